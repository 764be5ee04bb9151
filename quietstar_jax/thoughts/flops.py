"""FLOPs of a training step, from formulas; a multiplication with its addition counts as two FLOPs.

The count covers the matrix products that the algorithm needs at all positions that think, each once: only the causal
half of attention, no padding of chunks, no recomputation. Sliding windows are not subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.thought_config import Phase, RateScales
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, phase_settings

EVERYTHING_LEARNS = RateScales()


class Flops(NamedTuple):
    """Floating-point operations of one step over the whole batch, part by part.

    Attributes:
      base: forward pass over the text with its LM head; sampling: T steps of every chain with their LM head.
      scoring: chains of the forward scoring pass; scoring_heads: LM and mixing heads on them, and the LM head on the
        text that distillation teaches.
      backward: gradients of base and scoring; twice their forward pass if all weights learn.
      recomputation: matrix products that `model.rematerialize` computes twice; not needed by the algorithm.
      rewarding: text, chains and heads once more, where advantages depend on all rewards of the batch.
      reference: text, chains and LM head under the reference, for the KL divergence.
    """

    base: float
    sampling: float
    scoring: float
    scoring_heads: float
    backward: float
    recomputation: float
    rewarding: float = 0.0
    reference: float = 0.0

    @property
    def necessary(self) -> float:
        """The sum of all parts except recomputation."""
        return sum(self) - self.recomputation


def decoder_flops(a: Architecture, keys: float) -> float:
    """Forward FLOPs of one token in all layers, where it attends to `keys` keys on average."""
    width = a.num_heads * a.head_dim
    projections = 2 * a.hidden_size * (2 * width + 2 * a.num_kv_heads * a.head_dim)
    feed_forward = 6 * a.hidden_size * a.intermediate_size
    return a.num_layers * (projections + feed_forward + 4 * width * keys)


def phase_flops(config: Config, phase: Phase) -> float:
    """Necessary FLOPs of all steps of a phase, in a run that starts from `model.architecture`."""
    a, length = config.model.architecture, config.data.sequence_length
    settings = phase_settings(config, phase, Vocabulary(0, (), (), ()))  # FLOPs depend on no id
    step = step_flops(a, settings, phase.batch_size, length, phase.rates)
    return phase.steps * step.necessary


def step_flops(
    a: Architecture, settings: ThoughtSettings, batch: int, length: int, rates: RateScales = EVERYTHING_LEARNS
) -> Flops:
    """FLOPs of one training step on `batch` sequences of `length` tokens.

    The count covers only what these settings compute: no sampling where the control needs none, no scores of thought
    tokens without REINFORCE, no mixing head where the mixing has none, a second forward pass only where the objective
    needs one. The backward pass includes the gradients of weights that learn and the gradients of activations on the
    path to them: with a frozen decoder, that path is through the chains to the start and end embeddings, if they learn.
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
    mixing = 2.0 * a.hidden_size * (2 * a.hidden_size + 1)  # without the half on the text, which all thoughts share
    mixing = chains * settings.tokens_ahead * mixing + thinking * 2.0 * a.hidden_size**2
    mixing = mixing if MIXINGS[settings.config.mixing].traits["head"] else 0.0
    thought_heads = chains * settings.thought_length * head
    talk_heads = chains * settings.tokens_ahead * head + mixing
    heads = talk_heads + (thought_heads if settings.reinforced else 0.0)
    distillation = thinking * head if settings.distill_weight else 0.0
    rewarding = reference = 0.0
    if settings.needs_batch_rewards:
        rewarding = base + scoring + talk_heads + (thought_heads if settings.config.kl_in_reward else 0.0)
    if settings.needs_reference:
        reference = texts * decoder_flops(a, prefix) + scoring + thought_heads
    to_weights = mixing if rates.mixing_head else 0.0
    recomputation = 0.0
    if rates.decoder:
        way = base + scoring + heads + distillation
        to_weights += way - mixing
        recomputation = texts * decoder_flops(a, prefix) + scoring
    elif rates.thought_embeddings:
        way, recomputation = scoring + heads, scoring
    else:
        way = to_weights
    return Flops(
        base, sampling, scoring, heads + distillation, way + to_weights,
        recomputation if settings.rematerialize else 0.0, rewarding, reference,
    )  # fmt: skip
