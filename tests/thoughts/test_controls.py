"""What stands in a thought's place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts import controls
from quietstar_jax.thoughts.chunks import PAST_THE_TEXT, pack
from quietstar_jax.thoughts.controls import draw_uniforms, earlier_places, random_tokens, sample_or_control
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.score_tokens import think
from quietstar_jax.thoughts.text import read_text
from tests.thoughts.cases import Case, random_model

CASE = Case("controls")


def thoughts_of(control: str, *, greedy: bool = False, seed: int = 0) -> np.ndarray:
    settings = dataclasses.replace(
        CASE.thought, pause_id=7, config=dataclasses.replace(CASE.thought.config, control=control)
    )
    model = random_model(CASE.decoder, settings.config.embedding_scale)
    text = read_text(model.decoder, *CASE.text(), dtype=settings.dtype)
    shape = (CASE.batch, settings.num_thoughts, CASE.length, settings.thought_length)
    positions = jnp.arange(CASE.length)
    uniforms = draw_uniforms(jax.random.key(seed), shape)
    if control == "none":
        np.testing.assert_array_equal(
            sample_or_control(model, text, positions, uniforms, settings, 3).tokens,
            sample_thoughts(model, text, positions, uniforms.tokens, settings, 3).tokens,
        )
    return np.asarray(sample_or_control(model, text, positions, uniforms, settings, 3, greedy=greedy).tokens)


def test_pause_is_filler() -> None:
    assert set(thoughts_of("pause").ravel().tolist()) == {7}


@pytest.mark.parametrize("greedy", [False, True])
def test_shuffled_thoughts_are_those_of_earlier_positions(greedy: bool) -> None:
    own, shuffled = thoughts_of("none", greedy=greedy), thoughts_of("shuffled", greedy=greedy)
    for b, r, j in np.ndindex(own.shape[:3]):
        earlier = set(map(tuple, own[b, r, : max(j, 1)]))  # the first position has none and keeps its own
        assert tuple(shuffled[b, r, j]) in earlier, (b, r, j)
    assert np.any(own != shuffled)


@pytest.mark.parametrize(("chosen", "end", "two_documents"), [(0, "fixed", 1), (0, "token", 0), (1, "token", 1)])
def test_evaluation_samples_only_the_earlier_thoughts_that_it_uses(
    chosen: bool, end: str, two_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the thoughts that these earlier positions would have: the first greedy, the others with their draws."""
    case = Case("earlier", mask=("1111111", "0111110"))
    base = dataclasses.replace(case.thought, end_token=9, config=dataclasses.replace(case.thought.config, end=end))
    model = random_model(case.decoder, 7.0)
    starts = jnp.array([[0, 0, 0, 3, 3, 3, 3], [0] * 7]) if two_documents else None
    text = read_text(model.decoder, *case.text(), starts, dtype=base.dtype)
    shape, everywhere = (case.batch, 3, case.length, case.thought.thought_length), jnp.arange(case.length)
    uniforms = draw_uniforms(jax.random.key(5), shape)
    settings = dataclasses.replace(base, num_thoughts=3)
    own = think(model, text, everywhere, uniforms, settings, 1)
    source = np.asarray(earlier_places(uniforms.places, text.mask, starts))
    thinks = jnp.array([[0, 0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 0]], bool)
    packed = pack(everywhere, thinks)
    settings = dataclasses.replace(settings, config=dataclasses.replace(settings.config, control="shuffled"))
    sampled: list[np.ndarray] = []  # the positions of each call, one thought at each

    def spy(model, text, positions, uniforms, settings, chunk):
        assert settings.num_thoughts == 1
        sampled.append(np.asarray(positions.positions if chosen else positions))
        return sample_thoughts(model, text, positions, uniforms, settings, chunk)

    monkeypatch.setattr(controls, "sample_thoughts", spy)
    found = think(model, text, packed if chosen else everywhere[2:], uniforms, settings, 1)
    for positions, number in zip(sampled, (1, 2), strict=True):
        counts = number * np.asarray(thinks.sum(axis=1)) if chosen else [5 * number] * 2
        for row, count in zip(positions, counts, strict=True):  # those that are not chosen are last, and not in a text
            assert (row[:count] < case.length).all()
            assert (row[count:] == PAST_THE_TEXT).all()
    if chosen:
        found = packed.put_back(found)
    else:
        found = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (2, 0), (0, 0))), found)
    here = np.asarray(thinks) if chosen else np.arange(case.length) >= 2
    for name in ("tokens", "entropy", "log_probs"):
        at_its_place = np.asarray(getattr(own, name))
        expected, after = np.take_along_axis(at_its_place, source[..., None], axis=2), np.asarray(getattr(found, name))
        there = np.broadcast_to(here, (case.batch, case.length))[:, None, :, None]
        np.testing.assert_allclose(np.where(there, after, 0), np.where(there, expected, 0), atol=1e-5, err_msg=name)
        assert (np.where(there, expected != at_its_place, False)).any()


def test_every_earlier_place_is_equally_likely() -> None:
    places = np.asarray(earlier_places(jax.random.uniform(jax.random.key(0), (1, 20_000, 6)), jnp.ones((1, 6), bool)))
    for j in range(6):
        counts = np.bincount(places[0, :, j], minlength=6) / 20_000
        wanted = np.where(np.arange(6) < j, 1 / max(j, 1), 0.0) if j else np.eye(6)[0]
        np.testing.assert_allclose(counts, wanted, atol=0.015, err_msg=str(j))


def test_the_largest_number_below_one_takes_the_place_just_before() -> None:
    length = 3000
    highest = jnp.full((1, 1, length), np.nextafter(np.float32(1), np.float32(0)))
    places = np.asarray(earlier_places(highest, jnp.ones((1, length), bool)))[0, 0]
    np.testing.assert_array_equal(places, [0, *range(length - 1)])


def test_padding_gives_its_thoughts_to_no_other_position() -> None:
    real = jnp.array([[0, 1, 1, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]], bool)
    places = np.asarray(earlier_places(jax.random.uniform(jax.random.key(1), (2, 50, 9)), real))
    np.testing.assert_array_equal(places[1], [range(9)] * 50)
    for j in range(9):
        earlier = [i for i in range(j) if real[0, i]] if real[0, j] else []
        assert set(places[0, :, j].tolist()) == set(earlier or [j]), j


def test_places_are_drawn_apart_from_the_thoughts() -> None:
    """Ranks of the two kinds of numbers, over many draws: no correlation, and no number is used twice."""
    found = draw_uniforms(jax.random.key(3), (40, 2, 50, 3))
    tokens, places = np.asarray(found.tokens), np.asarray(found.places)
    assert not np.intersect1d(tokens, places).size or len(np.intersect1d(tokens, places)) < 5  # chance, of 2^23 numbers
    for i in range(3):
        assert abs(np.corrcoef(tokens[..., i].ravel(), places.ravel())[0, 1]) < 0.06  # 3.8 standard deviations


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
    np.testing.assert_array_equal(scores.nll, again.nll)
    assert np.all(np.asarray(scores.weight) == 1.0)
