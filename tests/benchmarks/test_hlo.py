"""The reader of compiled programs, on programs written by hand whose traffic one can add up."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from benchmarks import hlo

pytestmark = pytest.mark.optimized

KB = 1024  # bytes of f32[256]


def program(entry: str, *fused: str) -> str:
  lines = "\n".join(f"  {line}" for line in entry.strip().splitlines())
  return "\n\n".join(
    [
      "HloModule jit_step, is_scheduled=true",
      *fused,
      f"ENTRY %main (x: f32[256]) -> f32[256] {{\n{lines}\n}}",
    ]
  )


def test_a_kernel_reads_its_operands_and_writes_its_result():
  text = program("""
%x = f32[256]{0} parameter(0), metadata={op_name="x(y)"}
%h = bf16[16,16]{1,0:T(8,128)(2,1)} convert(%x), metadata={op_name="f(x, %x)"}
%t = (f32[256]{0}, f32[256]{0}) fusion(%x, %h), kind=kLoop, calls=%missing
ROOT %g = f32[256]{0} get-tuple-element(%t), index=1
""")
  assert hlo.traffic(text) == (KB + KB // 2) + (KB + KB // 2 + 2 * KB)
  assert [i.name for i in hlo.parse(text).kernels] == ["h", "t"]


def test_every_operand_counts_commented_or_not():
  names = ", ".join(f"{'/*index=5*/' if n == 5 else ''}%p{n}" for n in range(7))
  parameters = "\n".join(f"%p{n} = f32[256]{{0}} parameter({n})" for n in range(7))
  text = program(f"{parameters}\nROOT %f = f32[256]{{0}} fusion({names}), kind=kLoop, calls=%body")
  assert hlo.traffic(text) == 8 * KB


def test_operands_with_their_shapes_before_them():
  text = program("""
%x = f32[16,16]{1,0} parameter(0)
ROOT %y = f32[16,16]{1,0} add(f32[16,16]{1,0} %x, f32[16,16]{1,0} %x)
""")
  assert hlo.traffic(text) == 3 * KB


SLICED = """%body (p: f32[4,256], q: f32[256]) -> f32[256] {
  %p = f32[4,256]{1,0} parameter(0)
  %q = f32[256]{0} parameter(1)
  OPS
}"""
CALLER = """
%x = f32[4,256]{1,0} parameter(0)
%y = f32[256]{0} parameter(1)
ROOT %f = f32[256]{0} fusion(%x, %y), kind=kLoop, calls=%body
"""


@pytest.mark.parametrize(
  ("ops", "read_of_x"),
  [
    (["%s = f32[1,256]{1,0} slice(%p), slice={[0:1], [0:256]}"], KB),
    (
      [
        "%c = bf16[4,256]{1,0} convert(%p)",
        "%b = bf16[1024]{0} bitcast(%c)",
        "%s = bf16[256]{0} slice(%b), slice={[0:256]}",
      ],
      KB,  # of x itself, although the slice is of half its width
    ),
    (
      [
        "%s = f32[1,256]{1,0} slice(%p), slice={[0:1], [0:256]}",
        "%t = f32[1,256]{1,0} slice(%p), slice={[1:2], [0:256]}",
      ],
      2 * KB,
    ),
    (
      [
        "%s = f32[1,256]{1,0} slice(%p), slice={[0:1], [0:256]}",
        "%e = f32[4,256]{1,0} exponential(%p)",
      ],
      4 * KB,
    ),
    ([f"%s{n} = f32[2,256]{{1,0}} slice(%p), slice={{[0:2]}}" for n in range(9)], 4 * KB),
    (["%e = f32[4,256]{1,0} exponential(%p)"], 4 * KB),
    (["ROOT %c = bf16[4,256]{1,0} convert(%p)"], 4 * KB),
  ],
  ids=["slice", "through", "two", "and-all", "no-more-than-all", "all", "the-result"],
)
def test_a_fusion_reads_of_an_operand_what_it_slices(ops, read_of_x):
  text = program(CALLER, SLICED.replace("OPS", "\n  ".join(ops)))
  assert hlo.traffic(text) == read_of_x + KB + KB


def test_operands_keep_their_numbers_whatever_is_printed_before_them():
  caller = CALLER.replace("fusion(%x, %y)", "fusion(f32[4,256]{1,0} %x, f32[256]{0} %y)")
  body = SLICED.replace("OPS", "%s = f32[16]{0} slice(%q), slice={[0:16]}")
  body = body.replace("%p = ", "%e = f32[4,256]{1,0} exponential(%p)\n  %p = ")
  assert hlo.traffic(program(caller, body)) == 4 * KB + 64 + KB


@pytest.mark.parametrize("op", ["slice", "dynamic-slice", "gather"])
def test_a_slice_on_its_own_reads_what_it_writes(op):
  text = program(f"""
