"""The clock: all of the time, each moment once."""

import pytest

from examples import clock


@pytest.fixture
def tick(monkeypatch):
  """Lets so many seconds pass."""
  now = 100.0

  def tick(seconds):
    nonlocal now
    now += seconds

  monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
  return tick


def test_activities_add_up(tick):
  watch = clock.Clock("starting", began=99.0)
  tick(2)
  watch.begin("training")

  def step(x):
    tick(x)
    return x

  step = watch.first_call("compiling", step)
  assert [step(8), step(1), step(1)] == [8, 1, 1]
  assert (watch["training"], watch["compiling"], watch["saving"]) == (2, 8, 0)
  with watch.spent("testing"):
    tick(4)
  tick(0.06)
  assert watch.report() == (
    "It took 17.1 s: starting 3.0 s, training 2.1 s, compiling 8.0 s, testing 4.0 s."
  )
