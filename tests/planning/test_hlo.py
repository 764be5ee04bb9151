"""Communication read from HLO text, on programs small enough to count by hand and on one that XLA wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quietstar_jax.planning.hlo import collectives, sent_bytes

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%condition.1 (state.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%condition.2 (state.2: (s32[], f32[8])) -> pred[] {
  ROOT %less.2 = pred[] compare(%i.2, %end), direction=LT
}

%inner (state.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %r = f32[8]{0} all-reduce(%y), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
}

%open_ended (state.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%z), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %d = f32[4]{0} collective-permute-done(%p)
}

%outer (state.5: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%condition.1, body=%inner
  %v = (s32[], f32[8]) while(%t.2), condition=%condition.2, body=%open_ended
}

%fused_start (q: f32[64]) -> f32[64] {
  %a2a = f32[64]{0} all-to-all(%q), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
}

%fused_done (q.1: f32[64]) -> f32[64] {
  %a2a.1 = f32[64]{0} all-to-all(%q.1), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
}

%all-reduce-scatter.1 (s: f32[128]) -> f32[32] {
  %whole = f32[128]{0} all-reduce(%s), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[32]{0} dynamic-slice(%whole, %at), dynamic_slice_sizes={32}
}

%async_collective_fusion.7 (h: f32[16]) -> f32[16] {
  %begun = f32[16]{0:S(1)} all-reduce(%h), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%fused_computation.8 (h.1: f32[16]) -> f32[16] {
  %ended = f32[16]{0} all-reduce(%h.1), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%async_collective_fusion.9 (h.2: f32[16]) -> f32[16] {
  %other = f32[16]{0} all-reduce(%h.2), channel_id=1, replica_groups=[2,2]<=[4], metadata={op_name="other"}
}

%all-reduce-scatter.2 (s.1: f32[128]) -> f32[32] {
  %whole.1 = f32[128]{0} all-reduce(%s.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

%all-reduce-scatter.3 (s.2: f32[128]) -> f32[32] {
  %whole.2 = f32[128]{0} all-reduce(%s.2), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %l = (s32[], f32[8]) while(%t.3), condition=%condition.3, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %f1 = f32[64]{0} fusion(%l), kind=kCustom, calls=%fused_start
  %f2 = f32[64]{0} fusion(%f1), kind=kCustom, calls=%fused_done
  %f3 = f32[32]{0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.1
  %f4 = f32[32]{0} fusion(%f3), kind=kCustom, calls=%all-reduce-scatter.2
  %f5 = f32[32]{0} fusion(%f4), kind=kCustom, calls=%all-reduce-scatter.3
  %f6 = f32[16]{0} fusion(%f5), kind=kCustom, calls=%async_collective_fusion.7
  %f7 = f32[16]{0} fusion(%f6), kind=kCustom, calls=%fused_computation.8
  %f8 = f32[16]{0} fusion(%f7), kind=kCustom, calls=%async_collective_fusion.9
  %sum.1 = (f32[8]{0}, /*index=1*/f32[8]{0}) all-reduce(%f7, %f7), channel_id=1, replica_groups=[2,2]<=[4]
  %sum.2 = (f32[8]{0}, /*index=1*/f32[8]{0}) all-reduce(%f7, %f7), channel_id=1, replica_groups=[2,2]<=[4]
}
"""


def test_loops_are_multiplied_out_and_what_is_written_twice_counts_once():
    found = collectives(PROGRAM, 4)
    assert list(found) == ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]
    assert found["all-gather"] == (15, 15 * 16 * 32 * 2 * 3 / 4, 0)
    # In the loop, on a channel of its own; on JAX's channel, of 16 numbers each, two asynchronous ones and two others.
    assert found["all-reduce"] == (15 + 4, (15 * 8 + 4 * 16) * 4 * 2 * 1 / 2, 0)
    assert found["reduce-scatter"] == (3, 3 * 128 * 4 * 3 / 4, 0)
    assert found["all-to-all"] == (1, 64 * 4 * 3 / 4, 0)
    assert found["collective-permute"] == (3, 3 * 4 * 4, 3)  # in a loop whose length is data: as if it ran once


@pytest.mark.parametrize(
    ("kind", "size", "group", "sent"),
    [
        ("all-gather", 100, 4, 75),  # its own quarter, handed on three times
        ("all-reduce", 100, 4, 150),  # scattered, then gathered
        ("reduce-scatter", 25, 4, 75),  # the result is a quarter of what is reduced
        ("all-to-all", 100, 4, 75),
        ("collective-permute", 100, 2, 100),
        ("all-reduce", 100, 1, 0),
    ],
)
def test_bytes_that_a_device_sends(kind, size, group, sent):
    assert sent_bytes(kind, size, group) == sent


def test_a_program_of_xla_is_read(tmp_path):
    """A sum over 8 devices in each of 7 turns of a loop, and a gathered weight after it."""
    source = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from quietstar_jax.planning.hlo import collectives
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
def turn(carry, w):
    return jax.lax.with_sharding_constraint(jnp.tanh(carry @ w), NamedSharding(mesh, P())), None
def fn(x, ws, table):
    y = jax.lax.scan(turn, x, ws)[0]
    return y, jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P()))
def shape(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
text = jax.jit(fn).lower(shape((16, 64)), shape((7, 64, 64), None, "x"), shape((80, 10), "x")).compile().as_text()
print(collectives(text, 8))
"""
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert f"'all-reduce': Collective(times=7, sent={7 * 2 * 16 * 64 * 4 * 7 / 8}, unknown=0)" in ended.stdout
    assert f"'all-gather': Collective(times=1, sent={80 * 10 * 4 * 7 / 8}, unknown=0)" in ended.stdout
