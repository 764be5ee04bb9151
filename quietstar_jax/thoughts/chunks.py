"""Maps and sums over chunks of positions, so that only the chains of one chunk are in memory at a time.

Chains of different positions are independent. With 14 positions, chunks of 4 and 2 devices along the position axis,
`chunk_starts` returns starts [0, 8] and offsets [0, 4]; a device processes the chunk at start + its offset:

    position    0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13  .  .     . = PAST_THE_TEXT
    start       0            0            8            8
    device      0            1            0            1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.parallel.axes import constrain_tree, manual_shard_map, num_shards, on_all_devices
from quietstar_jax.thoughts.attention.prefix_xla import KEY_BLOCK
from quietstar_jax.thoughts.settings import ThoughtSettings

Tree = TypeVar("Tree")
PAST_THE_TEXT = 2**30  # position that fills incomplete chunks; no text is this long
# Float32 arrays [V] counted for each predicted distribution: its logits, which `cross_entropy` saves, their gradient,
# and one for intermediate results. Compiled for a CPU, scoring has 2.0 per thought token, and 3.3 to 4.8 per token
# ahead, which has two distributions: without and with the thought. Sampling has 4.0 there, and is counted with 3 too.
LOGITS_ALIVE = 3
TOKEN_BLOCK = 64  # thought tokens of a chain whose logits exist at a time, see `score.score_actions`
# Where memory allows, packed positions have at most PACKED_CHUNKS chunks, of about PACKED_CHAINS chains or more on each
# device. Small chunks compute little in vain, but many small chunks are slow if most of them must be computed.
PACKED_CHUNKS, PACKED_CHAINS = 32, 16


class Packed(NamedTuple):
    """J positions reordered so that the chosen ones come first: most chunks then have none and are skipped.

    A chunk is computed if any sequence of the batch has a chosen position in it.

        chosen           ■        ■  ■
        place         0  1  2  3  4  5
        order         1  4  5  0  2  3
        positions     1  4  5  .  .  .     . = PAST_THE_TEXT

    Attributes:
      positions: [B, J] int32, the chosen positions, then `PAST_THE_TEXT`; from `pack`, in ascending order.
      order: [B, J] int32, places of the chosen ones among the J positions, then those of the others.
    """

    positions: jax.Array
    order: jax.Array

    def take(self, values: Tree) -> Tree:
        """Returns arrays [B, R, J, ...] in packed order."""
        return jax.tree.map(lambda x: take_places(x, self.order), values)

    def put_back(self, values: Tree, fill: int = 0) -> Tree:
        """Undoes `take`: returns arrays [B, R, J, ...] in the original order, `fill` where not chosen."""
        chosen = self.positions != PAST_THE_TEXT

        def put(x: jax.Array) -> jax.Array:
            there = jnp.expand_dims(chosen[:, None], tuple(range(3, x.ndim)))
            return take_places(jnp.where(there, x, jnp.array(fill, x.dtype)), self.slots)

        return jax.tree.map(put, values)

    @property
    def slots(self) -> jax.Array:
        """The inverse of `order`: where in packed order each of the J positions is, [B, J] int32."""
        return jnp.argsort(self.order, axis=1)


def pack(positions: jax.Array, chosen: jax.Array) -> Packed:
    """Packs the chosen ones of positions [J]; chosen: [B, J] bool."""
    order = jnp.argsort(~chosen, axis=1, stable=True)
    taken = jnp.arange(positions.size) < chosen.sum(axis=1)[:, None]
    return Packed(jnp.where(taken, positions[order], PAST_THE_TEXT), order)


def take_places(x: jax.Array, places: jax.Array) -> jax.Array:
    """Returns values [B, R, J, ...] at places [B, J]."""
    return jnp.take_along_axis(x, jnp.expand_dims(places[:, None], tuple(range(3, x.ndim))), axis=2)


def chunk_starts(count: int, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns where chunks of `count` positions start, and the offset of each device's chunk from a start.

    Devices along the position axis process neighbouring chunks, so that their prefixes are about equally long. The
    last chunks may extend past the positions.

    Returns:
      ([chunks per device], [devices along the position axis]) int32.
    """
    devices = num_shards("positions")
    return jnp.arange(0, count, chunk * devices), jnp.arange(0, chunk * devices, chunk)


def take_positions(positions: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    """Returns a chunk of positions [J] or [B, J]; past their end, `PAST_THE_TEXT`, which contributes nothing."""
    index = start + jnp.arange(chunk)
    return jnp.take(positions, index, axis=-1, mode="fill", fill_value=PAST_THE_TEXT)


def take_chunk(tree: Tree, start: jax.Array, chunk: int, axis: int) -> Tree:
    """Returns entries start .. start + chunk - 1 along the position axis of every array; zeros past the end."""
    index = start + jnp.arange(chunk)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=axis, mode="fill", fill_value=0), tree)


