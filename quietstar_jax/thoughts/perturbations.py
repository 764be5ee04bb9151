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
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.errors import ConfigError
from quietstar_jax.thoughts.controls import random_tokens

KINDS = ("delete", "replace", "truncate", "shuffle")
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


def check_kind(kind: str) -> None:
    """Raises ConfigError if there is no such perturbation; suggests the nearest one."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"perturb is {kind!r}; it must be one of {', '.join(KINDS)}.{hint}")


def changed_tokens(length: int, percent: int) -> int:
    """Returns how many of a thought's `length` tokens are changed at a share of `percent`, rounded."""
    return (2 * length * percent + 100) // 200


def perturb(
    tokens: jax.Array, draws: PerturbationDraws, kind: str, count: int, *, vocab_size: int,
    meta_tokens: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """Returns thoughts of which `count` tokens are changed.

    Args:
      tokens: [B, R, J, T]; draws: [B, R, J, T] each; `truncate` uses none of them.
      kind: one of `KINDS`.
      count: n, 0 .. T.
      vocab_size, meta_tokens: `replace` draws uniformly from the vocabulary without the meta tokens.

    Returns:
      [B, R, J, T] int32, or [B, R, J, T - n] for `delete` and `truncate`.
    """
    check_kind(kind)
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
