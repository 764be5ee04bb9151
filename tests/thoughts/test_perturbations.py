"""Perturbed thoughts and thoughts without the text, against thoughts and chains written out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.models.parameters import split
from quietstar_jax.thought_config import PERTURBATIONS
from quietstar_jax.thoughts.controls import draw_uniforms
from quietstar_jax.thoughts.perturbations import (
    PERCENTS,
    PerturbationDraws,
    changed_tokens,
    draw_perturbations,
    perturb,
)
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.score_predictions import Thinking, Wanted, score_without_thoughts
from quietstar_jax.thoughts.score_tokens import score_given_thoughts, score_tokens
from quietstar_jax.thoughts.score_use import UseWanted, score_use
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.thoughts.token_scores import Prediction, ThoughtUse, TokenScores, ensemble_nll
from tests.thoughts import oracle
from tests.thoughts.cases import Case, random_model

OWN = dict(vocab_size=13, meta_tokens=(11, 12))
LETTERS = "abcde"


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        ("delete", 0, "abcde"), ("delete", 2, "bce"), ("delete", 4, "c"), ("delete", 5, ""),
        ("truncate", 0, "abcde"), ("truncate", 2, "abc"), ("truncate", 5, ""),
        ("replace", 0, "abcde"), ("replace", 2, "VbcYe"), ("replace", 5, "VWXYZ"),
        ("shuffle", 0, "abcde"), ("shuffle", 1, "abcde"), ("shuffle", 2, "dbcae"), ("shuffle", 3, "dbcea"),
    ],
)  # fmt: skip
def test_a_thought_by_hand(kind, count, expected):
    """The order of places is 3 0 4 1 2, as in the docstring of the module."""
    replaced_by = jnp.asarray((np.arange(5) + ord("V") + 0.5) / 100, jnp.float32)
    draws = PerturbationDraws(jnp.array([0.2, 0.7, 0.8, 0.1, 0.3]), replaced_by)
    tokens = jnp.array([ord(letter) for letter in LETTERS])
    found = perturb(tokens, draws, kind, count, vocab_size=100, meta_tokens=())
    assert "".join(map(chr, found.tolist())) == expected


def random_thoughts(length=7):
    shape = (3, 2, 4, length)
    tokens = jax.random.randint(jax.random.key(1), shape, 1, 11)
    return tokens, draw_perturbations(jax.random.key(2), shape)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_shares_are_nested_and_differ_between_thoughts(kind):
    """What is changed at a share is changed at larger ones too; `shuffle` keeps the tokens, and moves all it chose."""
    _, draws = random_thoughts()
    places = jnp.broadcast_to(jnp.arange(7), draws.places.shape)  # every token is different
    kept_before = np.ones((24, 100), bool)
    for count in range(8):
        # Ids 7 .. 99 stand for replacements.
        found = np.asarray(perturb(places, draws, kind, count, vocab_size=100, meta_tokens=tuple(range(7))))
        assert found.shape == (3, 2, 4, 7 - count if kind in ("delete", "truncate") else 7)
        rows = found.reshape(24, -1)
        if kind == "shuffle":
            np.testing.assert_array_equal(np.sort(rows, axis=-1), np.broadcast_to(np.arange(7), rows.shape))
            assert ((rows != np.arange(7)).sum(axis=-1) == (count if count > 1 else 0)).all()
            kept = np.array([[row[i] == i for i in range(7)] for row in rows])
            continue
        kept = np.array([np.isin(np.arange(100), row) for row in rows])[:, :7]
        assert (kept.sum(axis=1) == 7 - count).all()
        assert (kept <= kept_before[:, :7]).all()
        kept_before = kept
        if kind in ("delete", "truncate"):
            assert (np.diff(rows, axis=-1) > 0).all()  # in order
        if kind in ("delete", "replace") and 0 < count < 7:
            assert len(np.unique(kept, axis=0)) > 1


def test_replacements_do_not_depend_on_the_share_and_are_allowed():
    tokens, draws = random_thoughts()
    whole = perturb(tokens, draws, "replace", 7, **OWN)
    assert set(np.unique(whole)) <= set(range(11))
    for count in range(8):
        some = perturb(tokens, draws, "replace", count, **OWN)
        assert ((some == tokens) | (some == whole)).all()


def test_numbers_of_changed_tokens():
    assert [changed_tokens(5, percent) for percent in PERCENTS] == [0, 1, 2, 3, 4, 5]
    assert [changed_tokens(6, percent) for percent in PERCENTS] == [0, 1, 2, 4, 5, 6]
    assert [changed_tokens(1, percent) for percent in PERCENTS] == [0, 0, 0, 1, 1, 1]
    for length in range(1, 40):
        assert [changed_tokens(length, percent) for percent in PERCENTS] == [round(length * p / 100) for p in PERCENTS]


def test_impossible_perturbations():
    tokens, draws = random_thoughts()
    with pytest.raises(ConfigError, match=r"'truncat'; it must be one of .*did you mean truncate"):
        perturb(tokens, draws, "truncat", 1, **OWN)
    for count in (-1, 8):
        with pytest.raises(ValueError, match=rf"count is {count}; it must be 0 \.\. 7"):
            perturb(tokens, draws, "delete", count, **OWN)


CASES = [
    Case("mixed", mask=("1111111", "1111100"), settings={"thought_length": 5}),
    Case("paper", config={"mixing": "log_probabilities"}, settings={"thought_length": 5}),
    Case("window", architecture={"sliding_window": 3}, settings={"thought_length": 5, "num_thoughts": 1}),
]


def slow_nll(case, params, text, thoughts, *, alone=False):
    """Cross-entropy [B, R, J] of x[j+1] with thoughts [B, R, J, any length], one written-out sequence at a time.

    Args:
      alone: the prediction after the thought only, where no token of the chain sees the text.
    """
    a, s = case.decoder, dataclasses.replace(case.thought, thought_length=thoughts.shape[-1])
    tokens, mask = text
    found = np.zeros(thoughts.shape[:3])
    for b, r, j in np.ndindex(found.shape):
        if j + 1 >= tokens.shape[1] or not mask[b, j + 1]:
            continue
        hidden = oracle.text(a, params, tokens[b], mask[b])[0][j]
        seen = jnp.zeros_like(mask[b]) if alone else mask[b]
        after = oracle.jitted_chain(a, s, params, tokens[b], seen, jnp.int32(j), thoughts[b, r, j])[
            s.thought_length + 1
        ]
        if alone:
            found[b, r, j] = oracle.nll(oracle.head(a, params, after), tokens[b, j + 1])
            continue
        w = oracle.mixing_weight(params, hidden, after)
        if s.config.mixing == "log_probabilities":
            w = jax.nn.sigmoid(w)
            parts = [jax.nn.log_softmax(oracle.head(a, params, x)) for x in (hidden, after)]
            found[b, r, j] = -((1 - w) * parts[0] + w * parts[1])[tokens[b, j + 1]]
        else:
            found[b, r, j] = oracle.nll(oracle.head(a, params, (1 - w) * hidden + w * after), tokens[b, j + 1])
    return found


@pytest.mark.some(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_against_written_out_chains(case):
    """Removed tokens are absent: the shorter thought is written out and read by a plain decoder."""
    model, positions = random_model(case.decoder, 7.0), jnp.arange(case.length)
    text = read_text(model.decoder, *case.text(), dtype=case.thought.dtype)
    params, thoughts = dict(split(model)[0]), case.thoughts()
    draws = draw_perturbations(jax.random.key(3), thoughts.tokens.shape)
    plain = score_given_thoughts(model, text, positions, thoughts, case.thought).talk.nll
    wanted = UseWanted(PERTURBATIONS, draws)
    before = score_without_thoughts(model, text, positions, case.thought, Wanted())
    use = score_use(model, text, positions, before, thoughts.tokens, plain, wanted, case.thought)
    near = dict(rtol=2e-4, atol=2e-4)
    slow = {}
    for kind in PERTURBATIONS:
        np.testing.assert_array_equal(use.perturbed[kind][0], plain)
        for percent, nll in list(zip(PERCENTS, use.perturbed[kind], strict=True))[2:]:
            changed = perturb(thoughts.tokens, draws, kind, changed_tokens(5, percent), **OWN)
            if percent in (40, 100):
                slow[kind, percent] = slow_nll(case, params, case.text(), changed)
                np.testing.assert_allclose(nll, slow[kind, percent], **near)
    np.testing.assert_array_equal(slow["delete", 100], slow["truncate", 100])  # both are an empty thought
    assert np.abs(slow["delete", 100] - plain).max() > 0.05
    alone = slow_nll(case, params, case.text(), thoughts.tokens, alone=True)
    np.testing.assert_allclose(use.thought_only, alone, **near)
    np.testing.assert_allclose(
        use.empty_only, slow_nll(case, params, case.text(), thoughts.tokens[..., :0], alone=True), **near
    )
    assert np.abs(use.thought_only - use.empty_only).max() > 0.05


def test_only_thoughts_that_the_policy_makes_are_perturbed():
    case = Case("policy", mask=("1111111", "0111111"))
    model, (tokens, mask) = random_model(case.decoder, 7.0), case.text()
    shape = (2, 2, case.length, case.thought.thought_length)
    uniforms, draws = draw_uniforms(jax.random.key(2), shape), draw_perturbations(jax.random.key(3), shape)
    made = jnp.array([0, 0, 1, 1, 0, 1, 0], bool)
    below = jnp.broadcast_to(jnp.where(made, 0.1, 0.9), mask.shape)
    thinking = Thinking(parse_policy("random:0.5"), jnp.zeros(mask.shape, jnp.int32), below)
    wanted = UseWanted(PERTURBATIONS, draws)
    some, every = (
        score_tokens(
            model, tokens, mask, None, jnp.arange(case.length), uniforms, case.thought, greedy=0, use=wanted, **policy
        )
        for policy in ({"thinking": thinking}, {})
    )
    np.testing.assert_array_equal(some.made[0, 0], made)
    for kind in PERTURBATIONS:
        for found, dense in zip(some.use.perturbed[kind], every.use.perturbed[kind], strict=True):
            expected = jnp.where(made, dense, every.base.nll[:, None])
            np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, some.use[:2], every.use[:2])


def test_a_truncated_thought_is_a_shorter_one():
    case = CASES[0]
    model, positions = random_model(case.decoder, 7.0), jnp.arange(case.length)
    text, thoughts = read_text(model.decoder, *case.text(), dtype=case.thought.dtype), case.thoughts()
    draws = draw_perturbations(jax.random.key(3), thoughts.tokens.shape)
    wanted = UseWanted(("truncate",), draws)
    before = score_without_thoughts(model, text, positions, case.thought, Wanted())
    use = score_use(model, text, positions, before, thoughts.tokens, jnp.zeros(()), wanted, case.thought)
    for count in range(1, 6):
        shorter = dataclasses.replace(case.thought, thought_length=5 - count)
        given = jax.tree.map(lambda x: x[..., : 5 - count], thoughts)  # noqa: B023
        expected = score_given_thoughts(model, text, positions, given, shorter)
        np.testing.assert_allclose(use.perturbed["truncate"][count], expected.talk.nll, rtol=1e-5, atol=1e-5)


def test_a_thought_alone_knows_nothing_else_of_the_text():
    """Other text before the thought changes nothing, if the thought and the tokens after it are the same."""
    case = Case("ahead", length=8, settings={"tokens_ahead": 3})
    model, place = random_model(case.decoder, 7.0), 4
    tokens, mask = case.text()
    thoughts = case.thoughts().tokens[:, :, place : place + 1]
    alone = dataclasses.replace(case.thought, config=dataclasses.replace(case.thought.config, mixing="none"))

    def nll(tokens, hide_text):
        text = read_text(model.decoder, tokens, mask, dtype=case.thought.dtype)
        at = jnp.array([place])
        return score_thoughts(model, text, at, thoughts, alone, hide_text=hide_text).nll  # [B, R, 1, K]

    other = tokens.at[:, : place + 1].set(tokens[:, : place + 1] % 10 + 1)
    np.testing.assert_array_equal(nll(tokens, True), nll(other, True))
    assert np.abs(nll(tokens, False) - nll(other, False)).max() > 0.1  # the text does matter where it is seen
    assert np.abs(nll(tokens, True) - nll(tokens.at[:, place + 1].set(1), True)).max() > 0.1  # K > 1: so do these


def test_ensembles_by_hand():
    nll = np.array([[[0.5, 3.0]], [[1.5, 1000.0]]], np.float32).swapaxes(0, 1)  # [B, R, J]: 1, 2, 2
    expected = [-np.log((np.exp(-0.5) + np.exp(-1.5)) / 2), 3.0 + np.log(2)]
    np.testing.assert_allclose(ensemble_nll(nll, axis=1)[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(ensemble_nll(nll[:, :1], axis=1), nll[:, 0])
    zeros, right = np.zeros((1, 2), np.float32), np.array([[[True, False]], [[False, False]]]).swapaxes(0, 1)
    base, talk = Prediction(zeros, zeros, zeros > 0), Prediction(nll, nll > 1, right)
    use = ThoughtUse(nll + 1, nll + 2, {"delete": (nll, nll + 4)})
    scores = TokenScores(zeros == 0, base, zeros, talk, -nll, nll, nll, np.zeros((1, 2, 2, 3), int), None, use)
    found = scores.average_thought()
    np.testing.assert_allclose(found.talk.nll, [[1.0, 501.5]])
    np.testing.assert_allclose(found.talk.correct, [[0.5, 0.0]])
    np.testing.assert_allclose(found.use.ensemble[0], expected, rtol=1e-6)
    np.testing.assert_allclose(found.use.thought_only, [[2.0, 502.5]])
    np.testing.assert_allclose(found.use.perturbed["delete"][1], [[5.0, 505.5]])
    assert found.thoughts.shape == (1, 2, 3)