def map_chunks(
    fn: Callable[..., Tree], operands: Any, positions: jax.Array | Packed, chunk: int, inputs: Any, *, axis: int
) -> Tree:
    """Calls `fn(operands, positions of a chunk, inputs of a chunk)` for all chunks of positions [J] or [B, J].

    Args:
      operands: pytree of all arrays that every chunk needs; `fn` must not close over arrays.
      positions: if packed, chunks without a chosen position are skipped.
      inputs: pytree of arrays with the positions along `axis`; in packed order if the positions are packed.

    Returns:
      The results of `fn`, joined along `axis`. Of packed positions, those after the chosen ones are not defined:
      `Packed.put_back` replaces them.
    """
    packed = isinstance(positions, Packed)
    if isinstance(positions, Packed):
        positions = positions.positions
    count = positions.shape[-1]

    def local_chunks(_: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Tree:
        positions, inputs = constants

        def one(start: jax.Array) -> Tree:
            start = start + offset[0]
            own = take_positions(positions, start, chunk)
            of_chunk = operands, own, take_chunk(inputs, start, chunk, axis)
            if not packed:
                return fn(*of_chunk)
            nothing = jax.eval_shape(fn, *of_chunk)
            empty = on_all_devices((own == PAST_THE_TEXT).all())
            return jax.lax.cond(empty, lambda *_: _zeros(nothing), fn, *of_chunk)

        return jax.lax.map(one, starts)

    # `jax.lax.map` stacks the chunks of a device along a new axis 0, and the results of the devices are concatenated
    # along the position axis, now axis + 1: [starts, ..., devices * chunk, ...]. Axis 0 moves in front of the position
    # axis, and the two merge into positions in order; the last chunks are cut to `count`.
    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, count, axis=axis)

    mapped = _on_local_positions(local_chunks, (None,) * (axis + 1) + ("positions",))
    return jax.tree.map(join, mapped(operands, (positions, inputs), *chunk_starts(count, chunk)))


