"""Runs all experiments, or those named, and makes the gallery: python -m experiments [NAME ...]"""

from __future__ import annotations

import importlib

from experiments import experiment
from experiments.experiment import PAGES, Experiment, Found

# In the order of the gallery.
NAMES = (
  "faster",
  "rates",
  "centering",
  "placement",
  "smoothness",
  "depth",
  "length_direction",
  "large_batches",
  "synchronized",
  "renorm",
  "recurrent",
  "inserted",
)


def main() -> None:
  parser = experiment.parser("Runs the experiments, and makes docs/experiments/README.md.")
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
  options = parser.parse_args()
  if unknown := set(options.names) - set(NAMES):
    parser.error(f"no experiment {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}.")
  for name in options.names or NAMES:
    print(f"{name} ...")
    experiment.run(named(name), options.full, options.redraw)
  (PAGES / "README.md").write_text(gallery([(e, kept(e)) for e in map(named, NAMES)]))


def named(name: str) -> Experiment:
  """The experiment of the file of this name."""
  found: Experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
  return found


def kept(of: Experiment) -> Found | None:
  """What it found when it was last run."""
  return experiment.stored.read(of.name, experiment.RESULTS)


def gallery(shown: list[tuple[Experiment, Found | None]]) -> str:
  """The page of all experiments that have been run, as Markdown."""
  parts = [
    "# The published claims, measured",
    "Each picture leads to its page: what was done, all figures with their spread, the learning "
    "rates that were tried, and where the claim does not hold. `make experiments` runs them all "
    "and makes these pages, and `make experiments ARGS=--redraw` makes the pages alone.",
  ]
  for each, found in shown:
    if found:
      parts += [
        f"## [{each.title}]({each.name}.md)",
        f"Published ({each.source}): {each.claim}",
        f"Here: {each.verdict(found)}",
        f"[![{each.title}]({each.name}.png)]({each.name}.md)",
      ]
  return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
  main()
