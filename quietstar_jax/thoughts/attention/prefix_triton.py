"""The prefix part of chain attention as Pallas kernels for NVIDIA GPUs, compiled by Triton.

`forward` and `backward` are the kernels of `kernel_common.prefix_fwd` and `prefix_bwd`, over its rows and blocks:
blocks of keys that no row of a block sees are neither read nor computed.

    kernel                         a program has          and loops over
    forward, gradient of q         one block of rows      the key blocks first .. last of `kernel_common.bounds`
    gradient of keys and values    one block of keys      the row blocks that see it, listed by `_visitors`

A program sums over keys for its own rows, or over rows for its own keys, so that no sum needs atomic additions and
results are deterministic. Products are in the compute dtype, on tensor cores (float32 as XLA's own products:
`jax.default_matmul_precision`); scores and sums are float32. Axis letters as in `kernel_common`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from quietstar_jax.errors import ConfigError
from quietstar_jax.models.attention import MASKED, soft_cap
from quietstar_jax.thoughts.attention.kernel_common import Range, bounds, dot, pad, pad_axis
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState, through_softmax


class Blocks(NamedTuple):
    """rows, keys: sizes of a block, powers of two, at least 16 (the minimum for Triton's products); warps: number of
    warps, of 32 threads each, of the program that computes a block."""

    rows: int
    keys: int
    warps: int


# Keyed by the bytes of one head in the compute dtype, the size of each row and key of a block. The arrays that a
# program keeps for its whole loop and twice (STAGES) those that it fetches per iteration add up to 96 KiB of shared
# memory in each line; weights that become an operand of a product add at most 32 KiB. A program has 163 KiB on A100,
# 227 KiB on H100.
#   forward: rows of q, 2 x keys and values of a block        bytes x (rows + 4 keys)
#   gradient of q: rows of q and of the gradient, the same    bytes x (2 rows + 4 keys)
#   gradients of keys and values: these, 2 x the rows         bytes x (2 keys + 4 rows)
FORWARD = {256: Blocks(128, 64, 8), 512: Blocks(64, 32, 8), 1024: Blocks(32, 16, 4)}
BACKWARD = {256: Blocks(64, 64, 8), 512: Blocks(32, 32, 4), 1024: Blocks(16, 16, 4)}
STAGES = 2
LEAST = 16  # minimum size of each axis of a product


def forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, *, cap: float = 0.0, interpret: bool = False
) -> SoftmaxState:
    """Softmax of scaled queries [B, G, N, H] over keys and values [B, G, P, H]; `interpret` runs on any device.

    `cap` is the soft cap of the scores, 0 = none. A row that sees no key has m = `MASKED` and l = 0.

    Raises:
      ConfigError: heads are wider than the kernels' blocks.
    """
    rows, width, length = q.shape[2], q.shape[3], keys.shape[2]
    blocks = _blocks(FORWARD, q)
    q, keys, values = _pad_heads(q, keys, values)
    q, keys, values, seen = pad(q, keys, values, seen, blocks.rows, blocks.keys)
    batch, groups, padded, full_width = q.shape
    of_rows, numbers = _of_head(blocks.rows), _of_sequence(blocks.rows)
    all_keys = _all_of_head(*keys.shape[2:])
    state = _call(
        functools.partial(_forward_kernel, cap=cap),
        "prefix_attention_forward",
        blocks,
        grid=(padded // blocks.rows, groups, batch),
        in_specs=[
            _of_sequence(1), _of_sequence(1), _of_head(blocks.rows, full_width), numbers, numbers, all_keys, all_keys,
            _all_of_sequence(keys.shape[2]),
        ],
        out_specs=[of_rows, of_rows, _of_head(blocks.rows, full_width)],
        out_shapes=[(batch, groups, padded), (batch, groups, padded), q.shape],
        interpret=interpret,
    )(
        *bounds(seen, length, blocks.rows, blocks.keys), q, seen.low, seen.high, keys, values,
        seen.mask.astype(jnp.int32),
    )  # fmt: skip
    m, l, acc = (x[:, :, :rows] for x in state)
    return SoftmaxState(m[..., None], l[..., None], acc[..., :width])


def backward(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, lse: jax.Array, delta: jax.Array,
    gradient: jax.Array, *, cap: float = 0.0, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of queries, keys and values, float32, from recomputed scores.

    Args:
      lse: [B, G, N, 1] log-sum-exp over prefix and chain; delta: [B, G, N, 1] the gradient times the context,
        summed over H; gradient: [B, G, N, H] of the context.
    """
    rows, length, width = q.shape[2], keys.shape[2], q.shape[3]
    blocks = _blocks(BACKWARD, q)
    q, keys, values, gradient = _pad_heads(q, keys, values, gradient)
    q, keys, values, seen = pad(q, keys, values, seen, blocks.rows, blocks.keys)
    lse, delta, gradient = (pad_axis(x, 2, blocks.rows) for x in (lse, delta, gradient))
    batch, groups, padded, full_width = q.shape
    full_length = keys.shape[2]
    visited = bounds(seen, length, blocks.rows, blocks.keys)
    of_rows = (q, gradient, lse[..., 0], delta[..., 0], seen.low, seen.high)
    of_keys = (keys, values, seen.mask.astype(jnp.int32))

    row_spec, row_numbers = _of_head(blocks.rows, full_width), _of_sequence(blocks.rows)
    all_keys = _all_of_head(full_length, full_width)
    (to_q,) = _call(
        functools.partial(_query_gradient_kernel, cap=cap),
        "prefix_attention_query_gradient",
        blocks,
        grid=(padded // blocks.rows, groups, batch),
        in_specs=[
            _of_sequence(1), _of_sequence(1), row_spec, row_spec, _of_head(blocks.rows), _of_head(blocks.rows),
            row_numbers, row_numbers, all_keys, all_keys, _all_of_sequence(full_length),
        ],
        out_specs=[row_spec],
        out_shapes=[q.shape],
        interpret=interpret,
    )(*visited, *of_rows, *of_keys)  # fmt: skip

    key_spec, all_rows, all_numbers = _of_head(blocks.keys, full_width), _all_of_head(padded), _all_of_sequence(padded)
    every_row = _all_of_head(padded, full_width)
    to_keys, to_values = _call(
        functools.partial(_key_gradient_kernel, cap=cap),
        "prefix_attention_key_gradient",
        blocks,
        grid=(full_length // blocks.keys, groups, batch),
        in_specs=[
            _of_sequence(1), _of_sequence(1, padded // blocks.rows), every_row, every_row, all_rows, all_rows,
            all_numbers, all_numbers, key_spec, key_spec, _of_sequence(blocks.keys),
        ],
        out_specs=[key_spec, key_spec],
        out_shapes=[keys.shape, keys.shape],
        interpret=interpret,
    )(*_visitors(*visited, full_length // blocks.keys), *of_rows, *of_keys)  # fmt: skip
    return to_q[:, :, :rows, :width], to_keys[:, :, :length, :width], to_values[:, :, :length, :width]


def _forward_kernel(
    first, last, q, low, high, keys, values, mask, m_out, l_out, acc_out, *, blocks: Blocks, cap: float
):
    # q [rows, H], low and high [rows] are the program's block; keys, values [P, H] and mask [P] are whole, and the loop
    # loads a block at a time. first, last [1] are the key blocks of this block of rows.
    rows, seen = q[...], (low[...][:, None], high[...][:, None])

    def block(i: jax.Array, state: tuple) -> tuple:
        m, l, acc = state
        at = pl.ds(i * blocks.keys, blocks.keys)
        visible = _visible(_numbers(i, blocks.keys)[None, :], *seen, mask[at][None, :])
        scores = soft_cap(dot(rows, keys[at, :], 1, 1), cap)
        # l and acc are rescaled to the new m, as in `prefix_xla.add_blocks`. While a row has seen no key, its m is
        # MASKED and exp(scores - new_m) is meaningless: the outer `where` sets these weights to 0.
        new_m = jnp.maximum(m, jnp.where(visible, scores, MASKED).max(axis=1))
        weights = jnp.where(visible, jnp.exp(scores - new_m[:, None]), 0.0)
        rescale = jnp.exp(m - new_m)
        added = dot(weights.astype(values.dtype), values[at, :], 1, 0)
        return new_m, l * rescale + weights.sum(axis=1), acc * rescale[:, None] + added

    none = jnp.full((blocks.rows,), MASKED, jnp.float32), jnp.zeros((blocks.rows,), jnp.float32)
    state = jax.lax.fori_loop(first[0], last[0] + 1, block, (*none, jnp.zeros(rows.shape, jnp.float32)))
    m_out[...], l_out[...], acc_out[...] = state


def _query_gradient_kernel(
    first, last, q, gradient, lse, delta, low, high, keys, values, mask, to_q, *, blocks: Blocks, cap: float
):
    rows, of_context, seen = q[...], gradient[...], (low[...][:, None], high[...][:, None])
    saved = lse[...][:, None], delta[...][:, None]

    def block(i: jax.Array, acc: jax.Array) -> jax.Array:
        at = pl.ds(i * blocks.keys, blocks.keys)
        block_keys = keys[at, :]
        visible = _visible(_numbers(i, blocks.keys)[None, :], *seen, mask[at][None, :])
        scores = jnp.where(visible, soft_cap(dot(rows, block_keys, 1, 1), cap), MASKED)
        to_weights = dot(of_context, values[at, :], 1, 1)
        _, to_scores = through_softmax(scores, to_weights, *saved, q.dtype, cap)
        return acc + dot(to_scores, block_keys, 1, 0)

    to_q[...] = jax.lax.fori_loop(first[0], last[0] + 1, block, jnp.zeros(rows.shape, jnp.float32))


def _key_gradient_kernel(
    count, order, q, gradient, lse, delta, low, high, keys, values, mask, to_keys, to_values, *, blocks: Blocks,
    cap: float,
):  # fmt: skip
    """Scores are [keys, rows] here, so that the products that are summed need no transposed operand."""
    # count [1] row blocks see this block of keys; the loop visits order[0, :count] and skips the others.
    block_keys, block_values = keys[...], values[...]
    numbers, real = _numbers(pl.program_id(0), blocks.keys)[:, None], mask[...][:, None]

    def block(i: jax.Array, sums: tuple) -> tuple:
        at = pl.ds(order[0, i] * blocks.rows, blocks.rows)
        rows, of_context = q[at, :], gradient[at, :]
        visible = _visible(numbers, low[at][None, :], high[at][None, :], real)
        scores = jnp.where(visible, soft_cap(dot(block_keys, rows, 1, 1), cap), MASKED)
        to_weights = dot(block_values, of_context, 1, 1)
        weights, to_scores = through_softmax(scores, to_weights, lse[at][None, :], delta[at][None, :], q.dtype, cap)
        return sums[0] + dot(to_scores, rows, 1, 0), sums[1] + dot(weights, of_context, 1, 0)

    zeros = jnp.zeros(block_keys.shape, jnp.float32)
    to_keys[...], to_values[...] = jax.lax.fori_loop(0, count[0], block, (zeros, zeros))


def _visible(numbers: jax.Array, low: jax.Array, high: jax.Array, real: jax.Array) -> jax.Array:
    return (numbers >= low) & (numbers <= high) & (real != 0)


def _numbers(block: jax.Array, size: int) -> jax.Array:
    """Returns the numbers of the keys in a block, int32 [size]."""
    return block * size + jax.lax.iota(jnp.int32, size)


def _visitors(first: jax.Array, last: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Finds the blocks of rows that see each block of keys, from the `kernel_common.bounds` [B, row blocks].

    Returns:
      (their number [B, key blocks], all row blocks with those that see it first [B, key blocks, row blocks]), int32.
    """
    number = jnp.arange(key_blocks)[:, None]
    sees = (first[:, None] <= number) & (number <= last[:, None])
    order = jnp.argsort(~sees, axis=-1, stable=True)
    return sees.sum(axis=-1, dtype=jnp.int32), order.astype(jnp.int32)


def _blocks(sizes: Mapping[int, Blocks], q: jax.Array) -> Blocks:
    needed = _full_width(q.shape[-1]) * q.dtype.itemsize
    for size, blocks in sizes.items():
        if needed <= size:
            return blocks
    raise ConfigError(
        f"model.prefix_attention is 'triton', but heads of {q.shape[-1]} numbers in {q.dtype} are wider than the GPU "
        f"kernel's blocks ({max(sizes)} bytes). Set it to 'blocks'."
    )


def _pad_heads(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Pads arrays [.., H] with zeros to a width that Triton's products accept."""
    return [pad_axis(x, x.ndim - 1, _full_width(x.shape[-1])) for x in arrays]


def _full_width(width: int) -> int:
    """Returns the next power of two, at least `LEAST`."""
    return max(LEAST, 1 << (width - 1).bit_length())


def _call(
    kernel: Callable[..., None], name: str, blocks: Blocks, *, grid: tuple[int, int, int],
    in_specs: list[pl.BlockSpec], out_specs: list[pl.BlockSpec], out_shapes: list[tuple[int, ...]], interpret: bool,
) -> Callable[..., Any]:  # fmt: skip
    """Returns the kernel over a grid (block of its own axis, head, sequence). Neighbouring programs on this grid share
    the other arrays that they read."""
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in out_shapes],
        compiler_params=_triton().CompilerParams(num_warps=blocks.warps, num_stages=STAGES),
        interpret=interpret,
        name=name,
    )


def _triton() -> Any:
    """Returns JAX's Triton module, deprecated in 0.12. Imported on use, so that nothing else depends on it.

    Raises:
      ConfigError: this version of JAX does not have it.
    """
    try:
        from jax.experimental.pallas import triton
    except ImportError as error:
        raise ConfigError(
            f"model.prefix_attention is 'triton', but jax {jax.__version__} cannot compile the kernels for GPUs: it no "
            "longer has Triton. Set it to 'auto' or 'blocks', or install jax 0.12 or older."
        ) from error
    return triton


def _of_head(size: int, *width: int) -> pl.BlockSpec:
    """A program's own block of an array [B, G, N or P, ...]."""
    return pl.BlockSpec((None, None, size, *width), lambda i, g, b: (b, g, i, *(0,) * len(width)))


def _all_of_head(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), lambda i, g, b: (b, g, *(0,) * len(shape)))


def _of_sequence(size: int, *width: int) -> pl.BlockSpec:
    """A program's own block of an array [B, N or P, ...]."""
    return pl.BlockSpec((None, size, *width), lambda i, g, b: (b, i, *(0,) * len(width)))


def _all_of_sequence(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size), lambda i, g, b: (b, 0))
