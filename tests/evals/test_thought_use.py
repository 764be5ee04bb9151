"""Whether thoughts are used: figures by hand, and a scorer whose results depend on nothing but the text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from quietstar_jax.evals.tails import Continuation, ContinuationScorer, UseOptions
from quietstar_jax.evals.thought_use import ensembles, summarize_use
from quietstar_jax.thought_config import PERTURBATIONS
from quietstar_jax.thoughts.token_scores import Prediction, ThoughtUse, TokenScores
from tests.reports.cases import random_model

TAILS = [
    Continuation(np.random.default_rng(n).integers(6, 100, n).tolist(), 1 + n % 4, number=n) for n in (5, 13, 18, 23)
]


def column(base, talk, *, together, alone, empty, deleted):
    """Scores of one window; deleted: [6][tokens]."""
    base, talk, together, alone, empty = (np.array(x, np.float32) for x in (base, talk, together, alone, empty))
    right = np.zeros(base.shape, bool)
    use = ThoughtUse(alone, empty, {"delete": tuple(np.array(x, np.float32) for x in deleted)}, together)
    thoughts = np.zeros((*base.shape, 2), int)
    without, after = (Prediction(nll, right, right) for nll in (base, talk))
    return TokenScores(~right, without, base, after, base - talk, base, base, thoughts, None, use)


def test_figures_by_hand():
    windows = [  # of 2 and 1 tokens
        column([3, 3], [2, 1], together=[1.5, 1], alone=[4, 4], empty=[5, 6], deleted=[[2, 1]] * 4 + [[3, 2]] * 2),
        column([3], [3], together=[2.5], alone=[4], empty=[4], deleted=[[3]] * 4 + [[3.3]] * 2),
    ]
    found = summarize_use(windows, seed=0, samples=2)
    assert found["thought_only_loss"] == found["thought_only"]["nats_per_token"] == pytest.approx(4.0)
    assert found["thought_only"]["empty_thought"]["nats_per_token"] == pytest.approx(5.0)
    assert found["thought_only"]["gain_over_empty_thought"]["difference"] == pytest.approx(1.0)
    together = found["ensemble"]
    assert (together["samples"], together["nats_per_token"]) == (2, pytest.approx(5 / 3))
    assert together["one_thought"]["nats_per_token"] == pytest.approx(2.0)
    assert together["gain_over_one_thought"]["difference"] == pytest.approx(1 / 3)
    assert together["gain_over_no_thoughts"]["difference"] == pytest.approx(3 - 5 / 3)
    rows = found["perturbed"]["delete"]
    assert [(row["percent"], row["changed_tokens"]) for row in rows] == [
        (0, 0), (20, 0), (40, 1), (60, 1), (80, 2), (100, 2)
    ]  # fmt: skip
    assert [row["nats_per_token"] for row in rows] == pytest.approx([2.0] * 4 + [8.3 / 3] * 2)
    assert rows[3]["change"] == {"difference": 0.0, "interval": (0.0, 0.0), "p_value": 1.0, "test": "sign flips"}
    assert rows[5]["change"]["difference"] == pytest.approx(2.3 / 3)
    low, high = rows[5]["change"]["interval"]
    assert low < 2.3 / 3 < high
    assert "ensemble" not in summarize_use(windows, seed=0)


def test_ensembles_of_every_size():
    nll = -np.log(np.array([[0.5, 0.2], [0.25, 0.2], [0.3, 0.8]], np.float32))  # [R, tokens]
    base = np.array([2.0, 1.0], np.float32)
    fields = [None] * 3
    scores = TokenScores(None, Prediction(base, None, None), None, Prediction(nll, None, None), *fields, None)
    found = ensembles([scores], seed=0)
    pairs = [(0, 1), (1, 2), (2, 0)]
    expected = [nll.mean(), np.mean([-np.log(np.exp(-nll[list(pair)]).mean(axis=0)) for pair in pairs])]
    expected.append(-np.log(np.exp(-nll).mean(axis=0)).mean())
    assert [row["nats_per_token"] for row in found] == pytest.approx(expected, rel=1e-5)
    assert found[0]["gain_over_one_thought"]["difference"] == pytest.approx(0, abs=1e-6)
    assert found[2]["gain_over_no_thoughts"]["difference"] == pytest.approx(1.5 - expected[2], rel=1e-5)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.mark.parametrize(
    ("samples", "kinds"),
    [pytest.param(0, PERTURBATIONS, marks=pytest.mark.slow), (1, ()),
     pytest.param(3, ("delete", "truncate"), marks=pytest.mark.slow)],
)  # fmt: skip
def test_results_depend_on_the_text_and_its_number_only(model, samples, kinds):
    use = UseOptions(kinds, samples, seed=4)
    together = ContinuationScorer(model, model.settings(3), 4, use)(TAILS)
    alone = ContinuationScorer(model, model.settings(3), 1, use)
    for tail, one in list(zip(TAILS, together, strict=True))[::2]:
        (again,) = alone([tail])
        np.testing.assert_array_equal(again.thoughts, one.thoughts)
        for name in ("thought_only", "empty_only", "ensemble"):
            np.testing.assert_allclose(getattr(again.use, name), getattr(one.use, name), atol=5e-5)
        for kind in kinds:
            np.testing.assert_allclose(again.use.perturbed[kind], one.use.perturbed[kind], atol=5e-5)
            np.testing.assert_array_equal(one.use.perturbed[kind][0], one.talk.nll)
        if kinds:
            np.testing.assert_allclose(one.use.perturbed["delete"][5], one.use.perturbed["truncate"][5], atol=1e-6)
        assert (one.use.ensemble <= one.talk.nll + 1e-6).all()
        if samples < 2:
            np.testing.assert_array_equal(one.use.ensemble, one.talk.nll)
    if not samples:
        plain = ContinuationScorer(model, model.settings(3), 4)(TAILS)
        for one, before in zip(together, plain, strict=True):
            np.testing.assert_array_equal(one.thoughts, before.thoughts)
            np.testing.assert_allclose(one.talk.nll, before.talk.nll, atol=1e-5)
            assert before.use is None


def test_sampled_thoughts_differ_by_number_and_seed(model):
    def thoughts(number, seed):
        scorer = ContinuationScorer(model, model.settings(3), 1, UseOptions((), 1, seed))
        return scorer([TAILS[3]._replace(number=number)])[0].thoughts

    assert (thoughts(0, 0) == thoughts(0, 0)).all()
    assert (thoughts(0, 0) != thoughts(1, 0)).any()
    assert (thoughts(0, 0) != thoughts(0, 1)).any()


def test_a_scorer_without_thoughts_has_nothing_to_measure(model):
    settings = dataclasses.replace(model.settings(3), thought_length=0)
    (scores,) = ContinuationScorer(model, settings, 1, UseOptions())(TAILS[:1])
    assert scores.use is None
