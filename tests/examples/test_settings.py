"""The settings: their defaults, and the checks of each and of all together."""

import math

import pytest

from examples import settings
from examples.keys import KEYS
from examples.settings import UserError
from tests.examples import helpers


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("learning_rate", -1.0, "-1.0, but must be above 0; try --config.learning_rate=0.003$"),
    ("learning_rate", math.nan, "nan, but must be above 0, and finite; try"),
    ("adaptive_clip", math.inf, "inf, but must be 0 for no limit, or above 0, and finite; try"),
    ("weight_decay", -1.0, "-1.0, but must be at least 0; try"),
    ("label_smoothing", 2.0, "2.0, but must be at least 0 and below 1; try"),
    ("loss_scale", 0.5, "0.5, but must be 0 for none, or at least 1 and at most 16777216; try"),
    ("widths", (0,), r"\(0,\), but must be a positive whole number for .*=16,32$"),
    ("workdir", " ", "' ', but must be a folder; try --config.workdir=runs/digits"),
    ("dtype", "bfloat", "'bfloat', but must be one of .*; did you mean 'bfloat16'"),
    ("virtual_batch_size", "-1", "'-1', but must be global, device, or a number of examples"),
  ],
)
def test_what_a_key_does_not_allow_is_refused(key, value, message):
  with pytest.raises(UserError, match=f"^config.{key} is {message}"):
    settings.check(helpers.config(**{key: value}), 4)


def test_the_defaults_are_allowed():
  settings.check_each(settings.defaults("mnist"))
  assert set(settings.defaults("mnist")) == set(KEYS)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 30}, "config.batch_size is 30, .*multiple of the 4 devices.*batch_size=28"),
    ({"batch_size": 3}, "--config.batch_size=4"),
    ({"warmup_steps": 10}, "config.warmup_steps is 10, .*below config.steps, 10"),
    ({"widths": (4, 8)}, r"config.widths is \(4, 8\) and config.blocks is \(1,\)"),
    ({"microbatches": 3}, "config.microbatches is 3, .* 8 examples .* 4 devices.* 1, 2, 4, 8, or"),
    ({"virtual_batch_size": "6"}, "virtual_batch_size is '6', .* 1, 2, 4, 8, 16, 32, or device"),
    ({"virtual_batch_size": "16", "microbatches": 4}, "the 2 examples .* 1, 2, 4, 8, or device"),
    (
      {"virtual_batch_size": "2", "microbatches": 4, "microbatch_statistics": "merged"},
      "two sizes for one batch",
    ),
  ],
)
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    settings.check(helpers.config(**changes), 4)


def test_possible_settings_pass():
  settings.check(helpers.config(), 4)
  settings.check(helpers.config(microbatches=8, loss_scale=2.0**24, skip_nonfinite=3), 4)


@pytest.mark.parametrize(
  ("given", "examples"), [("global", None), ("device", 4), ("2", 2), ("16", 16)]
)
def test_virtual_batch_sizes_are_numbers_of_examples(given, examples):
  config = helpers.config(virtual_batch_size=given, microbatches=2)
  settings.check(config, 4)
  assert settings.virtual_batch_size(config, 4) == examples
