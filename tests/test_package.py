"""The package as a whole: what it imports, what it shows, what it documents."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxbn
import jaxbn.diagnostics
import jaxbn.linen
import jaxbn.nnx
import jaxbn.surgery

ROOT = pathlib.Path(jaxbn.__file__).parent
# What a file imports of ours is in a line above its own. A folder stands for all others in it.
ORDER = """
_names _types _dtypes _meshes _digits
_activation
_checks _counts _xla
_groups
_arguments
_measure _apply _choose _track
_share
_virtual
_batch_norm
__init__ _layers variants/__init__ variants/_examples variants/_covariance alternatives/__init__
variants/_inverse_root variants/_cells
variants/recurrent
variants alternatives/rewhitening
alternatives
linen/__init__ linen/_common nnx/__init__ nnx/_common
linen/_batch_norm nnx/_batch_norm
linen nnx
surgery/__init__ surgery/_difference surgery/_foreign surgery/_spread surgery/_trees surgery/_trace
surgery/_abstract surgery/_bound_axes
surgery/_linen surgery/_known surgery/_words
surgery/_nnx surgery/_linear
surgery/_layer surgery/_collection surgery/_chain surgery/_scope
surgery/_find surgery/_count
surgery/_population surgery/_bodies surgery/_behind
surgery/_interpret
surgery/_network
surgery/_recalibrate
surgery
diagnostics/__init__ diagnostics/_observe diagnostics/_finding
diagnostics/measures diagnostics/_html diagnostics/_watch
diagnostics/_report
diagnostics/_facts
diagnostics/_collect diagnostics/_faults_of_statistics diagnostics/_faults_of_layers
diagnostics/_faults_of_runs
diagnostics/_faults
diagnostics/_doctor
diagnostics
"""
RANKS = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}
# What they may import of others', beside these.
EVERYWHERE = {"jax", "numpy"}
ALSO = {
  **{folder: {"flax"} for folder in ("linen", "nnx", "surgery", "diagnostics")},
  "alternatives/path_sgd": {"optax"},
}


def imported(path):
  """The top-level packages and the modules of ours that a file imports at run time."""
  packages, ours = set(), set()
  tree = ast.parse(path.read_text())
  tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxbn"):
      home = node.module.replace(".", "/").removeprefix("jaxbn").removeprefix("/")
      names = {f"{home}/{alias.name}".removeprefix("/") for alias in node.names}
      modules = {name for name in names if (ROOT / f"{name}.py").exists()}
      ours |= modules
      if modules != names:  # the names of a file, or of a folder's face
        ours.add(home if (ROOT / f"{home}.py").exists() else f"{home}/__init__".removeprefix("/"))
    elif isinstance(node, ast.ImportFrom):
      packages.add(node.module.split(".")[0])
    elif isinstance(node, ast.Import):
      packages |= {a.name.split(".")[0] for a in node.names}
  return packages, ours


def module(path):
  """A file's name in ORDER, and the folder that it is in, if any."""
  relative = path.relative_to(ROOT).with_suffix("")
  return relative.as_posix(), relative.parts[0] if len(relative.parts) > 1 else ""


def rank(name):
  return RANKS.get(name, RANKS.get(name.split("/")[0]))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: module(p)[0])
def test_imports_point_one_way(path):
  packages, ours = imported(path)
  name, folder = module(path)
  assert all(rank(o) < rank(name) for o in ours), ours
  other = {"linen": "nnx", "nnx": "linen"}.get(folder)
  assert not any(o.split("/")[0] == other for o in ours)
  third_party = packages - set(sys.stdlib_module_names)
  assert third_party <= EVERYWHERE | ALSO.get(folder, set()) | ALSO.get(name, set())


def test_importing_jaxbn_imports_neither_flax_nor_optax():
  code = "import sys, jaxbn; assert not {'flax', 'optax'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_all_that_is_public_is_reached_from_jaxbn_itself():
  code = """
import jaxbn, types
def walk(module):
  for name in dir(module):
    value = getattr(module, name)
    if isinstance(value, types.ModuleType):
      yield value.__name__
      yield from walk(value)
print(*walk(jaxbn))"""
  printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  folders = ("diagnostics", "linen", "nnx", "surgery", "variants", "alternatives")
  names = [f"{f}.{path.stem}" for f in folders for path in (ROOT / f).glob("[a-z]*.py")]
  assert set(printed.stdout.split()) == {f"jaxbn.{name}" for name in (*folders, *names)}


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


@pytest.mark.parametrize(
  "package", [jaxbn.linen, jaxbn.nnx, jaxbn.surgery, jaxbn.diagnostics], ids=lambda p: p.__name__
)
def test_every_layer_that_is_exported_is_where_it_is_said_to_be(package):
  assert sorted(package.__all__) == sorted(package._HOMES)
  for name, home in package._HOMES.items():
    thing = getattr(package, name)
    where = thing.__name__ if inspect.ismodule(thing) else thing.__module__
    assert where == f"{package.__name__}.{home}"


FAMILY = [
  importlib.import_module(f"jaxbn.{folder}.{path.stem}")
  for folder in ("variants", "alternatives")
  for path in sorted((ROOT / folder).glob("[a-z]*.py"))
]
PUBLIC = [
  getattr(where, name)
  for where in (
    jaxbn,
    jaxbn.linen,
    jaxbn.nnx,
    jaxbn.surgery,
    jaxbn.surgery.stats,
    jaxbn.diagnostics,
    *FAMILY,
  )
  for name in where.__all__
  if not inspect.ismodule(getattr(where, name))
]
FACES = [
  jaxbn.diagnostics.measures,
  jaxbn.linen,
  jaxbn.nnx,
  jaxbn.diagnostics,
  jaxbn.surgery,
  jaxbn.surgery.stats,
  *FAMILY,
]


@pytest.mark.parametrize("module", FACES, ids=lambda m: m.__name__)
def test_dir_is_what_is_public(module):
  assert dir(module) == sorted(module.__all__)


def test_axis_is_passed_by_keyword():
  functions = [thing for thing in PUBLIC if inspect.isfunction(thing)]
  for function in functions:
    parameter = inspect.signature(function).parameters.get("axis")
    assert parameter is None or parameter.kind is parameter.KEYWORD_ONLY, function


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
