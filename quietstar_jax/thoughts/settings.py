"""Settings that the functions of `thoughts` need; frozen, so that they can be static arguments of `jit`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp

from quietstar_jax.config import Config
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.thought_config import Phase, ThoughtConfig


@dataclass(frozen=True)
class ThoughtSettings:
    """Shape of the thoughts of one phase, and the constants of REINFORCE.

    Attributes:
      thought_length: T, sampled tokens per thought, without start and end; the maximum if `samples_end`.
      num_thoughts: R, thoughts per position.
      tokens_ahead: K, true tokens scored after a thought.
      reach: for how many next tokens a thought is used, except in training, see `thoughts.reach`.
      policy_weight: weight of the REINFORCE term in the loss; 0 where it trains nothing.
      distill_weight: weight of the KL divergence from the prediction with thoughts to the one without.
      longest_thought: largest thought length until now, for `policy_reduction="sum_over_max"`; 0 = `thought_length`.
      meta_tokens: ids that are never sampled in a thought.
      preferred_tokens: ids before which positions are likelier to think, see `ThoughtConfig.position_pattern`.
      start_token: id of the token with which a thought begins where a text has it; None if there is no single one.
      end_token: id that ends a thought where `thought.end` is `token`; it is one of the `meta_tokens`.
      pad_id: id used for tokens past the end of the text.
      pause_id: id that fills thoughts under the control `pause`.
      compute_dtype: dtype of activations; logits, losses and rewards are float32.
      rematerialize: recompute layers in the backward pass.
      prefix_attention: auto, blocks or triton; see `ModelConfig`.
    """

    thought_length: int
    num_thoughts: int = 1
    tokens_ahead: int = 1
    reach: int = 1
    policy_weight: float = 0.0
    distill_weight: float = 0.0
    longest_thought: int = 0
    meta_tokens: tuple[int, ...] = ()
    preferred_tokens: tuple[int, ...] = ()
    start_token: int | None = None
    end_token: int | None = None
    pad_id: int = 0
    pause_id: int = 0
    compute_dtype: str = "float32"
    rematerialize: bool = False
    prefix_attention: str = "auto"
    config: ThoughtConfig = field(default_factory=ThoughtConfig)

    @property
    def reinforced(self) -> bool:
        """Whether REINFORCE trains the thoughts. Pauses are all equal, so their rewards differ only by rounding."""
        return self.thought_length > 0 and self.policy_weight > 0 and self.config.control != "pause"

    @property
    def needs_batch_rewards(self) -> bool:
        """Whether advantages depend on all rewards of the batch, which costs one more forward pass.

        The advantage of a single thought is its reward, so only `advantage_scale` can then divide by a deviation.
        """
        divides = ADVANTAGES[self.config.advantage].traits["needs_batch_std"]
        return self.reinforced and (self.config.advantage_scale == "batch" or bool(self.num_thoughts > 1 and divides))

    @property
    def needs_reference(self) -> bool:
        """Whether thoughts are compared with a reference, which costs one more forward pass."""
        return self.reinforced and self.config.needs_reference

    @property
    def samples_end(self) -> bool:
        """Whether thoughts end when the model decides so, so that lengths differ; see `thoughts.ending`."""
        return self.thought_length > 0 and self.config.end != "fixed"

    @property
    def chain_length(self) -> int:
        """C: start, T sampled tokens, end, K - 1 true tokens; slots at the end are unused after a shorter thought."""
        return self.thought_length + 2 + self.tokens_ahead - 1

    def thinking_positions(self, length: int) -> int:
        """Returns how many of a text's L positions think; a choice is among those whose K tokens ahead all exist."""
        if self.config.positions == "all":
            return length
        candidates = length - 1 - self.tokens_ahead
        count = self.config.positions_per_sequence or math.ceil(self.config.position_fraction * candidates)
        return max(1, min(count, candidates))

    def drawn_positions(self, length: int) -> int:
        """Returns for how many positions of a text random numbers are drawn: all L, or only those that think.

        With `positions_per_sequence`, thoughts can be so long that numbers for all L positions would need more memory
        than the thoughts themselves.
        """
        return self.thinking_positions(length) if self.config.positions_per_sequence else length

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.compute_dtype)


class Vocabulary(NamedTuple):
    """The token ids that the objective needs from the tokenizer.

    Attributes:
      pad_id: fills short sequences; meta_tokens: never sampled in a thought.
      start_tokens, end_tokens: tokens whose mean embeddings initialise the start and end embeddings; empty if training
        starts from weights that already have learned ones.
      pause_id: fills thoughts under the control `pause`.
      unused: ids of the model that are not tokens, see `data.vocabulary.unused_ids`; never sampled in a thought either.
      end_token: the only one of the `initial_end_token`, if `thought.end` is `token`.
      preferred: ids whose text matches `thought.position_pattern`.
      start_token: id of the `initial_start_token` if that is one token, else None.
    """

    pad_id: int
    meta_tokens: tuple[int, ...]
    start_tokens: tuple[int, ...]
    end_tokens: tuple[int, ...]
    pause_id: int = 0
    unused: tuple[int, ...] = ()
    preferred: tuple[int, ...] = ()
    end_token: int | None = None
    start_token: int | None = None


def thought_settings(config: Config, vocabulary: Vocabulary, **shape: Any) -> ThoughtSettings:
    """Returns `ThoughtSettings` from the settings that all thoughts of a run share, and from the fields in `shape`."""
    end = vocabulary.end_token if config.thought.end == "token" else None
    return ThoughtSettings(
        meta_tokens=(*vocabulary.meta_tokens, *vocabulary.unused, *(() if end is None else (end,))),
        end_token=end,
        preferred_tokens=vocabulary.preferred,
        start_token=vocabulary.start_token,
        pad_id=vocabulary.pad_id,
        pause_id=vocabulary.pause_id,
        compute_dtype=config.model.compute_dtype,
        prefix_attention=config.model.prefix_attention,
        config=config.thought,
        **shape,
    )


def phase_settings(config: Config, phase: Phase, vocabulary: Vocabulary) -> ThoughtSettings:
    """Returns the thought settings of one phase."""
    until_now = config.phases[: [item.name for item in config.phases].index(phase.name) + 1]
    return thought_settings(
        config,
        vocabulary,
        thought_length=phase.thought_length,
        num_thoughts=phase.num_thoughts,
        tokens_ahead=phase.tokens_ahead,
        policy_weight=phase.policy_weight if config.reinforces(phase) else 0.0,
        distill_weight=phase.distill_weight,
        longest_thought=max(item.thought_length for item in until_now),
        rematerialize=config.model.rematerialize,
    )
