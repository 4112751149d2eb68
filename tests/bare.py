"""Runs all that is documented where nothing but the wheel is installed: see `make wheel`.

Every public docstring's example, and every Python block of the pages given, those of a page in one
namespace, with warnings as errors.
"""

import doctest
import inspect
import pathlib
import re
import sys
import types
import warnings

import jax

import jaxbn

jax.config.update("jax_num_cpu_devices", 4)


def public(module):
  """All that `dir` shows, of this module and of those within it, by its full name."""
  for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, types.ModuleType):
      yield from public(value)
    elif not isinstance(value, str):
      yield f"{module.__name__}.{name}", value


def run_docstrings():
  parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
  for name, value in public(jaxbn):
    runner.run(parser.get_doctest(inspect.getdoc(value), {}, name, None, None))
  return runner.summarize()


def run_page(path):
  namespace = {}
  for block in re.finditer(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
    exec(compile(block[1], f"{path}: {block[1].splitlines()[0]}", "exec"), namespace)


def main(pages):
  warnings.simplefilter("error")
  assert "site-packages" in jaxbn.__file__, jaxbn.__file__
  failed, tried = run_docstrings()
  for page in map(pathlib.Path, pages):
    run_page(page)
  print(f"jax {jax.__version__}: {tried} examples of docstrings, {len(pages)} pages.")
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
