"""The reference model of the KL divergence: log-probabilities of given thoughts under frozen weights."""

from __future__ import annotations

import jax

from quietstar_jax.thoughts.chunks import map_chunks
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.score import chain_hidden_states, score_actions
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, read_text


def reference_log_probs(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: jax.Array, settings: ThoughtSettings,
    positions_per_chunk: int,
) -> jax.Array:  # fmt: skip
    """Returns the log-probability of each thought token at the temperature of scoring, without gradient.

    Costs a forward pass over text and chains: the text is read again, with the weights of the reference.

    Args:
      model: the reference; text: only its tokens, mask and starts are used; thoughts: [B, R, J, T].

    Returns:
      [B, R, J, T] float32.
    """
    model = jax.lax.stop_gradient(model)
    text = read_text(model.decoder, text.tokens, text.mask, text.starts, dtype=settings.dtype)

    def chunk(read: tuple[QuietStar, Text], positions: jax.Array, thoughts: jax.Array) -> jax.Array:
        model, text = read
        hidden = chain_hidden_states(model, text, positions, thoughts, settings)[0]
        return score_actions(model, hidden, thoughts, settings)[0]

    return map_chunks(chunk, (model, text), positions, positions_per_chunk, thoughts, axis=2)
