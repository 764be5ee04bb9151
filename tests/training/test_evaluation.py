import dataclasses

import chex
import jax
import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.thinking import ALWAYS, parse_policy
from quietstar_jax.models.parameters import merge
from quietstar_jax.thought_config import Phase, ThoughtConfig
from quietstar_jax.thoughts.score_figures import summarize
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.training import answers
from quietstar_jax.training.answers import measure_answers
from quietstar_jax.training.batch import Batch, to_device
from quietstar_jax.training.evaluation import (
    AMONG,
    evaluation_settings,
    make_token_scorer,
    score_batches,
    without_thoughts,
)
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


def test_a_policy_chooses_where_evaluation_thinks(run):
    config = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, think="every:3"))
    settings, params = evaluation_settings(config, run.vocabulary), first_state(run).params
    params = params | {"mixing_head.out": np.ones_like(params["mixing_head.out"])}
    always, some = (
        jax.device_get(make_token_scorer(run.graphdef, settings, think)(params, batch(run))).first_thought()
        for think in (ALWAYS, config.evaluation.policy)
    )
    made = np.broadcast_to(np.arange(24) % 3 == 2, (2, 24))
    np.testing.assert_array_equal(some.made, made)
    np.testing.assert_allclose(some.talk.nll, np.where(made, always.talk.nll, always.base.nll), atol=1e-5)
    assert summarize(some)["thinking_rate"] == made[some.real].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"evaluation__think": "sometimes"}, "think is 'sometimes'; it must be one of always"),
     ({"evaluation__think": "never"}, "evaluation.think is 'never'; it must be a policy that makes thoughts"),
     ({"evaluation__think": "gate:0.1"}, "evaluation.think is 'gate:0.1'; it must be a policy that needs no"),
     ({"evaluation__think": "every:2", "thought__gate": True}, "evaluation.think is 'every:2'; it must be 'always'"),
     ({"evaluation__think": "start:0.1", "thought__initial_start_token": "( )"},
      r"initial_start_token is '\( \)', which is 2 tokens .*evaluation.think is 'start:0.1'")],
)  # fmt: skip
def test_policies_that_evaluation_cannot_follow(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(tiny_config(tmp_path, **changes))


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


def test_thoughts_that_change_nothing_can_be_left_out(run):
    settings, params = evaluation_settings(run.config, run.vocabulary), first_state(run).params
    plain = without_thoughts(settings)
    with_thoughts, without = (
        summarize(jax.device_get(make_token_scorer(run.graphdef, each)(params, batch(run))).first_thought())
        for each in (settings, plain)
    )
    of_thoughts = {"thought_entropy", "unique_thought_rate", "thought_length"}
    assert {name for name in without if not without[name]} >= of_thoughts
    assert all(with_thoughts[name] > 0 for name in of_thoughts)
    assert with_thoughts["loss_with_thoughts"] == with_thoughts["loss_without_thoughts"]
    chex.assert_trees_all_close(*({**one, **dict.fromkeys(of_thoughts)} for one in (without, with_thoughts)), rtol=1e-5)
    for mixing in ("log_probabilities", "none"):  # with an untrained head too, these predict something else
        assert without_thoughts(dataclasses.replace(settings, config=ThoughtConfig(mixing=mixing))) is None


def test_thoughts_among_given_positions_only(run):
    params = first_state(run).weights
    params = params | {"mixing_head.out": np.ones_like(params["mixing_head.out"])}
    one = batch(run)._asdict()
    batches = [{name: one[name] for name in ("tokens", "mask")}] * 2
    among = np.arange(24) % 5 == np.array([[1], [3]])
    given = [each | {AMONG: among} for each in batches]
    among = np.tile(among, (2, 1)) & np.concatenate([each["mask"] for each in batches])
    settings = evaluation_settings(run.config, run.vocabulary)
    for think, made in (("always", among), ("every:2", among & (np.arange(24) % 2 == 1))):
        scorer = make_token_scorer(run.graphdef, settings, parse_policy(think))
        every = score_batches(make_token_scorer(run.graphdef, settings), params, batches, jax.random.key(1))
        some = score_batches(scorer, params, given, jax.random.key(1))
        np.testing.assert_array_equal(some.made & some.real, made & some.real)
        np.testing.assert_array_equal(some.thoughts[made], every.thoughts[made])
        np.testing.assert_allclose(some.talk.nll[made], every.talk.nll[made], rtol=1e-5)
        np.testing.assert_array_equal(some.talk.nll[~made], some.base.nll[~made])
        assert (every.talk.nll[made & every.real] != every.base.nll[made & every.real]).all()


@pytest.mark.parametrize("reach", [1, 3])
def test_answers_need_only_thoughts_that_are_used_for_them(run, reach, monkeypatch):
    evaluation, mixing = dataclasses.replace(run.config.evaluation, reach=reach), "probabilities"
    thought = dataclasses.replace(run.config.thought, mixing=mixing)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, evaluation=evaluation, thought=thought))
    scorer = make_token_scorer(run.graphdef, evaluation_settings(run.config, run.vocabulary))
    params = first_state(run).weights
    params = params | {"mixing_head.out": np.ones_like(params["mixing_head.out"])}
    found = measure_answers(run, scorer, params)
    assert found["answer_loss_with_thoughts"] != found["answer_loss_without_thoughts"]
    monkeypatch.setattr(answers, "think_before_answers", lambda batches, *_: batches)
    everywhere = measure_answers(run, scorer, params)
    chex.assert_trees_all_close({name: everywhere[name] for name in found}, found, rtol=1e-5)


def test_random_rankings_differ_by_batch_and_run_and_change_nothing_else(run):
    scorer, params = make_token_scorer(run.graphdef, evaluation_settings(run.config, run.vocabulary)), first_state(run)
    one = batch(run)._asdict()
    batches = [{name: one[name] for name in ("tokens", "mask")}] * 2
    plain = score_batches(scorer, params.weights, batches)
    assert plain.rankings is None
    ranked = [score_batches(scorer, params.weights, batches, rank_key=jax.random.key(seed)) for seed in (0, 0, 1)]
    first, again, other = (scores.rankings["random"] for scores in ranked)
    np.testing.assert_array_equal(first, again)
    values = np.concatenate([first.ravel(), other.ravel()])
    assert len(np.unique(values)) > 0.99 * len(values), "no draw repeats, in another batch or with another seed"
    chex.assert_trees_all_close(ranked[0]._replace(rankings=None), plain, rtol=1e-5, atol=1e-6)


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
