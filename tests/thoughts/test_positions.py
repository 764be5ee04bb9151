"""Thinking at chosen positions: which they are, and that the objective is exactly that of these positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.chunks import PAST_THE_TEXT
from quietstar_jax.thoughts.flops import step_flops
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.objective import advantages, count_targets, rewards
from quietstar_jax.thoughts.positions import at_positions, choose, count_chosen
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, here_and_ahead, read_text
from quietstar_jax.training.batch import draw
from tests.thoughts.cases import Case, random_model, worst_errors


def case(how: str, fraction: float) -> Case:
    """Positions 0 .. 5 of the first sequence may be chosen, of the second 0 .. 2: x[j+1] and x[j+2] must be real."""
    return Case(
        how, length=9, mask=("111111111", "111110000"), config={"positions": how, "position_fraction": fraction},
        architecture={"num_heads": 4, "num_kv_heads": 2, "sliding_window": 6},
    )  # fmt: skip


def text_of(mask: list[str], entropy: list[list[float]] | None = None) -> Text:
    real = jnp.array([[c == "1" for c in row] for row in mask])
    nothing = jnp.zeros(real.shape)
    return Text(real.astype(jnp.int32), real, nothing, None, nothing, entropy and jnp.array(entropy))


def chosen(how: str, fraction: float, draws: list[list[float]], text: Text) -> list[list[int]]:
    config = dataclasses.replace(Case("").thought.config, positions=how, position_fraction=fraction)
    settings = ThoughtSettings(thought_length=2, tokens_ahead=2, config=config)
    found = np.asarray(choose(text, jnp.array(draws), settings))
    return [[int(j) for j in row if j != PAST_THE_TEXT] for row in found]


def test_every_nth_position_from_a_drawn_offset() -> None:
    draws = [[0.0] * 9, [0.4] * 9, [0.99] * 9]
    assert chosen("stride", 1 / 3, draws, text_of(["1" * 9] * 3)) == [[0, 3], [1, 4], [2, 5]]
    assert chosen("stride", 1 / 3, draws, text_of(["111111000"] * 3)) == [[0, 3], [1], [2]]


def test_random_positions_are_those_of_the_largest_draws() -> None:
    draws = [[0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.99, 0.99, 0.99]]  # no reward is given at positions 6 .. 8
    assert chosen("random", 0.5, draws, text_of(["1" * 9])) == [[1, 3, 5]]


def test_positions_before_preferred_tokens_are_likelier() -> None:
    """Two positions before token 1 with weight 3, two others: the first choice has probability 3/8 each, or 1/8."""
    config = dataclasses.replace(
        Case("").thought.config, positions="random", position_weight=3.0, positions_per_sequence=1
    )
    settings = ThoughtSettings(tokens_ahead=1, thought_length=1, preferred_tokens=(1, 7), config=config)
    count = 20_000
    tokens = jnp.tile(jnp.array([5, 1, 7, 5, 5, 1]), (count, 1))  # position 4 is no candidate, nor is 5
    text = text_of(["1" * 6])._replace(tokens=tokens, mask=jnp.ones(tokens.shape, bool))
    found = np.asarray(choose(text, jax.random.uniform(jax.random.key(0), tokens.shape), settings))
    shares = np.bincount(found[:, 0], minlength=6) / count
    np.testing.assert_allclose(shares, [3 / 8, 3 / 8, 1 / 8, 1 / 8, 0, 0], atol=0.015)

    draws = jnp.zeros(tokens.shape)  # the least number that can be drawn still is a candidate
    assert (np.asarray(choose(text, draws, settings)) < 4).all()


def test_positions_where_a_thought_would_start_are_likelier() -> None:
    """In proportion to the probability of the start token; not in documents that contain this token, here 7."""
    config = dataclasses.replace(Case("").thought.config, positions="start", positions_per_sequence=1)
    settings = ThoughtSettings(tokens_ahead=1, thought_length=1, start_token=7, config=config)
    count = 20_000
    tokens = jnp.tile(jnp.array([5, 1, 7, 5, 5, 1, 5]), (count, 1))
    log_prob = jnp.log(jnp.tile(jnp.array([0.9, 0.9, 0.9, 0.02, 0.06, 0.9, 0.9]), (count, 1)))
    text = text_of(["1" * 7])._replace(tokens=tokens, mask=jnp.ones(tokens.shape, bool), start_log_prob=log_prob)
    text = text._replace(starts=jnp.tile(jnp.array([0, 0, 0, 3, 3, 3, 3]), (count, 1)))
    draws = jax.random.uniform(jax.random.key(0), tokens.shape)
    shares = np.bincount(np.asarray(choose(text, draws, settings))[:, 0], minlength=7) / count
    np.testing.assert_allclose(shares, [0, 0, 0, 1 / 4, 3 / 4, 0, 0], atol=0.015)  # 5 and 6 are no candidates
    every = dataclasses.replace(settings, config=dataclasses.replace(config, positions_per_sequence=4))
    assert (np.asarray(choose(text, draws, every)) == [3, 4, PAST_THE_TEXT, PAST_THE_TEXT]).all()
    alone = text._replace(starts=None)
    assert (np.asarray(choose(alone, draws, settings)) == PAST_THE_TEXT).all()
    assert (np.asarray(choose(alone._replace(mask=tokens != 7), draws, settings)) < 5).any()


def test_the_least_certain_positions_whose_targets_are_real() -> None:
    entropy = [[1.0, 5.0, 2.0, 4.0, 3.0, 0.0, 9.0, 9.0, 9.0]] * 2
    text = text_of(["111111111", "111110000"], entropy)
    assert chosen("entropy", 0.5, [[0.0] * 9] * 2, text) == [[1, 3, 4], [1, 2]]
    assert chosen("entropy", 0.01, [[0.0] * 9] * 2, text) == [[1], [1]]


def test_shorter_texts_think_less_and_holes_never() -> None:
    entropy = [[1.0] * 9] * 3
    text = text_of(["110000000", "111111111", "101111011"], entropy)
    assert chosen("entropy", 1.0, [[0.0] * 9] * 3, text) == [[], [0, 1, 2, 3, 4, 5], [1, 2, 3]]


def test_a_number_of_positions_for_each_sequence() -> None:
    """The least certain, or all that a shorter text has; the budget and the random numbers are for as many."""
    config = dataclasses.replace(Case("").thought.config, positions="entropy", positions_per_sequence=2)
    settings = ThoughtSettings(thought_length=2, tokens_ahead=2, config=config)
    text = text_of(["111111111", "111110000", "111100000"], [[1.0, 5.0, 2.0, 4.0, 3.0, 0.0, 9.0, 9.0, 9.0]] * 3)
    draws = jnp.zeros((3, 9))
    assert choose(text, draws, settings).tolist() == [[1, 3], [1, 2], [0, 1]]
    assert count_chosen(text.tokens[:2], text_of(["111111111", "111000000"]).mask, draws[:2], settings).tolist() == [
        2,
        1,
    ]
    assert settings.thinking_positions(9) == settings.drawn_positions(9) == 2
    assert settings.thinking_positions(4) == 1  # no more than exist
    assert draw(jax.random.key(0), (3, 9), settings).thoughts.tokens.shape == (3, 1, 2, 2)
    everywhere = dataclasses.replace(settings, config=dataclasses.replace(config, positions_per_sequence=0))
    assert draw(jax.random.key(0), (3, 9), everywhere).thoughts.tokens.shape == (3, 1, 9, 2)


@pytest.mark.some(1)
@pytest.mark.parametrize(("how", "fraction"), [("entropy", 0.6), ("random", 0.3), ("stride", 0.5)])
def test_loss_and_gradients_are_those_of_the_chosen_positions(how: str, fraction: float) -> None:
    """Against the formulas over scores of all positions, of which the others get weight 0."""
    c = case(how, fraction)
    s, config = c.thought, c.thought.config
    params, graphdef = split(random_model(c.decoder, config.embedding_scale))
    (tokens, mask), draws = c.text(), jax.random.uniform(jax.random.key(5), (c.batch, c.length))
    thoughts = c.thoughts()
    counts = count_targets(mask, s.tokens_ahead, count_chosen(tokens, mask, draws, s))

    def given(model: Any, text: Text, positions: jax.Array) -> Any:
        return jax.tree.map(lambda x: at_positions(x, positions), thoughts)

    @jax.jit
    @jax.value_and_grad
    def found(params: Any) -> jax.Array:
        model = merge(graphdef, params)
        return quiet_star_loss(
            model, tokens, mask, given, counts, s, c.positions_per_chunk, choose=lambda text: choose(text, draws, s)
        )[0]

    @jax.jit
    @jax.value_and_grad
    def wanted(params: Any) -> jax.Array:
        model = merge(graphdef, params)
        text = read_text(model.decoder, tokens, mask, dtype=s.dtype, with_entropy=True)
        everywhere = jnp.arange(c.length)
        scores = score_thoughts(model, text, everywhere, thoughts.tokens, s)
        positions = choose(text, draws, s)
        thinks = (positions[:, :, None] == everywhere).any(axis=1)[:, None, :].astype(jnp.float32)  # [B, 1, L]
        total = thinks.sum()
        assert_real = jnp.where(total > 2, 0.0, jnp.nan)  # the case must have something to choose
        talk = (scores.nll * thinks[..., None]).sum(axis=(0, 1, 2)) / (s.num_thoughts * total)
        reward = rewards(here_and_ahead(text.nll, everywhere, s.tokens_ahead), scores.nll)
        advantage = advantages(reward, positive_only=config.positive_only) * thinks
        policy = -(advantage * scores.log_probs.mean(axis=-1)).sum() / (s.num_thoughts * total)
        base = text.nll.sum() / counts.text
        weight = config.base_loss_weight
        return weight * base + (1 - weight) * talk.mean() + s.policy_weight * policy + assert_real

    (value, gradients), (expected, expected_gradients) = found(params), wanted(params)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert not worst_errors(gradients, expected_gradients, 2e-5)


def test_a_thought_does_not_depend_on_which_others_are_thought() -> None:
    c = case("random", 0.5)
    s = c.thought
    model = random_model(c.decoder, s.config.embedding_scale)
    (tokens, mask), everywhere = c.text(), jnp.arange(c.length)
    text = read_text(model.decoder, tokens, mask, dtype=s.dtype)
    uniforms = jax.random.uniform(jax.random.key(3), (c.batch, s.num_thoughts, c.length, s.thought_length))
    all_thoughts = sample_thoughts(model, text, everywhere, uniforms, s, 4).tokens
    positions = jnp.array([[0, 3, 5], [1, 2, PAST_THE_TEXT]])
    some = sample_thoughts(model, text, positions, at_positions(uniforms, positions), s, 2).tokens
    np.testing.assert_array_equal(some[0], all_thoughts[0][:, jnp.array([0, 3, 5])])
    np.testing.assert_array_equal(some[1, :, :2], all_thoughts[1][:, jnp.array([1, 2])])


def test_the_cost_falls_with_the_fraction() -> None:
    settings = ThoughtSettings(thought_length=9, num_thoughts=2, tokens_ahead=4)
    config = dataclasses.replace(settings.config, positions="entropy", position_fraction=0.25)
    quarter = dataclasses.replace(settings, config=config)
    decoder = Case("").decoder
    every, some = (step_flops(decoder, s, batch=2, length=205) for s in (settings, quarter))
    assert some.base == every.base
    for part in ("sampling", "scoring", "scoring_heads"):
        assert getattr(some, part) == pytest.approx(getattr(every, part) * 50 / 205)
