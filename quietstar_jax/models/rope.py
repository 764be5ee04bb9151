"""Rotary position embeddings with the scalings of Hugging Face `rope_parameters`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.config import Architecture


def frequencies(architecture: Architecture) -> tuple[np.ndarray, float]:
    """Angular frequency of every rotary pair, and the factor by which cos and sin are multiplied.

    Returns:
      ([H/2] float32 radians per position, attention factor).
    """
    half = np.arange(0, architecture.head_dim, 2, dtype=np.float64) / architecture.head_dim
    plain = 1.0 / architecture.rope_theta**half
    scaling = architecture.rope_scaling
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, architecture).astype(np.float32), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, architecture).astype(np.float32), _yarn_attention_factor(architecture)
    return plain.astype(np.float32), 1.0


def rotation(architecture: Architecture, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles: positions [...] -> two arrays [..., 1, H/2] (broadcast over heads)."""
    inverse, factor = frequencies(architecture)
    angles = positions.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of x [..., heads, H]; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _llama3(plain: np.ndarray, architecture: Architecture) -> np.ndarray:
    scaling = architecture.rope_scaling
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn(plain: np.ndarray, architecture: Architecture) -> np.ndarray:
    scaling, dim = architecture.rope_scaling, architecture.head_dim

    def pair_turning(times: float) -> float:
        length = scaling.original_max_positions / (times * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(architecture.rope_theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(architecture: Architecture) -> float:
    scaling = architecture.rope_scaling
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
