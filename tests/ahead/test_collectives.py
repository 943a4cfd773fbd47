"""Collectives, read from the HLO of small programs and of a written one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from speechjax.ahead.collectives import Traffic, collectives


def compiled(function, *specs) -> str:
    """HLO of a function of float32 arrays, {sizes, partition} each, on four CPU devices in a row."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    args = [jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec)) for sizes, spec in specs]
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(*args).compile().as_text() or ""


ROWS = PartitionSpec("x")


def test_collectives_of_a_small_program():
    """A sum over split rows is one all-reduce, a result that all have of a split array one all-gather."""
    assert collectives(compiled(lambda x: x.sum(axis=0), ((8, 16), ROWS))) == {"all-reduce": Traffic(1, 64.0)}
    assert collectives(compiled(lambda x: 2 * x, ((8, 16), ROWS))) == {"all-gather": Traffic(1, 512.0)}
    assert collectives(compiled(lambda x: 2 * x, ((8, 16), PartitionSpec()))) == {}, "negative control"


def test_collectives_in_loops_count_as_often_as_they_turn():
    def total(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(x.T @ (x @ c)), None), w, length=5)[0]

    found = collectives(compiled(total, ((16, 3), PartitionSpec()), ((8, 16), ROWS)))
    assert found == {"all-reduce": Traffic(5, 5 * 16 * 3 * 4.0)}


HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %s = f32[]{:T(128)} add(%a, %a)
}

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %ag = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x), channel_id=1
  %done = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather-done(%ag)
  %rs = bf16[8,128]{1,0:T(8,128)(2,1)} reduce-scatter(%done), channel_id=2, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%x, %rs)
}

%fused (p: f32[4]) -> f32[4] {
  %q = f32[4]{0:T(128)} parameter(0)
  ROOT %ar = f32[4]{0:T(128)} all-reduce(%q), channel_id=3, replica_groups=[2,2]<=[4], to_apply=%add
}

ENTRY %main (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0:T(128)} parameter(0)
  %both = (f32[2]{0}, pred[4]{0}) all-reduce(%arg, %arg), channel_id=4, to_apply=%add
  %w = (s32[], bf16[8,128]{1,0}) while(%arg), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
  ROOT %f = f32[4]{0:T(128)} fusion(%arg), kind=kCustom, calls=%fused
}
"""


def test_collectives_of_a_scheduled_module():
    """Tuples, tiled layouts, starts with their operands in the result, fusions; a done is no second one."""
    found = collectives(HLO)
    gathered = 32 * 128 * 2
    assert found == {
        "all-reduce": Traffic(2, 32.0 + 16.0),
        "all-gather": Traffic(24, 24.0 * gathered),
        "reduce-scatter": Traffic(24, 24.0 * gathered),
    }
    once = collectives(HLO.replace("known_trip_count", "unknown"))
    assert once["all-gather"] == Traffic(1, float(gathered))


LOOP = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[4])) -> pred[] {
  %end = u32[]{:T(128)} constant(8), metadata={op_name="index=9"}
  %p = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %by = u32[]{:T(128)} constant(2)
  %q = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%q), index=1
  %x = f32[4]{0:T(128)} get-tuple-element(%q), index=0
  %next = u32[]{:T(128)} add(%i, %by)
  %y = f32[4]{0:T(128)} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[4]{0:T(128)}, u32[]{:T(128)}) tuple(%y, %next)
}

ENTRY %main (arg: f32[4]) -> f32[4] {
  %arg = (f32[4]{0}, u32[]) parameter(0)
  %w = (f32[4]{0}, u32[]) while(%arg), condition=%cond, body=%body
  ROOT %f = f32[4]{0:T(128)} get-tuple-element(%w), index=0
}
"""


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        (("", ""), 4),
        (("constant(2)", "constant(3)"), 3),
        (("add(%i, %by)", "fusion(%i), kind=kLoop, calls=%f"), 8),
        (("tuple(%y, %next)", "call(%q), to_apply=%f"), 8),
        (("direction=LT", "direction=NE"), 1),
        (("constant(8)", "parameter(1)"), 1),
        (("%cond, body", "%elsewhere, body"), 1),
    ],
    ids=["by two", "by three", "by what cannot be read", "no tuple", "not up to", "not constant", "no such condition"],
)
def test_turns_are_read_from_the_condition_where_the_compiler_wrote_none(change, turns):
    assert collectives(LOOP.replace(*change)) == {"collective-permute": Traffic(turns, 16.0 * turns)}
