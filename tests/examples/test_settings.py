"""The settings: the command line, the checks, and whose a run directory is."""

import json

import pytest

from examples import settings
from examples.settings import UserError
from tests.examples import helpers

# ml_collections loads config files by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DIGITS = "configs/digits.py"


def parse(*arguments):
  return settings.from_command_line(["train.py", *arguments], DIGITS)


def test_command_line_changes_the_config():
  config = parse(
    "--config=configs/fashion_mnist.py", "--config.batch_size=64", "--config.widths=3,4"
  )
  assert (config.dataset, config.batch_size, config.widths) == ("fashion_mnist", 64, (3, 4))
  assert parse("--config", DIGITS, "--config.seed", "3").seed == 3
  assert parse().dataset == "digits"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.batchsize=1", r"--config.batchsize is not a key .*; did you mean 'batch_size'\?"),
    ("--config.batch_size=x", "config.batch_size is 'x', but must be of type int, such as"),
    ("--config=configs/digit.py", "'configs/digit.py', which is not a file.*'configs/digits.py'"),
    ("--batch_size=3", "--batch_size is not an option.*did you mean 'config.batch_size'"),
    ("batch_size=3", "the argument 'batch_size=3' is not understood"),
  ],
)
def test_wrong_command_lines_are_refused(argument, message):
  with pytest.raises(UserError, match=message):
    parse(argument)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 30}, "config.batch_size is 30, .*multiple of the 4 devices.*batch_size=28"),
    ({"batch_size": 3}, "--config.batch_size=4"),
    ({"eval_batch_size": 0}, "config.eval_batch_size is 0"),
    ({"log_every": 0}, "config.log_every is 0, but must be at least 1"),
    ({"warmup_steps": 10}, "config.warmup_steps is 10, .*below config.steps, 10"),
    ({"widths": (4, 8)}, r"config.widths is \(4, 8\) and config.blocks is \(1,\)"),
    ({"widths": (0,)}, "positive whole number"),
    ({"dtype": "bfloat"}, "config.dtype is 'bfloat', .*did you mean 'bfloat16'"),
    ({"microbatches": 3}, "config.microbatches is 3, .* 8 examples .* 4 devices.* 1, 2, 4, 8, or"),
    ({"microbatches": 0}, "config.microbatches is 0, "),
    ({"microbatch_statistics": "merge"}, "config.microbatch_statistics is 'merge', .*'merged'"),
    ({"virtual_batch_size": "6"}, "virtual_batch_size is '6', .* 1, 2, 4, 8, 16, 32, or device"),
    ({"virtual_batch_size": "16", "microbatches": 4}, "the 2 examples .* 1, 2, 4, 8, or device"),
    (
      {"virtual_batch_size": "2", "microbatches": 4, "microbatch_statistics": "merged"},
      "two sizes for one batch",
    ),
    ({"skip_nonfinite": -1}, "config.skip_nonfinite is -1, but must be at least 0"),
    (
      {"adaptive_clip": -0.01},
      "config.adaptive_clip is -0.01, but must be 0 for none, or positive",
    ),
    ({"loss_scale": 0.5}, "config.loss_scale is 0.5, .* 0 for none, or from 1 to 16777216"),
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


def test_a_run_that_is_older_than_a_key_goes_on(tmp_path):
  settings.claim(tmp_path, helpers.config())
  file = tmp_path / "config.json"
  keys = json.loads(file.read_text())
  del keys["microbatches"], keys["loss_scale"]
  file.write_text(json.dumps(keys))
  settings.claim(tmp_path, helpers.config())
  with pytest.raises(UserError, match=r"microbatches was 1 and is now 2\)"):
    settings.claim(tmp_path, helpers.config(microbatches=2))


def test_a_run_directory_belongs_to_its_config(tmp_path):
  settings.claim(tmp_path / "run", helpers.config())
  before = (tmp_path / "run" / "config.json").read_text()
  assert json.loads(before)["widths"] == [4]
  settings.claim(tmp_path / "run", helpers.config(devices=2, keep=9))  # where it runs may change
  with pytest.raises(
    UserError, match=r"batch_size was 32 and is now 64, seed was 0 and is now 1\)"
  ):
    settings.claim(tmp_path / "run", helpers.config(batch_size=64, seed=1))
  assert (tmp_path / "run" / "config.json").read_text() == before
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
