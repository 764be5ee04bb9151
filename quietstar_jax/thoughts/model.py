"""The weights of Quiet-STaR: a decoder, a mixing head, start and end embeddings, optionally other heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.architecture import NO_ADAPTERS, Adapters, Architecture
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.parameters import GraphDef, parameter, split, zeros
from quietstar_jax.thoughts.ending import EndHead
from quietstar_jax.thoughts.gate import ThinkingGate
from quietstar_jax.thoughts.mixing import MixingHead
from quietstar_jax.thoughts.settings import ThoughtSettings


class QuietStar(nnx.Module):
    """A decoder with a mixing head and thought embeddings.

    `start_embedding` and `end_embedding` [D] are stored divided by `ThoughtConfig.embedding_scale`. Published
    checkpoints have an unused second row of each: `start_spare` and `end_spare` [D] store it unchanged. `gate` and
    `end_head` are None unless `ThoughtConfig.heads` contains them.
    """

    def __init__(self, decoder: Decoder, start: jax.Array, end: jax.Array, rngs: nnx.Rngs, heads: Sequence[str] = ()):
        """Args: start, end: [D] embeddings as stored; heads: see `ThoughtConfig.heads`."""
        self.decoder = decoder
        self.mixing_head = MixingHead(decoder.architecture.hidden_size, rngs)
        self.start_embedding = parameter(rngs, start.shape, ("embed",), lambda key, shape: start)
        self.end_embedding = parameter(rngs, end.shape, ("embed",), lambda key, shape: end)
        self.start_spare = parameter(rngs, start.shape, ("embed",), zeros)
        self.end_spare = parameter(rngs, end.shape, ("embed",), zeros)
        self.gate = ThinkingGate(decoder.architecture.hidden_size, rngs) if "gate" in heads else None
        self.end_head = EndHead(decoder.architecture.hidden_size, rngs) if "end_head" in heads else None

    def start_and_end(self, settings: ThoughtSettings) -> tuple[jax.Array, jax.Array]:
        """Returns the start and end embeddings, [D] each in the compute dtype, as input of the decoder.

        Like rows of the embedding, of which they are the mean at first, they are multiplied by the decoder's
        `embedding_multiplier`.
        """
        scale, dtype = settings.config.embedding_scale, settings.dtype
        rows = ((stored[...] * scale).astype(dtype) for stored in (self.start_embedding, self.end_embedding))
        start, end = map(self.decoder.scale_embeddings, rows)
        return start, end


def initialize(
    decoder: Decoder, start_tokens: Sequence[int], end_tokens: Sequence[int], embedding_scale: float, key: jax.Array,
    heads: Sequence[str] = (),
) -> QuietStar:  # fmt: skip
    """Adds a mixing head and thought embeddings to a decoder, initialised as in the paper.

    The mixing head's last layer is zero; the start and end embeddings are the mean embeddings of the given token ids
    (those of "---" in the paper). A thinking gate is initialised to zeros, an end head to a constant probability; the
    model has those that `heads` contains, see `ThoughtConfig.heads`.
    """

    embedding = decoder.embedding[...]
    start, end = (mean_embedding(embedding, tokens, embedding_scale) for tokens in (start_tokens, end_tokens))
    return QuietStar(decoder, start, end, nnx.Rngs(key), heads)


def mean_embedding(embedding: jax.Array, tokens: Sequence[int], embedding_scale: float) -> jax.Array:
    """Returns the initial start or end embedding, [D] as stored: the mean of these rows of the embedding [V, D]."""
    return embedding[jnp.array(tokens)].astype(jnp.float32).mean(axis=0) / embedding_scale


def init_quiet_star(
    architecture: Architecture, start_tokens: Sequence[int], end_tokens: Sequence[int], embedding_scale: float,
    key: jax.Array, adapters: Adapters = NO_ADAPTERS, heads: Sequence[str] = (),
) -> QuietStar:  # fmt: skip
    """Returns a model with random weights."""
    decoder_key, head_key = jax.random.split(key)
    decoder = Decoder(architecture, nnx.Rngs(decoder_key), adapters)
    return initialize(decoder, start_tokens, end_tokens, embedding_scale, head_key, heads)


def abstract_params(
    architecture: Architecture, adapters: Adapters = NO_ADAPTERS, heads: Sequence[str] = ()
) -> tuple[dict[str, Any], GraphDef]:
    """Returns float32 shapes of all parameters, and the graph definition of the model; allocates nothing."""

    def init() -> QuietStar:
        return init_quiet_star(architecture, [0], [0], 1.0, jax.random.key(0), adapters, heads)

    return split(jax.eval_shape(init))
