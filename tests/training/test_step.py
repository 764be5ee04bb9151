import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.config import from_config_dict
from quietstar_jax.configs import long_thoughts
from quietstar_jax.models.parameters import merge
from quietstar_jax.thought_config import RateScales
from quietstar_jax.thoughts.chunks import PAST_THE_TEXT
from quietstar_jax.thoughts.positions import candidates, choose, ranked_by
from quietstar_jax.thoughts.settings import phase_settings
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.optimizer import learning_rate
from quietstar_jax.training.setup import first_state, prepare
from quietstar_jax.training.step import initial_state, make_train_step
from tests.training.tiny import tiny_config, tiny_config_dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepare(tiny_config(tmp_path_factory.mktemp("step")))


def batch_of(run, rows=4):
    """Rows of very different lengths, so that a mean of microbatch means would be wrong."""
    length = run.config.data.sequence_length
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 6, run.architecture.vocab_size)
    real = jnp.array([length, 7, 19, 4])[:rows]
    return Batch(tokens.astype(jnp.int32), jnp.arange(length) < real[:, None])


def step_of(run, phase, state=None):
    step = make_train_step(run.config, phase, run.graphdef, run.vocabulary)
    return jax.jit(step)(first_state(run) if state is None else state, batch_of(run), run.key, jnp.int32(0))


@pytest.mark.some(1)
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "thoughts"])
def test_accumulation_equals_the_large_batch(run, index):
    phase = run.config.phases[index]
    whole, whole_metrics = step_of(run, phase)
    for pieces in (2, 4):
        parts, metrics = step_of(run, dataclasses.replace(phase, microbatches=pieces))
        chex.assert_trees_all_close(metrics, whole_metrics, rtol=2e-4, atol=2e-6)
        moments, wanted = parts.opt_state[1].mu, whole.opt_state[1].mu
        for name in wanted:
            scale = float(jnp.abs(wanted[name]).max()) + 1e-12
            np.testing.assert_allclose(moments[name] / scale, wanted[name] / scale, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_long_thoughts_at_one_position_train(tmp_path):
    """The shipped configuration with a tiny decoder; a thought of 70 tokens has two blocks."""
    config = long_thoughts.get_config()
    tiny = tiny_config_dict(tmp_path)
    for group in ("model", "data", "logging"):
        config[group] = tiny[group]
    config.model.architecture.max_positions = 128
    config.thought.update(initial_start_token="(", initial_end_token=")")
    config.phases[0].update(thought_length=70, batch_size=4, warmup_steps=0, learning_rate=1e-2)
    run = prepare(from_config_dict(config))
    (phase,) = run.config.phases
    state, first = step_of(run, phase)
    state, second = step_of(run, phase, state)
    for metrics in (first, second):
        assert not {name: value for name, value in metrics.items() if not np.isfinite(value).all()}
        assert float(metrics["reward_std"]) > 0
    moving = {name for name, value in state.opt_state[1].mu.items() if np.any(value)}
    assert {"start_embedding", "decoder.embedding", "decoder.layers.query"} <= moving
    # Only REINFORCE trains: the log-probability of a thought depends neither on its end nor on the mixing.
    assert not {name for name in moving if name == "end_embedding" or name.startswith("mixing_head")}


def test_plain_phase_leaves_the_thought_weights_without_gradient(run):
    state, metrics = step_of(run, run.config.phases[0])
    moments = state.opt_state[1].mu
    untouched = [name for name, value in moments.items() if not np.any(value)]
    assert set(untouched) == {name for name in moments if not name.startswith("decoder.")}
    assert float(metrics["loss"]) == float(metrics["base_loss"])


def test_mixing_head_begins_without_effect_and_moves(run):
    state, metrics = step_of(run, run.config.phases[1])
    assert float(metrics["talk_loss_1"]) == pytest.approx(float(metrics["base_loss"]), rel=1e-6)
    assert float(metrics["mixing_weight"]) == 0.0
    assert np.any(state.params["mixing_head.out"])


def test_frozen_decoder_stays_bit_for_bit(run):
    phase = run.config.phases[1]
    before = first_state(run).params
    state, _ = step_of(run, dataclasses.replace(phase, rates=dataclasses.replace(phase.rates, decoder=0.0)))
    for name, value in state.params.items():
        if name.startswith("decoder."):
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_metrics_name_rate_and_norm(run):
    phase = run.config.phases[0]
    _, metrics = step_of(run, phase)
    assert float(metrics["learning_rate"]) == pytest.approx(float(learning_rate(phase, jnp.int32(0))))
    assert float(metrics["gradient_norm"]) > 0


@pytest.mark.some(1)
@pytest.mark.parametrize("changes", [{"policy_weight": 0.0}, {"policy_weight": 0.0, "distill_weight": 1.0}, {}])
def test_an_objective_with_a_reference_in_phases_that_do_not_train_thoughts(tmp_path, changes):
    """The rewards are then those without the divergence, which nothing computes."""
    control = "pause" if not changes else "none"
    run = prepare(tiny_config(tmp_path, thought__kl_in_reward=0.5, thought__kl_weight=0.1, thought__control=control))
    _, metrics = step_of(run, dataclasses.replace(run.config.phases[1], **changes))
    assert "kl" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())


