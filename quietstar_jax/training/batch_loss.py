"""The loss of some sequences of a batch: think and talk with the random numbers of the step, then learn.

A batch is split over devices and microbatches. `Shared` contains what all parts have in common, so that their losses
add up to the loss of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from quietstar_jax.models.parameters import GraphDef, merge, split
from quietstar_jax.thought_config import RateScales
from quietstar_jax.thoughts.chunks import max_positions_per_chunk, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.controls import sample_or_control
from quietstar_jax.thoughts.loss import (
    Metrics,
    Rewarded,
    language_model_loss,
    quiet_star_loss,
    reward_thoughts,
)
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.objective import Counts
from quietstar_jax.thoughts.positions import at_positions, choose
from quietstar_jax.thoughts.reference import reference_log_probs
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text
from quietstar_jax.training.batch import Batch, Draws
from quietstar_jax.training.optimizer import rate_scale


class Rows(NamedTuple):
    """Some sequences of a batch.

    Attributes:
      thoughts: their thoughts, if they are already sampled; positions: [B, J] where, if not everywhere.
    """

    batch: Batch
    draws: Draws
    thoughts: Thoughts | None = None
    positions: jax.Array | None = None


class Shared(NamedTuple):
    """What all sequences of a step share; see `quiet_star_loss` and `TrainState`."""

    counts: Counts
    entropy_bonus: jax.Array | None
    reference: dict[str, jax.Array] | None
    frozen: dict[str, jax.Array]


@dataclass(frozen=True)
class BatchLoss:
    """The objective of a phase as functions of weights, sequences and what all sequences share."""

    graphdef: GraphDef
    settings: ThoughtSettings
    rates: RateScales

    def loss(self, params: Any, rows: Rows, shared: Shared) -> tuple[jax.Array, Metrics]:
        """Returns (loss, metrics); the sums over all rows are those of the batch."""
        (batch, draws, thoughts, positions), model = rows, merge(self.graphdef, params | shared.frozen)
        if not self.settings.thought_length:
            return language_model_loss(model, batch.tokens, batch.mask, shared.counts, self.settings, batch.starts)

        def think(model: QuietStar, text: Text, positions: jax.Array) -> Thoughts:
            return self._think(model, text, positions, draws, shared.reference) if thoughts is None else thoughts

        return quiet_star_loss(
            model, batch.tokens, batch.mask, think, shared.counts, self.settings, self._chunk(model, batch.tokens),
            starts=batch.starts,
            choose=lambda text: choose(text, draws.positions, self.settings) if positions is None else positions,
            frozen=lambda name: name in shared.frozen or not rate_scale(name, self.rates),
            entropy_bonus=shared.entropy_bonus,
        )  # fmt: skip

    def rewards(self, params: Any, rows: Rows, shared: Shared) -> Rewarded:
        """Samples and rewards the thoughts of the rows, without gradients."""
        batch, draws, *_ = rows
        model = merge(self.graphdef, params | shared.frozen)

        def think(model: QuietStar, text: Text, positions: jax.Array) -> Thoughts:
            return self._think(model, text, positions, draws, shared.reference)

        return reward_thoughts(
            model, batch.tokens, batch.mask, think, self.settings, self._chunk(model, batch.tokens),
            starts=batch.starts,
            choose=lambda text: choose(text, draws.positions, self.settings),
        )  # fmt: skip

    def _think(self, model: QuietStar, text: Text, positions: jax.Array, draws: Draws, reference: Any) -> Thoughts:
        settings = self.settings
        sampled = max_sampled_positions_per_chunk(model.decoder.architecture, settings, *text.tokens.shape)
        uniforms = draws.thoughts
        if not settings.config.positions_per_sequence:
            uniforms = jax.tree.map(lambda x: at_positions(x, positions), uniforms)
        thoughts = sample_or_control(model, text, positions, uniforms, settings, sampled)
        if reference is None or not settings.reinforced:
            return thoughts
        model = merge(self.graphdef, split(model)[0] | reference)
        chunk = self._chunk(model, text.tokens)
        log_probs = reference_log_probs(model, text, positions, thoughts.tokens, settings, chunk)
        return thoughts._replace(reference_log_probs=log_probs)

    def _chunk(self, model: QuietStar, tokens: jax.Array) -> int:
        return max_positions_per_chunk(model.decoder.architecture, self.settings, *tokens.shape)
