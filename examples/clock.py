"""Where the time of a run goes: every moment of it is counted once."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any


class Clock:
  """Seconds by activity, which add up to the time since `began`.

  What is done within another activity, such as compiling within training, is not counted as that.
  """

  def __init__(self, activity: str, began: float | None = None):
    """Starts with this activity; `began` is a value of `time.perf_counter`."""
    self._seconds: dict[str, float] = {}
    self._activity = activity
    self._since = time.perf_counter() if began is None else began

  def __getitem__(self, activity: str) -> float:
    """The seconds of an activity until now."""
    self.begin(self._activity)
    return self._seconds.get(activity, 0.0)

  def begin(self, activity: str) -> None:
    """What follows is that activity."""
    now = time.perf_counter()
    self._seconds[self._activity] = self._seconds.get(self._activity, 0.0) + now - self._since
    self._activity, self._since = activity, now

  @contextlib.contextmanager
  def spent(self, activity: str) -> Iterator[None]:
    """Counts what is done in this context as that activity."""
    outer = self._activity
    self.begin(activity)
    try:
      yield
    finally:
      self.begin(outer)

  def first_call(self, activity: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose first call, in which it is compiled, is counted as that activity."""
    called = False

    def timed(*arguments: Any) -> Any:
      nonlocal called
      with contextlib.nullcontext() if called else self.spent(activity):
        called = True
        return function(*arguments)

    return timed

  def report(self) -> str:
    """All activities and their sum."""
    self.begin(self._activity)
    rounded = {name: round(seconds, 1) for name, seconds in self._seconds.items()}
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in rounded.items())
    return f"It took {sum(rounded.values()):.1f} s: {parts}."
