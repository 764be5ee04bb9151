"""Positions in chunks: chains of different positions are independent, so only some are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.parallel.axes import constrain_tree, manual_shard_map, num_shards
from quietstar_jax.thoughts.attention.prefix_xla import KEY_BLOCK
from quietstar_jax.thoughts.settings import ThoughtSettings

Tree = TypeVar("Tree")
PAST_THE_TEXT = 2**30  # a position that no text has


def chunk_starts(count: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Where each chunk of `count` positions begins, and how far each device's own chunk lies behind it.

    Devices along the position axis take neighbouring chunks, so that all have about as much text before their
    thoughts. The last chunks may reach past the positions.

    Returns:
      ([chunks per device], [devices along the position axis]) int32.
    """
    devices = num_shards("positions")
    return jnp.arange(0, count, chunk * devices), jnp.arange(0, chunk * devices, chunk)


def take_positions(positions: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """A chunk of positions [J] or [B, J]; `PAST_THE_TEXT`, which counts for nothing, where there are no more."""
    index = start + jnp.arange(chunk)
    return jnp.take(positions, index, axis=-1, mode="fill", fill_value=PAST_THE_TEXT)


def take_chunk(tree: Tree, start: jax.Array, chunk: int, axis: int) -> Tree:
    """Entries start .. start + chunk - 1 along the position axis of every array; zeros past the end."""
    index = start + jnp.arange(chunk)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=axis, mode="fill", fill_value=0), tree)


def map_chunks(
    fn: Callable[..., Tree], operands: Any, positions: jax.Array, chunk: int, inputs: Any, *, axis: int
) -> Tree:
    """`fn(operands, positions of a chunk, inputs of these)` for all chunks of positions [J] or [B, J].

    Args:
      operands: pytree of all arrays that every chunk needs; `fn` may not close over arrays.
      inputs: pytree of arrays with the positions along `axis`.

    Returns:
      what `fn` gave, joined along `axis`.
    """
    count = positions.shape[-1]

    def own_chunks(_: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Tree:
        positions, inputs = constants

        def one(start: jax.Array) -> Tree:
            start = start + offset[0]
            return fn(operands, take_positions(positions, start, chunk), take_chunk(inputs, start, chunk, axis))

        return jax.lax.map(one, starts)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, count, axis=axis)

    mapped = _on_own_positions(own_chunks, (None,) * (axis + 1) + ("positions",))
    return jax.tree.map(join, mapped(operands, (positions, inputs), *chunk_starts(count, chunk)))


