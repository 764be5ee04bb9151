"""Greedy choice and sampling of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import ALWAYS, ThinkPolicy
from quietstar_jax.models.attention import MASKED
from quietstar_jax.settings import require
from quietstar_jax.thoughts.sample import draw_tokens

TEMPERATURES = "0 (greedy), or 1e-6 up to 1e6"


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one call.

    Attributes:
      temperature: 0 = always the likeliest token; top_p: sample only from the likeliest tokens that together have this
        probability; thought_temperature: as `temperature`, for the tokens of thoughts.
      think: at which positions there is a thought.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    thought_temperature: float = 0.0
    think: ThinkPolicy = ALWAYS

    def __post_init__(self) -> None:
        problems = [
            *require(is_temperature(self.temperature), "temperature", self.temperature, TEMPERATURES),
            *require(0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, up to 1"),
            *require(
                is_temperature(self.thought_temperature), "thought_temperature", self.thought_temperature,
                TEMPERATURES,
            ),
        ]  # fmt: skip
        if problems:
            raise ConfigError("; ".join(problems) + ".")


def is_temperature(value: float) -> bool:
    """Whether a value is in `TEMPERATURES`: logits divided by others are no longer finite, or no longer distinct."""
    return value == 0 or 1e-6 <= value <= 1e6


def choose(
    logits: jax.Array, uniforms: jax.Array | None, temperature: jax.Array, top_p: jax.Array | None = None
) -> jax.Array:
    """Chooses token ids [B] int32 from logits [B, V].

    Args:
      uniforms: [B] in [0, 1), one for each draw; None = greedy, the likeliest token.
      top_p: scalar; None = 1.
    """
    if uniforms is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    return draw_tokens(logits if top_p is None else nucleus(logits, top_p), uniforms)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Masks logits [B, V] of all tokens but the likeliest ones that together have probability `top_p`.

    Ties with the least likely of these tokens are also kept. Its probability is found by bisection over the bits of a
    float, which is much cheaper than sorting the vocabulary.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def enough(bits: jax.Array) -> jax.Array:
        lowest = jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
        return jnp.where(probabilities >= lowest, probabilities, 0.0).sum(axis=-1) >= top_p

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` is enough, or 0; `high` is not enough, or exceeds the maximum
        middle = low + (high - low) // 2
        reached = enough(middle)
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    # Positive floats are ordered like their bits. The likeliest token is always kept, whatever the rounding.
    high = jax.lax.bitcast_convert_type(probabilities.max(axis=-1), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    lowest = jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]
    return jnp.where(probabilities >= lowest, logits, MASKED)
