"""The benchmark of trained networks: what it makes of rows, and what it compiles again."""

import pytest

from benchmarks import results as stored
from benchmarks import trained


def row(norm, mb, **others):
  key = dict(zip(trained.KEY, ("v5e", "vgg", "bfloat16", norm), strict=True))
  row = {**key, "compiler": trained._compiler(), "MB": mb, "count_MB": 2.0 * mb, "temp_MB": mb / 10}
  return {**row, "kernels": 5, "floor_MB": 50.0, "compile_s": 1, **others}


def test_taxes_are_over_none_and_flax():
  text = trained.table([row("none", 100), row("flax", 200), row("jaxbn", 150)])
  assert "| flax | 200 MB | 100 MB | 1.00 | 2.00 | 200 MB | 10 MB |" in text
  assert text.endswith("flax: 1.00; v5e, bfloat16, jaxbn: 0.50.")
  assert "| jaxbn | 150 MB | 50 MB | 0.50 | 1.00 | 100 MB | 5 MB |" in text


def test_without_a_baseline_there_is_no_line():
  assert "jaxbn" not in trained.table([row("jaxbn", 150), row("none", 100, target="v4")])


@pytest.mark.parametrize(("compiler", "again"), [(None, False), ("libtpu of old", True)])
def test_what_the_same_compiler_compiled_is_not_compiled_again(
  compiler, again, monkeypatch, tmp_path
):
  monkeypatch.setattr(stored, "FOLDER", tmp_path)
  compiled = []
  monkeypatch.setattr(trained, "row_of", lambda *key: compiled.append(key) or row(key[-1], 7.0))
  there = row("none", 100, **({"compiler": compiler} if compiler else {}))
  keys = [tuple(there[k] for k in trained.KEY), ("v5e", "vgg", "bfloat16", "flax")]
  trained.fill({keys[0]: there}, keys, float("inf"))
  assert compiled == (keys if again else keys[1:])
  stored_rows = stored.read("trained", tmp_path)["rows"]
  assert {r["norm"]: r["MB"] for r in stored_rows} == {"none": 7.0 if again else 100, "flax": 7.0}


def test_nothing_begins_out_of_time(capsys):
  trained.fill({}, [("v5e", "vgg", "bfloat16", "none")], until=0)
  assert "left for the next run" in capsys.readouterr().out
