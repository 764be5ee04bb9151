"""FLOPs of a training step, from formulas; a multiplication with its addition counts as two FLOPs.

The count covers the matrix products that the algorithm needs at all positions that think, each once: only the causal
half of attention, no padding of chunks, no recomputation. Sliding windows are not subtracted. Where the model samples
the end of thoughts, the count is an upper bound: that of thoughts that all have T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from quietstar_jax.architecture import NO_ADAPTERS, Adapters, Architecture
from quietstar_jax.config import Config
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.models.adapters import MAPS
from quietstar_jax.thought_config import Phase, RateScales
from quietstar_jax.thoughts.chunks import TOKEN_BLOCK
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, phase_settings

EVERYTHING_LEARNS = RateScales()


class Flops(NamedTuple):
    """Floating-point operations of one step over the whole batch, part by part.

    Attributes:
      base: forward pass over the text with its LM head; sampling: T steps of every chain with their LM head.
      scoring: chains of the forward scoring pass; scoring_heads: LM and mixing heads on them, the LM head on the text
        for distillation, and the thinking gate.
      backward: gradients of base and scoring; twice their forward pass if all weights learn.
      recomputation: matrix products that `model.rematerialize` computes twice, and the LM head on thoughts that are
        scored in blocks; not needed by the algorithm.
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


def adapter_flops(a: Architecture, adapters: Adapters) -> float:
    """Forward FLOPs of one token in the adapters of all layers."""
    d, f, q, kv = a.hidden_size, a.intermediate_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    sizes = {"query": d + q, "key": d + kv, "value": d + kv, "output": q + d, "gate": d + f, "up": d + f, "down": f + d}
    return a.num_layers * 2.0 * adapters.rank * sum(sizes[name] for name in MAPS[adapters.maps])


def decoder_flops(a: Architecture, keys: float, adapters: Adapters = NO_ADAPTERS) -> float:
    """Forward FLOPs of one token in all layers, where it attends to `keys` keys on average."""
    width = a.num_heads * a.head_dim
    projections = 2 * a.hidden_size * (2 * width + 2 * a.num_kv_heads * a.head_dim)
    feed_forward = 6 * a.hidden_size * a.intermediate_size
    return a.num_layers * (projections + feed_forward + 4 * width * keys) + adapter_flops(a, adapters)


def phase_flops(config: Config, phase: Phase, architecture: Architecture | None = None) -> float:
    """Necessary FLOPs of all steps of a phase; `architecture`: None = `model.architecture`."""
    a, length = architecture or config.model.architecture, config.data.sequence_length
    settings = phase_settings(config, phase, Vocabulary(0, (), (), ()))  # FLOPs depend on no id
    step = step_flops(a, settings, phase.batch_size, length, phase.rates, config.model.adapters)
    return phase.steps * step.necessary


def step_flops(
    a: Architecture, settings: ThoughtSettings, batch: int, length: int, rates: RateScales = EVERYTHING_LEARNS,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:  # fmt: skip
    """FLOPs of one training step on `batch` sequences of `length` tokens.

    The count covers only what these settings compute: no sampling where the control needs none, no scores of thought
    tokens without REINFORCE, no mixing head where the mixing has none, a second forward pass only where the objective
    needs one. The backward pass includes the gradients of weights that learn and the gradients of activations on the
    path to them: with a frozen decoder, that path is through the chains to the start and end embeddings, if they learn.
    With adapters, that path is through the whole decoder, but only attention and the adapters need a second product:
    the weights that the adapters freeze need no gradient.
    """

    def decoder(keys: float) -> float:
        return decoder_flops(a, keys, adapters)

    def to_second_operands(keys: float) -> float:
        """FLOPs of one token in the part of the backward pass that is not on the path of activations."""
        frozen = decoder_flops(a, 0) if adapters.maps != "none" else 0.0
        return decoder(keys) - frozen

    head = 2.0 * a.hidden_size * a.vocab_size
    prefix = (length + 1) / 2
    texts, thinking = batch * length, batch * settings.thinking_positions(length)
    chains = thinking * settings.num_thoughts
    base = texts * (decoder(prefix) + head)
    if not settings.thought_length:
        recomputation = texts * decoder(prefix) if settings.rematerialize else 0.0
        to_weights = texts * to_second_operands(prefix) + (texts * head if adapters.maps == "none" else 0.0)
        return Flops(base, 0.0, 0.0, 0.0, base + to_weights, recomputation)
    c = settings.chain_length
    choice = head + (2.0 * a.hidden_size if settings.config.end == "sampled" else 0.0)  # of a token, or of the end
    sampling = 0.0
    if settings.samples_end or settings.config.control in ("none", "shuffled"):
        sampling = chains * settings.thought_length * (decoder(prefix + (settings.thought_length + 1) / 2) + choice)
    scoring = chains * c * decoder(prefix + (c + 1) / 2)
    mixing = 2.0 * a.hidden_size * (2 * a.hidden_size + 1)  # without the half on the text, which all thoughts share
    mixing = chains * settings.tokens_ahead * mixing + thinking * 2.0 * a.hidden_size**2
    mixing = mixing if MIXINGS[settings.config.mixing].traits["head"] else 0.0
    thought_heads = chains * settings.thought_length * choice
    talk_heads = chains * settings.tokens_ahead * head + mixing
    heads = talk_heads + (thought_heads if settings.reinforced else 0.0)
    again = thought_heads if settings.reinforced and settings.thought_length > TOKEN_BLOCK else 0.0
    distillation = thinking * head if settings.distill_weight else 0.0
    gate = thinking * 2.0 * a.hidden_size if settings.config.gate else 0.0
    rewarding = reference = 0.0
    if settings.needs_batch_rewards:
        rewarding = base + scoring + talk_heads + (thought_heads if settings.config.kl_in_reward else 0.0)
    if settings.needs_reference:
        reference = texts * decoder(prefix) + scoring + thought_heads
    way = mixing if rates.mixing_head else 0.0
    to_weights = way + (gate if rates.gate else 0.0)  # the gate's input has no gradient
    recomputation = 0.0
    if rates.move_decoder(adapters):
        way = base + scoring + heads + distillation
        to_weights += texts * to_second_operands(prefix) + chains * c * to_second_operands(prefix + (c + 1) / 2)
        if adapters.maps == "none":
            to_weights += texts * head + heads - mixing + distillation
        recomputation = texts * decoder(prefix) + scoring
    elif rates.thought_embeddings:
        way, recomputation = scoring + heads, scoring
    return Flops(
        base, sampling, scoring, heads + distillation + gate, way + to_weights,
        (recomputation if settings.rematerialize else 0.0) + again, rewarding, reference,
    )  # fmt: skip
