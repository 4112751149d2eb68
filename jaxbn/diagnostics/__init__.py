"""The doctor: why evaluation is bad; and the functions that measure what papers do."""

from typing import TYPE_CHECKING

from jaxbn._names import on_first_use

if TYPE_CHECKING:
  from jaxbn.diagnostics import measures as measures
  from jaxbn.diagnostics._diagnose import diagnose
  from jaxbn.diagnostics._doctor import Doctor
  from jaxbn.diagnostics._faults import faults
  from jaxbn.diagnostics._finding import Finding
  from jaxbn.diagnostics._report import Report
  from jaxbn.diagnostics.measures import (
    Noise,
    Smoothness,
    batch_noise,
    covariate_shift,
    effective_learning_rate,
    gradient_norms,
    gradient_shift,
    smoothness,
  )

__all__ = [
  "Doctor",
  "Finding",
  "Noise",
  "Report",
  "Smoothness",
  "batch_noise",
  "covariate_shift",
  "diagnose",
  "effective_learning_rate",
  "faults",
  "gradient_norms",
  "gradient_shift",
  "measures",
  "smoothness",
]
_HOMES = {
  "Doctor": "_doctor",
  "Finding": "_finding",
  "Noise": "measures",
  "Report": "_report",
  "Smoothness": "measures",
  "batch_noise": "measures",
  "covariate_shift": "measures",
  "diagnose": "_diagnose",
  "effective_learning_rate": "measures",
  "faults": "_faults",
  "gradient_norms": "measures",
  "gradient_shift": "measures",
  "measures": "measures",
  "smoothness": "measures",
}

if not TYPE_CHECKING:
  __getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
  return __all__