def sum_chunks(
    fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any, Any]], operands: Any, constants: Any, count: int,
    chunk: int, axes: Any = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Sum over chunks of `fn(operands, constants, start) -> (scalar, aux, carried)`, lean to differentiate.

    Each chunk's gradient is taken right after its value, while its activations are at hand, and only the sum of
    the gradients is kept: no chunk runs twice and the memory is that of one. Possible because the result is a plain
    sum. Devices along the position axis add their sums up once, at the end.

    Args:
      fn: `carried` are some of the operands, by name, as `fn` hands them on (see `layer_scan`), or none.
      operands: floating-point arrays (or pytrees of such) by name, to differentiate; constants: pytree that gets no
        gradient.
      count: positions in all; chunk: how many of them each call takes, from number `start` on.
      axes: the tree of operands with the logical axes of each array, by which its gradient is laid out; None = free.

    Returns:
      (sum of the scalars, sum of the aux; no gradient flows through aux).
    """

    def total(operands: Any, constants: Any) -> tuple[jax.Array, Any]:
        def own(psum: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Any:
            def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, fn(operands, constants, start + offset[0])[:2]), None

            sums = jax.lax.scan(add, _zeros(jax.eval_shape(fn, operands, constants, starts[0])[:2]), starts)[0]
            return psum(sums, "position")

        return _on_own_positions(own, ())(operands, constants, *chunk_starts(count, chunk))

    def forward(operands: Any, constants: Any) -> tuple[tuple[jax.Array, Any], Any]:
        def own(psum: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Any:
            def lay_out(gradients: Any) -> Any:
                return gradients if axes is None else constrain_tree(gradients, axes)

            def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
                sums, gradients = carry

                def value(operands: Any) -> tuple[tuple[jax.Array, Any], Any]:
                    scalar, aux, carried = fn(operands, constants, start + offset[0])
                    return (scalar, carried), aux

                (scalar, carried), back, aux = jax.vjp(value, operands, has_aux=True)
                (more,) = back((jnp.ones_like(scalar), {name: gradients[name] for name in carried}))
                more = lay_out(more)
                # Accumulated in float32 also where the operands are narrower.
                gradients |= {
                    name: x if name in carried else jax.tree.map(_add_wide, gradients[name], x)
                    for name, x in more.items()
                }
                return (jax.tree.map(jnp.add, sums, (scalar, aux)), lay_out(gradients)), None

            sums = _zeros(jax.eval_shape(fn, operands, constants, starts[0])[:2])
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), operands)
            return psum(jax.lax.scan(add, (sums, lay_out(gradients)), starts)[0], "position")

        out, gradients = _on_own_positions(own, ())(operands, constants, *chunk_starts(count, chunk))
        return out, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands)

    def backward(gradients: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangents[0]).astype(g.dtype), gradients), None

    summed = jax.custom_vjp(total)
    summed.defvjp(forward, backward)
    return summed(operands, constants)


def _on_own_positions(fn: Callable[..., Any], out_axes: Any) -> Callable[..., Any]:
    """`fn(operands, constants, starts, offset)` on every device along the position axis with its own offset [1]."""
    return manual_shard_map(fn, ("position",), ((), (), (), ("positions",)), out_axes)


def max_positions_per_chunk(architecture: Architecture, settings: ThoughtSettings, batch: int, length: int) -> int:
    """How many positions fit the memory budget of `ThoughtConfig.chunk_megabytes` on each device of the mesh.

    Counts what the backward pass of one chunk keeps of every layer (`models.decoder.REMAT_POLICY`), what it computes
    again of one, and the logits of thought and talk tokens.

    Args:
      batch: B, sequences of a microbatch on the automatic axes of the mesh; length: L.

    Returns:
      a divisor of the positions that think on a device where one is close, so that no chunk is half empty.
    """
    config, keys = settings.config, min(KEY_BLOCK, length)
    batch, thinking = (
        -(-batch // num_shards("batch")),
        -(-settings.thinking_positions(length) // num_shards("positions")),
    )
    if config.positions_per_chunk:
        return min(config.positions_per_chunk, thinking)
    a = architecture
    heads, mlp, vocab = (
        a.num_heads // num_shards("heads"),
        a.intermediate_size // num_shards("mlp"),
        a.vocab_size // num_shards("vocab"),
    )
    width, head_values = settings.dtype.itemsize, 2 * (heads + a.num_kv_heads // num_shards("kv_heads")) * a.head_dim
    results = (2 * a.hidden_size + head_values + 2 * mlp) * width + 4 * heads
    again = (6 * a.hidden_size + 4 * mlp) * width + 12 * heads * keys
    layers = 1 if settings.rematerialize else a.num_layers
    per_token = a.num_layers * a.hidden_size * width + layers * results + again
    logits = 3 * 4 * vocab * (settings.thought_length + 2 * settings.tokens_ahead)
    return _fitting(settings, batch * settings.num_thoughts * (settings.chain_length * per_token + logits), thinking)


def max_sampled_positions_per_chunk(
    architecture: Architecture, settings: ThoughtSettings, batch: int, length: int
) -> int:
    """The same while thoughts are sampled.

    Each of T steps gathers all weights anew for every chunk, where the mesh has them in parts. There, as many positions
    as fit without a gradient to come go at once: a position keeps no more than the keys and values of its chains.
    """
    config, ahead = settings.config, max_positions_per_chunk(architecture, settings, batch, length)
    if config.positions_per_chunk or num_shards("embed") == 1:
        return ahead
    batch, thinking = (
        -(-batch // num_shards("batch")),
        -(-settings.thinking_positions(length) // num_shards("positions")),
    )
    a, width = architecture, settings.dtype.itemsize
    cache = 2 * a.num_layers * (a.num_kv_heads // num_shards("kv_heads")) * a.head_dim * settings.thought_length * width
    heads, mlp = a.num_heads // num_shards("heads"), a.intermediate_size // num_shards("mlp")
    token = (6 * a.hidden_size + 4 * mlp) * width + 12 * heads * min(KEY_BLOCK, length) + 3 * 4 * a.vocab_size
    return max(ahead, _fitting(settings, batch * settings.num_thoughts * (cache + token), thinking))


def _fitting(settings: ThoughtSettings, bytes_per_position: int, thinking: int) -> int:
    """How many of `thinking` positions fit the budget, or a little fewer, so that chunks are full."""
    fitting = max(1, min(thinking, settings.config.chunk_megabytes * 2**20 // bytes_per_position))
    divisor = max(n for n in range(1, fitting + 1) if thinking % n == 0)
    return divisor if 2 * divisor > fitting else fitting


def _add_wide(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(total.dtype)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
