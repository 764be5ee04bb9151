"""What a training step costs, counted from its formulas: a multiplication and its addition are two FLOPs.

Counted are the matrix products that the algorithm needs at all positions that think, each once: causal halves
of attention only, one base pass, no padding of chunks, nothing recomputed. Sliding windows are not taken off.
"""

from __future__ import annotations

from typing import NamedTuple

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config, Phase, RateScales
from quietstar_jax.thoughts.settings import ThoughtSettings

EVERYTHING_LEARNS = RateScales()


class Flops(NamedTuple):
    """Floating-point operations of one step over the whole batch, part by part.

    Attributes:
      base: forward pass over the text with its LM head; sampling: T steps of every chain with their LM head.
      scoring: chains of the forward scoring pass; scoring_heads: LM and mixing heads on them.
      backward: gradients of base and scoring, twice their forward where all weights learn.
      recomputation: matrix products that `model.rematerialize` does a second time; not needed by the algorithm.
    """

    base: float
    sampling: float
    scoring: float
    scoring_heads: float
    backward: float
    recomputation: float

    @property
    def necessary(self) -> float:
        """All but recomputation."""
        return sum(self) - self.recomputation


def decoder_flops(a: Architecture, keys: float) -> float:
    """Forward FLOPs of one token in all layers, that attends to so many keys on average."""
    width = a.num_heads * a.head_dim
    projections = 2 * a.hidden_size * (2 * width + 2 * a.num_kv_heads * a.head_dim)
    feed_forward = 6 * a.hidden_size * a.intermediate_size
    return a.num_layers * (projections + feed_forward + 4 * width * keys)


def phase_flops(config: Config, phase: Phase) -> float:
    """Necessary FLOPs of all steps of a phase of a run that starts from `model.architecture`."""
    a, length = config.model.architecture, config.data.sequence_length
    settings = ThoughtSettings(
        phase.thought_length, phase.num_thoughts, phase.tokens_ahead, phase.policy_weight, config=config.thought
    )
    step = step_flops(a, settings, phase.batch_size, length, phase.rates)
    return phase.steps * step.necessary


def step_flops(
    a: Architecture, settings: ThoughtSettings, batch: int, length: int, rates: RateScales = EVERYTHING_LEARNS
) -> Flops:
    """FLOPs of one training step on `batch` sequences of `length` tokens.

    Counted is what these settings compute: no sampling where a control needs none, no scores of thought tokens without
    REINFORCE, no mixing head where nothing is mixed. Backward are the gradients of weights that learn and the way to
    them: where the decoder is frozen, through the chains to the embeddings of start and end, if these learn.
    """
    head = 2.0 * a.hidden_size * a.vocab_size
    prefix = (length + 1) / 2
    texts, thinking = batch * length, batch * settings.thinking_positions(length)
    chains = thinking * settings.num_thoughts
    base = texts * (decoder_flops(a, prefix) + head)
    if not settings.thought_length:
        recomputation = texts * decoder_flops(a, prefix) if settings.rematerialize else 0.0
        return Flops(base, 0.0, 0.0, 0.0, 2 * base, recomputation)
    c = settings.chain_length
    sampling = 0.0
    if settings.config.control in ("none", "shuffled"):
        sampling = (
            chains * settings.thought_length * (decoder_flops(a, prefix + (settings.thought_length + 1) / 2) + head)
        )
    scoring = chains * c * decoder_flops(a, prefix + (c + 1) / 2)
    mixing = 2.0 * a.hidden_size * (2 * a.hidden_size + 1)  # the half of the text is shared by all thoughts
    mixing = chains * settings.tokens_ahead * mixing + thinking * 2.0 * a.hidden_size**2
    mixing = 0.0 if settings.config.mixing == "none" else mixing
    heads = chains * ((settings.thought_length if settings.reinforced else 0) + settings.tokens_ahead) * head + mixing
    to_weights = mixing if rates.mixing_head else 0.0
    recomputation = 0.0
    if rates.decoder:
        way = base + scoring + heads
        to_weights += way - mixing
        recomputation = texts * decoder_flops(a, prefix) + scoring
    elif rates.thought_embeddings:
        way, recomputation = scoring + heads, scoring
    else:
        way = to_weights
    return Flops(
        base, sampling, scoring, heads, way + to_weights, recomputation if settings.rematerialize else 0.0
    )  # fmt: skip