def lowered(run, phase, **thought):
    """The program of a step, before compilation."""
    changed = dataclasses.replace(run.config.thought, **thought)
    config = dataclasses.replace(run.config, thought=changed, phases=(phase,))
    step = make_train_step(config, phase, run.graphdef, run.vocabulary)
    state = jax.eval_shape(lambda: initial_state(first_state(run).params, config, objective=True))
    return jax.jit(step).lower(state, batch_of(run), run.key, jnp.int32(0)).as_text()


def test_a_second_pass_that_changes_nothing_is_not_computed(run):
    """A single thought is compared with no other, so the standard deviation of the rewards is not needed."""
    one = dataclasses.replace(run.config.phases[1], num_thoughts=1)
    plain = lowered(run, one)
    assert lowered(run, one, advantage="batch_std") == plain
    assert lowered(run, one, advantage_scale="batch") != plain


def test_where_nothing_that_predicts_thoughts_learns_no_objective_of_thoughts_is_computed(run):
    rates = RateScales(decoder=0.0, thought_embeddings=0.0)
    frozen = dataclasses.replace(run.config.phases[1], rates=rates)
    untrained = dataclasses.replace(frozen, policy_weight=0.0)
    costly = {"advantage": "batch_std", "kl_weight": 0.1, "entropy_bonus": 0.1}
    assert lowered(run, frozen, **costly) == lowered(run, untrained, **costly)


def test_positions_where_a_thought_would_start(tmp_path):
    """The step reads the probabilities of the start token, and rows that contain it do not think."""
    changes = {"positions": "start", "positions_per_sequence": 2}
    run = prepare(tiny_config(tmp_path, **{f"thought__{name}": value for name, value in changes.items()}))
    assert run.vocabulary.start_token == run.vocabulary.start_tokens[0]
    _, metrics = step_of(run, run.config.phases[1])
    assert np.isfinite(float(metrics["talk_loss"]))
    settings, batch = phase_settings(run.config, run.config.phases[1], run.vocabulary), batch_of(run)
    batch = batch._replace(tokens=batch.tokens.at[2, 3].set(run.vocabulary.start_token))
    state, draws = first_state(run), jnp.full(batch.tokens.shape, 0.5)  # the largest probabilities
    model = merge(run.graphdef, state.weights)
    text = read_text(model.decoder, batch.tokens, batch.mask, dtype=jnp.float32, **ranked_by(settings))
    expected = jax.nn.log_softmax(model.decoder.logits(text.hidden))[..., run.vocabulary.start_token]
    np.testing.assert_allclose(text.start_log_prob, expected, rtol=1e-5)
    allowed = candidates(batch.tokens, batch.mask, draws, settings)
    largest = jnp.sort(jax.lax.top_k(jnp.where(allowed, expected, -jnp.inf), 2)[1], axis=1)
    chosen, thinks = choose(text, draws, settings), allowed.sum(axis=1) > 1
    assert 0 < thinks.sum() < len(thinks)
    np.testing.assert_array_equal(chosen[thinks], largest[thinks])
    written = (batch.mask & (batch.tokens == run.vocabulary.start_token)).any(axis=1)
    assert (np.asarray(chosen[written]) == PAST_THE_TEXT).all()
