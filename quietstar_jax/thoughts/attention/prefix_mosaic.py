"""The prefix part of chain attention as Pallas kernels for TPU: the scores of a block stay in on-chip memory.

`forward` and `backward` are the kernels of `kernel_common.prefix_fwd` and `prefix_bwd`, over its rows and blocks:
blocks of keys that no row of a block sees are not computed. Axis letters as there; scores and sums are float32.

Each kernel accumulates in scratch memory along the last axis of its grid, which runs in sequence; programs along the
other axes are independent. Each output block is written once, by the last step:

    kernel                grid (batch, head, ...)     scratch                 last axis
    forward               row block, step             m, l, acc               key blocks first[row block] + step
    gradient of q         row block, step             dq                      key blocks first[row block] + step
    gradient of keys,     key block, row block        dk, dv                  row blocks; computes where
      values                                                                  first <= key block <= last
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quietstar_jax.models.attention import MASKED, soft_cap
from quietstar_jax.thoughts.attention.kernel_common import Range, bounds, dot, pad, pad_axis
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState

ROW_BLOCK, KEY_BLOCK = 256, 128


def forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, *, cap: float = 0.0, interpret: bool = False
) -> SoftmaxState:  # fmt: skip
    """Softmax of scaled queries [B, G, N, H] over keys and values [B, G, P, H]; `interpret` runs on any device.

    `cap` is the soft cap of the scores, 0 = none. A row that sees no key has m = `MASKED` and l = 0.
    """
    rows, length = q.shape[2], keys.shape[2]
    q, keys, values, seen = pad(q, keys, values, seen, ROW_BLOCK, KEY_BLOCK)
    batch, groups, padded, width = q.shape
    grid = (batch, groups, padded // ROW_BLOCK, keys.shape[2] // KEY_BLOCK)
    state = pl.pallas_call(
        functools.partial(_forward_kernel, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[_rows(width), _keys(width), _keys(width), _row_numbers(), _row_numbers(), _key_numbers()],
            out_specs=[_rows(1), _rows(1), _rows(width)],
            scratch_shapes=[pltpu.VMEM((ROW_BLOCK, n), jnp.float32) for n in (1, 1, width)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, groups, padded, n), jnp.float32) for n in (1, 1, width)],
        compiler_params=_parallel_but_last(grid),
        interpret=interpret,
        name="prefix_attention_forward",
    )(*bounds(seen, length, ROW_BLOCK, KEY_BLOCK), q, keys, values, *_columns(seen))
    return SoftmaxState(*(x[:, :, :rows] for x in state))


def backward(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, lse: jax.Array, delta: jax.Array,
    gradient: jax.Array, *, cap: float = 0.0, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of queries, keys and values, float32, from recomputed scores.

    Args:
      lse: [B, G, N, 1] log-sum-exp over prefix and chain; delta: [B, G, N, 1] the gradient times the context,
        summed over H; gradient: [B, G, N, H] of the context.
    """
    rows, length = q.shape[2], keys.shape[2]
    unpadded = keys.shape
    q, keys, values, seen = pad(q, keys, values, seen, ROW_BLOCK, KEY_BLOCK)
    lse, delta, gradient = (pad_axis(x, 2, ROW_BLOCK) for x in (lse, delta, gradient))
    batch, groups, padded, width = q.shape
    grid = (batch, groups, padded // ROW_BLOCK, keys.shape[2] // KEY_BLOCK)
    visited = bounds(seen, length, ROW_BLOCK, KEY_BLOCK)
    operands = (*visited, q, keys, values, *_columns(seen), lse, delta, gradient)

    to_q = pl.pallas_call(
        functools.partial(_query_gradient_kernel, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                _rows(width), _keys(width), _keys(width), _row_numbers(), _row_numbers(), _key_numbers(),
                _rows(1), _rows(1), _rows(width),
            ],
            out_specs=_rows(width),
            scratch_shapes=[pltpu.VMEM((ROW_BLOCK, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=_parallel_but_last(grid),
        interpret=interpret,
        name="prefix_attention_query_gradient",
    )(*operands)  # fmt: skip

    swap = functools.partial(_spec, rows_last=True)
    to_keys, to_values = pl.pallas_call(
        functools.partial(_key_gradient_kernel, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(grid[0], grid[1], grid[3], grid[2]),
            in_specs=[
                swap("rows", width), swap("keys", width), swap("keys", width), swap("row numbers"),
                swap("row numbers"), swap("key numbers"), swap("rows", 1), swap("rows", 1), swap("rows", width),
            ],
            out_specs=[swap("keys", width), swap("keys", width)],
            scratch_shapes=[pltpu.VMEM((KEY_BLOCK, width), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(keys.shape, jnp.float32)] * 2,
        compiler_params=_parallel_but_last(grid),
        interpret=interpret,
        name="prefix_attention_key_gradient",
    )(*operands)  # fmt: skip
    return to_q[:, :, :rows], to_keys[:, :, : unpadded[2]], to_values[:, :, : unpadded[2]]


def _forward_kernel(first, last, q, keys, values, low, high, mask, m_out, l_out, acc_out, m, l, acc, *, cap):
    # Blocks, without leading axes of size 1: q, acc [rows, H]; keys, values [keys, H]; low, high, m, l [rows, 1]; mask
    # [1, keys]. The prefetched scalars first, last are whole, [B, row blocks].
    row_block, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        m[...] = jnp.full_like(m, MASKED)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    block = first[pl.program_id(0), row_block] + step

    @pl.when(block <= last[pl.program_id(0), row_block])
    def _() -> None:
        scores, visible = _scores(q, keys, low, high, mask, block, cap)
        # l and acc are rescaled to the new m, as in `prefix_xla.add_blocks`. While a row has seen no key, its m is
        # MASKED and exp(scores - new_m) is meaningless: the outer `where` sets these weights to 0.
        new_m = jnp.maximum(m[...], jnp.where(visible, scores, MASKED).max(axis=1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_m), 0.0)
        rescale = jnp.exp(m[...] - new_m)
        l[...] = l[...] * rescale + weights.sum(axis=1, keepdims=True)
        acc[...] = acc[...] * rescale + dot(weights.astype(values.dtype), values[0, 0], 1, 0)
        m[...] = new_m

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        m_out[0, 0], l_out[0, 0], acc_out[0, 0] = m[...], l[...], acc[...]


def _query_gradient_kernel(
    first, last, q, keys, values, low, high, mask, lse, delta, gradient, to_q, acc, *, cap
):  # fmt: skip
    row_block, step = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    block = first[pl.program_id(0), row_block] + step

    @pl.when(block <= last[pl.program_id(0), row_block])
    def _() -> None:
        _, to_scores = _through_softmax(q, keys, values, low, high, mask, lse, delta, gradient, block, cap)
        acc[...] += dot(to_scores, keys[0, 0], 1, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        to_q[0, 0] = acc[...]


def _key_gradient_kernel(
    first, last, q, keys, values, low, high, mask, lse, delta, gradient, to_keys, to_values, keys_sum, values_sum, *,
    cap,
):  # fmt: skip
    block, row_block = pl.program_id(2), pl.program_id(3)

    @pl.when(row_block == 0)
    def _() -> None:
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    batch = pl.program_id(0)

    @pl.when((first[batch, row_block] <= block) & (block <= last[batch, row_block]))
    def _() -> None:
        weights, to_scores = _through_softmax(q, keys, values, low, high, mask, lse, delta, gradient, block, cap)
        keys_sum[...] += dot(to_scores, q[0, 0], 0, 0)
        values_sum[...] += dot(weights, gradient[0, 0], 0, 0)

    @pl.when(row_block == pl.num_programs(3) - 1)
    def _() -> None:
        to_keys[0, 0], to_values[0, 0] = keys_sum[...], values_sum[...]


def _scores(
    q: Any, keys: Any, low: Any, high: Any, mask: Any, block: jax.Array, cap: float
) -> tuple[jax.Array, jax.Array]:
    """Returns scores of a block of rows and a block of keys, and which of them are visible: two [rows, keys]."""
    scores = soft_cap(dot(q[0, 0], keys[0, 0], 1, 1), cap)
    number = block * KEY_BLOCK + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return scores, (number >= low[0]) & (number <= high[0]) & (mask[0] != 0)


def _through_softmax(
    q: Any, keys: Any, values: Any, low: Any, high: Any, mask: Any, lse: Any, delta: Any, gradient: Any,
    block: jax.Array, cap: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns (weights, gradient of products) of a block in the compute dtype; see `prefix_xla.through_softmax`."""
    # MASKED inside the exponential avoids overflow at invisible keys; their weight is 0.
    scores, visible = _scores(q, keys, low, high, mask, block, cap)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, MASKED) - lse[0, 0]), 0.0)
    to_weights = dot(gradient[0, 0], values[0, 0], 1, 1)
    to_scores = weights * (to_weights - delta[0, 0])
    if cap:
        to_scores *= 1.0 - (scores / cap) ** 2
    return weights.astype(q.dtype), to_scores.astype(q.dtype)


def _columns(seen: Range) -> tuple[jax.Array, jax.Array, jax.Array]:
    return seen.low[:, :, None], seen.high[:, :, None], seen.mask.astype(jnp.int32)[:, None]


def _parallel_but_last(grid: tuple[int, ...]) -> pltpu.CompilerParams:
    semantics = [pltpu.PARALLEL] * (len(grid) - 1) + [pltpu.ARBITRARY]
    return pltpu.CompilerParams(dimension_semantics=semantics)


def _spec(kind: str, width: int = 1, *, rows_last: bool = False) -> pl.BlockSpec:
    """Returns the block of an array for one program of the grid (batch, head, block of rows, step over blocks of keys);
    with `rows_last`, of the grid (batch, head, block of keys, block of rows)."""

    def place(b: Any, x: Any, y: Any, first: Any, last: Any) -> tuple[Any, Any]:
        """Returns (block of rows, block of keys). Steps past the last block of keys repeat its index, so that Pallas
        fetches nothing for them."""
        if rows_last:
            return y, x
        return x, jnp.clip(first[b, x] + y, 0, jnp.maximum(last[b, x], 0))

    shape, index = {
        "rows": ((1, 1, ROW_BLOCK, width), lambda b, g, *at: (b, g, place(b, *at)[0], 0)),
        "keys": ((1, 1, KEY_BLOCK, width), lambda b, g, *at: (b, g, place(b, *at)[1], 0)),
        "row numbers": ((1, ROW_BLOCK, 1), lambda b, g, *at: (b, place(b, *at)[0], 0)),
        "key numbers": ((1, 1, KEY_BLOCK), lambda b, g, *at: (b, 0, place(b, *at)[1])),
    }[kind]
    return pl.BlockSpec(shape, index)


_rows, _keys = functools.partial(_spec, "rows"), functools.partial(_spec, "keys")
_row_numbers, _key_numbers = functools.partial(_spec, "row numbers"), functools.partial(_spec, "key numbers")
