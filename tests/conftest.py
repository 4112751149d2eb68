"""What every test runs under: eight virtual CPU devices, and programs that are quick to compile.

A test that reads programs, memory, bits or times has the marker `optimized`: its programs are those
that users get. All others do without most optimizations. What was compiled once is found again in
.cache. The processes that tests start do the same.
"""

import os
import pathlib
import time

import hypothesis
import jax
import pytest

CACHE = pathlib.Path(__file__).parents[1] / ".cache"
DAYS = 30  # after which what was compiled is forgotten

if jax.__version_info__ < (0, 10):
  # Without them the compiler takes two thirds of the time. Later ones have no choice.
  flag = "--xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
jax.config.update("jax_num_cpu_devices", 8)
for name, value in {
  "jax_compilation_cache_dir": str(CACHE / f"jax-{jax.__version__}"),
  "jax_persistent_cache_min_compile_time_secs": 0,
  "jax_traceback_in_locations_limit": 0,  # in programs: to write them costs a tenth of a test
}.items():
  jax.config.update(name, value)
  os.environ[name.upper()] = str(value)

# Derandomized so that a run says the same thing everywhere; no deadline, for the first example of a
# shape compiles.
hypothesis.settings.register_profile(
  "jaxbn",
  deadline=None,
  derandomize=True,
  max_examples=40,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxbn")

_last = None, False  # the file and the marker of the test before


def pytest_configure(config):
  if not hasattr(config, "workerinput"):
    for entry in CACHE.glob("*/*"):
      if entry.stat().st_mtime < time.time() - DAYS * 24 * 3600:
        entry.unlink(missing_ok=True)


def _kind(item):
  return item.path, item.get_closest_marker("optimized") is not None


def pytest_collection_modifyitems(items):
  """In each file those with the marker come last, so that what is compiled is kept for longer."""
  files = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
  items.sort(key=lambda item: (files[item.path], _kind(item)[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Before fixtures. What is compiled is not kept for the next file, nor for the other kind."""
  global _last
  this = _kind(item)
  if this != _last:
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not this[1])
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(not this[1])
    _last = this
