import dataclasses

import jax
import numpy as np
import pytest

from quietstar_jax.models.parameters import merge
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.thoughts.token_scores import summarize
from quietstar_jax.training.batch import Batch, to_device
from quietstar_jax.training.evaluation import evaluation_settings, make_token_scorer
from quietstar_jax.training.setup import first_state, prepare
from quietstar_jax.training.summary import most_helpful_thoughts
from tests.thoughts.test_token_scores import scores_of
from tests.training.tiny import tiny_config


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
    scores = jax.device_get(
        make_token_scorer(run.graphdef, settings)(first_state(run).params, batch(run))
    ).first_thought()
    np.testing.assert_allclose(scores.talk.nll, scores.base.nll, atol=1e-5)
    np.testing.assert_array_equal(scores.talk.correct, scores.base.correct)
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
    scores = jax.device_get(
        make_token_scorer(run.graphdef, settings)(first_state(run).params, batch(run))
    ).first_thought()
    np.testing.assert_array_equal(scores.talk.nll, scores.base.nll)
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
