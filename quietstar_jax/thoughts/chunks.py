"""Positions in chunks: chains of different positions are independent, so only some are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from quietstar_jax.config import Architecture
from quietstar_jax.thoughts.attention import KEY_BLOCK
from quietstar_jax.thoughts.settings import ThoughtSettings

Tree = TypeVar("Tree")
PAST_THE_TEXT = 2**30  # a position that no text has


def chunk_starts(count: int, chunk: int) -> jax.Array:
    """Where each chunk of `count` positions begins. The last one may reach past them."""
    return jnp.arange(0, count, chunk)


def take_positions(positions: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """A chunk of positions [J] or [B, J]; `PAST_THE_TEXT`, which counts for nothing, where there are no more."""
    index = start + jnp.arange(chunk)
    return jnp.take(positions, index, axis=-1, mode="fill", fill_value=PAST_THE_TEXT)


def take_chunk(tree: Tree, start: jax.Array, chunk: int, axis: int) -> Tree:
    """Entries start .. start + chunk - 1 along the position axis of every array; zeros past the end."""
    index = start + jnp.arange(chunk)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=axis, mode="fill", fill_value=0), tree)


def map_chunks(fn: Callable[..., Tree], positions: jax.Array, chunk: int, inputs: Any, *, axis: int) -> Tree:
    """`fn(positions of a chunk, inputs of these)` for all chunks of positions [J] or [B, J], joined along `axis`."""
    count = positions.shape[-1]

    def one(start: jax.Array) -> Tree:
        return fn(take_positions(positions, start, chunk), take_chunk(inputs, start, chunk, axis))

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, count, axis=axis)

    return jax.tree.map(join, jax.lax.map(one, chunk_starts(count, chunk)))


def sum_chunks(
    fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]], operands: Any, constants: Any, starts: jax.Array
) -> tuple[jax.Array, Any]:
    """Sum over chunks of `fn(operands, constants, start) -> (scalar, aux)`, lean to differentiate.

    Each chunk's gradient is taken right after its value, while its activations are at hand, and only the sum of
    the gradients is kept: no chunk runs twice and the memory is that of one. Possible because the result is a plain
    sum.

    Args:
      operands: pytree of floating-point arrays to differentiate; constants: pytree that gets no gradient.
      starts: [chunks] first position of each chunk.

    Returns:
      (sum of the scalars, sum of the aux; no gradient flows through aux).
    """

    def total(operands: Any, constants: Any, starts: jax.Array) -> tuple[jax.Array, Any]:
        def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, fn(operands, constants, start)), None

        return jax.lax.scan(add, _zeros(jax.eval_shape(fn, operands, constants, starts[0])), starts)[0]

    def forward(operands: Any, constants: Any, starts: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        value_and_grad = jax.value_and_grad(fn, has_aux=True)

        def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
            step = value_and_grad(operands, constants, start)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, step), None

        # Accumulated in float32 also where the operands are narrower.
        sums = _zeros(jax.eval_shape(fn, operands, constants, starts[0]))
        gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), operands)
        out, gradients = jax.lax.scan(add, (sums, gradients), starts)[0]
        return out, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands)

    def backward(gradients: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None, None]:
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangents[0]).astype(g.dtype), gradients), None, None

    summed = jax.custom_vjp(total)
    summed.defvjp(forward, backward)
    return summed(operands, constants, starts)


def positions_per_chunk(architecture: Architecture, settings: ThoughtSettings, batch: int, length: int) -> int:
    """How many positions fit the memory budget of `ThoughtConfig.chunk_megabytes`.

    Counts what the backward pass of one chunk keeps of every layer (`models.decoder.KEPT`), what it computes again of
    one, and the logits of thought and talk tokens.

    Args:
      batch: B, sequences per device and microbatch; length: L.

    Returns:
      a divisor of the number of positions that think where one is close, so that no chunk is half empty.
    """
    config, thinking = settings.config, settings.thinking_positions(length)
    if config.positions_per_chunk:
        return min(config.positions_per_chunk, thinking)
    a = architecture
    width, heads = settings.dtype.itemsize, (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    results = (2 * a.hidden_size + heads + 2 * a.intermediate_size) * width + 4 * a.num_heads
    again = (6 * a.hidden_size + 4 * a.intermediate_size) * width + 12 * a.num_heads * min(KEY_BLOCK, length)
    layers = 1 if settings.rematerialize else a.num_layers
    per_token = a.num_layers * a.hidden_size * width + layers * results + again
    logits = 3 * 4 * a.vocab_size * (settings.length + 2 * settings.tokens_ahead)
    per_position = batch * settings.count * (settings.chain_length * per_token + logits)
    fitting = max(1, min(thinking, config.chunk_megabytes * 2**20 // per_position))
    divisor = max(n for n in range(1, fitting + 1) if thinking % n == 0)
    return divisor if 2 * divisor > fitting else fitting


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
