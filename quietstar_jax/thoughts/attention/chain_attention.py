"""Attention of thought chains: to the text before the thought and to the thought itself, in ONE exact softmax.

The X = M * C query rows of chain (r, j) and key/value head g, with M = 2, C = 3, j = 2 (■ sees, · does not see):

                   prefix keys, shared by all chains     keys of chain (r, j)
      m  c          0  1  2  3  4  5  .. P-1              0  1  2  .. E-1
      0  0          ■  ■  ■  ·  ·  ·                      ■  ·  ·
      0  1          ■  ■  ■  ·  ·  ·                      ■  ■  ·
      0  2          ■  ■  ■  ·  ·  ·                      ■  ■  ■
      1  0          ■  ■  ■  ·  ·  ·                      ■  ·  ·
      ..            `prefix_fwd`, block by block          `chain_fwd`, block by block

The chains of all positions are query rows against the same prefix keys, which are never copied. The rows visit first
the keys of their chain, then those of the prefix, block by block with a running maximum and sum (as in FlashAttention).
Scores over all keys never exist in memory, and blocks that no row sees are not computed. The backward pass recomputes
the weights as exp(score - log-sum-exp), from the saved log-sum-exp over both parts.

The same code visits both: a chain attends to itself as the positions of a text with their own keys (`chain_mask`). It
has three implementations with the same result: `prefix_xla` for any device, and the kernels `prefix_mosaic` and
`prefix_triton`; `ModelConfig.prefix_attention` selects one. Chains of at most one block need no kernel.

Axis letters: B batch, G key/value heads, M query heads of each, R thoughts, J positions, C chain tokens, X = M * C
query rows of a chain and head, P prefix keys, E chain keys, H head width. Scores and sums are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from quietstar_jax.models.attention import ATTENTION, split_heads
from quietstar_jax.parallel.axes import manual_shard_map
from quietstar_jax.thoughts.attention import kernel_common, prefix_mosaic, prefix_triton, prefix_xla
from quietstar_jax.thoughts.attention.mask import ChainMask, chain_mask
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState, add_blocks, empty_state

# Each device computes attention for its own sequences and heads, without communication. Only the gradients of keys and
# values are summed, over the devices along `group`.
_OVER = ("data", "fsdp", "tensor", "group")
_QUERIES = ("batch", "kv_heads", None, None, "query_rows", None)
_KEYS, _CHAIN_KEYS = ("batch", "kv_heads", None, None), ("batch", "kv_heads", None, None, None, None)
_CACHE = (None, *_CHAIN_KEYS)


def attend_chains(
    queries: jax.Array, prefix_keys: jax.Array, prefix_values: jax.Array, chain_keys: jax.Array,
    chain_values: jax.Array, seen: ChainMask, prefix_attention: str = "auto", cap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Returns the attention output of one layer for all chains.

    Args:
      queries: [B, R, J, C, G * M, H], scaled; prefix_keys, prefix_values: [B, P, G, H], of the base pass.
      chain_keys, chain_values: [B, G, R, J, E, H]; see `to_chain_layout`.
      prefix_attention: as in `ModelConfig`; cap: soft cap of the scores, 0 = none.

    Returns:
      [B, R, J, C, G * M, H] in the dtype of the values.
    """
    rows = _query_rows(queries, prefix_keys.shape[-2])
    prefix = (prefix_keys.swapaxes(1, 2), prefix_values.swapaxes(1, 2))
    return _from_query_rows(_attention(prefix_attention, cap, rows, *prefix, chain_keys, chain_values, seen), queries)


