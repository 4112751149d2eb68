"""The doctor: why evaluation is bad; and the functions that measure what papers do."""

from typing import TYPE_CHECKING, Any

from jaxbn._layers import on_first_use

if TYPE_CHECKING:
  from jaxbn.diagnostics._diagnose import FAULTS, diagnose
  from jaxbn.diagnostics._finding import Finding
  from jaxbn.diagnostics._report import Report

__all__ = ["FAULTS", "Finding", "Report", "diagnose"]
_HOMES = {
  "FAULTS": "_diagnose",
  "Finding": "_finding",
  "Report": "_report",
  "diagnose": "_diagnose",
}


def __getattr__(name: str) -> Any:
  return on_first_use(__name__, _HOMES, name)


def __dir__() -> list[str]:
  return sorted(__all__)
