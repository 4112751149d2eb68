"""The package as a whole: what it imports, what it shows, what it documents."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROOT = pathlib.Path(jaxbn.__file__).parent
STEPS = {"_moments", "_share", "_running", "_normalize"}
FACE = set(jaxbn.__all__)
LAYER = {"_checks", "_layers", "_running"}
# What each file may import of ours: one way, no circle.
ALLOWED = {
  "_checks": set(),
  "_rule": {"_checks"},
  "_moments": {"_checks", "_rule"},
  "_digits": set(),
  "_share": {"_checks", "_digits", "_moments", "_rule"},
  "_running": {"_checks", "_moments", "_rule"},
  "_activation": set(),
  "_normalize": {"_activation", "_checks", "_rule"},
  "_virtual": {"_checks", "_moments", "_rule", "_running", "_share"},
  "_choose": {"_checks", "_rule"} | STEPS,
  "_batch_norm": {"_checks", "_choose", "_rule", "_virtual"} | STEPS,
  "_layers": {"_batch_norm", "_running"},
  "__init__": {"_batch_norm", "_choose"} | STEPS,
  "linen/_common": {"_activation", "_moments", "_normalize", "_running"},
  "linen/_batch_norm": LAYER | {"linen/_common"},
  "linen/_conditional": {"_checks", "linen/_batch_norm", "variants/conditional"},
  "linen/_domain": {"_checks", "_running", "linen/_batch_norm", "variants/domain"},
  "linen/_prediction_time": LAYER
  | {"linen/_batch_norm", "linen/_common", "variants/prediction_time"},
  "linen/_reference": {"_checks", "variants/reference", "linen/_common"} | FACE,
  "linen/_renorm": {"_checks", "linen/_batch_norm", "variants/renorm"},
  "nnx/_common": {"_checks"},
  "nnx/_batch_norm": LAYER | {"nnx/_common"},
  "nnx/_conditional": {"_checks", "nnx/_batch_norm", "variants/conditional", "nnx/_common"},
  "nnx/_domain": {"_checks", "_running", "nnx/_batch_norm", "variants/domain", "nnx/_common"},
  "nnx/_prediction_time": {"_checks", "_layers", "nnx/_batch_norm", "variants/prediction_time"}
  | {"nnx/_common"},
  "nnx/_reference": {"_checks", "variants/reference", "nnx/_common"} | FACE,
  "nnx/_renorm": {"_checks", "nnx/_batch_norm", "variants/renorm", "nnx/_common"},
  "linen/_whitening": {"_checks", "variants/whitening"},
  "nnx/_whitening": {"_checks", "variants/whitening", "nnx/_common"},
  "variants/_cells": {"_checks", "_running"} | FACE,
  "variants/recurrent": {"variants/_cells"} | FACE,
  "variants/input_norm": {"_checks", "_running", "variants/_cells", "variants/recurrent"} | FACE,
  "linen/_input_norm": {"variants", "linen/_common"} | FACE,
  "nnx/_input_norm": {"variants", "nnx/_common"} | FACE,
  "linen/_recurrent": {"variants", "variants/_cells"} | FACE,
  "nnx/_recurrent": {"variants", "variants/_cells", "nnx/_common"} | FACE,
  "alternatives/__init__": set(),
  "variants/__init__": set(),
  "variants/_examples": {"_checks", "_moments"},
  "variants/conditional": {"_batch_norm", "_checks", "_moments", "_running", "variants/_examples"},
  "variants/domain": {"_checks", "variants/_examples"} | STEPS,
  "variants/prediction_time": {"_batch_norm", "_checks", "_choose", "_moments", "_running"},
  "variants/reference": {"_batch_norm", "_checks", "_choose", "variants/_examples"} | STEPS,
  "variants/renorm": {"_batch_norm", "_checks", "_choose", "_moments", "_running"},
  "variants/_covariance": {"_checks", "_moments", "_rule", "_share"},
  "variants/_inverse_root": {"_checks", "_rule", "variants/_covariance"},
  "variants/whitening": {"_checks", "_normalize", "_rule", "_running"}
  | {"variants/_covariance", "variants/_inverse_root"},
  "linen/_rewhitening": {"_checks", "alternatives"},
  "linen/_weight_norm": {"_checks", "alternatives", "linen/_common"} | FACE,
  "nnx/_rewhitening": {"_checks", "alternatives", "nnx/_common"},
  "nnx/_weight_norm": {"_checks", "alternatives", "nnx/_common"} | FACE,
  "alternatives/gdnp": {"_checks"},
  "alternatives/rewhitening": {
    "_checks",
    "_rule",
    "variants/_covariance",
    "variants/_inverse_root",
  },
  "alternatives/rewhitening_optimizer": {"_checks", "_rule", "alternatives/rewhitening"},
  "alternatives/weight_norm": {"_checks", "_rule", "_running"} | FACE,
  "alternatives/path_sgd": {"_checks", "_rule"},
  "alternatives/normalizer_free": {"_activation", "_checks"} | FACE,
  "linen/_normalizer_free": {"_checks", "alternatives/normalizer_free"},
  "nnx/_normalizer_free": {"_checks", "alternatives/normalizer_free"},
}
# What they may import of others', beside these.
EVERYWHERE = {"jax", "numpy", "chex"}
ALSO = {"linen": {"flax"}, "nnx": {"flax"}, "alternatives/path_sgd": {"optax"}}


def imported(path):
  """The top-level packages and the modules of ours that a file imports at run time."""
  packages, ours = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxbn"):
      rest = node.module.split(".", 1)[1:]
      ours |= {rest[0].replace(".", "/")} if rest else {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      packages.add(node.module.split(".")[0])
    elif isinstance(node, ast.Import):
      packages |= {a.name.split(".")[0] for a in node.names}
  return packages, ours


def module(path):
  """A file's name in ALLOWED, and the folder that it is in, if any."""
  relative = path.relative_to(ROOT).with_suffix("")
  return relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else ""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: module(p)[0])
