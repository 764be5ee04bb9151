"""What a chain sees, by changing one token at a time and looking at what changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.thought_config import CONTROLS, ThoughtConfig
from quietstar_jax.thoughts import controls
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.positions import at_positions, choose
from quietstar_jax.thoughts.score import chain_hidden_states, score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import read_text

LENGTH, COUNT, SETTINGS = 6, 2, ThoughtSettings(thought_length=2, num_thoughts=2, tokens_ahead=3)
ARCHITECTURE = Architecture(
    vocab_size=13, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    initializer_range=0.5,
)  # fmt: skip
MODEL = init_quiet_star(ARCHITECTURE, [1], [2], 100.0, jax.random.key(0))


@jax.jit
def hidden_states(tokens: jax.Array, mask: jax.Array, thoughts: jax.Array) -> tuple[jax.Array, jax.Array]:
    text = read_text(MODEL.decoder, tokens, mask, dtype=jnp.dtype("float32"))
    return chain_hidden_states(MODEL, text, jnp.arange(LENGTH), thoughts, SETTINGS)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((2, LENGTH), bool)
    mask[1, 1] = False  # a hole: never a key
    tokens = rng.integers(3, 13, (2, LENGTH)).astype(np.int32)
    return tokens, mask, rng.integers(3, 13, (2, COUNT, LENGTH, 2)).astype(np.int32)


def changed(before: jax.Array, after: jax.Array) -> np.ndarray:
    """[B, R, J, C] whether a hidden state moved."""
    return np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > 1e-6


@pytest.mark.some(2)
@pytest.mark.parametrize(("row", "at"), [(0, 0), (0, 2), (0, LENGTH - 1), (1, 1), (1, 3)])
def test_a_token_of_the_text_reaches_chains_from_its_position_on(inputs, row, at) -> None:
    tokens, mask, thoughts = inputs
    other = tokens.copy()
    other[row, at] = tokens[row, at] % 10 + 3
    assert other[row, at] != tokens[row, at]
    before, after = hidden_states(tokens, mask, thoughts), hidden_states(other, mask, thoughts)
    thinking, talking = changed(before[0], after[0]), changed(before[1], after[1])
    for b in range(2):
        for j in range(LENGTH):
            seen = b == row and mask[row, at] and at <= j
            assert (thinking[b, :, j] == seen).all(), (b, j)
            for k in range(3):
                # k = 0 is `end`; k > 0 is the forced token x[j+k], which sees x[j+1] .. x[j+k]
                forced = b == row and j < at <= j + k
                assert (talking[b, :, j, k] == (seen or forced)).all(), (b, j, k)


@pytest.mark.parametrize("i", [0, 1])
def test_a_thought_token_reaches_only_its_own_chain_from_there_on(inputs, i) -> None:
    tokens, mask, thoughts = inputs
    other = thoughts.copy()
    other[0, 1, 3, i] = thoughts[0, 1, 3, i] % 10 + 3
    before, after = hidden_states(tokens, mask, thoughts), hidden_states(tokens, mask, other)
    thinking, talking = changed(before[0], after[0]), changed(before[1], after[1])
    wanted_thinking, wanted_talking = np.zeros_like(thinking), np.zeros_like(talking)
    wanted_thinking[0, 1, 3, i + 1 :] = True
    wanted_talking[0, 1, 3] = True
    np.testing.assert_array_equal(thinking, wanted_thinking)
    np.testing.assert_array_equal(talking, wanted_talking)


@pytest.mark.some(6)
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("positions", ["all", "random"])
@pytest.mark.parametrize("control", CONTROLS)
def test_no_control_sees_a_later_token(control: str, positions: str, greedy: bool) -> None:
    """The loss with thoughts of tokens 1 .. n does not change when tokens after n do, for every n."""
    length, fraction = 12, 1.0 if positions == "all" else 0.6
    config = ThoughtConfig(control=control, positions=positions, position_fraction=fraction)
    settings = dataclasses.replace(SETTINGS, tokens_ahead=1, pause_id=3, config=config)
    drawn = controls.draw_uniforms(jax.random.key(1), (2, COUNT, length, settings.thought_length))
    draws = jax.random.uniform(jax.random.key(2), (2, length))

    @jax.jit
    def losses(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = read_text(MODEL.decoder, tokens, jnp.ones(tokens.shape, bool), dtype=settings.dtype)
        places = choose(text, draws, settings)
        uniforms = jax.tree.map(lambda x: at_positions(x, places), drawn)
        thoughts: Any = controls.sample_or_control(MODEL, text, places, uniforms, settings, 5, greedy=greedy)
        nll = score_thoughts(MODEL, text, places, thoughts.tokens, settings).nll[..., 0]
        return nll, jnp.broadcast_to(places[..., None, :], nll.shape)

    tokens = np.random.default_rng(4).integers(3, 13, (2, length)).astype(np.int32)
    before, places = losses(tokens)
    moved = 0.0
    for n in range(1, length - 1):
        other = tokens.copy()
        other[:, n + 1 :] = (tokens[:, n + 1 :] - 2) % 10 + 3
        after = losses(other)[0]
        predicted = np.asarray(places) + 1  # the token that each loss is of
        np.testing.assert_allclose(
            np.where(predicted <= n, after, 0), np.where(predicted <= n, before, 0), atol=1e-6, err_msg=str(n)
        )
        moved = max(moved, np.abs(np.where(predicted > n, after - before, 0)).max())
    assert moved > 1e-3
