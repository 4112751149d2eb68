"""Why is a run's evaluation bad? Its last checkpoint, diagnosed on its training data.

  python -m examples.diagnose runs/digits

Prints the report and writes diagnosis.json and report.html into the run's directory. The status is
1 where something is wrong.
"""

import itertools
import sys
from pathlib import Path

import jaxbn
from examples import checkpoints, data, models, run_directory
from examples.settings import UserError

BATCHES = 8


def diagnose(directory: Path) -> jaxbn.diagnostics.Report:
  """Diagnoses the run in `directory`; an earlier diagnosis there is continued."""
  config = run_directory.read_config(directory)
  dataset = data.load(config.dataset, config.data_dir or None, download=config.download)
  image_shape = dataset.test_images.shape[1:]
  model = models.create(config, image_shape, len(dataset.class_names), None)
  step, variables = checkpoints.read(directory / "checkpoints")
  batches = data.train_batches(dataset, config.batch_size, seed=config.seed, augment=config.augment)
  earlier = directory / "diagnosis.json"
  report = jaxbn.diagnose(
    model,
    variables,
    itertools.islice(batches, BATCHES),
    inputs=lambda batch: (batch["image"],),
    steps=step,
    decay_mask=models.decays(model, image_shape) if config.weight_decay else None,
    before=jaxbn.diagnostics.Report.from_json(earlier.read_text()) if earlier.exists() else None,
    train=False,
  )
  report.save(earlier)
  report.save_html(directory / "report.html")
  return report


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  try:
    found = diagnose(Path(sys.argv[1]))
  except (UserError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(found)
  print(f"\nPictures are in {Path(sys.argv[1]) / 'report.html'}.")
  sys.exit(found.exit_status)
