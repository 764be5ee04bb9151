"""The weights of Quiet-STaR: a decoder, a mixing head, and the start and end embeddings of a thought."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.decoder import Decoder
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


class QuietStar(nnx.Module):
    """A decoder with a mixing head and thought embeddings.

    `start_embedding` and `end_embedding` [D] are stored divided by `ThoughtConfig.embedding_scale`. Published
    checkpoints have an unused second row of each: `start_spare` and `end_spare` [D] store it unchanged.
    """

    def __init__(self, decoder: Decoder, start: jax.Array, end: jax.Array, rngs: nnx.Rngs):
        """Args: start, end: [D] embeddings as stored."""
        self.decoder = decoder
        self.mixing_head = MixingHead(decoder.architecture.hidden_size, rngs)
        self.start_embedding = parameter(rngs, start.shape, ("embed",), lambda key, shape: start)
        self.end_embedding = parameter(rngs, end.shape, ("embed",), lambda key, shape: end)
        self.start_spare = parameter(rngs, start.shape, ("embed",), zeros)
        self.end_spare = parameter(rngs, end.shape, ("embed",), zeros)


def initialize(
    decoder: Decoder, start_tokens: Sequence[int], end_tokens: Sequence[int], embedding_scale: float, key: jax.Array
) -> QuietStar:
    """Adds a mixing head and thought embeddings to a decoder, initialised as in the paper.

    The mixing head's last layer is zero; the start and end embeddings are the mean embeddings of the given token ids
    (those of "---" in the paper).
    """

    embedding = decoder.embedding[...]
    start, end = (mean_embedding(embedding, tokens, embedding_scale) for tokens in (start_tokens, end_tokens))
    return QuietStar(decoder, start, end, nnx.Rngs(key))


def mean_embedding(embedding: jax.Array, tokens: Sequence[int], embedding_scale: float) -> jax.Array:
    """Returns the initial start or end embedding, [D] as stored: the mean of these rows of the embedding [V, D]."""
    return embedding[jnp.array(tokens)].mean(axis=0) / embedding_scale


def init_quiet_star(
    architecture: Architecture, start_tokens: Sequence[int], end_tokens: Sequence[int], embedding_scale: float,
    key: jax.Array,
) -> QuietStar:  # fmt: skip
    """Returns a model with random weights."""
    decoder_key, head_key = jax.random.split(key)
    decoder = Decoder(architecture, nnx.Rngs(decoder_key))
    return initialize(decoder, start_tokens, end_tokens, embedding_scale, head_key)
