"""The windows of a text, and the likeliest tokens and sampled thoughts in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.reports.observe import LIKELIEST, Window, cut_windows, longest_window, observe
from quietstar_jax.thoughts.token_scores import TokenScores
from tests.reports.cases import random_model

MODEL = random_model()
TEXTS = [MODEL.tokenizer.encode(text) for text in ("sum 3 +1 +4 ask 8 .", "kim has 4 wage fig gift ask 4 .")]


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    return cut_windows(MODEL, TEXTS, documents=5, max_tokens=100, length=50)


@pytest.fixture(scope="module")
def seen(windows: list[Window]) -> list[TokenScores]:
    return observe(MODEL, MODEL.settings(3, 2), windows, samples=2, seed=0)


def test_likeliest_tokens_are_the_ones_the_losses_are_of(windows: list[Window], seen: list[TokenScores]) -> None:
    first, last = windows[0].tokens[0], LIKELIEST - 1
    likely = np.array([first, seen[0].base.top_ids[0, last]]), np.array([first, seen[0].talk.top_ids[0, 0, last]])
    base, mixed = observe(MODEL, MODEL.settings(3, 2), [Window(0, tokens) for tokens in likely], samples=0, seed=0)
    assert base.base.top_ids[0, last] == likely[0][1]
    assert mixed.talk.top_ids[0, 0, last] == likely[1][1]
    np.testing.assert_allclose(base.base.top_probabilities[0, last], np.exp(-base.base.nll[0]), rtol=1e-4)
    np.testing.assert_allclose(mixed.talk.top_probabilities[0, 0, last], np.exp(-mixed.talk.nll[0, 0]), rtol=1e-4)
    for odds in (base.base.top_probabilities, mixed.talk.top_probabilities):
        assert (np.diff(odds) <= 0).all()


def test_sampled_thoughts_differ_and_follow_the_seed(windows: list[Window], seen: list[TokenScores]) -> None:
    assert (seen[0].thoughts[1] != seen[0].thoughts[2]).any()
    again, other = (observe(MODEL, MODEL.settings(3, 2), windows, samples=2, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[1].thoughts, seen[1].thoughts)
    assert (other[1].thoughts[1:] != seen[1].thoughts[1:]).any()
    np.testing.assert_array_equal(other[1].thoughts[0], seen[1].thoughts[0])


def test_thoughts_among_given_positions(windows: list[Window]) -> None:
    """A prediction whose older thoughts are all there is that with thoughts at all positions."""
    model = dataclasses.replace(MODEL, thought=dataclasses.replace(MODEL.thought, mixing="probabilities"))
    settings, longest = model.settings(3, 2, 2), max(len(window.tokens) for window in windows)
    among = np.arange(longest) % 4 >= np.array([[1], [2]])
    every, some = (observe(model, settings, windows, samples=1, seed=0, among=here) for here in (None, among))
    for here, whole, few in zip(among, every, some, strict=True):
        chosen = here[: len(few.base.nll)]
        np.testing.assert_array_equal(few.made, np.broadcast_to(chosen, few.made.shape))
        np.testing.assert_array_equal(few.thoughts[:, chosen], whole.thoughts[:, chosen])
        both = chosen & np.append(False, chosen[:-1])
        assert both.any()
        for name in ("reward", "weight"):
            expected = getattr(whole, name)[:, both]
            np.testing.assert_allclose(getattr(few, name)[:, both], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(few.talk.nll[:, both], whole.talk.nll[:, both], rtol=1e-4)
        unused = ~(chosen | np.append(False, chosen[:-1]))
        np.testing.assert_array_equal(few.talk.nll[0, unused], few.base.nll[unused])


def test_probabilities_of_the_papers_mixing(windows: list[Window]) -> None:
    model = dataclasses.replace(MODEL, thought=dataclasses.replace(MODEL.thought, mixing="log_probabilities"))
    settings = model.settings(3, 1)
    (before,) = observe(model, settings, windows[:1], samples=0, seed=0)
    tokens = np.array([windows[0].tokens[0], before.talk.top_ids[0, 0, 0]])
    (seen,) = observe(model, settings, [Window(0, tokens)], samples=0, seed=0)
    np.testing.assert_allclose(seen.talk.top_probabilities[0, 0, 0], np.exp(-seen.talk.nll[0, 0]), rtol=1e-4)
    assert seen.talk.top_probabilities[0, 0].sum() < 1
    assert seen.talk.nll.shape == (1, 1)


def test_windows() -> None:
    eos = MODEL.tokenizer.eos_id

    def cut(**changes: int) -> list[tuple[int, int]]:
        given = dict(documents=5, max_tokens=100, length=50) | changes
        return [(window.document, len(window.tokens)) for window in cut_windows(MODEL, TEXTS, **given)]

    assert cut() == [(0, 8), (1, 10)]
    assert cut_windows(MODEL, TEXTS, documents=1, max_tokens=9, length=9)[0].tokens[-1] == eos
    assert cut(length=4) == [(0, 4), (0, 4), (1, 4), (1, 4), (1, 2)]
    assert cut(length=3) == [(0, 3), (0, 3), (0, 2), (1, 3), (1, 3), (1, 3)]  # a single token is left out
    assert cut(max_tokens=11) == [(0, 8), (1, 3)]
    assert cut(max_tokens=8) == [(0, 8)]
    assert cut(documents=1) == [(0, 8)]
    with pytest.raises(DataError, match="nothing to predict"):
        cut_windows(MODEL, [[]], documents=1, max_tokens=100, length=50)


def test_room_beside_a_thought() -> None:
    assert longest_window(MODEL, MODEL.settings(3, 2), 20) == 20
    assert longest_window(MODEL, MODEL.settings(3, 2), 500) == 64 - 3 - 2 - 1
    with pytest.raises(ConfigError, match="no room for text"):
        longest_window(MODEL, MODEL.settings(61, 2), 20)
