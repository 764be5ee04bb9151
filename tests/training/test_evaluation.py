import dataclasses

import numpy as np
import pytest

from quietstar_jax.config import Phase
from quietstar_jax.training.evaluation import TokenScores, evaluation_settings, make_token_scorer, summarize
from quietstar_jax.training.setup import first_state, prepare
from quietstar_jax.training.step import Batch
from quietstar_jax.training.summary import most_helpful_thoughts
from tests.training.tiny import tiny_config


def scores_of(base, talk, real, thoughts):
    zeros = np.zeros_like(base)
    return TokenScores(
        real=real, base_nats=base, talk_nats=talk, base_correct=base < 0.5, talk_correct=talk < 0.5,
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
    scores = make_token_scorer(run.structure, run.architecture, settings)(first_state(run).params, batch(run))
    np.testing.assert_allclose(scores.talk_nats, scores.base_nats, atol=1e-5)
    np.testing.assert_array_equal(scores.talk_correct, scores.base_correct)
    np.testing.assert_array_equal(scores.real[1], np.arange(24) < 8)
    assert scores.thoughts.shape == (2, 24, 2)
    assert not np.isin(scores.thoughts, run.vocabulary.meta_tokens).any()


def test_a_run_that_never_thinks_reports_the_base(run):
    config = dataclasses.replace(run.config, phases=(Phase(name="plain", thought_length=0),))
    settings = evaluation_settings(config, run.vocabulary)
    assert settings.length == 0
    scores = make_token_scorer(run.structure, run.architecture, settings)(first_state(run).params, batch(run))
    np.testing.assert_array_equal(scores.talk_nats, scores.base_nats)
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
