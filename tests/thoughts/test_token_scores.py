"""One scorer serves the evaluation of training, the measurements of continuations, and the reports."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.evals.tails import Continuation, ContinuationScorer, UseOptions
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.models.linear import pick
from quietstar_jax.reports.observe import Window, observe
from quietstar_jax.thought_config import CONTROLS
from quietstar_jax.thoughts.ending import ENDED
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.score_figures import summarize
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_given_thoughts
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.thoughts.token_scores import Prediction, TokenScores
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import make_token_scorer
from tests.reports import cases
from tests.thoughts.cases import Case, random_model

VARIANTS = [("hidden_states", "none", 1), ("log_probabilities", "none", 1), ("probabilities", "none", 1)]
VARIANTS += [("none", "none", 1), ("probabilities", "none", 3), ("probabilities", "shuffled", 2)]
VARIANTS += [("hidden_states", control, 1) for control in CONTROLS[1:]]


def numbers(scores, thought=()):
    """The fields that all users of the scorer have, [positions], with one thought of an axis R."""
    after = (scores.talk.nll, scores.reward, scores.weight, scores.thought_entropy, scores.thoughts)
    return [scores.base.nll, scores.base_entropy, *(x[thought] for x in after)]


@pytest.mark.parametrize(("mixing", "control", "reach"), VARIANTS)
def test_evaluation_continuations_and_reports_agree(mixing, control, reach):
    """They pad on the right, on the left, and to other lengths; continuations think only at their last positions."""
    model = cases.random_model()
    model = dataclasses.replace(model, thought=dataclasses.replace(model.thought, mixing=mixing, control=control))
    settings, draw = model.settings(3, reach=reach), np.random.default_rng(0)
    tails = [Continuation(draw.integers(6, 100, n).tolist(), 1 + n % 4) for n in (5, 13, 18, 23, 31, 40)]
    windows = [Window(0, np.array(tail.tokens)) for tail in tails]
    measured = ContinuationScorer(model, settings, batch_size=4)(tails)
    shown = observe(model, settings, windows, samples=1, seed=0)
    evaluate = make_token_scorer(model.graphdef, settings)
    for tail, of_tail, of_window in zip(tails, measured, shown, strict=True):
        count, tokens = len(tail.tokens), np.zeros((1, 48), np.int32)
        tokens[0, :count] = tail.tokens
        evaluated = jax.device_get(evaluate(model.params, Batch(tokens, np.arange(48)[None] < count)))
        evaluated = evaluated.of_text(0, slice(count - 1))
        assert evaluated.real.all()
        assert np.abs(evaluated.talk.nll - evaluated.base.nll).max() > 1e-2  # thoughts do change something
        for found, expected in zip(numbers(of_tail), numbers(evaluated, 0), strict=True):
            np.testing.assert_allclose(found, expected[-tail.last :], atol=5e-5)
        if control in ("none", "pause"):  # the other controls draw, and a report draws by its own seed
            for found, expected in zip(numbers(of_window, 0), numbers(evaluated, 0), strict=True):
                np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("variant", [*((*one, "fixed") for one in VARIANTS), ("probabilities", "none", 2, "token")])
def test_where_a_policy_does_not_think_there_is_no_thought_and_the_rest_is_equal(variant):
    """With `use`, all thoughts are computed, and predictions ignore those that the policy does not make."""
    mixing, control, reach, end = variant
    model = cases.random_model()
    thought = dataclasses.replace(model.thought, mixing=mixing, control=control, end=end)
    vocabulary = model.vocabulary._replace(end_token=9 if end == "token" else None)
    model = dataclasses.replace(model, thought=thought, vocabulary=vocabulary)
    settings, draw = model.settings(3, reach=reach), np.random.default_rng(0)
    tails = [Continuation(draw.integers(6, 100, n).tolist(), n - 1, (7, 9), n) for n in (5, 40, 43, 44)]
    few, whole = (
        ContinuationScorer(model, settings, 4, use, think=parse_policy("random:0.3"))(tails)
        for use in (None, UseOptions())
    )
    for one, other in zip(few, whole, strict=True):
        np.testing.assert_array_equal(one.made, other.made)
        assert (one.thoughts[~one.made] == ENDED).all()
        np.testing.assert_array_equal(one.thoughts[one.made], other.thoughts[one.made])
        np.testing.assert_allclose(one.thought_entropy, other.thought_entropy * one.made, atol=5e-5)
        for name in ("base", "talk", "reward", "weight"):
            found, expected = getattr(one, name), getattr(other, name)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), found, expected)
    assert 0.1 < np.concatenate([one.made for one in few]).mean() < 0.5


@pytest.mark.parametrize("mixing", ["hidden_states", "log_probabilities"])
def test_given_thoughts_at_chosen_positions(mixing):
    case = Case("given", config={"mixing": mixing}, mask=("1111111", "1111100"), positions_per_chunk=2)
    model, positions = random_model(case.decoder, 7.0), jnp.array([1, 3, 4])
    text = read_text(model.decoder, *case.text(), dtype=case.thought.dtype)
    thoughts = jax.tree.map(lambda x: x[:, :, positions], case.thoughts())
    candidates = jnp.array([[2, 5], [7, 1]])
    found = score_given_thoughts(
        model, text, positions, thoughts, case.thought, forbidden=(3, 4, 5), candidates=candidates, likeliest=4
    )
    scores = score_thoughts(model, text, positions, thoughts.tokens, case.thought)
    base = jax.nn.log_softmax(model.decoder.logits(text.hidden))[:, positions]
    talk = scores.log_scores[..., 0, :]
    if mixing == "hidden_states":
        talk = jax.nn.log_softmax(talk)
    targets, real = text.tokens[:, positions + 1], text.mask[:, positions + 1]
    np.testing.assert_array_equal(found.real, real)
    np.testing.assert_allclose(found.base.nll, text.nll[:, positions], atol=1e-5)
    np.testing.assert_allclose(found.base_entropy, -(jnp.exp(base) * base).sum(axis=-1), atol=1e-5)
    np.testing.assert_allclose(found.talk.nll, scores.nll[..., 0], atol=1e-5)
    np.testing.assert_allclose(found.weight, scores.weight[..., 0], atol=1e-5)
    np.testing.assert_allclose(found.thought_entropy, thoughts.entropy.mean(axis=-1), atol=1e-6)
    np.testing.assert_array_equal(found.thoughts, thoughts.tokens)
    ahead = jnp.stack([text.nll[:, positions], text.nll[:, positions + 1]], axis=-1)[:, None]  # K = 2
    np.testing.assert_allclose(found.reward, (ahead - scores.nll).sum(axis=-1), atol=1e-5)
    for prediction, log_probs in ((jax.tree.map(lambda x: x[:, None], found.base), base[:, None]), (found.talk, talk)):
        allowed = log_probs.at[..., jnp.array([3, 4, 5])].set(-jnp.inf)
        np.testing.assert_array_equal(prediction.best, allowed.argmax(axis=-1))
        np.testing.assert_array_equal(prediction.correct, (prediction.best == targets[:, None]) & real[:, None])
        for row in range(2):
            np.testing.assert_allclose(prediction.candidates[row], log_probs[row][..., candidates[row]], atol=1e-5)
        order = jnp.argsort(-log_probs, axis=-1)[..., :4]
        np.testing.assert_array_equal(prediction.top_ids, order)
        np.testing.assert_allclose(
            prediction.top_probabilities, jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1)), rtol=1e-4
        )
    thinking = Thinking(None, text.tokens, text.nll)
    alone = score_given_thoughts(model, text, positions, None, case.thought, thinking=thinking)
    assert alone[3:] == (None,) * len(alone[3:])
    assert not alone.thinks
    assert (alone.base.candidates, alone.base.top_ids, alone.base.top_probabilities) == (None, None, None)
    np.testing.assert_allclose(alone.base.nll, found.base.nll, atol=1e-6)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_excluded_tokens_have_no_probability(mixing):
    case, excluded = Case("excluded", config={"mixing": mixing}), [1, 2, 6]
    model, positions = random_model(case.decoder, 30.0), jnp.arange(case.length)  # nearly certain of some tokens
    text = read_text(model.decoder, *case.text(), dtype=case.thought.dtype)
    thoughts, unknown = case.thoughts(), case.decoder.vocab_size + 3
    whole = score_given_thoughts(model, text, positions, thoughts, case.thought)
    found = score_given_thoughts(model, text, positions, thoughts, case.thought, excluded=(*excluded, unknown))
    scores = score_thoughts(model, text, positions, thoughts.tokens, case.thought).log_scores[..., 0, :]
    targets = jnp.pad(text.tokens[:, 1:], ((0, 0), (0, 1)))[:, None]
    counts = found.real[:, None] & ~jnp.isin(targets, jnp.array(excluded))
    assert 5 < counts.sum() < found.real.sum()
    for prediction, log_scores in ((found.base, model.decoder.logits(text.hidden)), (found.talk, scores)):
        of_thoughts = log_scores.reshape(len(text.tokens), -1, *log_scores.shape[-2:])
        kept = jax.nn.log_softmax(of_thoughts.at[..., jnp.array(excluded)].set(-jnp.inf))
        best, nll = (x.reshape(kept.shape[:-1]) for x in (prediction.best, prediction.nll))
        np.testing.assert_array_equal(best, kept.argmax(axis=-1))
        expected = -pick(kept, jnp.broadcast_to(targets, nll.shape))
        np.testing.assert_allclose(nll, jnp.where(counts, expected, nll), rtol=1e-5, atol=1e-5)
    for name in ("reward", "weight", "thoughts", "base_entropy"):  # what thoughts do is not measured differently
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


def test_a_mixing_weight_of_0_changes_no_prediction():
    case = Case("unmoved")
    model, positions = random_model(case.decoder, 7.0), jnp.arange(case.length)
    model.mixing_head.out.set_value(jnp.zeros_like(model.mixing_head.out[...]))
    text = read_text(model.decoder, *case.text(), dtype=case.thought.dtype)
    wanted = {"candidates": jnp.array([[2], [7]]), "likeliest": 3}
    found = score_given_thoughts(model, text, positions, case.thoughts(), case.thought, **wanted)
    for before, after in zip(found.base, found.talk, strict=True):
        np.testing.assert_array_equal(after, np.stack([before, before], axis=1))
    np.testing.assert_array_equal(found.reward, 0)


def scores_of(base, talk, real, thoughts):
    """Scores with the first thought, made by hand."""
    zeros = np.zeros_like(base)
    without, after = (Prediction(nll, zeros.astype(int), nll < 0.5) for nll in (base, talk))
    return TokenScores(real, without, base, after, base - talk, zeros + 0.25, zeros + 2.0, thoughts)


def test_summary_by_hand():
    base = np.arange(20, dtype=np.float32).reshape(2, 10)
    real = np.ones((2, 10), bool)
    real[1, 9] = False  # the largest loss is padding and counts for nothing
    thoughts = np.zeros((2, 10, 3), np.int32)
    thoughts[0, 0] = 1
    found = summarize(scores_of(base, base / 2, real, thoughts))
    assert found["tokens"] == 19
    assert found["loss_without_thoughts"] == pytest.approx(9.0)
    assert found["loss_with_thoughts"] == pytest.approx(4.5)
    assert found["accuracy_without_thoughts"] == pytest.approx(1 / 19)
    assert found["reward"] == pytest.approx(4.5)
    assert found["unique_thought_rate"] == pytest.approx(2 / 19)
    assert found["thought_entropy"] == pytest.approx(2.0)
    assert len(found["deciles"]) == 10
    assert found["deciles"][0]["loss_without_thoughts"] == pytest.approx(0.5)
    assert found["deciles"][-1]["loss_without_thoughts"] == pytest.approx(18.0)


def test_figures_of_thoughts_are_means_over_those_that_are_made():
    base = np.arange(20, dtype=np.float32).reshape(1, 20)
    made = np.zeros((1, 20), bool)
    made[0, [12, 13, 15]] = True  # the 7th decile, and half of the 8th
    thoughts = np.arange(20)[None, :, None] // 2
    scores = scores_of(base, np.where(made, base - 3, base), made | True, thoughts)
    weight = np.where(made, 0.25, 0.0)
    scores = scores._replace(base_entropy=base, weight=weight, thought_entropy=np.where(made, 2.0, 7.0), made=made)
    found = summarize(scores)
    assert found["loss_with_thoughts"] == pytest.approx(found["loss_without_thoughts"] - 9 / 20)
    names = ("mixing_weight", "reward", "thought_entropy", "unique_thought_rate", "thinking_rate")
    assert [found[name] for name in names] == pytest.approx([0.25, 3.0, 2.0, 2 / 3, 3 / 20])
    assert [row["mixing_weight"] for row in found["deciles"]] == [0.0] * 6 + [0.25, 0.25] + [0.0] * 2
    silent = summarize(scores._replace(made=made & False))
    assert [silent[name] for name in names] == [0.0] * 5


def test_flatter_predictions_do_not_seem_to_help_the_hard_tokens():
    # Tokens drawn from the predictions themselves; instead of thoughts, the same logits at a temperature of 1.05.
    draw = np.random.default_rng(0)
    logits = draw.gumbel(size=(20_000, 40)) * draw.uniform(0.1, 3.0, (20_000, 1))
    base, flat = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (logits, logits / 1.05))
    tokens = (base + draw.gumbel(size=base.shape)).argmax(axis=1)
    base_nll, flat_nats = (-x[np.arange(len(x)), tokens] for x in (base, flat))
    uncertainty = -(np.exp(base) * base).sum(axis=1)
    divergence = (np.exp(base) * (base - flat)).sum(axis=1)  # what the flattening costs on average, at every token

    def tenths(by):
        row = scores_of(base_nll[None], flat_nats[None], np.ones((1, base_nll.size), bool), np.zeros((1, 20_000, 1)))
        rows = summarize(row._replace(base_entropy=by[None]))["deciles"]
        return np.array([row["loss_with_thoughts"] - row["loss_without_thoughts"] for row in rows])

    parts = np.array_split(np.argsort(uncertainty, kind="stable"), 10)
    noise = np.array([(flat_nats - base_nll)[part].std() / np.sqrt(part.size) for part in parts])
    expected = np.array([divergence[part].mean() for part in parts])
    assert (np.abs(tenths(uncertainty) - expected) < 4 * noise).all()
    by_outcome = tenths(base_nll)  # the order that this replaces
    assert by_outcome[-1] < -0.1
    assert by_outcome[:5].min() > 0
