"""The mixing head: the weight of the prediction after a thought (paper section 4.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

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


def centered_bias(head: MixingHead, mean: jax.Array) -> jax.Array:
    """Returns the bias of the first layer with which the head sees its two inputs minus a vector [D].

    The hidden states of pretrained models share a large common vector, through which the first updates of the head
    change the weight at all positions together.
    """
    common = mean.astype(jnp.float32) @ (head.base_in[...] + head.thought_in[...])
    return head.in_bias[...] - common
