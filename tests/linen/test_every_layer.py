"""What holds for every Linen layer: what Flax's own tools see of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

import jaxbn.linen
from tests import layers
from tests.layers import EXAMPLES

KEY = jax.random.key(0)
EVERY = layers.EVERY_LINEN
MUTABLE = ["batch_stats", "reference", "intermediates"]


def test_every_layer_is_here():
  assert {name.partition(",")[0] for name in EVERY} == set(jaxbn.linen.__all__) - {
    "prediction_time"
  }


@pytest.mark.parametrize("name", layers.BATCH_NORMS)
def test_a_batch_norm_is_one_of_flax_s(name):
  make, args, _ = EVERY[name]
  assert isinstance(make(), nn.BatchNorm)
  variables = make().init(KEY, *args)
  y, new = make().apply(
    variables,
    *args,
    mutable=MUTABLE,
    capture_intermediates=lambda module, _: isinstance(module, nn.BatchNorm),
  )
  (captured,) = new["intermediates"]["__call__"]
  layers.assert_bit_equal(captured, y)


def test_flax_s_call_is_never_reached(monkeypatch):
  def reached(*args, **kwargs):
    raise AssertionError("Flax's own")

  monkeypatch.setattr(nn.BatchNorm, "__call__", reached)
  for name in layers.BATCH_NORMS:
    make, args, _ = EVERY[name]
    _, variables = make().init_with_output(KEY, *args)
    make().apply(variables, *args, mutable=MUTABLE)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", EVERY)
def test_one_call_is_one_call(name, jit):
  # Whatever Flax may intercept is captured; of a layer that is its call, once.
  make, args, _ = EVERY[name]
  module = make()
  variables = module.init(KEY, *args)

  def capture(layer, method):
    return isinstance(layer, type(module)) and method != "setup"

  def apply(variables):
    return module.apply(variables, *args, mutable=MUTABLE, capture_intermediates=capture)

  y, new = (jax.jit(apply) if jit else apply)(variables)
  (captured,) = new["intermediates"].pop("__call__")
  assert not new["intermediates"]
  layers.assert_bit_equal(captured, y)


@pytest.mark.parametrize("name", EVERY)
def test_tabulate_has_one_row_for_one_call(name):
  make, args, _ = EVERY[name]
  # Of what is wrapped Flax makes no operations count, for its own WeightNorm neither.
  flops = name != "WeightNorm"
  wide = {"width": 300}
  table = nn.tabulate(make(), KEY, show_repeated=True, compute_flops=flops, console_kwargs=wide)
  rows = [row.split("│") for row in table(*args).splitlines()]
  assert [row[2].strip() for row in rows if len(row) > 2 and type(make()).__name__ in row[2]] == [
    type(make()).__name__
  ]


def training(module, variables, *args):
  """The variables after a call in training."""
  return variables | module.apply(variables, *args, mutable=MUTABLE)[1]


@pytest.mark.parametrize("name", EVERY)
def test_statistics_averaged_over_devices_keep_their_types(name):
  # As in Flax's examples, in a scan over steps.
  make, args, _ = EVERY[name]
  module = make()
  start = training(module, module.init(KEY, *args), *args)
  stats = {k: v for k, v in start.items() if k in MUTABLE}

  def step(stats, _):
    new = training(module, start | stats, *args)
    return jax.lax.pmean({k: new[k] for k in stats}, "devices"), None

  def steps(stats):
    return jax.lax.scan(step, stats, length=2)[0]

  after = jax.vmap(steps, axis_name="devices", axis_size=2, in_axes=None)(stats)
  assert jax.tree.map(lambda v: v.dtype, after) == jax.tree.map(lambda v: v.dtype, stats)


COUNTED = {
  "BatchNorm": (layers.EXAMPLES,),
  "BatchRenorm": (layers.EXAMPLES,),
  "ConditionalBatchNorm": (layers.EXAMPLES, layers.LABELS),
  "DomainBatchNorm": (layers.EXAMPLES, layers.LABELS),
  "MeanOnlyBatchNorm": (layers.EXAMPLES,),
  "InputNormRNN": (layers.EXAMPLES,),
}


@pytest.mark.parametrize("option", [{"debias": True}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("name", COUNTED)
def test_statistics_without_a_count_will_do_for_evaluation_only(name, option):
  make, args = EVERY[name].make, COUNTED[name]
  plain, counting = make(), make(**option)
  saved = training(plain, plain.init(KEY, *args), *args)
  evaluating = {"use_running_average": None}
  y, expected = (
    module.clone(**evaluating).apply(saved, *args, use_running_average=True)
    for module in (counting, plain)
  )
  layers.assert_bit_equal(y, expected)
  with pytest.raises(ValueError, match=r"the layer has a mean but no count.*Add the leaf"):
    training(counting, saved, *args)


def test_predictions_need_no_count_either():
  counting = jaxbn.linen.BatchNorm(use_running_average=True, debias=True)
  plain = jaxbn.linen.BatchNorm(use_running_average=True)
  saved = plain.init(KEY, layers.EXAMPLES)
  y, expected = (
    jaxbn.linen.prediction_time(module.apply, 2.0)(saved, layers.EXAMPLES)
    for module in (counting, plain)
  )
  layers.assert_bit_equal(y, expected)


@pytest.mark.parametrize("name", EVERY)
def test_ranks_and_dtypes_are_promoted_explicitly(name):
  make, args, evaluates = EVERY[name]
  module = make()
  place = int(isinstance(args[0], tuple))  # a cell's carry comes before x

  def loss(params, x, module):
    given = [*args[:place], x, *args[place + 1 :]]
    y, _ = module.apply(variables | {"params": params}, *given, mutable=MUTABLE)
    return sum(jnp.sum(v) for v in jax.tree.leaves(y) if jnp.issubdtype(v.dtype, jnp.inexact))

  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    variables = module.init(KEY, *args)
    modes = [module, module.clone(use_running_average=True)] if evaluates else [module]
    for mode in modes:
      jax.grad(loss, (0, 1))(variables["params"], args[place], mode)


HALF = ["BatchNorm", "BatchRenorm", "ConditionalBatchNorm", "DomainBatchNorm", "WhiteningNorm"]


@pytest.mark.parametrize(
  "param_dtype", [jnp.bfloat16, jnp.float32], ids=["all half", "wide parameters"]
)
@pytest.mark.parametrize("name", HALF)
def test_half_precision_under_strict_promotion(name, param_dtype):
  make, args, _ = EVERY[name]
  module = make(param_dtype=param_dtype, dtype=jnp.bfloat16)
  x, *rest = args
  x = x.astype(jnp.bfloat16)

  def loss(params, x, module):
    y, _ = module.apply(variables | {"params": params}, x, *rest, mutable=MUTABLE)
    return jnp.sum(y, dtype=jnp.bfloat16)

  with jax.numpy_dtype_promotion("strict"):
    variables = module.init(KEY, x, *rest)
    for mode in (module, module.clone(use_running_average=True)):
      jax.grad(loss, (0, 1))(variables["params"], x, mode)


def _abstract(name):
  """A layer, the shapes of its variables, and a call that computes nothing."""
  make, (first, *others), _ = EVERY[name]
  module = make()
  variables = jax.eval_shape(lambda x: module.init(KEY, x, *others), first)

  def call(variables, x=first, **kwargs):
    return jax.eval_shape(lambda v, x: module.apply(v, x, *others, **kwargs), variables, x)

  return variables, call


@pytest.mark.parametrize("name", [n for n in EVERY if EVERY[n].evaluates])
def test_what_flax_says_of_statistics_has_a_mend(name):
  variables, call = _abstract(name)
  with pytest.raises(errors.ModifyScopeVariableError, match=r"mutable=\['batch_stats'\]"):
    call(variables)
  missing = errors.ScopeCollectionNotFound, ValueError
  with pytest.raises(missing, match=r"(its own in|no running statistics in .*) batch_stats"):
    call({"params": variables["params"]})
  assert call(variables, mutable=["batch_stats"])


@pytest.mark.parametrize("name", [n for n in EVERY if hasattr(EVERY[n].make(), "axis")])
def test_channels_that_do_not_match_are_named(name):
  variables, call = _abstract(name)
  with pytest.raises(errors.ScopeParamShapeError, match=r"channels of shape \(6,\) on axis=-1"):
    call(variables, jnp.ones((8, 5, 6)), mutable=MUTABLE)
  with pytest.raises(errors.ScopeParamShapeError, match=r"channels' axis: axis=1 has 4\."):
    call(variables, x=jnp.ones((8, 4, 6)), mutable=MUTABLE)


def test_missing_parameters_are_not_taken_for_statistics():
  module = jaxbn.linen.BatchNorm(use_running_average=True)
  stats = {"batch_stats": module.init(KEY, EXAMPLES)["batch_stats"]}
  for variables in (stats, stats | {"params": {}}):
    with pytest.raises(errors.ScopeCollectionNotFound, match="nothing of its own in params: pass"):
      module.apply(variables, EXAMPLES)
  bare = module.clone(use_scale=False, use_bias=False)
  assert bare.apply(stats, EXAMPLES).shape == EXAMPLES.shape
  with pytest.raises(errors.ScopeCollectionNotFound, match="nothing of its own in batch_stats"):
    bare.apply({}, EXAMPLES)


class _Slope(nn.Module):
  """An activation with a parameter, of which Flax itself says what is wrong."""

  @nn.compact
  def __call__(self, z):
    return z * self.param("slope", nn.initializers.ones, z.shape[-1:])


def test_what_is_wrong_with_an_activation_is_not_said_of_the_layer():
  module = jaxbn.linen.BatchNorm(use_running_average=False, activation=_Slope())
  variables = module.init(KEY, EXAMPLES)
  params = variables["params"] | {"activation": {"slope": jnp.ones(7)}}
  with pytest.raises(errors.ScopeParamShapeError, match='For parameter "slope"'):
    module.apply(variables | {"params": params}, EXAMPLES, mutable=["batch_stats"])
  with pytest.raises(errors.ScopeParamShapeError, match=r"\{'scale': \(4,\), 'bias': \(4,\)\}"):
    module.apply(variables, EXAMPLES[..., :3], mutable=["batch_stats"])


def test_a_reference_that_cannot_be_remembered():
  module = jaxbn.linen.ReferenceBatchNorm()
  with pytest.raises(ValueError, match=r"pass mutable=\['reference'\]"):
    module.apply(module.init(KEY, EXAMPLES, True), EXAMPLES, True)


@pytest.mark.parametrize("name", [n for n in EVERY if hasattr(EVERY[n].make(), "axis")])
def test_another_library_s_flag_at_the_call(name):
  _, call = _abstract(name)
  with pytest.raises(TypeError, match=r"__call__ has no argument 'train': .*use_running_average"):
    call({}, train=True)
