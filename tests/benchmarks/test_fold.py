"""The benchmark of folding: a row's two programs are what they are called."""

import pytest

from benchmarks import fold, networks


@pytest.mark.optimized
def test_a_folded_network_has_fewer_kernels(monkeypatch):
  tiny = networks.Network("Tiny", lambda net, x: net.conv_norm(x, 4, 3), (8, 8, 3), 2)
  monkeypatch.setattr(fold, "NETWORKS", {"tiny": tiny})
  monkeypatch.setattr(fold, "CPU_BATCH", 2)
  row = fold.folded_row("cpu", "tiny", quick=True)
  assert (row["norms"], row["left"], row["shape"]) == (1, 0, [8, 8, 3])
  assert 0 < row["folded_kernels"] < row["kernels"]
  assert 0 < row["folded_MB"] < row["MB"]
  assert row["median_ratio"] == pytest.approx(row["folded_median_ms"] / row["median_ms"], rel=1e-3)
  parts = fold.parts({"rows": [row, {"kind": "skipped", "target": "v5e", "why": "Left out."}]})
  assert "| CPU, float32 | Tiny | 2 of 8x8x3 | 1 |" in parts["counts"]
  assert parts["skipped"] == "Left out."
