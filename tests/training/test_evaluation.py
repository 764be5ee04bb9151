import dataclasses

import jax
import numpy as np
import pytest

from quietstar_jax.config import Phase
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.training.evaluation import TokenScores, evaluation_settings, make_token_scorer, summarize
from quietstar_jax.training.setup import first_state, prepare
from quietstar_jax.training.step import Batch, to_device
from quietstar_jax.training.summary import most_helpful_thoughts
from tests.training.tiny import tiny_config


def scores_of(base, talk, real, thoughts):
    zeros = np.zeros_like(base)
    return TokenScores(
        real=real, base_nll=base, base_entropy=base, talk_nll=talk, base_correct=base < 0.5, talk_correct=talk < 0.5,
        reward=base - talk, weight=zeros + 0.25, entropy=zeros + 2.0, thoughts=thoughts,
    )  # fmt: skip


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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepare(tiny_config(tmp_path_factory.mktemp("evaluation")))


def batch(run):
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 100, (2, 24), dtype=np.int32)
    mask = np.arange(24) < np.array([[24], [9]])
    return Batch(tokens, mask)


def test_an_untrained_mixing_head_changes_nothing(run):
    settings = evaluation_settings(run.config, run.vocabulary)
    scores = make_token_scorer(run.graphdef, run.architecture, settings)(first_state(run).params, batch(run))
    np.testing.assert_allclose(scores.talk_nll, scores.base_nll, atol=1e-5)
    np.testing.assert_array_equal(scores.talk_correct, scores.base_correct)
    model = merge(run.graphdef, first_state(run).params)
    logits = model.decoder.logits(
        read_text(model.decoder, *to_device(batch(run)._asdict()), dtype=settings.dtype).hidden
    )
    log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(scores.base_entropy, -(np.exp(log_probs) * log_probs).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(scores.real[1], np.arange(24) < 8)
    assert scores.thoughts.shape == (2, 24, 2)
    assert not np.isin(scores.thoughts, run.vocabulary.meta_tokens).any()


def test_a_run_that_never_thinks_reports_the_base(run):
    config = dataclasses.replace(run.config, phases=(Phase(name="plain", thought_length=0),))
    settings = evaluation_settings(config, run.vocabulary)
    assert settings.thought_length == 0
    scores = make_token_scorer(run.graphdef, run.architecture, settings)(first_state(run).params, batch(run))
    np.testing.assert_array_equal(scores.talk_nll, scores.base_nll)
    assert scores.thoughts.shape == (2, 24, 0)
    assert summarize(scores)["unique_thought_rate"] == 0.0


def test_most_helpful_thoughts_come_first_and_once_per_sequence(run):
    base = np.full((3, 5), 2.0, np.float32)
    talk = base.copy()
    talk[1, 2], talk[1, 3], talk[2, 0] = 0.0, 0.5, 1.0
    scores = scores_of(base, talk, np.ones((3, 5), bool), np.full((3, 5, 2), 7, np.int32))
    batches = [{"tokens": np.full((3, 5), 8, np.int32), "mask": np.ones((3, 5), bool)}]
    found = most_helpful_thoughts(scores, batches, run.tokenizer)
    gains = [sample["probability_with_thought"] for sample in found]
    assert gains[0] == pytest.approx(1.0)
    assert gains[1] == pytest.approx(np.exp(-1.0))
    assert found[0]["thought"] == run.tokenizer.decode([7, 7])
