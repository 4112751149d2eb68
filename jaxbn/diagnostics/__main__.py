"""Shows the last diagnosis of a run: python -m jaxbn.diagnostics RUN_DIR

RUN_DIR/diagnosis.json is what `report.save` wrote there; report.html is written beside it. The exit
status is 0 where nothing is wrong, 1 where something is, 2 where there is no diagnosis.
"""

import pathlib
import sys

from jaxbn.diagnostics._report import Report


def main(arguments: list[str]) -> int:
  if len(arguments) != 1 or arguments[0].startswith("-"):
    print(__doc__, file=sys.stderr)
    return 2
  directory = pathlib.Path(arguments[0])
  try:
    report = Report.from_json((directory / "diagnosis.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, KeyError, TypeError) as error:
    print(
      f"error: {str(directory / 'diagnosis.json')!r} is no diagnosis: {error}. Write one with "
      "jaxbn.diagnose(...).save(path), or by the trainer's diagnose_every.",
      file=sys.stderr,
    )
    return 2
  print(report)
  report.save_html(directory / "report.html")
  print(f"\nPictures are in {directory / 'report.html'}.")
  return report.exit_status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
