"""What stands in a thought's place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts.controls import random_tokens, shuffle_positions, think
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.text import read_text
from tests.thoughts.cases import Case, random_model

CASE = Case("controls")


def thoughts_of(control: str, *, greedy: bool = False, seed: int = 0) -> np.ndarray:
    settings = dataclasses.replace(
        CASE.thought, pause_id=7, config=dataclasses.replace(CASE.thought.config, control=control)
    )
    model = random_model(CASE.decoder, settings.config.embedding_scale)
    text = read_text(model.decoder, *CASE.text(), dtype=settings.dtype)
    shape = (CASE.batch, settings.count, CASE.length, settings.length)
    positions = jnp.arange(CASE.length)
    uniforms = jax.random.uniform(jax.random.key(seed), shape)
    if control == "none":
        np.testing.assert_array_equal(
            think(model, text, positions, uniforms, settings, 3).tokens,
            sample_thoughts(model, text, positions, uniforms, settings, 3).tokens,
        )
    return np.asarray(think(model, text, positions, uniforms, settings, 3, greedy=greedy).tokens)


def test_pause_is_filler() -> None:
    assert set(thoughts_of("pause").ravel().tolist()) == {7}


@pytest.mark.parametrize("greedy", [False, True])
def test_shuffled_thoughts_are_those_of_other_positions(greedy: bool) -> None:
    own, shuffled = thoughts_of("none", greedy=greedy), thoughts_of("shuffled", greedy=greedy)
    for b, r in np.ndindex(own.shape[:2]):
        assert sorted(map(tuple, own[b, r])) == sorted(map(tuple, shuffled[b, r]))


def test_no_position_keeps_its_thought() -> None:
    numbers = jnp.broadcast_to(jnp.arange(9)[None, None, :, None], (2, 3, 9, 1))
    uniforms = jax.random.uniform(jax.random.key(1), (2, 3, 9, 4))
    shuffled = shuffle_positions(numbers, uniforms, jnp.ones((2, 1, 9), bool))
    assert not np.any(shuffled == numbers)
    assert all(set(row.tolist()) == set(range(9)) for row in np.asarray(shuffled).reshape(6, 9))


def test_padding_gives_its_thoughts_to_no_other_position() -> None:
    numbers = jnp.broadcast_to(jnp.arange(9)[None, None, :, None], (2, 3, 9, 1))
    real = jnp.array([[1, 1, 1, 0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]], bool)[:, None]
    shuffled = shuffle_positions(numbers, jax.random.uniform(jax.random.key(1), (2, 3, 9, 4)), real)[..., 0]
    np.testing.assert_array_equal(shuffled[0][:, [3, 6, 7, 8]], [[3, 6, 7, 8]] * 3)
    moved = np.asarray(shuffled[0][:, [0, 1, 2, 4, 5]])
    assert all(set(row.tolist()) == {0, 1, 2, 4, 5} for row in moved)
    assert not np.any(moved == [0, 1, 2, 4, 5])
    np.testing.assert_array_equal(shuffled[1], [range(9)] * 3)  # there is no other


def test_random_tokens_are_uniform_without_meta_tokens() -> None:
    tokens = np.asarray(random_tokens(jax.random.uniform(jax.random.key(0), (40_000,)), 10, (3, 9)))
    counts = np.bincount(tokens, minlength=10)
    assert counts[3] == counts[9] == 0
    np.testing.assert_allclose(counts[[0, 1, 2, 4, 5, 6, 7, 8]] / 40_000, 1 / 8, atol=0.01)
    assert int(random_tokens(jnp.array([1.0 - 1e-7]), 10, (3, 9))[0]) == 8


def test_without_mixing_the_thought_alone_predicts() -> None:
    settings = dataclasses.replace(CASE.thought, config=dataclasses.replace(CASE.thought.config, mixing="none"))
    model = random_model(CASE.decoder, settings.config.embedding_scale)
    text = read_text(model.decoder, *CASE.text(), dtype=settings.dtype)
    positions = jnp.arange(CASE.length)
    scores = score_thoughts(model, text, positions, CASE.thoughts().tokens, settings)
    model.mixing_head.out.set_value(model.mixing_head.out[...] * 5)
    again = score_thoughts(model, text, positions, CASE.thoughts().tokens, settings)
    np.testing.assert_array_equal(scores.nats, again.nats)
    assert np.all(np.asarray(scores.weight) == 1.0)
