"""Figures that show whether thoughts differ: distinct thoughts, and quantiles of the entropy over positions.

All are sums over sequences, so that the results of microbatches and devices add up to those of the batch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

BINS = 256
QUANTILES = (0.05, 0.5, 0.95)
HASHES = (
    (0x9E3779B1, 0x7FEB352D, 0x165667B1),
    (0xC2B2AE3D, 0x846CA68B, 0x27D4EB2F),
)  # all odd


def distinct_thoughts(tokens: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the number of distinct thoughts within each sequence, [B] float32.

    Thoughts are compared by two hashes of 32 bits, which cost the same to sort for every T. Different thoughts count as
    one with a probability of about 2^-64 for each pair: 2^-39 for a sequence of 8192 thoughts. Thoughts that differ in
    a single token never do.

    Args:
      tokens: [B, R, J, T] int32; counted: [B, J] bool, the positions whose thoughts are counted.
    """
    batch, count, places, _ = tokens.shape
    absent = jnp.broadcast_to(~counted[:, None], (batch, count, places)).astype(jnp.uint32)
    # Sorted by (absent, hash, hash), equal thoughts are neighbours; the first of them is counted.
    keys = (absent, *(_hash(tokens, *constants) for constants in HASHES))
    keys = jax.lax.sort([key.reshape(batch, -1) for key in keys], dimension=1, num_keys=len(keys))
    new = jnp.stack([key[:, 1:] != key[:, :-1] for key in keys]).any(axis=0)
    return (jnp.pad(new, ((0, 0), (1, 0)), constant_values=True) & (keys[0] == 0)).sum(axis=1, dtype=jnp.float32)


def _hash(tokens: jax.Array, of_token: int, of_place: int, start: int) -> jax.Array:
    """Returns a hash of each thought, [.., T] int32 -> [..] uint32: the sum of a number for each token and its place.

    The number is the finalizer of MurmurHash3, a permutation of the 32-bit integers, of a linear function of both.
    """
    place = jnp.arange(tokens.shape[-1], dtype=jnp.uint32)
    x = tokens.astype(jnp.uint32) * jnp.uint32(of_token) + place * jnp.uint32(of_place) + jnp.uint32(start)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).sum(axis=-1, dtype=jnp.uint32)


def entropy_histogram(entropy: jax.Array, counted: jax.Array, vocab_size: int) -> jax.Array:
    """Returns how many of the counted positions have an entropy in each bin, float32 [BINS].

    Bin i covers log(V) (i / BINS)^2 .. log(V) ((i + 1) / BINS)^2: narrow near 0, where collapsed thoughts are.

    Args:
      entropy: [B, J] nats; counted: [B, J] bool.
    """
    share = jnp.clip(entropy / math.log(vocab_size), 0.0, 1.0)
    bins = jnp.minimum((jnp.sqrt(share) * BINS).astype(jnp.int32), BINS - 1)
    return jnp.zeros(BINS, jnp.float32).at[bins].add(counted.astype(jnp.float32))


def histogram_quantiles(histogram: jax.Array, vocab_size: int) -> dict[str, jax.Array]:
    """Returns `entropy_p05`, `entropy_p50`, `entropy_p95` in nats, interpolated within a bin of `entropy_histogram`."""
    edges = math.log(vocab_size) * (jnp.arange(BINS + 1, dtype=jnp.float32) / BINS) ** 2
    cumulative = jnp.concatenate([jnp.zeros(1), jnp.cumsum(histogram)])
    quantiles = {}
    for quantile in QUANTILES:
        target = quantile * cumulative[-1]
        at = jnp.clip(jnp.searchsorted(cumulative, target, side="right") - 1, 0, BINS - 1)
        inside = (target - cumulative[at]) / jnp.maximum(histogram[at], 1e-9)
        quantiles[f"entropy_p{round(100 * quantile):02}"] = edges[at] + jnp.clip(inside, 0, 1) * (
            edges[at + 1] - edges[at]
        )
    return quantiles
