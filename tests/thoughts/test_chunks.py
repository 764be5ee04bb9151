"""Chunks of positions: sums, their gradients, and how many positions fit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from quietstar_jax.architecture import Architecture
from quietstar_jax.parallel.axes import MESH_AXES
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.chunks import (
    PAST_THE_TEXT,
    even_chunk,
    map_chunks,
    max_positions_per_chunk,
    max_sampled_positions_per_chunk,
    pack,
    sum_chunks,
    take_chunk,
)
from quietstar_jax.thoughts.settings import ThoughtSettings


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_mapping_joins_and_cuts(chunk: int) -> None:
    inputs = jnp.arange(14.0).reshape(2, 7)
    found = map_chunks(
        lambda _, positions, x: x * 10 + positions.astype(x.dtype), (), jnp.arange(7), chunk, inputs, axis=1
    )
    np.testing.assert_array_equal(found, inputs * 10 + jnp.arange(7.0))


def test_packed_positions_by_hand() -> None:
    chosen = jnp.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    packed = pack(jnp.arange(6) + 10, chosen)
    np.testing.assert_array_equal(packed.positions[0], [11, 14, 15, *[PAST_THE_TEXT] * 3])
    np.testing.assert_array_equal(packed.order[0], [1, 4, 5, 0, 2, 3])
    values = jnp.arange(3 * 2 * 6 * 2).reshape(3, 2, 6, 2)
    np.testing.assert_array_equal(packed.take(values)[0, 1, :3], values[0, 1, jnp.array([1, 4, 5])])
    for fill in (0, -2):
        expected = jnp.where(chosen[:, None, :, None], values, fill)
        np.testing.assert_array_equal(packed.put_back(packed.take(values), fill), expected)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_without_a_chosen_position_are_skipped(chunk: int) -> None:
    """The function would return 1 from them."""
    chosen = jnp.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], bool)
    packed = pack(jnp.arange(6), chosen)

    def one(_: None, positions: jax.Array, x: jax.Array) -> jax.Array:
        return x * 0 + 1

    found = jax.jit(lambda: map_chunks(one, None, packed, chunk, packed.take(jnp.zeros((2, 1, 6))), axis=2))()
    expected = jnp.arange(6) < -(-3 // chunk) * chunk
    np.testing.assert_array_equal(found, jnp.broadcast_to(expected, (2, 1, 6)))
    np.testing.assert_array_equal(packed.put_back(found)[:, 0], chosen)


@pytest.mark.parametrize(("dtype", "carried"), [("float32", ()), ("float32", ("a",)), ("bfloat16", ())])
def test_sum_and_gradient_equal_the_plain_sum(dtype: str, carried: tuple[str, ...]) -> None:
    weights = {"a": jnp.array([0.5, -1.0], dtype), "unused": jnp.ones(3, dtype)}
    data, ids = jnp.arange(7.0), jnp.arange(7)

    def piece(weights, constants, start):
        x, i = take_chunk(constants, start, 3, 0)
        value = (weights["a"][i % 2].astype(jnp.float32) * x).sum() ** 2
        return value, {"seen": x.sum()}, {name: weights[name] for name in carried}

    def chunked(weights):
        total, aux = sum_chunks(piece, weights, (data, ids), 7, 3)
        return 2.5 * total, aux

    def plain(weights):
        return 2.5 * sum(piece(weights, (data, ids), start)[0] for start in (0, 3, 6))

    (value, aux), gradient = jax.value_and_grad(chunked, has_aux=True)(weights)
    expected, expected_gradient = jax.value_and_grad(plain)(weights)
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    assert float(aux["seen"]) == 21.0
    for name in weights:
        assert gradient[name].dtype == weights[name].dtype
        np.testing.assert_allclose(
            gradient[name].astype("float32"), expected_gradient[name].astype("float32"), rtol=tolerance
        )


def test_a_larger_budget_never_takes_fewer_positions() -> None:
    settings = ThoughtSettings(thought_length=9, num_thoughts=2, tokens_ahead=4)
    found = [
        max_positions_per_chunk(
            Architecture(),
            dataclasses.replace(settings, config=ThoughtConfig(chunk_megabytes=megabytes)),
            batch=4,
            length=60,
        )
        for megabytes in (1, 16, 64, 256, 1024, 65536)
    ]
    assert found == sorted(found)
    assert found[0] >= 1
    assert found[-1] == 60


def test_chunks_are_even() -> None:
    assert [even_chunk(count, 64) for count in (1, 64, 72, 128, 130)] == [1, 64, 36, 64, 44]
    for count in range(1, 300):
        chunk = even_chunk(count, 64)
        assert chunk <= 64
        assert -(-count // chunk) == -(-count // 64), "no more chunks than of 64"
        assert chunk * -(-count // 64) < count + -(-count // 64), "less than one position per chunk is not needed"


def test_a_given_chunk_is_taken_up_to_the_text() -> None:
    settings = ThoughtSettings(thought_length=2, config=ThoughtConfig(positions_per_chunk=50))
    assert max_positions_per_chunk(Architecture(), settings, batch=1, length=20) == 20


def test_more_positions_are_sampled_at_once_where_weights_are_gathered():
    architecture = Architecture(hidden_size=256, intermediate_size=768, num_layers=16, vocab_size=64)
    settings = ThoughtSettings(4, num_thoughts=2, tokens_ahead=4, config=ThoughtConfig(chunk_megabytes=16))
    scored, sampled = (
        fn(architecture, settings, 4, 256) for fn in (max_positions_per_chunk, max_sampled_positions_per_chunk)
    )  # fmt: skip
    assert sampled == scored < 256  # nothing to gather on one device
    mesh = AbstractMesh((1, 1, 4, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    with jax.sharding.use_abstract_mesh(mesh):
        scored = max_positions_per_chunk(architecture, settings, 4, 256)
        sampled = max_sampled_positions_per_chunk(architecture, settings, 4, 256)
        assert scored < sampled <= 256
        fixed = dataclasses.replace(settings, config=ThoughtConfig(positions_per_chunk=2))
        assert max_sampled_positions_per_chunk(architecture, fixed, 4, 256) == 2
