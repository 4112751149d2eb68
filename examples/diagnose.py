"""Why is a run's evaluation bad? Its last checkpoint, diagnosed on its training data.

  python -m examples.diagnose runs/digits

Prints the report and writes diagnosis.json and report.html into the run's directory. The status is
1 where something is wrong. The trainer does so itself every config.diagnose_every steps.
"""

import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from grain.sharding import ShardByJaxProcess

import jaxbn
from examples import checkpoints, data, models, run_directory, settings, steps
from examples.settings import UserError

EVERY = 25  # steps, of which one is noted for the pictures
BATCHES = 8  # each as large as the process's share of one in training
JSON, PAGE = "diagnosis.json", "report.html"


class Checkups:
  """Diagnoses of one run, always on the same batches, and what was noted in between."""

  def __init__(self, config: Any, dataset: data.Dataset, device_count: int):
    """Continues the history in the run's directory."""
    self._directory = Path(config.workdir)
    image_shape = dataset.train_images.shape[1:]
    model = _model(config, dataset)
    self._told: dict[str, Any] = {"batch_size": _normalized_together(config, device_count)}
    if config.weight_decay:
      self._told["decay_mask"] = models.decays(model, image_shape)
    batches = data.train_batches(
      dataset,
      config.batch_size,
      seed=config.seed,
      augment=config.augment,
      shard=ShardByJaxProcess(),
    )
    with contextlib.closing(batches):
      self._batches = list(itertools.islice(batches, BATCHES))
    self._doctor = jaxbn.diagnostics.Doctor(
      model,
      inputs=lambda batch: (batch["image"].reshape(-1, *image_shape),),
      every=EVERY,
      before=_read(self._directory / JSON),
      train=False,
    )

  def note(self, step: int, state: steps.TrainState, batch: dict[str, jax.Array]) -> None:
    """Of a step in training, of which this process's first device is looked at."""
    self._doctor(step, _variables(steps.local(state)), steps.local(batch))

  def diagnose(self, step: int, state: steps.TrainState) -> jaxbn.diagnostics.Report:
    """Of the network as all devices of this process have it."""
    stats = steps.each_copy(state.batch_stats)
    return self.of(step, _variables(steps.unreplicate(state)), replicas={"batch_stats": stats})

  def of(self, step: int, variables: Any, **told: Any) -> jaxbn.diagnostics.Report:
    """Writes what it finds into the run's directory."""
    report = self._doctor.diagnose(variables, self._batches, steps=step, **self._told, **told)
    report.save(self._directory / JSON)
    report.save_html(self._directory / PAGE)
    return report


def _read(file: Path) -> jaxbn.diagnostics.Report | None:
  """The last diagnosis, if there is one."""
  try:
    return jaxbn.diagnostics.Report.from_json(file.read_text()) if file.exists() else None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{str(file)!r} is no diagnosis: {error}; move it away") from error


def check(config: Any, dataset: data.Dataset) -> None:
  """Refuses to diagnose a network without a batch norm."""
  images = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
  if not jaxbn.surgery.find(_model(config, dataset), images, train=False):
    raise UserError(
      f"config.diagnose_every is {config.diagnose_every}, but config.norm is {config.norm!r}, "
      "which is no batch norm, so that there is nothing to diagnose: try "
      "--config.diagnose_every=0, or --config.norm=batch"
    )


def _model(config: Any, dataset: data.Dataset) -> models.Network:
  """The network for one device, whose variables are those of the network for many."""
  return models.create(config, dataset.train_images.shape[1:], len(dataset.class_names), None)


def _normalized_together(config: Any, device_count: int) -> int:
  """How many examples."""
  alone = config.microbatches if config.microbatch_statistics == "each" else 1
  virtual = settings.virtual_batch_size(config, device_count)
  return virtual or config.batch_size // alone


def _variables(state: steps.TrainState) -> dict[str, Any]:
  return {"params": state.params, "batch_stats": state.batch_stats}


def diagnose(directory: Path) -> jaxbn.diagnostics.Report:
  """Diagnoses the run in `directory`; an earlier diagnosis there is continued."""
  config = run_directory.read_config(directory)
  dataset = data.load(config.dataset, config.data_dir or None, download=config.download)
  step, variables = checkpoints.read(directory / "checkpoints")
  return Checkups(config, dataset, config.devices or len(jax.devices())).of(step, variables)


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  try:
    found = diagnose(Path(sys.argv[1]))
  except (UserError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(found)
  print(f"\nPictures are in {Path(sys.argv[1]) / PAGE}.")
  sys.exit(found.exit_status)
