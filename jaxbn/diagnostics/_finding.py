"""What the doctor says of one fault."""

from __future__ import annotations

from typing import NamedTuple

SEVERITIES = ("error", "warning", "note")  # worst first
SURENESS = ("certain", "likely", "possible")


class Finding(NamedTuple):
  """One fault of one layer.

  Attributes:
    fault: its short name, such as "never-updated".
    layer: where it is, as "block/norm"; "" where it is the run's.
    severity: "error": evaluation is wrong, or will be; "warning": it costs accuracy; "note": it
      costs something else.
    sure: "certain": it was seen as such; "likely": it explains what was seen; "possible": it may.
    evidence: what was seen, in words and numbers.
    mend: what to do, in code.
  """

  fault: str
  layer: str
  severity: str
  sure: str
  evidence: str
  mend: str

  @property
  def rank(self) -> tuple[int, int]:
    """Lower is worse."""
    return SEVERITIES.index(self.severity), SURENESS.index(self.sure)
