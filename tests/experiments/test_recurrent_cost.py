"""The benchmark of recurrent cells: what it times it also says."""

import io

from rich.console import Console

from experiments import recurrent_cost


def rows():
  return list(recurrent_cost.run((recurrent_cost.Size(4, 2, 3, 4),), recurrent_cost.QUICK))


def test_every_cell_is_timed_beside_the_plain_one():
  found = rows()
  assert [(row["cell"], row["kind"]) for row in found] == [
    (cell, kind) for cell in recurrent_cost.CELLS for kind in recurrent_cost.KINDS
  ]
  for row in found:
    assert row["samples"] >= 3
    assert (
      abs(row["ratio_min"] - row["ours_min_us"] / row["plain_min_us"]) < 0.02 * row["ratio_min"]
    )


def test_the_tables_hold_the_ratios():
  row = dict.fromkeys(("batch", "steps", "inputs", "units"), 1)
  row |= {"cell": "LSTM", "kind": "forward", "plain_min_us": 100.0, "ours_min_us": 125.0}
  row |= {"ratio_min": 1.25, "ratio_median": 1.3}
  out = io.StringIO()
  Console(file=out, width=200).print(recurrent_cost.table([row]))
  assert "1.25" in out.getvalue()
  assert (
    recurrent_cost.markdown([row]).splitlines()[-1]
    == "| LSTM | 1 | forward | 100.0 | 125.0 | 1.25 | 1.30 |"
  )
