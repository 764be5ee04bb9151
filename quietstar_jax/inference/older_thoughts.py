"""Thoughts that serve several tokens of a generated text: a reach of N above 1, see `thoughts/reach.py`.

The chain of a thought is kept while it is used, and each new token of the text continues it:

    x_j, start, t_1 .. t_n, end      predicts x[j+1]
    x[j+1]                           predicts x[j+2]
    ..
    x[j+N-1]                         predicts x[j+N]; then the chain is overwritten

The thought after x_j is in slot j mod (N - 1). Letters: S = N - 1 slots, B sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.inference.kv_cache import cached_pass
from quietstar_jax.models.decoder import KeyValues
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.reach import mixed_over_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings

NONE = -1  # the root where no thought was made


class OlderThoughts(NamedTuple):
    """The thoughts after the S tokens before the newest token of B sequences.

    Attributes:
      chain_kv: [S, layers, B, G, 1, 1, T + 3 + S, H] keys and values of the chains.
      root: [S, B] int32, j, or `NONE`; length: [S, B] int32, how many tokens the chain has.
      hidden: [S, B, D] hidden states at its last token.
    """

    chain_kv: KeyValues
    root: jax.Array
    length: jax.Array
    hidden: jax.Array


def no_older_thoughts(
    a: Architecture, batch: int, settings: ThoughtSettings, place: jax.sharding.Sharding
) -> OlderThoughts:
    """Returns the older thoughts of B sequences before their first token."""
    slots, dtype = settings.reach - 1, settings.dtype
    one = jax.eval_shape(lambda: empty_chains(a, batch, 1, 1, settings.thought_length + 3 + slots, dtype))
    return OlderThoughts(
        jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype, device=place), one),
        jnp.full((slots, batch), NONE, jnp.int32, device=place),
        jnp.zeros((slots, batch), jnp.int32, device=place),
        jnp.zeros((slots, batch, a.hidden_size), dtype, device=place),
    )


def continue_chains(
    model: QuietStar, older: OlderThoughts, newest: jax.Array, at_text: jax.Array, cache: KeyValues
) -> OlderThoughts:
    """Computes the newest token of each text in the chains of its older thoughts.

    A slot in which any sequence continues costs a pass over all sequences; other slots cost nothing.

    Args:
      newest: embeddings [B, 1, D]; at_text: [B] bool, the sequences whose newest token was not computed before.
    """

    def one_slot(_: None, slot: OlderThoughts) -> tuple[None, OlderThoughts]:
        continues = at_text & (slot.root != NONE)

        def read() -> OlderThoughts:
            # Other sequences write after the end of their chains, where nothing reads before the next token is written.
            before = jnp.maximum(slot.root, 0) - 1
            hidden, chain_kv = cached_pass(model.decoder, newest, slot.length, before, cache, slot.chain_kv)
            hidden = jnp.where(continues[:, None], hidden[:, 0], slot.hidden)
            return OlderThoughts(chain_kv, slot.root, slot.length + continues, hidden)

        return None, jax.lax.cond(continues.any(), read, lambda: slot)

    return jax.lax.scan(one_slot, None, older)[1]


def mix_older(
    model: QuietStar, older: OlderThoughts, base: jax.Array, own: jax.Array, has_own: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes the predictions after the older thoughts, and after the newest one where there is one.

    Args:
      base: [B, D] hidden states at the newest tokens; own: [B, D] at the `end` of the thoughts after these.
      has_own: [B] bool; position: [B] of the newest tokens.

    Returns:
      (log-probabilities [B, V] of the next tokens, share [B] of the predictions after thoughts).
    """
    ages = jnp.arange(1, len(older.root) + 1)[:, None]
    slots = (position - ages) % len(older.root)
    talk = jnp.concatenate([own[None], jnp.take_along_axis(older.hidden, slots[..., None], axis=0)])
    used = jnp.concatenate([has_own[None], jnp.take_along_axis(older.root, slots, axis=0) != NONE])
    talk, used = talk.swapaxes(0, 1)[:, None, None], used.T[:, None, None]  # [B, R, J, N, D] and [B, R, J, N]
    scores, weight = mixed_over_thoughts(model, base[:, None], talk, used)
    return scores[:, 0, 0], weight[:, 0, 0]


def remember(
    older: OlderThoughts, chain_kv: KeyValues, length: jax.Array, position: jax.Array, talks: jax.Array,
    has_own: jax.Array,
) -> OlderThoughts:  # fmt: skip
    """Overwrites the slots of the newest tokens, after which texts get another token.

    Args:
      chain_kv: of the thoughts that end, [layers, B, G, 1, 1, T + 3, H]; length: [B] of their chains.
      position: [B] of the newest tokens; talks: [B] bool, whether a text gets a token; has_own: with a thought.
    """
    here = talks & (jnp.arange(len(older.root))[:, None] == position % len(older.root))

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        own = jnp.pad(new, [(0, 0)] * 5 + [(0, kept.shape[6] - new.shape[5]), (0, 0)])
        return jnp.where(here.reshape(len(here), 1, -1, *[1] * 5), own, kept)

    made = (talks & has_own).any()
    return OlderThoughts(
        jax.lax.cond(made, lambda: jax.tree.map(put, older.chain_kv, chain_kv), lambda: older.chain_kv),
        jnp.where(here, jnp.where(has_own, position, NONE), older.root),
        jnp.where(here, length, older.length),
        older.hidden,
    )
