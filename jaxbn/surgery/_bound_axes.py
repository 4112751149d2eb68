"""Axes of devices that layers name, and that may not be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def here(options: Mapping[str, Any]) -> dict[str, Any]:
  """Without an axis that is not bound here, where the whole batch is one array."""
  options = dict(options)
  name = options.get("axis_name")
  if name is not None and not _is_bound(name):
    options |= {"axis_name": None, "axis_index_groups": None}
  return options


def _is_bound(axis_name: Any) -> bool:
  try:
    jax.lax.axis_index(axis_name)
  except NameError:
    return False
  return True
