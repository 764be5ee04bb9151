"""The mixing head: the weight of the prediction after a thought (paper section 4.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.linear import dense, linear
from quietstar_jax.models.parameters import Initializer, parameter, zeros


def uniform_fan_in(fan_in: int) -> Initializer:
    """Initializer that is uniform within +-1/sqrt(fan_in), as in the published head."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class MixingHead(nnx.Module):
    """MLP 2D -> D -> D -> 1 on [hidden state of the text, hidden state after the thought].

    The first layer is stored as its two halves, so that the half on the text is computed once for all thoughts.
    The last layer starts at zero, so that training starts as if there were no thoughts.
    """

    def __init__(self, hidden_size: int, rngs: nnx.Rngs):
        d = hidden_size
        self.base_in = parameter(rngs, (d, d), ("embed", "mixing"), uniform_fan_in(2 * d))
        self.thought_in = parameter(rngs, (d, d), ("embed", "mixing"), uniform_fan_in(2 * d))
        self.in_bias = parameter(rngs, (d,), ("mixing",), uniform_fan_in(2 * d))
        self.hidden = parameter(rngs, (d, d), ("mixing", "embed"), uniform_fan_in(d))
        self.hidden_bias = parameter(rngs, (d,), ("embed",), uniform_fan_in(d))
        self.out = parameter(rngs, (d, 1), ("embed", None), zeros)


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
