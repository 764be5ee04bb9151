"""Tiny random models and texts in which every term of the objective matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.parameters import named_parameters
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.ending import ENDED
from quietstar_jax.thoughts.model import QuietStar, init_quiet_star
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings

TINY = Architecture(
    vocab_size=13, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    rope_theta=100.0,
)  # fmt: skip
PAD = 0


@dataclass(frozen=True)
class Case:
    """One configuration of the objective: sizes, options, and the text's mask drawn as rows of 0 and 1."""

    name: str
    batch: int = 2
    length: int = 7
    architecture: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mask: tuple[str, ...] = ()
    positions_per_chunk: int = 3

    @property
    def decoder(self) -> Architecture:
        return dataclasses.replace(TINY, **self.architecture)

    @property
    def thought(self) -> ThoughtSettings:
        defaults = {
            "thought_length": 2,
            "num_thoughts": 2,
            "tokens_ahead": 2,
            "policy_weight": 3.0,
            "meta_tokens": (11, 12),
        }
        config = ThoughtConfig(embedding_scale=7.0, score_temperature=2.0, base_loss_weight=0.3)
        return ThoughtSettings(
            **{**defaults, "pad_id": PAD, **self.settings}, config=dataclasses.replace(config, **self.config)
        )

    def text(self, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        """tokens, mask [B, L]; padding holds the pad id."""
        tokens = np.random.default_rng(seed).integers(1, 11, (self.batch, self.length))
        rows = self.mask or ("1" * self.length,) * self.batch
        mask = np.array([[c == "1" for c in row] for row in rows])
        assert mask.shape == tokens.shape
        return jnp.asarray(np.where(mask, tokens, PAD), jnp.int32), jnp.asarray(mask)

    def thoughts(self, seed: int = 0) -> Thoughts:
        """Given thoughts, of every length if ends are sampled, with an entropy and log-probabilities in sampling."""
        s, rng = self.thought, np.random.default_rng(seed + 1)
        shape = (self.batch, s.num_thoughts, self.length, s.thought_length)
        tokens = rng.integers(1, 11, shape)
        entropy, log_probs = rng.uniform(0, 2, shape), rng.uniform(-3, -2, shape)
        if s.samples_end:
            steps, lengths = np.arange(s.thought_length), rng.permutation(np.arange(shape[0] * shape[1] * shape[2]))
            lengths = (lengths % (s.thought_length + 1)).reshape(*shape[:3], 1)
            tokens = np.where(steps < lengths, tokens, ENDED)
            entropy, log_probs = (np.where(steps <= lengths, x, 0.0) for x in (entropy, log_probs))
        return Thoughts(jnp.asarray(tokens, jnp.int32), jnp.float32(entropy), jnp.float32(log_probs))


def random_model(
    architecture: Architecture, embedding_scale: float, seed: int = 0, heads: Sequence[str] = ()
) -> QuietStar:
    """A model whose every weight is random: norms, biases and the last mixing layer too."""
    model = init_quiet_star(architecture, [0], [0], embedding_scale, jax.random.key(seed), heads=heads)
    rng = np.random.default_rng(seed)
    for name, value in named_parameters(model).items():
        draw = rng.normal(size=value.shape)
        leaf = name.split(".")[-1]
        if leaf.endswith("norm"):
            draw = 1 + 0.3 * draw
        elif leaf in ("start_embedding", "end_embedding"):
            draw = draw / embedding_scale
        elif leaf == "embedding" or leaf.endswith("bias"):
            draw = 0.7 * draw
        else:
            draw = 1.3 * draw / np.sqrt(architecture.hidden_size)
        value.set_value(jnp.asarray(draw, jnp.float32))
    return model


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value expected (1 where that is all zero)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


def worst_errors(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Names whose relative error is above the tolerance (or NaN), with the error."""
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    return {name: error for name, error in errors.items() if not error <= tolerance}
