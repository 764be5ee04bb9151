"""The thinking gate: predicts from the hidden state of the text whether a thought there would gain more than a price.

It is trained together with the thoughts, without a gradient to the decoder; its targets are the gains of these thoughts
(logistic regression on ordered thresholds, McCullagh 1980):

    g_j(price) = sigmoid(a (m_j - price)),    m_j = (u . h_j + b) / a,    a = exp(log_slope)
    target       1[gain of the thoughts at j > price],    loss  binary cross-entropy, mean over several prices

So one sort of the positions by m_j, in nats, serves every price: g_j > 1/2 exactly where m_j > price, and the price can
be chosen after training. Axis letters: B batch, R thoughts per position, J positions, K tokens ahead, D hidden width,
P prices.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.models.parameters import parameter, zeros


class ThinkingGate(nnx.Module):
    """The weights u [D], b [1] and log a [1]; all start at zero, so the predicted gain is 0 everywhere at first."""

    def __init__(self, hidden_size: int, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (hidden_size,), ("embed",), zeros)
        self.bias = parameter(rngs, (1,), (None,), zeros)
        self.log_slope = parameter(rngs, (1,), (None,), zeros)


def predicted_gain(gate: ThinkingGate, hidden: jax.Array) -> jax.Array:
    """Returns m, the price in nats at which a thought is as likely to pay as not, float32 [...]; hidden: [..., D]."""
    score = hidden.astype(jnp.float32) @ gate.weight[...] + gate.bias[...]
    return score * jnp.exp(-gate.log_slope[...])


def gate_logits(gate: ThinkingGate, hidden: jax.Array, prices: Sequence[float]) -> jax.Array:
    """Returns the logits of g at each price, float32 [..., P]; hidden: [..., D], which gets no gradient."""
    gain = predicted_gain(gate, jax.lax.stop_gradient(hidden))
    return jnp.exp(gate.log_slope[...]) * (gain[..., None] - jnp.asarray(prices, jnp.float32))


def gate_targets(gain: jax.Array, prices: Sequence[float]) -> jax.Array:
    """Returns whether a thought pays at each price, float32 [..., P]; gain: [...] nats, mean over thoughts."""
    return (gain[..., None] > jnp.asarray(prices, jnp.float32)).astype(jnp.float32)


def gate_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy of logits and targets [..., P] in nats, mean over the prices, [...]."""
    return (jax.nn.softplus(logits) - targets * logits).mean(axis=-1)


def mean_gain(base_nll: jax.Array, talk_nll: jax.Array, tokens: int) -> jax.Array:
    """Returns by how many nats thoughts improve the next tokens, mean over the thoughts, [B, J], without gradient.

    Args:
      base_nll: [B, J, K]; talk_nll: [B, R, J, K]; both 0 where a token is not real.
      tokens: how many of the K tokens count.
    """
    gain = (base_nll[:, None] - talk_nll)[..., :tokens].sum(axis=-1).mean(axis=1)
    return jax.lax.stop_gradient(gain)