def test_imports_point_one_way(path):
  packages, ours = imported(path)
  name, folder = module(path)
  if name in ("linen/__init__", "nnx/__init__"):  # the face of what is beside it
    assert all(o.startswith(f"{folder}/_") for o in ours - {"_layers"})
  else:
    assert ours <= ALLOWED[name]
  third_party = packages - set(sys.stdlib_module_names)
  assert third_party <= EVERYWHERE | ALSO.get(folder, set()) | ALSO.get(name, set())


def test_importing_jaxbn_imports_neither_flax_nor_chex():
  code = "import sys, jaxbn; assert not {'flax', 'chex'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_layers_come_on_first_use():
  code = "import jaxbn; jaxbn.linen.BatchNorm; jaxbn.nnx.BatchNorm; "
  code += "jaxbn.variants; jaxbn.alternatives"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_layer_is_imported_when_it_is_used(kind):
  # To define one takes Flax a millisecond or more, and there are many.
  package = f"jaxbn.{kind}"
  code = (
    f"import sys, {package}; has = lambda layer: f'{package}._{{layer}}' in sys.modules; "
    f"assert not has('batch_norm'); {package}.BatchNorm; "
    "assert has('batch_norm') and not has('recurrent')"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [jaxbn.linen, jaxbn.nnx], ids=lambda p: p.__name__)
def test_every_layer_that_is_exported_is_where_it_is_said_to_be(package):
  assert sorted(package.__all__) == sorted(package._HOMES) == dir(package)
  for name in package.__all__:
    assert getattr(package, name).__module__ == f"{package.__name__}.{package._HOMES[name]}"


@pytest.mark.parametrize("package", [jaxbn, jaxbn.linen, jaxbn.nnx], ids=lambda p: p.__name__)
def test_an_unknown_name_is_an_attribute_error(package):
  with pytest.raises(AttributeError, match="no attribute 'batchnorm'"):
    _ = package.batchnorm


FAMILY = [
  importlib.import_module(f"jaxbn.{folder}.{path.stem}")
  for folder in ("variants", "alternatives")
  for path in sorted((ROOT / folder).glob("[a-z]*.py"))
]
PUBLIC = [
  getattr(where, name)
  for where in (jaxbn, jaxbn.linen, jaxbn.nnx, *FAMILY)
  for name in where.__all__
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda t: f"{t.__module__}.{t.__name__}")
def test_public_docstrings_name_every_argument(thing):
  doc = inspect.getdoc(thing)
  if inspect.isclass(thing) and hasattr(thing, "_fields"):
    names = thing._fields
  else:
    function = thing.__init__ if inspect.isclass(thing) else thing
    names = set(inspect.signature(function).parameters) - {"self", "parent", "name"}
    assert ">>>" in doc
  for name in names:
    assert name in doc, name
