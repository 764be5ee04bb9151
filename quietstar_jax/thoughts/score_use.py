"""Scores after perturbed thoughts and after thoughts alone: whether predictions use the content of a thought."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.perturbations import PERCENTS, PerturbationDraws, changed_tokens, perturb, perturb_each
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.score_predictions import Wanted, made_positions, score_after_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text
from quietstar_jax.thoughts.token_scores import Prediction, ThoughtUse, TokenScores


class UseWanted(NamedTuple):
    """What `score_use` computes in addition to the losses of thoughts alone.

    Attributes:
      kinds: perturbations, of `thought_config.PERTURBATIONS`.
      draws: random numbers for thoughts at all L positions, [B, R, L, T] each; None if there are no kinds.
    """

    kinds: tuple[str, ...] = ()
    draws: PerturbationDraws | None = None


def score_use(
    model: QuietStar, text: Text, positions: jax.Array, before: TokenScores, thoughts: jax.Array, nll: jax.Array,
    wanted: UseWanted, settings: ThoughtSettings,
) -> ThoughtUse:  # fmt: skip
    """Scores x[j+1] at J positions after perturbed thoughts and after thoughts alone.

    The given thoughts are not sampled again. Each number of changed tokens costs one more pass over the chains.

    Args:
      positions, thoughts: as in `score_given_thoughts`, T > 0; nll: [B, R, J] cross-entropy with them.
      before: from `score_without_thoughts`; where its policy makes no thought, none is perturbed.
      settings: with R thoughts per position.
    """
    length, alone = thoughts.shape[-1], dataclasses.replace(settings.config, mixing="none")
    before = before._replace(base=Prediction(*before.base[:3]))  # without optional results, as they are not wanted
    packed = made_positions(text, positions, before)
    first = settings.reach - 1  # only a position's own thought is measured alone

    def score(tokens: jax.Array, before: TokenScores, settings: ThoughtSettings, **how: Any) -> jax.Array:
        given = Thoughts(tokens, jnp.zeros(tokens.shape, jnp.float32))
        settings = dataclasses.replace(settings, thought_length=tokens.shape[-1])
        return score_after_thoughts(model, text, positions, before, given, settings, Wanted(), **how).talk.nll

    def perturbed() -> dict[str, tuple[jax.Array, ...]]:
        """One program for all thoughts of equal length: compiling one for each change takes longer than running it."""
        draws = jax.tree.map(lambda x: jnp.take(x, positions, axis=2), wanted.draws)
        size, meta_tokens = model.decoder.architecture.vocab_size, settings.meta_tokens
        change = perturb_each if settings.samples_end else perturb
        counts = [percent if settings.samples_end else changed_tokens(length, percent) for percent in PERCENTS]
        by_length: dict[int, dict[tuple[str, int], jax.Array]] = {}
        for kind, count in itertools.product(wanted.kinds, sorted({*counts} - {0})):
            changed = change(thoughts, draws, kind, count, vocab_size=size, meta_tokens=meta_tokens)
            changed = changed if packed is None else packed.take(changed)
            by_length.setdefault(changed.shape[-1], {})[kind, count] = changed
        found = {(kind, 0): nll for kind in wanted.kinds}
        for group in by_length.values():
            scored = jax.lax.map(lambda x: score(x, before, settings, packed=packed), jnp.stack([*group.values()]))
            found |= dict(zip(group, scored, strict=True))
        return {kind: tuple(found[kind, count] for count in counts) for kind in wanted.kinds}

    unmixed, everywhere = dataclasses.replace(settings, config=alone, reach=1), before._replace(made=None)
    return ThoughtUse(
        score(thoughts, everywhere, unmixed, hide_text=True)[..., first:],
        score(thoughts[..., :0], everywhere, unmixed, hide_text=True)[..., first:],
        perturbed(),
    )
