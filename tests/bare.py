"""Runs all that is documented where nothing but the wheel is installed: see `make wheel`.

Every public docstring's example, and the Python of the pages given, those of a page in one
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


def blocks(text):
  """A page's Python, each block where it is in the page, for tracebacks to say the line."""
  for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
    yield text.count("\n", 0, found.start(1)) * "\n" + found[1]


def main(arguments):
  assert "site-packages" in jaxbn.__file__, jaxbn.__file__
  warnings.simplefilter("error")
  pages = [argument for argument in arguments if argument != "--docstrings"]
  for page in pages:
    names = {}
    for block in blocks(pathlib.Path(page).read_text()):
      exec(compile(block, page, "exec"), names)
  failed, tried = run_docstrings() if "--docstrings" in arguments else (0, 0)
  on = f"jax {jax.__version__}, {jax.device_count()} devices"
  print(f"{on}: {len(pages)} pages and {tried} lines of docstrings run.")
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
