"""Mixings of the predictions without and with a thought. To add one, write a function here and decorate it.

Every mixing is a function `(model, base_hidden, talk_hidden) -> (scores, weight)`:

  base_hidden: [B, J, K, D] hidden states h of the text; talk_hidden: [B, R, J, K, D] hidden states h' after thoughts.
  scores: [B, R, J, K, V] float32, logits; log-probabilities if registered with `log_probs=True`.
  weight: [B, R, J, K] float32, the share w of the prediction after the thought. Where it is exactly 0, the prediction
    must be that of the text, because the loss there is replaced by the loss of the text (see `score_thoughts`).

Traits:

  log_probs: the cross-entropy of a token is minus its score; the scores need not be normalized.
  head: whether the mixing head computes the weight (paper section 4.3).

An export also needs the same function in torch: add it to `MIXINGS` in export_hf/torch_module.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from quietstar_jax.models.linear import dense, linear
from quietstar_jax.thoughts.registry import Registry

if TYPE_CHECKING:  # the settings read the registry, and some commands that have settings need no model
    from quietstar_jax.models.decoder import Decoder
    from quietstar_jax.thoughts.model import MixingHead, QuietStar

MixingFn = Callable[["QuietStar", jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
MIXINGS: Registry[MixingFn] = Registry(log_probs=False, head=True)


@MIXINGS.register(
    formula=r"\mathrm{logits}(h) + w\,\mathrm{logits}(h' - h)",
    assumes="A linear LM head. The weight is not bounded; it starts at 0, as if there were no thoughts.",
    source="Quiet-STaR, published code",
)
def hidden_states(model: QuietStar, base_hidden: jax.Array, talk_hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the mixed hidden state (1 - w) h + w h'."""
    weight = mixing_weight(model.mixing_head, base_hidden, talk_hidden)
    return mix_hidden_states(model.decoder, base_hidden, talk_hidden, weight), weight


@MIXINGS.register(
    formula=r"(1 - w) \log p + w \log p'",
    assumes="0 < w < 1, by a sigmoid; 1/2 at the start. The mixture is not normalized.",
    source="Quiet-STaR, paper",
    log_probs=True,
)
def log_probabilities(model: QuietStar, base_hidden: jax.Array, talk_hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixed log-probabilities of the predictions without and with the thought."""
    weight = jax.nn.sigmoid(mixing_weight(model.mixing_head, base_hidden, talk_hidden))
    # base [B, 1, J, K, V] is computed once and broadcast over the R thoughts.
    base = jax.nn.log_softmax(model.decoder.logits(base_hidden))[:, None]
    after_thought = jax.nn.log_softmax(model.decoder.logits(talk_hidden))
    return mix_log_probabilities(base, after_thought, weight[..., None]), weight


@MIXINGS.register(
    formula=r"\mathrm{logits}(h')",
    assumes="w = 1: nothing limits what a bad thought does to the prediction.",
    source="RLP, JEPO, LaTRO",
    head=False,
)
def none(model: QuietStar, base_hidden: jax.Array, talk_hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The prediction after the thought alone."""
    return model.decoder.logits(talk_hidden), jnp.ones(talk_hidden.shape[:-1], jnp.float32)


def mixing_weight(head: MixingHead, base_hidden: jax.Array, thought_hidden: jax.Array) -> jax.Array:
    """Returns the weight w of the prediction after the thought, unbounded as in the published code.

    Args:
      base_hidden: [B, J, K, D]; thought_hidden: [B, R, J, K, D].

    Returns:
      [B, R, J, K] float32.
    """
    from_text = dense(base_hidden, head.base_in[...], head.in_bias[...])
    x = jax.nn.relu(from_text[:, None] + dense(thought_hidden, head.thought_in[...]))
    x = jax.nn.relu(dense(x, head.hidden[...], head.hidden_bias[...]))
    return linear(x, head.out[...], 1, jnp.float32)[..., 0]


def mix_hidden_states(
    decoder: Decoder, base_hidden: jax.Array, thought_hidden: jax.Array, weight: jax.Array
) -> jax.Array:
    """Returns the logits of the mixed hidden state (1 - w) h + w h', as the published code mixes.

    The LM head is linear, so the logits are computed as logits(h) + w logits(h' - h): in bfloat16, adding a small w h'
    to h would round it away, and with it nearly every early reward.

    Args:
      base_hidden: [B, J, K, D]; thought_hidden: [B, R, J, K, D]; weight: [B, R, J, K] float32.

    Returns:
      [B, R, J, K, V] float32.
    """
    change = decoder.logits(thought_hidden - base_hidden[:, None])
    return decoder.logits(base_hidden)[:, None] + weight[..., None] * change


def mix_log_probabilities(base: jax.Array, after_thought: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the paper's mixture, (1 - w) log p + w log p', which is not renormalised.

    The weight must be within 0 .. 1: otherwise the cross-entropy has no lower bound.
    """
    return (1.0 - weight) * base + weight * after_thought