def attend_step(
    queries: jax.Array, prefix_keys: jax.Array, prefix_values: jax.Array, written_keys: jax.Array,
    written_values: jax.Array, layer: jax.Array, chain_keys: jax.Array, chain_values: jax.Array, seen: ChainMask,
    prefix_attention: str = "auto", cap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """As `attend_chains`, for one token of each chain (C = E = 1) after those that are written.

    The written tokens are read in place, in blocks up to the newest token.

    Args:
      written_keys, written_values: [layers, B, G, R, J, T, H], of which 0 .. c - 1 are used; layer: scalar index;
        chain_keys, chain_values: of token c, `seen.offsets` [1].

    Returns:
      As `attend_chains`; not differentiable.
    """

    def local(_: Any, q: jax.Array, keys: jax.Array, values: jax.Array, *arguments: Any) -> jax.Array:
        *_, new_values, seen = arguments
        # The devices that the program is compiled for are not always those of this process.
        chain = jax.lax.platform_dependent(
            _rows_as_prefix(seen, q), *arguments,
            cpu=functools.partial(over_written, prefix_xla.KEY_BLOCK),
            default=functools.partial(over_written, prefix_xla.ACCELERATOR_KEY_BLOCK),
        )  # fmt: skip
        return _finish(_add_prefix(prefix_attention, cap, q, keys, values, seen, chain), new_values.dtype)

    def over_written(width: int, rows: jax.Array, *arguments: Any) -> prefix_xla.SoftmaxState:
        *written, layer, new_keys, new_values, seen = arguments
        length = written[0].shape[5]
        width = min(width, length)

        def cut(start: jax.Array) -> tuple[jax.Array, jax.Array]:
            is_new = (start + jnp.arange(width) == seen.offsets)[:, None]

            def read(cache: jax.Array, new: jax.Array) -> jax.Array:
                corner, size = (layer, 0, 0, 0, 0, start, 0), (1, *new.shape[:4], width, new.shape[5])
                block = jnp.where(is_new, new, jax.lax.dynamic_slice(cache, corner, size)[0])
                return _keys_as_prefix(block)

            return read(written[0], new_keys), read(written[1], new_values)

        return add_blocks(rows, chain_mask(seen, length), empty_state(rows), width, cut, cap)

    rows = _query_rows(queries, prefix_keys.shape[-2])
    of_rows, of_prefix, _, _, _, of_seen = _arguments(seen)
    axes = (of_rows, of_prefix, of_prefix, _CACHE, _CACHE, (), _CHAIN_KEYS, _CHAIN_KEYS, of_seen)
    context = manual_shard_map(local, _OVER, axes, _QUERIES)(
        rows, prefix_keys.swapaxes(1, 2), prefix_values.swapaxes(1, 2), written_keys, written_values, layer,
        chain_keys, chain_values, seen,
    )  # fmt: skip
    return _from_query_rows(context, queries)


def attend_cache(
    queries: jax.Array, cache_keys: jax.Array, cache_values: jax.Array, layer: jax.Array, chain_keys: jax.Array,
    chain_values: jax.Array, seen: ChainMask, key_block: int, cap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """As `attend_chains`, against one layer of a cache that is read in place: blocks that no chain sees are not read.

    Args:
      cache_keys, cache_values: [layers, B, G, P, H]; layer: scalar index of the layer.
      key_block: keys per block.

    Returns:
      As `attend_chains`; not differentiable.
    """
    rows = _query_rows(queries, cache_keys.shape[2])
    _, batch, groups, length, width = cache_keys.shape
    block = min(key_block, length)

    def cut(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        corner, size = (layer, 0, 0, start, 0), (1, batch, groups, block, width)
        return (
            jax.lax.dynamic_slice(cache_keys, corner, size)[0],
            jax.lax.dynamic_slice(cache_values, corner, size)[0],
        )

    own, chain = _rows_as_prefix(seen, rows), (_keys_as_prefix(chain_keys), _keys_as_prefix(chain_values))
    seen_chain = chain_mask(seen, chain_keys.shape[4])
    state = prefix_xla.prefix_fwd(own, *chain, seen_chain, empty_state(own), cap=cap, width=key_block)
    state = add_blocks(rows, _of_rows(seen, rows), _as_rows(state, rows), block, cut, cap)
    return _from_query_rows(_finish(state, chain_values.dtype), queries)


def _query_rows(queries: jax.Array, groups: int) -> jax.Array:
    """Queries [B, R, J, C, G * M, H] -> rows [B, G, R, J, X, H], row x = m * C + c."""
    rows = split_heads(queries, groups).transpose(0, 4, 1, 2, 5, 3, 6)  # [B, G, R, J, M, C, H]
    return rows.reshape(*rows.shape[:4], -1, rows.shape[-1])


def _of_rows(seen: ChainMask, q: jax.Array) -> ChainMask:
    """Returns the mask with an offset for each row of q [.., X, H]: the C offsets repeat M times."""
    return seen._replace(offsets=jnp.tile(seen.offsets, q.shape[4] // seen.offsets.shape[-1]))


# A chain attends to itself as a text whose C tokens are positions with one query token each, of M query heads that take
# the axis of thoughts (`chain_mask`); each chain is a further key/value head. These shapes copy nothing.
def _rows_as_prefix(seen: ChainMask, x: jax.Array) -> jax.Array:
    """Rows of chains [B, G, R, J, M * C, H] -> [B, G * R * J, M, C, 1, H]."""
    tokens = seen.offsets.shape[-1]
    return x.reshape(len(x), -1, x.shape[4] // tokens, tokens, 1, x.shape[-1])


def _keys_as_prefix(x: jax.Array) -> jax.Array:
    """Keys or values of chains [B, G, R, J, E, H] -> [B, G * R * J, E, H]."""
    return x.reshape(len(x), -1, *x.shape[4:])


def _from_query_rows(context: jax.Array, queries: jax.Array) -> jax.Array:
    """The inverse of `_query_rows`: context [B, G, R, J, X, H] -> [B, R, J, C, G * M, H]."""
    batch, count, chunk, tokens, _, width = queries.shape
    context = context.reshape(batch, context.shape[1], count, chunk, -1, tokens, width)
    return context.transpose(0, 2, 3, 5, 1, 4, 6).reshape(queries.shape)


def to_chain_layout(x: jax.Array) -> jax.Array:
    """Keys or values [B, R, J, C, G, H] -> [B, G, R, J, C, H], the layout for attention."""
    return jnp.moveaxis(x, 4, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    prefix_attention: str, cap: float, q: jax.Array, keys: jax.Array, values: jax.Array, chain_keys: jax.Array,
    chain_values: jax.Array, seen: ChainMask,
):  # fmt: skip
    """q [B, G, R, J, X, H] scaled; keys, values [B, G, P, H], of the chain [B, G, R, J, E, H] -> context like q."""
    return _forward(prefix_attention, cap, q, keys, values, chain_keys, chain_values, seen)[0]


def _forward(prefix_attention: str, cap: float, *arguments: Any) -> tuple[jax.Array, tuple]:
    attend = functools.partial(_attend, prefix_attention, cap)
    context, lse = manual_shard_map(attend, _OVER, _arguments(arguments[-1]), (_QUERIES, _QUERIES))(*arguments)
    # Saved: the arguments, the context and the log-sum-exp [B, G, R, J, X, 1] of each row; no scores and no weights. A
    # rematerialisation policy saves the last two by this name, so that the backward pass does not attend again.
    context = checkpoint_name(context, ATTENTION)
    return context, (*arguments, context, checkpoint_name(lse, ATTENTION))


def _backward(prefix_attention: str, cap: float, saved: tuple, gradient: jax.Array) -> tuple:
    differentiate = functools.partial(_gradients, prefix_attention, cap)
    # saved = (q, keys, values, chain_keys, chain_values, seen, context, lse); `seen` has no gradient.
    axes, gradients = (*_arguments(saved[5]), *(_QUERIES,) * 3), (_QUERIES, _KEYS, _KEYS, _CHAIN_KEYS, _CHAIN_KEYS)
    return *manual_shard_map(differentiate, _OVER, axes, gradients)(*saved, gradient), None


_attention.defvjp(_forward, _backward)


def _arguments(seen: ChainMask) -> tuple[Any, ...]:
    """Logical axes of the array arguments of `_attention`."""
    positions: Any = ("batch", None) if seen.positions.ndim == 2 else ()
    axes: Any = {"mask": ("batch", None), "positions": positions, "offsets": (), "window": ()}
    axes["first"] = None if seen.first is None else ("batch", None)
    return _QUERIES, _KEYS, _KEYS, _CHAIN_KEYS, _CHAIN_KEYS, ChainMask(**axes)


def _choose(
    prefix_attention: str, cap: float, blocks: Callable[..., Any], kernels: Callable[..., Any],
    tpu: Callable[..., Any], gpu: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """Returns the implementation that `ModelConfig.prefix_attention` selects; `auto` depends on the compile target.

    Args:
      cap: soft cap of the scores.
      blocks: in XLA; kernels: the same with a kernel as its first argument, which is `tpu` or `gpu`.
    """
    blocks, kernels = functools.partial(blocks, cap=cap), functools.partial(kernels, cap=cap)
    if prefix_attention == "auto":
        return functools.partial(jax.lax.platform_dependent, tpu=functools.partial(kernels, tpu), default=blocks)
    implementations: dict[str, Callable[..., Any]] = {"blocks": blocks, "triton": functools.partial(kernels, gpu)}
    return implementations[prefix_attention]


def _attend(
    prefix_attention: str, cap: float, _: Any, q: jax.Array, keys: jax.Array, values: jax.Array, chain_keys: jax.Array,
    chain_values: jax.Array, seen: ChainMask,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns (context like q, log-sum-exp [B, G, R, J, X, 1])."""
    chain = _chain_softmax(prefix_attention, cap, q, chain_keys, chain_values, seen)
    state = _add_prefix(prefix_attention, cap, q, keys, values, seen, chain)
    return _finish(state, chain_values.dtype), state.m + jnp.log(state.l)


def _chain_softmax(
    prefix_attention: str, cap: float, q: jax.Array, chain_keys: jax.Array, chain_values: jax.Array, seen: ChainMask
) -> SoftmaxState:
    """Returns the softmax over the chain. Its m is a real score, never MASKED: every token sees itself."""
    forwards = prefix_xla.chain_fwd, kernel_common.prefix_fwd, prefix_mosaic.forward, prefix_triton.forward
    attend = _choose(_for_chain(prefix_attention, chain_keys), cap, *forwards)
    rows, keys, values = _rows_as_prefix(seen, q), _keys_as_prefix(chain_keys), _keys_as_prefix(chain_values)
    return _as_rows(attend(rows, keys, values, chain_mask(seen, keys.shape[2]), empty_state(rows)), q)


def _add_prefix(
    prefix_attention: str, cap: float, q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask,
    chain: SoftmaxState,
) -> SoftmaxState:  # fmt: skip
    """Adds the prefix to the softmax over the chain, in the shapes of `_as_rows`."""
    forwards = prefix_xla.prefix_fwd, kernel_common.prefix_fwd, prefix_mosaic.forward, prefix_triton.forward
    state: SoftmaxState = _choose(prefix_attention, cap, *forwards)(
        q, keys, values, _of_rows(seen, q), _as_rows(chain, q)
    )
    return state


def _gradients(
    prefix_attention: str, cap: float, psum: Any, q: jax.Array, keys: jax.Array, values: jax.Array,
    chain_keys: jax.Array, chain_values: jax.Array, seen: ChainMask, context: jax.Array, lse: jax.Array,
    gradient: jax.Array,
) -> tuple:  # fmt: skip
    """Returns the gradients of q, keys, values, chain_keys and chain_values.

    For a query row q with scores s_i = q . k_i over all keys i, prefix and chain, weights p_i = exp(s_i - lse), context
    o = sum_i p_i v_i, and the gradient g of o:

        dp_i = g . v_i                  `to_weights`
        ds_i = p_i (dp_i - delta)       `to_scores`, delta = sum_i p_i dp_i = g . o
        dq   = sum_i ds_i k_i
        dk_i = ds_i q,  dv_i = p_i g    summed over the rows that share the key

    With a soft cap, ds_i also has the derivative of the cap (see `through_softmax`).

    The keys of one part need only lse and delta of the row from the other part, so the two parts are differentiated
    separately and their dq are added.
    """
    delta = (gradient.astype(jnp.float32) * context.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    of_rows = (q, lse, delta, gradient)
    kernels = kernel_common.prefix_bwd, prefix_mosaic.backward, prefix_triton.backward
    through_chain = _choose(_for_chain(prefix_attention, chain_keys), cap, prefix_xla.chain_bwd, *kernels)
    rows, *others = (_rows_as_prefix(seen, x) for x in of_rows)
    own = rows, _keys_as_prefix(chain_keys), _keys_as_prefix(chain_values), chain_mask(seen, chain_keys.shape[4])
    to_q, *to_chain = through_chain(*own, *others)
    through_prefix = _choose(prefix_attention, cap, prefix_xla.prefix_bwd, *kernels)
    from_prefix, *to_prefix = through_prefix(q, keys, values, _of_rows(seen, q), *of_rows[1:])
    # Devices along `group` have different query heads of the same key/value heads.
    to_keys = psum((*to_prefix, *(x.reshape(chain_keys.shape) for x in to_chain)), "group")
    return tuple(x.astype(q.dtype) for x in (to_q.reshape(q.shape) + from_prefix, *to_keys))


def _for_chain(prefix_attention: str, chain_keys: jax.Array) -> str:
    return "blocks" if chain_keys.shape[4] <= prefix_xla.KEY_BLOCK else prefix_attention


def _as_rows(state: SoftmaxState, q: jax.Array) -> SoftmaxState:
    return SoftmaxState(*(x.reshape(*q.shape[:-1], x.shape[-1]) for x in state))


def _finish(state: SoftmaxState, dtype: jnp.dtype) -> jax.Array:
    return (state.acc / state.l).astype(dtype)
