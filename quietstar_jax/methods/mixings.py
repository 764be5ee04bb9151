"""Mixings of the predictions without and with a thought. To add one, write a function here and decorate it.

Every mixing is a function `(logits, base_hidden, talk_hidden, weight) -> (scores, weight)`:

  logits: hidden states [.., D] -> float32 logits [.., V]; without the soft cap of the decoder if registered with
    `linear=True`, and then a linear function.
  base_hidden: [B, J, K, D] hidden states h of the text; talk_hidden: [B, R, J, K, D] hidden states h' after thoughts.
  weight: [B, R, J, K] float32, the output of the mixing head; None if the entry is registered with `head=False`.
  scores: [B, R, J, K, V] float32, logits; log-probabilities if registered with `log_probs=True`.
  weight, as returned: the share w of the prediction after the thought. Where it is exactly 0, the prediction must be
    that of the text, because the loss there is replaced by the loss of the text (see `score_thoughts`).

Traits:

  log_probs: the cross-entropy of a token is minus its score; the scores need not be normalized.
  linear: the scores are computed from logits before their soft cap (Gemma 2), which is applied to the scores.
  head: whether the mixing head computes the weight (paper section 4.3).

An export also needs the same function in torch: add it to `MIXINGS` in export_hf/torch_module.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from quietstar_jax.lazy import jax, jnp
from quietstar_jax.methods.registry import Registry

Logits: TypeAlias = "Callable[[jax.Array], jax.Array]"
MixingFn: TypeAlias = "Callable[[Logits, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]"
MIXINGS: Registry[MixingFn] = Registry(log_probs=False, linear=False, head=True)
REACHING = ("probabilities",)  # mixings that can mix the predictions after several thoughts, one after the other
FIRST_ODDS = -1.0  # log of w / (1 - w) at the start of the mixing `probabilities`: w = 0.27


@MIXINGS.register(
    formula=r"\mathrm{logits}(h) + w\,\mathrm{logits}(h' - h)",
    assumes="A linear LM head. The weight is not bounded; it starts at 0, as if there were no thoughts.",
    source="Quiet-STaR, published code",
    linear=True,
)
def hidden_states(
    logits: Logits, base_hidden: jax.Array, talk_hidden: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits of the mixed hidden state (1 - w) h + w h'.

    Computed as logits(h) + w logits(h' - h): in bfloat16, a small w h' would be lost to rounding when it is added to
    h, and with it nearly every early reward.
    """
    change = logits(talk_hidden - base_hidden[:, None])
    return logits(base_hidden)[:, None] + weight[..., None] * change, weight


@MIXINGS.register(
    formula=r"(1 - w) \log p + w \log p'",
    assumes="0 < w < 1, by a sigmoid; 1/2 at the start. The mixture is not normalized.",
    source="Quiet-STaR, paper",
    log_probs=True,
)
def log_probabilities(
    logits: Logits, base_hidden: jax.Array, talk_hidden: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixed log-probabilities. Without the sigmoid, the cross-entropy would have no lower bound."""
    weight = jax.nn.sigmoid(weight)
    base, after_thought = _log_predictions(logits, base_hidden, talk_hidden)
    return (1.0 - weight[..., None]) * base + weight[..., None] * after_thought, weight


@MIXINGS.register(
    formula=r"\log((1 - w)\,p + w\,p')",
    assumes="0 < w < 1: w is the sigmoid of (the head's output minus 1), and starts at 0.27. A wrong thought costs at "
    "most -log(1 - w).",
    source="pointer-generator networks (See et al., 2017)",
    log_probs=True,
)
def probabilities(
    logits: Logits, base_hidden: jax.Array, talk_hidden: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixed probabilities, which sum to 1. Thoughts that are right only sometimes still lower the loss."""
    base, after_thought = _log_predictions(logits, base_hidden, talk_hidden)
    return mix_probabilities(base, after_thought, weight)


def mix_probabilities(base: jax.Array, after: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes log-probabilities [.., V] for outputs [..] of the mixing head; returns log((1 - w) p + w p') and w."""
    odds = weight + FIRST_ODDS
    without, with_thought = jax.nn.log_sigmoid(-odds)[..., None], jax.nn.log_sigmoid(odds)[..., None]
    return jnp.logaddexp(without + base, with_thought + after), jax.nn.sigmoid(odds)


@MIXINGS.register(
    formula=r"\mathrm{logits}(h')",
    assumes="w = 1: nothing limits what a bad thought does to the prediction.",
    source="RLP, JEPO, LaTRO",
    head=False,
)
def none(logits: Logits, base_hidden: jax.Array, talk_hidden: jax.Array, weight: None) -> tuple[jax.Array, jax.Array]:
    """The prediction after the thought alone."""
    return logits(talk_hidden), jnp.ones(talk_hidden.shape[:-1], jnp.float32)


def _log_predictions(logits: Logits, base_hidden: jax.Array, talk_hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log p [B, 1, J, K, V], computed once and broadcast over the R thoughts, and log p' [B, R, J, K, V]."""
    return jax.nn.log_softmax(logits(base_hidden))[:, None], jax.nn.log_softmax(logits(talk_hidden))