def sum_chunks(
    fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any, Any]], operands: Any, constants: Any, count: int,
    chunk: int, axes: Any = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Sums `fn(operands, constants, start) -> (scalar, aux, carried)` over chunks, with the memory of one chunk.

    The custom gradient computes each chunk's gradient right after its value, while the activations of the chunk exist,
    and saves only the sum of the gradients for the backward pass:

        forward    for each chunk i:  value_i, vjp_i = jax.vjp(fn_i);  gradients += vjp_i(1)
        backward   gradient of the operands = cotangent of the sum * gradients

    This is exact because the result is a plain sum S = f_1 + f_2 + ...: dS/dx is the sum of the df_i/dx, and the
    scalar cotangent of S factors out. No chunk runs again in the backward pass. The sums of the devices along the
    position axis are added once, at the end.

    Args:
      fn: `carried` holds some of the operands, by name, as `fn` returns them unchanged (see `layer_scan`), or nothing.
      operands: floating-point arrays (or pytrees of such) by name, to differentiate; constants: pytree that gets no
        gradient.
      count: number of all positions; chunk: number of positions of each call, from number `start` on.
      axes: the tree of operands with the logical axes of each array, which its gradient gets too; None = no constraint.

    Returns:
      (sum of the scalars, sum of the aux; no gradient flows through aux).
    """

    def total(operands: Any, constants: Any) -> tuple[jax.Array, Any]:
        def local(psum: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Any:
            def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, fn(operands, constants, start + offset[0])[:2]), None

            sums = jax.lax.scan(add, _zeros(jax.eval_shape(fn, operands, constants, starts[0])[:2]), starts)[0]
            return psum(sums, "position")

        return _on_local_positions(local, ())(operands, constants, *chunk_starts(count, chunk))

    def forward(operands: Any, constants: Any) -> tuple[tuple[jax.Array, Any], Any]:
        def local(psum: Any, operands: Any, constants: Any, starts: jax.Array, offset: jax.Array) -> Any:
            def lay_out(gradients: Any) -> Any:
                return gradients if axes is None else constrain_tree(gradients, axes)

            def add(carry: Any, start: jax.Array) -> tuple[Any, None]:
                sums, gradients = carry

                def value(operands: Any) -> tuple[tuple[jax.Array, Any], Any]:
                    scalar, aux, carried = fn(operands, constants, start + offset[0])
                    return (scalar, carried), aux

                # The sum so far is the cotangent of the carried operands. As `fn` returns them unchanged, their new
                # gradient is this sum plus the gradient of the chunk: it replaces the sum. Others are added below.
                (scalar, carried), back, aux = jax.vjp(value, operands, has_aux=True)
                (more,) = back((jnp.ones_like(scalar), {name: gradients[name] for name in carried}))
                more = lay_out(more)
                # Gradients accumulate in float32 even where the operands are narrower.
                gradients |= {
                    name: x if name in carried else jax.tree.map(_add_wide, gradients[name], x)
                    for name, x in more.items()
                }
                return (jax.tree.map(jnp.add, sums, (scalar, aux)), lay_out(gradients)), None

            sums = _zeros(jax.eval_shape(fn, operands, constants, starts[0])[:2])
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), operands)
            return psum(jax.lax.scan(add, (sums, lay_out(gradients)), starts)[0], "position")

        out, gradients = _on_local_positions(local, ())(operands, constants, *chunk_starts(count, chunk))
        return out, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands)

    def backward(gradients: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangents[0]).astype(g.dtype), gradients), None

    summed = jax.custom_vjp(total)
    summed.defvjp(forward, backward)
    return summed(operands, constants)


def _on_local_positions(fn: Callable[..., Any], out_axes: Any) -> Callable[..., Any]:
    """Runs `fn(operands, constants, starts, offset)` on each device along the position axis with its own offset [1]."""
    return manual_shard_map(fn, ("position",), ((), (), (), ("positions",)), out_axes)


def chunk_size(positions: jax.Array | Packed, most: int, thoughts: int) -> int:
    """Returns how many of J positions a chunk has: at most `most`, and few if they are packed.

    Where the mesh shards the weights, every chunk gathers them again, so chunks of packed positions are as large as
    others.

    Args:
      thoughts: R, per position.
    """
    if not isinstance(positions, Packed):
        return even_chunk(positions.shape[-1], most)
    batch, count = positions.positions.shape
    if num_shards("embed") == 1:
        least = PACKED_CHAINS // (thoughts * -(-batch // num_shards("batch")))
        most = min(most, max(1, least, -(-count // PACKED_CHUNKS)))
    return even_chunk(count, most)


def even_chunk(count: int, most: int) -> int:
    """Returns the smallest chunk that divides `count` positions into as few chunks as chunks of `most` do."""
    count = -(-count // num_shards("positions"))
    return -(-count // -(-count // most))


def max_positions_per_chunk(architecture: Architecture, settings: ThoughtSettings, batch: int, length: int) -> int:
    """Returns how many positions fit the memory budget `ThoughtConfig.chunk_megabytes` on each device of the mesh.

    Counts the arrays of one chunk that every layer saves for the backward pass (`models.decoder.REMAT_POLICY`), those
    that are recomputed for one layer at a time, and the logits of thought and talk tokens.

    Args:
      batch: B, sequences of a microbatch on the automatic axes of the mesh; length: L.

    Returns:
      A divisor of the number of thinking positions per device if one is close to the limit, so that chunks are full.
    """
    config, keys = settings.config, min(KEY_BLOCK, max(length, settings.chain_length))
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
    # Bytes of a chain token in one layer. `results` are saved: query, context, key, value; both outputs of width D;
    # gate and up; the float32 log-sum-exp per head. `again` is recomputed, with float32 scores over a block of keys.
    width, head_values = settings.dtype.itemsize, 2 * (heads + a.num_kv_heads // num_shards("kv_heads")) * a.head_dim
    results = (2 * a.hidden_size + head_values + 2 * mlp) * width + 4 * heads
    again = (6 * a.hidden_size + 4 * mlp) * width + 12 * heads * keys
    # Every layer saves its input [D]; with `rematerialize`, only one layer at a time has the rest.
    layers = 1 if settings.rematerialize else a.num_layers
    per_token = a.num_layers * a.hidden_size * width + layers * results + again
    logits = LOGITS_ALIVE * 4 * vocab * (min(settings.thought_length, TOKEN_BLOCK) + 2 * settings.tokens_ahead)
    return _fitting(settings, batch * settings.num_thoughts * (settings.chain_length * per_token + logits), thinking)


def max_sampled_positions_per_chunk(
    architecture: Architecture, settings: ThoughtSettings, batch: int, length: int
) -> int:
    """Returns how many positions fit the memory budget while thoughts are sampled.

    Where the mesh shards the weights (`fsdp`), each of T steps gathers all weights again for every chunk. Chunks are
    then as large as fits without a backward pass: a position stores only the keys and values of its chains. Otherwise
    the result is that of `max_positions_per_chunk`.
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
    token = (
        (6 * a.hidden_size + 4 * mlp) * width + 12 * heads * min(KEY_BLOCK, length) + LOGITS_ALIVE * 4 * a.vocab_size
    )
    return max(ahead, _fitting(settings, batch * settings.num_thoughts * (cache + token), thinking))


def _fitting(settings: ThoughtSettings, bytes_per_position: int, thinking: int) -> int:
    """Returns how many positions fit the budget, or the largest divisor of `thinking` that fits if it is close."""
    fitting = max(1, min(thinking, settings.config.chunk_megabytes * 2**20 // bytes_per_position))
    divisor = max(n for n in range(1, fitting + 1) if thinking % n == 0)
    return divisor if 2 * divisor > fitting else fitting


def _add_wide(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(total.dtype)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
