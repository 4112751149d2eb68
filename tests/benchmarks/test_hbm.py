"""What a TPU's program moves through device memory, on programs written by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hbm, hlo

HALF = "bf16[64,4,4,64]{3,0,2,1:T(8,128)(2,1)"  # 64 channels in 128 lanes
SIZE = 2 * 64 * 4 * 4 * 128
CHIP, MEMORY = f"{HALF}S(1)}}", f"{HALF}}}"
TOKEN = "u32[]{:S(2)}"


def moved(*lines):
  body = "\n".join(f"  {line}" for line in lines)
  return hbm.moved(f"HloModule m\n\nENTRY %main (x: bf16[1]) -> bf16[1] {{\n{body}\n}}")


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("f32[3,5]{1,0}", 60),
    ("f32[3,5]{1,0:T(8,128)}", 4 * 8 * 128),
    ("f32[3,5]{0,1:T(4,128)}", 4 * 8 * 128),
    ("f32[300]{0:T(256)}", 4 * 512),
    ("pred[2,8,128]{2,1,0:T(8,128)(4,1)}", 2 * 8 * 128),
    ("f32[]{:T(128)}", 4),
    (MEMORY, SIZE),
  ],
)
def test_arrays_are_padded_to_tiles(shape, size):
  assert hbm.arrays(shape) == [hbm.Array(size, on_chip=False)]


def test_what_lies_on_the_chip_is_not_moved():
  parameters = f"%a = {MEMORY} parameter(0)", f"%b = {CHIP} parameter(1)"
  both = f"ROOT %f = ({MEMORY}, {CHIP}) fusion(%a, %b), kind=kLoop, calls=%g"
  assert moved(*parameters, both) == 2 * SIZE
  assert moved(*parameters, f"ROOT %f = {CHIP} fusion(%b), kind=kLoop, calls=%g") == 0


@pytest.mark.parametrize(
  ("to", "of", "sides"), [(CHIP, MEMORY, 1), (MEMORY, CHIP, 1), (MEMORY, MEMORY, 2)]
)
def test_a_copy_counts_on_the_side_of_memory(to, of, sides):
  start = f"%s = ({to}, {of}, {TOKEN}) copy-start(%a)"
  done = f"ROOT %d = {to} copy-done(%s)"
  assert moved(f"%a = {of} parameter(0)", start, done) == sides * SIZE


def test_of_a_slice_the_slice_is_copied():
  part = CHIP.replace("64,4,4,64", "64,1,4,64")
  start = f"%s = (({MEMORY}), {part}, {TOKEN}) slice-start(%a), slice={{[0:64]}}"
  assert moved(f"%a = {MEMORY} parameter(0)", start, f"ROOT %d = {part} slice-done(%s)") == SIZE / 4


@pytest.mark.optimized
def test_without_tiles_and_chip_it_is_the_traffic():
  text = jax.jit(lambda x: jnp.sin(x) @ x[:4].T).lower(jnp.ones((8, 8))).compile().as_text()
  assert hbm.moved(text) == hlo.traffic(text) > 0
