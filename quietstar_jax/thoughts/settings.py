"""Settings that the functions of `thoughts` need; frozen, so that they can be static arguments of `jit`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp

from quietstar_jax.config import ThoughtConfig


@dataclass(frozen=True)
class ThoughtSettings:
    """Shape of the thoughts of one phase, and the constants of REINFORCE.

    Attributes:
      thought_length: T, sampled tokens per thought, without start and end.
      num_thoughts: R, thoughts per position.
      tokens_ahead: K, true tokens scored after a thought.
      policy_weight: weight of the REINFORCE term in the loss.
      distill_weight: weight of the KL divergence from the prediction with thoughts to the one without.
      longest_thought: largest thought length until now, for `policy_reduction="sum_over_max"`; 0 = `thought_length`.
      meta_tokens: ids that are never sampled in a thought.
      pad_id: id used for tokens past the end of the text.
      pause_id: id that fills thoughts under the control `pause`.
      compute_dtype: dtype of activations; logits, losses and rewards are float32.
      rematerialize: recompute layers in the backward pass.
      prefix_attention: auto, blocks or triton; see `ModelConfig`.
    """

    thought_length: int
    num_thoughts: int = 1
    tokens_ahead: int = 1
    policy_weight: float = 0.0
    distill_weight: float = 0.0
    longest_thought: int = 0
    meta_tokens: tuple[int, ...] = ()
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
    def chain_length(self) -> int:
        """C: start, T sampled tokens, end, K - 1 true tokens."""
        return self.thought_length + 2 + self.tokens_ahead - 1

    def thinking_positions(self, length: int) -> int:
        """Returns how many of a text's L positions think; a choice is among those whose K tokens ahead all exist."""
        if self.config.positions == "all":
            return length
        return max(1, math.ceil(self.config.position_fraction * (length - 1 - self.tokens_ahead)))

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
    """

    pad_id: int
    meta_tokens: tuple[int, ...]
    start_tokens: tuple[int, ...]
    end_tokens: tuple[int, ...]
    pause_id: int = 0
    unused: tuple[int, ...] = ()
