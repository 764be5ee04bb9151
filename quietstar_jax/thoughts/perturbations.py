"""Perturbations of given thoughts, between sampling and scoring: do predictions depend on their content?

A share of each thought's T tokens is changed, n = `changed_tokens(T, percent)` tokens, the same number in every
thought. With T = 5 and the order of places 3 0 4 1 2 (0-based), for n = 2:

| kind | thought | tokens between start and end |
|---|---|---|
| | a b c d e | a b c d e |
| `delete` | places 3 and 0 are removed | b c e |
| `truncate` | the last two are removed | a b c |
| `replace` | places 3 and 0 get random tokens | x b c y e |
| `shuffle` | places 3 and 0 exchange their tokens | d b c a e |

Removed tokens are absent: the chain has T - n tokens between start and end, at consecutive rotary positions, and no key
of a removed token exists. With n = T the thought is empty: only start and end remain. The order of places and the
random tokens do not depend on n, so a token that is deleted or replaced at a smaller share also is at a larger one.
Where thoughts differ in length, the share is that of each thought's own tokens (`perturb_each`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.errors import ConfigError
from quietstar_jax.settings import one_of
from quietstar_jax.thought_config import Perturbation
from quietstar_jax.thoughts.controls import random_tokens
from quietstar_jax.thoughts.ending import ENDED, thought_lengths

PERCENTS = (0, 20, 40, 60, 80, 100)  # the shares of a curve


class PerturbationDraws(NamedTuple):
    """All random numbers of perturbations, float32 uniform in [0, 1), [B, R, J, T].

    Attributes:
      places: their ranks are the order in which the places of a thought are changed.
      tokens: select the random tokens of `replace`.
    """

    places: jax.Array
    tokens: jax.Array


def draw_perturbations(key: jax.Array, shape: tuple[int, ...]) -> PerturbationDraws:
    """Draws `PerturbationDraws` for thoughts of this shape."""
    return PerturbationDraws(jax.random.uniform(key, shape), jax.random.uniform(jax.random.fold_in(key, 1), shape))


def changed_tokens(length: Any, percent: int) -> Any:
    """Returns how many of a thought's `length` tokens are changed at a share of `percent`, rounded; int or array."""
    return (2 * length * percent + 100) // 200


def perturb(
    tokens: jax.Array, draws: PerturbationDraws, kind: str, count: int, *, vocab_size: int,
    meta_tokens: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """Returns thoughts of which `count` tokens are changed.

    Args:
      tokens: [B, R, J, T]; draws: [B, R, J, T] each; `truncate` uses none of them.
      kind: a `Perturbation`.
      count: n, 0 .. T.
      vocab_size, meta_tokens: `replace` draws uniformly from the vocabulary without the meta tokens.

    Returns:
      [B, R, J, T] int32, or [B, R, J, T - n] for `delete` and `truncate`.
    """
    if problems := one_of("kind", kind, Perturbation):
        raise ConfigError(f"{problems[0]}.")
    length = tokens.shape[-1]
    if not 0 <= count <= length:
        raise ValueError(f"count is {count}; it must be 0 .. {length}, the tokens of a thought.")
    if kind == "truncate":
        return tokens[..., : length - count]
    order = jnp.argsort(draws.places, axis=-1)
    changed = jnp.argsort(order, axis=-1) < count  # the inverse of a permutation gives the rank of each place
    if kind == "delete":
        kept = jnp.argsort(changed, axis=-1, stable=True)[..., : length - count]
        return jnp.take_along_axis(tokens, kept, axis=-1)
    if kind == "replace":
        return jnp.where(changed, random_tokens(draws.tokens, vocab_size, meta_tokens), tokens)
    # The tokens of the chosen places rotate by one place, in random order: with two or more places, each token moves.
    source = jnp.concatenate([jnp.roll(order[..., :count], 1, axis=-1), order[..., count:]], axis=-1)
    source = jnp.take_along_axis(source, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.take_along_axis(tokens, source, axis=-1)


def perturb_each(
    tokens: jax.Array, draws: PerturbationDraws, kind: str, percent: int, *, vocab_size: int,
    meta_tokens: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """Returns thoughts of different lengths, of which a share of each one's own tokens is changed.

    Args:
      tokens: [B, R, J, T], `ENDED` after the end of a thought; percent: 0 .. 100; the others as for `perturb`.

    Returns:
      [B, R, J, T] int32; thoughts of which tokens are removed end earlier.
    """
    if problems := one_of("kind", kind, Perturbation):
        raise ConfigError(f"{problems[0]}.")
    step, length = jnp.arange(tokens.shape[-1]), thought_lengths(tokens)[..., None]
    count = changed_tokens(length, percent)
    order = jnp.argsort(jnp.where(step < length, draws.places, 2.0), axis=-1)  # places after the end are last
    rank = jnp.argsort(order, axis=-1)
    if kind == "replace":
        return jnp.where(rank < count, random_tokens(draws.tokens, vocab_size, meta_tokens), tokens)
    if kind == "shuffle":
        rotated = jnp.take_along_axis(order, jnp.where(step < count, (step - 1) % jnp.maximum(count, 1), step), axis=-1)
        return jnp.take_along_axis(tokens, jnp.take_along_axis(rotated, rank, axis=-1), axis=-1)
    kept = jnp.argsort(rank < count, axis=-1, stable=True) if kind == "delete" else step
    moved = jnp.take_along_axis(tokens, jnp.broadcast_to(kept, tokens.shape), axis=-1)
    return jnp.where(step < length - count, moved, ENDED)
