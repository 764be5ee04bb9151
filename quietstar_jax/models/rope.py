"""Rotary position embeddings with the scalings of Hugging Face `rope_parameters`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture


def frequencies(architecture: Architecture) -> tuple[np.ndarray, float]:
    """Returns the angular frequency of every rotary pair, and the factor by which cos and sin are multiplied.

    Returns:
      ([N/2] float32 radians per position, attention factor); N is the number of dimensions of a head that rotate.
    """
    plain = _plain(architecture, architecture.rope_theta)
    scaling = architecture.rope_scaling
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, architecture).astype(np.float32), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, architecture).astype(np.float32), _yarn_attention_factor(architecture)
    return plain.astype(np.float32), 1.0


def bases(architecture: Architecture) -> np.ndarray:
    """Returns the index of each layer's rotary base, [layers] int32: 1 in local layers with their own base, else 0."""
    a = architecture
    return np.array([bool(a.rope_local_theta) and a.has_window(i) for i in range(a.num_layers)], np.int32)


def rotations(architecture: Architecture, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, base by base.

    Args:
      positions: [...].

    Returns:
      Two arrays [bases, ..., 1, N/2] (broadcast over heads); see `bases`.
    """
    tables = [frequencies(architecture)]
    if bases(architecture).any():
        tables.append((_plain(architecture, architecture.rope_local_theta).astype(np.float32), 1.0))
    angles = [positions.astype(jnp.float32)[..., None, None] * inverse for inverse, _ in tables]
    cos, sin = (
        jnp.stack([fn(angle) * factor for angle, (_, factor) in zip(angles, tables, strict=True)])
        for fn in (jnp.cos, jnp.sin)
    )
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + N/2) of x [..., heads, H], i < N/2; computed in float32, returned in x's dtype."""
    half = cos.shape[-1]
    first, second, still = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, still], axis=-1).astype(x.dtype)


def _plain(architecture: Architecture, theta: float) -> np.ndarray:
    """Returns the frequencies of a base without scaling, [N/2] float64."""
    half = np.arange(0, architecture.rotary_dim, 2, dtype=np.float64) / architecture.rotary_dim
    return 1.0 / theta**half


def _llama3(plain: np.ndarray, architecture: Architecture) -> np.ndarray:
    scaling = architecture.rope_scaling
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # full rotations over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _yarn(plain: np.ndarray, architecture: Architecture) -> np.ndarray:
    scaling, dim = architecture.rope_scaling, architecture.rotary_dim

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
