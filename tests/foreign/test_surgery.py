"""jaxbn.surgery on models of other packages, installed by `make foreign` and skipped elsewhere."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.surgery import Foreign, find, fold, recalibrate, replace, replaced

EPS = 1e-12  # in float64: what is wrong differs by far more, and rounding by far less
X = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 32, 32, 3)), jnp.float32)


def jax_resnet():
  """It trains where batch_stats may change, and its norm is a partial in a default argument."""
  package = pytest.importorskip("jax_resnet")
  model = package.ResNet18(n_classes=3, hidden_sizes=(4, 8), stage_sizes=[1, 1])
  return model, 7, None, {}, {}, EPS


def flaxmodels():
  """Its residual blocks, with a batch norm of its own that computes in float32 in any case."""
  pytest.importorskip("flaxmodels")
  from flaxmodels.resnet import ops
  from flaxmodels.resnet.resnet import BasicBlock

  class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      for number in range(2):
        x = BasicBlock(4, downsample=True, block_name=str(number))(x, {}, train)
      return x

  options = {name: name for name in ("axis", "epsilon", "momentum")}
  foreign = {ops.BatchNorm: Foreign(options=options)}
  return Blocks(), 6, foreign, {"train": True}, {"train": False}, 1e-5


def everything(model, training, evaluation, variables, x):
  """What training gives, with gradients, and evaluation."""

  def loss(params):
    given = {**variables, "params": params}
    y, new = model.apply(given, x, mutable=["batch_stats"], **training)
    return jnp.sum(jnp.sin(y)), (y, new)

  return (
    jax.value_and_grad(loss, has_aux=True)(variables["params"]),
    model.apply(variables, x, **evaluation),
  )


def assert_close(got, wanted, rounding):
  """As parts of the largest element of all: an element may be the difference of far larger ones.

  In float32 gradients can differ by more than rounding: where a ReLU is given what rounds to zero
  or does not, one has the element's cotangent and the other has not.
  """
  leaves = [jax.tree.leaves(tree) for tree in (got, wanted)]
  size = max(np.max(np.abs(leaf)) for leaf in leaves[1])
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=rounding * size)


@pytest.mark.parametrize("make", [jax_resnet, flaxmodels])
def test_a_linen_package(make):
  with jax.enable_x64(True):
    model, norms, foreign, training, evaluation, rounding = make()
    x = jnp.asarray(X, jnp.float64)
    first = jax.jit(functools.partial(model.init, **training))(jax.random.key(0), x)
    first = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), first)
    assert len(find(model, x, variables=first, foreign=foreign, **evaluation)) == norms

    variables = recalibrate(model, first, [x, x[:5]], foreign=foreign, **training)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], first["params"])
    old, new = (jax.tree.leaves(v["batch_stats"]) for v in (first, variables))
    assert len(new) == 2 * norms
    assert not any(np.array_equal(a, b) for a, b in zip(old, new, strict=True))

    ours = replace(model, foreign=foreign)
    run = functools.partial(everything, training=training, evaluation=evaluation)
    (loss, *wanted), (of_ours, *got) = (
      jax.tree.leaves(jax.jit(functools.partial(run, m))(variables=variables, x=x))
      for m in (model, ours)
    )
    assert len(replaced(ours)) == norms
    assert_close(of_ours, loss, rounding)
    assert_close(got, wanted, rounding)

    # It compares the outputs itself, to 1e-5.
    report = fold(lambda v, x: model.apply(v, x, **evaluation), variables, x).report
  assert (len(report.folded), report.left) == (norms, ())


def test_an_nnx_package():
  """Graphs and products with a batch norm of its own, of which one in the graph is never called."""
  pytest.importorskip("jraphx")
  from jraphx.nn.models import GCN, MLP
  from jraphx.nn.norm import BatchNorm

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.gcn = GCN(3, 4, num_layers=2, out_features=4, norm="batch_norm", rngs=rngs)
      self.mlp = MLP(feature_list=[4, 5, 2], norm="batch_norm", rngs=rngs)

    def __call__(self, x, edges):
      return self.mlp(self.gcn(x, edges))

  theirs = Foreign(
    options={"epsilon": "eps", "momentum": "momentum", "unbiased": lambda layer: True},
    variables={"mean": "running_mean", "var": "running_var", "scale": "weight"},
    mask="mask",
  )
  foreign = {BatchNorm: theirs}
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, edges = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.integers(0, 16, (2, 40)))
    model = Network(nnx.Rngs(0))
    floating = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree_util.tree_map_with_path(trained, floating))
    assert len(find(model, x, edges, foreign=foreign)) == 2

    with pytest.raises(ValueError, match=r"statistics in gcn/norms/1, .* partial=True"):
      recalibrate(model, None, [(x, edges)], foreign=foreign)
    model.eval()
    new = recalibrate(model, None, [(x, edges)], foreign=foreign, partial=True)
    given = model.gcn.convs[0](x, edges)
    norm = new.gcn.norms[0]
    np.testing.assert_allclose(norm.running_mean[...], given.mean(0), rtol=EPS)
    np.testing.assert_allclose(norm.running_var[...], given.var(0, ddof=1), rtol=EPS)

    ours = replace(new, foreign=foreign)
    assert len(replaced(ours)) == 3
    for mode in ("eval", "train"):
      results = []
      for network in (new, ours):
        getattr(network, mode)()
        loss = lambda network: (jnp.sum(jnp.sin(y := network(x, edges))), y)  # noqa: E731
        trained_one = nnx.value_and_grad(loss, has_aux=True)(network)
        # But for num_batches_tracked, which theirs counts and nothing reads.
        leaves = jax.tree.leaves(nnx.state(network, nnx.Any(nnx.Param, nnx.BatchStat)))
        results.append((trained_one, [v for v in leaves if v.ndim]))
      assert_close(*results, EPS)

    new.eval()
    graphdef, state = nnx.split(new)
    report = fold(lambda state, *args: nnx.merge(graphdef, state)(*args), state, x, edges).report
  assert report.folded == (("mlp/norms/0", "mlp/lins/0/kernel"),)
  assert report.left[0][0] == "gcn/norms/0"
  assert "behind scatter-add" in report.left[0][1]


def assert_folds(function, variables, x):
  folded = fold(function, variables, x)
  assert (len(folded.report.folded), folded.report.left) == (1, ())
  wanted = function(variables, x)
  np.testing.assert_allclose(
    folded.function(folded.variables, x), wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted))
  )


def trained(path, leaf):
  """Statistics and parameters that say something."""
  values = np.random.default_rng(leaf.size).uniform(0.5, 1.5, leaf.shape)
  return jnp.asarray(values, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def test_haiku_folds():
  hk = pytest.importorskip("haiku")

  def net(x, is_training):
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    return jax.nn.relu(norm(hk.Conv2D(4, 3)(x), is_training))

  model = hk.without_apply_rng(hk.transform_with_state(net))
  variables = jax.tree_util.tree_map_with_path(trained, model.init(jax.random.key(0), X, True))
  assert_folds(lambda v, x: model.apply(*v, x, False)[0], variables, X)


def test_equinox_folds():
  eqx = pytest.importorskip("equinox")
  conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
  norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
  norm = eqx.nn.inference_mode(norm)
  arrays, rest = eqx.partition((conv, norm, state), eqx.is_array)
  arrays = jax.tree_util.tree_map_with_path(trained, arrays)

  def function(arrays, x):
    conv, norm, state = eqx.combine(arrays, rest)
    one = lambda x: jax.nn.relu(norm(conv(x), state)[0])  # noqa: E731
    return jax.vmap(one, axis_name="batch")(x)

  assert_folds(function, arrays, jnp.transpose(X, (0, 3, 1, 2)))