%x = f32[4,256]{{1,0}} parameter(0)
%i = s32[] parameter(1)
ROOT %s = f32[1,256]{{1,0}} {op}(%x, %i)
""")
  assert hlo.traffic(text) == 2 * KB + 4


def test_an_index_is_not_sliced():
  text = program("""
%x = f32[256]{0} parameter(0)
%i = s32[256]{0} parameter(1)
ROOT %s = f32[1]{0} gather(%x, %i)
""")
  assert hlo.traffic(text) == 4 + KB + 4


def test_all_reduces_wherever_they_stand():
  text = program(
    """
%x = f32[256]{0} parameter(0)
%r = f32[256]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
ROOT %c = f32[256]{0} call(%r), to_apply=%inner
""",
    """%inner (p: f32[256]) -> (f32[256], f32[8]) {
  %p = f32[256]{0} parameter(0)
  %a = (f32[256]{0}, f32[8]{0}) all-reduce-start(%p), to_apply=%sum
  ROOT %d = (f32[256]{0}, f32[8]{0}) all-reduce-done(%a)
}""",
  )
  assert sorted(i.bytes for i in hlo.parse(text).all_reduces) == [KB, KB + 32]


def test_a_compiled_program_is_read():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  text = jax.jit(lambda x: jnp.tanh(x) @ x).lower(x).compile().as_text()
  assert text
  assert hlo.parse(text).kernels
  assert hlo.traffic(text) >= 3 * 64 * 64 * 4


def test_what_is_not_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


def test_collectives_are_counted_once_each():
  text = program(
    """
%x = f32[256]{0} parameter(0)
%y = bf16[256]{0} convert(%x)
%r = (f32[256]{0}, bf16[256]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%sum
%s = f32[256]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8], to_apply=%sum
%d = f32[256]{0} all-reduce-done(%s)
%g = (f32[256]{0}, f32[2048]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
%e = f32[2048]{0} all-gather-done(%g)
%p = f32[256]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
ROOT %c = f32[256]{0} call(%d), to_apply=%inner
""",
    """%inner (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %a = f32[256]{0} all-reduce(%p), to_apply=%sum, backend_config={"a":{"emitter":"Ring"}}
}""",
  )
  assert sorted(hlo.collectives(text, 8)) == sorted(
    [
      hlo.Collective("all-reduce", KB + KB // 2, 2),
      hlo.Collective("all-reduce", KB, 4),
      hlo.Collective("all-gather", KB, 8),
      hlo.Collective("collective-permute", KB, 8),
      hlo.Collective("all-reduce", KB, 8, "Ring"),
    ]
  )


@pytest.mark.parametrize(
  ("groups", "members"),
  [
    ("{}", 8),
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("{{0}}", 1),
    ("[4,2]<=[8]", 2),
    ("[2,4]<=[4,2]T(1,0)", 4),
    ("mesh['a'=2,'b'=4] {'b'}", 4),
    ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
  ],
)
def test_groups_of_devices_however_they_are_written(groups, members):
  text = program(f"""
%x = f32[256]{{0}} parameter(0)
ROOT %r = f32[256]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%sum
""")
  assert hlo.collectives(text, 8) == [hlo.Collective("all-reduce", KB, members)]


def test_groups_that_are_not_understood_are_not_guessed():
  text = program("ROOT %r = f32[256]{0} all-reduce(%x), replica_groups=all-of-them")
  with pytest.raises(ValueError, match="all-of-them"):
    hlo.collectives(text, 8)


def test_the_collectives_of_a_compiled_program():
  mesh = jax.make_mesh((2, 4), ("group", "member"), axis_types=(AxisType.Auto,) * 2)

  def local(x, y):
    return jax.lax.psum(x, "member"), jax.lax.psum(y, ("group", "member")), jax.lax.pmax(x, "group")

  split = PartitionSpec(("group", "member"))
  out = (PartitionSpec("group"), PartitionSpec(), PartitionSpec("member"))
  whole = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=out))
  text = whole.lower(jnp.zeros((8, 16)), jnp.zeros((8, 32))).compile().as_text()
  sizes = [(c.op, c.bytes, c.members) for c in hlo.collectives(text, 8)]
  assert sorted(sizes) == [("all-reduce", 64, 2), ("all-reduce", 64, 4), ("all-reduce", 128, 8)]


def test_a_program_for_one_device_has_no_collectives():
  text = jax.jit(jnp.sin).lower(jnp.zeros(4)).compile().as_text()
  assert hlo.collectives(text, 1) == []


def test_what_stands_in_a_branch_is_not_counted():
  mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
  dealt = jax.NamedSharding(mesh, jax.P("batch"))

  @jax.jit
  def f(x):
    total = jnp.sum(x, 0)
    return jax.lax.cond(total[0] > 0, lambda: total, lambda: jnp.sum(x * x, 0))

  text = f.lower(jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=dealt)).compile().as_text()
  assert text.count(" all-reduce(") == 2
  assert hlo.collectives(text, 2) == [hlo.Collective("all-reduce", 32, 2)]
  assert [i.bytes for i in hlo.parse(text).all_reduces] == [32]
