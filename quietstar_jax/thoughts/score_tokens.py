"""Computes `TokenScores`: used by evaluation, measurements and reports.

    tokens ──> read_text ──> score_without_thoughts ──> think ──> thoughts [B, R, J, T] ──> score_after_thoughts
                                      └── made: where the policy of thinking makes thoughts ──┘

Only thoughts that the policy makes are computed: their positions are packed, and chunks without any are skipped. Axis
letters are those of `token_scores`. Nothing here has a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quietstar_jax.parallel.axes import constrain
from quietstar_jax.thoughts.chunks import Packed, chunk_size, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.controls import Uniforms, at_places, sample_earlier, sample_or_control
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.reach import widened
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.score_predictions import (
    Wanted,
    made_positions,
    score_after_thoughts,
    score_without_thoughts,
)
from quietstar_jax.thoughts.score_use import UseWanted, score_use
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, read_text
from quietstar_jax.thoughts.token_scores import TokenScores


def score_tokens(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, starts: jax.Array | None, positions: jax.Array,
    uniforms: Uniforms, settings: ThoughtSettings, *, greedy: int = 1, use: UseWanted | None = None, **wanted: Any,
) -> TokenScores:  # fmt: skip
    """Scores x[j+1] at J positions without thoughts and after R thoughts; replicated on all devices.

    Args:
      tokens, mask, starts: [B, L] as in `Text`.
      positions: [J]; consecutive if `settings.reach` is above 1.
      uniforms: random numbers of thoughts at all L positions, [B, R, L, T]; T may be 0. Greedy thoughts use none, but
        some controls do.
      settings: its `num_thoughts` is not used; its `tokens_ahead` is at least its `reach`.
      greedy: how many of the R thoughts are greedy; these come first, the others are sampled.
      use: what is computed in `TokenScores.use`; nothing where T is 0. It needs all thoughts, also those that the
        policy does not make.
      wanted: optional results, see `Wanted`.
    """
    # Chunks are for R thoughts at any position. There is no backward pass, so a chunk needs memory for one layer only.
    config = dataclasses.replace(settings.config, positions="all")
    number, reach = uniforms.tokens.shape[1], settings.reach if settings.thought_length else 1
    settings = dataclasses.replace(settings, num_thoughts=number, rematerialize=True, config=config, reach=reach)
    positions, what = widened(positions, reach), Wanted(**wanted)
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype)
    before = score_without_thoughts(model, text, positions, settings, what)
    if not settings.thought_length:
        return _finished(before._replace(made=None, rankings=None))
    packed = None if use is not None else made_positions(text, positions, before)
    thoughts = think(model, text, positions if packed is None else packed, uniforms, settings, greedy)
    scores = _finished(score_after_thoughts(model, text, positions, before, thoughts, settings, what, packed=packed))
    if use is None:
        return scores
    return scores._replace(
        use=score_use(model, text, positions, before, thoughts.tokens, scores.talk.nll, use, settings)
    )


def score_given_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts | None, settings: ThoughtSettings,
    *, hide_text: bool = False, **wanted: Any,
) -> TokenScores:  # fmt: skip
    """Scores x[j+1] at J positions without thoughts and after given ones; replicated on all devices.

    Args:
      positions: [J]; with a reach N above 1, [N - 1 + J] from `widened`, and the results are for the last J.
      thoughts: [B, R, positions, T], sampled or from elsewhere; None = no thoughts.
      settings: with R thoughts per position.
      hide_text: the chains do not attend to the text, see `score.chain_hidden_states`.
      wanted: optional results, see `Wanted`.
    """
    what = Wanted(**wanted)
    before = score_without_thoughts(model, text, positions, settings, what)
    if thoughts is None:
        return _finished(before._replace(made=None, rankings=None))
    after = score_after_thoughts(model, text, positions, before, thoughts, settings, what, hide_text=hide_text)
    return _finished(after)


def think(
    model: QuietStar, text: Text, positions: jax.Array | Packed, uniforms: Uniforms, settings: ThoughtSettings,
    greedy: int,
) -> Thoughts:  # fmt: skip
    """Returns R thoughts at J positions, or their replacement under the control; arguments as in `score_tokens`.

    Those of packed positions are in packed order; after the chosen ones they are not defined.
    """
    largest = max_sampled_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)

    def some(first: int, last: int, greedy: bool) -> Thoughts:
        own, chunk = jax.tree.map(lambda x: x[:, first:last], uniforms), chunk_size(positions, largest, last - first)
        several = dataclasses.replace(settings, num_thoughts=last - first)
        if settings.config.control == "shuffled":
            return sample_earlier(model, text, positions, own, several, chunk, greedy=greedy)
        own = jax.tree.map(lambda x: at_places(x, positions), own)
        return sample_or_control(model, text, positions, own, several, chunk, greedy=greedy)

    parts = ((0, greedy, True), (greedy, settings.num_thoughts, False))
    thoughts = [some(*part) for part in parts if part[0] < part[1]]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *thoughts)


def _finished(scores: TokenScores) -> TokenScores:
    """Returns the scores on all devices; those without thoughts lose their axis of one thought."""
    scores = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), scores)
    real, base, spread = jax.tree.map(lambda x: x[:, 0], scores[:3])
    return scores._replace(real=real, base=base, base_entropy=spread)
