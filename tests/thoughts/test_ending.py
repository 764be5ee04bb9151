"""Thoughts whose end is sampled: a thought of n tokens is exactly a thought of a fixed length n."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.settings import from_mapping
from quietstar_jax.thought_config import CONTROLS, PERTURBATIONS, ThoughtConfig
from quietstar_jax.thoughts import sample
from quietstar_jax.thoughts.controls import draw_uniforms, sample_or_control
from quietstar_jax.thoughts.ending import (
    BIAS,
    ENDED,
    FIRST_PROBABILITY,
    action_entropy,
    actions,
    draw_end,
    length_figures,
    thought_lengths,
)
from quietstar_jax.thoughts.flops import step_flops
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import QuietStar, abstract_params, init_quiet_star
from quietstar_jax.thoughts.objective import count_targets, reduce_tokens
from quietstar_jax.thoughts.perturbations import PERCENTS, changed_tokens, draw_perturbations, perturb, perturb_each
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import read_text
from tests.thoughts import oracle
from tests.thoughts.cases import TINY, Case, random_model, relative_error, worst_errors

SAMPLED = {"end": "sampled"}
CASES = (
    Case("one_thought_one_ahead_in_a_window", architecture={"sliding_window": 3},
         settings={"thought_length": 3, "num_thoughts": 1, "tokens_ahead": 1}, mask=("1111100", "1110111")),
    Case("tied_and_capped", settings={"thought_length": 2, "num_thoughts": 3, "tokens_ahead": 3},
         architecture={"tie_embeddings": True, "score_cap": 1.5, "logit_cap": 2.0, "embedding_multiplier": 8**0.5}),
    Case("log_probabilities", settings={"rematerialize": True}, config={"mixing": "log_probabilities"}),
)  # fmt: skip
STARTS = jnp.array([[0, 0, 0, 3, 3, 3, 3], [0, 0, 2, 2, 2, 2, 2]])


def sampling(settings: ThoughtSettings, **config: object) -> ThoughtSettings:
    return dataclasses.replace(settings, config=dataclasses.replace(settings.config, **SAMPLED, **config))


def with_bias(model: QuietStar, bias: float) -> QuietStar:
    """The model with a head that ignores the hidden state: the log-odds of the end are the bias everywhere."""
    params, graphdef = split(model)
    zero = jnp.zeros_like(params["end_head.weight"])
    return merge(graphdef, params | {"end_head.weight": zero, "end_head.bias": jnp.full(1, bias, jnp.float32)})


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("case", "chosen"), [*zip(CASES, (False, True, False), strict=True)], ids=[case.name for case in CASES]
)
def test_a_thought_of_n_tokens_is_one_of_fixed_length_n(case: Case, chosen: bool) -> None:
    """Cross-entropies of the true tokens, log-probabilities of the thought's tokens, and their gradients, for each n.

    Thoughts of all lengths are scored together, and each length alone, with chains of that fixed length.
    """
    a, fixed, (tokens, mask) = case.decoder, case.thought, case.text()
    settings = sampling(fixed)
    thoughts = Case(**{**vars(case), "config": case.config | SAMPLED}).thoughts().tokens
    positions, starts = (jnp.array([[0, 2, 5], [1, 3, 4]]), STARTS) if chosen else (jnp.arange(case.length), None)
    thoughts = thoughts[:, :, : positions.shape[-1]]
    lengths = np.asarray(thought_lengths(thoughts))
    assert set(lengths.ravel()) == set(range(fixed.thought_length + 1))
    never = with_bias(random_model(a, fixed.config.embedding_scale, heads=("end_head",)), -1e4)
    params, graphdef = split(never)
    draw = np.random.default_rng(3)
    of_nll = jnp.float32(draw.normal(size=(*lengths.shape, fixed.tokens_ahead)))
    of_log_probs = jnp.float32(draw.normal(size=thoughts.shape))

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, has_aux=True)
    def score(params, thoughts, settings, where):
        model = merge(graphdef, params)
        text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype)
        scores = score_thoughts(model, text, positions, thoughts, settings)
        log_probs = jnp.where((jnp.arange(thoughts.shape[-1]) < thought_lengths(thoughts)[..., None]) & where,
                              scores.log_probs, 0.0)  # fmt: skip
        total = jnp.where(where, of_nll * scores.nll, 0.0).sum()
        return total + (of_log_probs[..., : log_probs.shape[-1]] * log_probs).sum(), (scores.nll, log_probs)

    (_, (nll, log_probs)), gradient = score(params, thoughts, settings, True)
    expected = jax.tree.map(jnp.zeros_like, gradient)
    for n in range(fixed.thought_length + 1):
        alone, here = dataclasses.replace(fixed, thought_length=n), lengths == n
        cut = jnp.where(here[..., None], thoughts, 1)[..., :n]
        (_, (nll_n, log_probs_n)), gradient_n = score(params, cut, alone, jnp.asarray(here[..., None]))
        np.testing.assert_allclose(np.asarray(nll)[here], np.asarray(nll_n)[here], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(np.asarray(log_probs)[here][:, :n], np.asarray(log_probs_n)[here], atol=1e-5)
        assert not np.asarray(log_probs)[here][:, n:].any()
        expected = jax.tree.map(jnp.add, expected, gradient_n)
    assert not worst_errors(gradient, expected, 1e-5)
    assert any(np.any(gradient[name]) for name in ("end_embedding", "start_embedding"))


def test_the_sum_over_rows_is_the_batch() -> None:
    case = Case("rows", config={**SAMPLED, "length_penalty": 0.1, "positive_only": False}, mask=("1111111", "1111000"))
    s, (tokens, mask), thoughts = case.thought, case.text(), case.thoughts()
    params, graphdef = split(random_model(case.decoder, s.config.embedding_scale, heads=s.config.heads))
    counts = count_targets(mask, s.tokens_ahead)

    @jax.jit
    def loss(params, tokens, mask, thoughts):
        def of(params):
            model = merge(graphdef, params)
            return quiet_star_loss(model, tokens, mask, lambda *_: thoughts, counts, s, 3)

        return jax.value_and_grad(of, has_aux=True)(params)

    whole = loss(params, tokens, mask, thoughts)
    rows = [loss(params, *jax.tree.map(lambda x, b=b: x[b : b + 1], (tokens, mask, thoughts))) for b in range(2)]
    together = jax.tree.map(jnp.add, *rows)
    assert relative_error(together[0][0], whole[0][0]) < 1e-5
    assert not worst_errors(together[0][1], whole[0][1], 1e-5)
    assert not worst_errors(together[1], whole[1], 1e-4)


def test_the_penalty_decreases_the_reward_by_each_token() -> None:
    case = Case("penalty", config=SAMPLED)
    model = random_model(case.decoder, case.thought.config.embedding_scale, heads=("end_head",))
    (tokens, mask), thoughts = case.text(), case.thoughts()
    counts = count_targets(mask, case.thought.tokens_ahead)

    def reward(penalty: float) -> float:
        settings = sampling(case.thought, length_penalty=penalty)
        return float(quiet_star_loss(model, tokens, mask, lambda *_: thoughts, counts, settings, 7)[1]["reward"])

    rewarded = np.asarray(thought_lengths(thoughts.tokens))[:, :, : case.length - 1 - case.thought.tokens_ahead]
    assert reward(0.0) - reward(0.5) == pytest.approx(0.5 * rewarded.mean(), rel=1e-4)


CASE = Case("sample", length=8, mask=("11111111", "11111100"), settings={"thought_length": 3}, config=SAMPLED)


@pytest.fixture(scope="module")
def model() -> QuietStar:
    return random_model(CASE.decoder, CASE.thought.config.embedding_scale, heads=("end_head",))


@partial(jax.jit, static_argnames=("settings", "chunk"))
def run(model: QuietStar, draws: jax.Array | None, settings: ThoughtSettings = CASE.thought, chunk: int = 3):
    tokens, mask = CASE.text()
    text = read_text(model.decoder, tokens, mask, dtype=settings.dtype)
    return text, sample_thoughts(model, text, jnp.arange(CASE.length), draws, settings, chunk)


def uniforms() -> jax.Array:
    s = CASE.thought
    return jax.random.uniform(jax.random.key(3), (CASE.batch, s.num_thoughts, CASE.length, s.thought_length))


def test_greedy_thoughts_and_their_ends_equal_the_oracle(model: QuietStar) -> None:
    settings = dataclasses.replace(CASE.thought, num_thoughts=1)
    (tokens, mask), params = CASE.text(), split(model)[0]
    thoughts = np.asarray(run(model, None, settings)[1].tokens)
    for b, j in np.ndindex(*tokens.shape):
        thought = np.zeros(settings.thought_length, np.int32)
        for i in range(settings.thought_length):
            hidden = oracle.jitted_chain(CASE.decoder, settings, params, tokens[b], mask[b], j, jnp.asarray(thought))[i]
            if float(hidden @ params["end_head.weight"] + params["end_head.bias"][0]) > 0:
                thought[i:] = ENDED
                break
            thought[i] = oracle.masked_logits(CASE.decoder, settings, params, hidden).argmax()
        np.testing.assert_array_equal(thoughts[b, 0, j], thought)
    assert len(np.unique(thought_lengths(thoughts))) > 2, "lengths that do not differ show nothing"


def test_score_gives_the_log_probabilities_and_entropies_of_sampling(model: QuietStar) -> None:
    config = dataclasses.replace(CASE.thought.config, sampling_temperature=1.7, score_temperature=1.7)
    settings = dataclasses.replace(CASE.thought, config=config)
    text, thoughts = run(model, uniforms(), settings)
    acts = np.asarray(actions(thoughts.tokens, settings))
    lengths = np.asarray(thought_lengths(thoughts.tokens))
    assert set(lengths.ravel()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(acts.sum(-1), np.minimum(lengths + 1, 3))
    np.testing.assert_array_equal(np.asarray(thoughts.tokens) == ENDED, np.arange(3) >= lengths[..., None])
    scores = score_thoughts(model, text, jnp.arange(CASE.length), thoughts.tokens, settings)
    np.testing.assert_allclose(scores.log_probs, thoughts.log_probs, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(thoughts.log_probs) != 0, acts)
    np.testing.assert_array_equal(np.asarray(thoughts.entropy) > 0, acts)
    at_one = dataclasses.replace(settings, config=dataclasses.replace(config, sampling_temperature=1.0))
    text, thoughts = run(model, uniforms(), at_one)
    scores = score_thoughts(model, text, jnp.arange(CASE.length), thoughts.tokens, at_one, with_entropy=True)
    acts = np.asarray(actions(thoughts.tokens, settings))
    np.testing.assert_allclose(np.asarray(scores.entropy)[acts], np.asarray(thoughts.entropy)[acts], atol=1e-5)


def test_the_end_token_is_drawn_like_any_token() -> None:
    """At temperature 1, the actions have the probabilities of the LM head over all tokens that are not forbidden."""
    case = dataclasses.replace(
        CASE, config={"end": "token"}, settings=CASE.settings | {"meta_tokens": (0, 3), "end_token": 3}
    )
    settings, (tokens, mask) = case.thought, case.text()
    model = random_model(case.decoder, settings.config.embedding_scale)
    _, thoughts = run(model, uniforms(), settings)
    params, found = split(model)[0], np.asarray(thoughts.tokens)
    assert len(np.unique(found[found >= 0])) > 5
    assert not np.isin(found, (0, 3)).any()
    ends = 0
    for b, r, j in [(0, 0, 2), (0, 1, 5), (1, 0, 1), (1, 1, 4), (0, 0, 7), (0, 1, 0)]:
        thought = np.maximum(found[b, r, j], 0)
        hidden = oracle.jitted_chain(case.decoder, settings, params, tokens[b], mask[b], j, jnp.asarray(thought))
        for i in range(settings.thought_length):
            logits = oracle.head(case.decoder, params, hidden[i]).at[0].set(-jnp.inf)
            action = 3 if found[b, r, j, i] == ENDED else found[b, r, j, i]
            expected = jax.nn.log_softmax(logits)[action]
            np.testing.assert_allclose(thoughts.log_probs[b, r, j, i], expected, atol=1e-5)
            if action == 3:
                ends += 1
                break
    assert ends


def test_thoughts_that_never_end_are_those_of_a_fixed_length(model: QuietStar) -> None:
    fixed = dataclasses.replace(CASE.thought, config=dataclasses.replace(CASE.thought.config, end="fixed"))
    for draws in (None, uniforms()):
        _, thoughts = run(with_bias(model, -1e4), draws)
        jax.tree.map(np.testing.assert_array_equal, thoughts, run(model, draws, fixed)[1])


def test_thoughts_do_not_depend_on_chunks_or_on_other_rows(model: QuietStar) -> None:
    draws = uniforms()
    _, whole = run(model, draws, chunk=8)
    for chunk in (3, 1):
        np.testing.assert_array_equal(run(model, draws, chunk=chunk)[1].tokens, whole.tokens)
    tokens, mask = CASE.text()
    text = read_text(model.decoder, tokens[1:], mask[1:], dtype=jnp.float32)
    alone = sample_thoughts(model, text, jnp.arange(CASE.length), draws[1:], CASE.thought, 8)
    np.testing.assert_array_equal(alone.tokens, whole.tokens[1:])


@pytest.mark.parametrize(("bias", "steps"), [(1e4, 1), (-1e4, 3)])
def test_sampling_stops_when_all_have_ended(model, monkeypatch, bias: float, steps: int) -> None:
    """Counts the steps that run: with a head that always ends, one per chunk, whatever T is."""
    counted, real = [], sample.chain_step

    def counting(*args, **kwargs):
        jax.debug.callback(lambda: counted.append(1))
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "chain_step", counting)
    tokens, mask = CASE.text()
    text = read_text(model.decoder, tokens, mask, dtype=jnp.float32)
    thoughts = sample_thoughts(with_bias(model, bias), text, jnp.arange(8), uniforms(), CASE.thought, 3)
    jax.block_until_ready(thoughts)
    jax.effects_barrier()
    assert len(counted) == 3 * steps  # 3 chunks of 3 positions; the place past the text has ended from the beginning
    assert set(np.asarray(thought_lengths(thoughts.tokens)).ravel()) == {3 if bias < 0 else 0}


def test_one_number_draws_the_end_and_then_the_token() -> None:
    grid = jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32)
    for probability in (0.0, 0.1, 0.5, 1.0):
        logit = jnp.full(1000, np.clip(np.log(max(probability, 1e-30) / max(1 - probability, 1e-30)), -50, 50))
        ends, rest = draw_end(logit.astype(jnp.float32), grid)
        assert int(ends.sum()) == round(1000 * probability)
        others = np.asarray(rest)[~np.asarray(ends)]
        np.testing.assert_allclose(others, (np.arange(others.size) + 0.5) / max(others.size, 1), atol=1e-3)
        assert ((np.asarray(rest) >= 0) & (np.asarray(rest) < 1)).all()
    ends, rest = draw_end(jnp.array([-0.1, 0.1]), None)
    assert ends.tolist() == [False, True]
    assert rest is None


def test_entropy_and_the_first_probability_by_hand() -> None:
    assert 1 / (1 + np.exp(-BIAS)) == pytest.approx(FIRST_PROBABILITY)
    # P(end) = 1/2, two equally likely tokens: 1/2, 1/4, 1/4.
    assert float(action_entropy(jnp.log(2.0), jnp.float32(0.0))) == pytest.approx(1.5 * np.log(2), rel=1e-6)
    model = init_quiet_star(TINY, [0], [0], 1.0, jax.random.key(0), heads=("end_head",))
    _, thoughts = run(model, jax.random.uniform(jax.random.key(0), (2, 2, 8, 3)))
    ended = np.asarray(thoughts.tokens) == ENDED
    ends = ended & (ended.cumsum(axis=-1) == 1)
    np.testing.assert_allclose(np.exp(thoughts.log_probs)[ends], 0.1, rtol=1e-5)


def test_reductions_over_actions_by_hand() -> None:
    values, acts = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[True, True, False]])
    found = [float(reduce_tokens(values, name, 6, acts)[0]) for name in ("mean", "sum", "sum_over_max")]
    assert found == [-1.5, -3.0, -0.5]
    assert float(reduce_tokens(values, "mean", 6)[0]) == pytest.approx(-7 / 3)


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_perturbed_thought_of_n_tokens_is_one_of_fixed_length_n(kind: str) -> None:
    shape = (2, 3, 4, 6)
    tokens, draws = jax.random.randint(jax.random.key(1), shape, 1, 11), draw_perturbations(jax.random.key(2), shape)
    lengths = (np.arange(24) % 7).reshape(shape[:3])
    tokens = jnp.where(jnp.arange(6) < lengths[..., None], tokens, ENDED)
    own = dict(vocab_size=13, meta_tokens=(11, 12))
    for percent in PERCENTS:
        found = np.asarray(perturb_each(tokens, draws, kind, percent, **own))
        for n in range(7):
            here = lengths == n
            cut, own_draws = jax.tree.map(lambda x, here=here, n=n: x[here][:, :n], (tokens, draws))
            expected = np.asarray(perturb(cut, own_draws, kind, changed_tokens(n, percent), **own))
            padded = np.pad(expected, ((0, 0), (0, 6 - expected.shape[1])), constant_values=ENDED)
            np.testing.assert_array_equal(found[here], padded)


@pytest.mark.parametrize("control", [name for name in CONTROLS if name != "none"])
def test_controls_have_the_lengths_of_the_thoughts(model: QuietStar, control: str) -> None:
    draws = draw_uniforms(jax.random.key(3), (CASE.batch, 2, CASE.length, 3))
    text, thoughts = run(model, draws.tokens)
    settings = dataclasses.replace(sampling(CASE.thought, control=control), pause_id=5)
    found = sample_or_control(model, text, jnp.arange(CASE.length), draws, settings, 3)
    lengths, before = np.asarray(thought_lengths(found.tokens)), np.asarray(thought_lengths(thoughts.tokens))
    if control == "shuffled":
        assert set(map(tuple, np.asarray(found.tokens).reshape(-1, 3))) <= set(
            map(tuple, np.asarray(thoughts.tokens).reshape(-1, 3))
        )
        return
    np.testing.assert_array_equal(lengths, before)
    if control == "pause":
        assert set(np.unique(found.tokens)) == {ENDED, 5}
    assert not np.asarray(found.log_probs)[~np.asarray(actions(found.tokens, settings))].any()


def test_figures_of_lengths_by_hand() -> None:
    figures = length_figures(jnp.array([5.0, 0.0, 3.0, 2.0]))
    assert {name: round(float(value), 6) for name, value in figures.items()} == {
        "thought_length": 1.2, "empty_thought_rate": 0.5, "thought_length_p05": 0.0, "thought_length_p50": 0.0,
        "thought_length_p95": 3.0,
    }  # fmt: skip
    assert all(float(value) == 0 for value in length_figures(jnp.zeros(3)).values())


def test_a_fixed_length_has_no_head() -> None:
    names = [set(abstract_params(TINY, heads=ThoughtConfig(end=end).heads)[0]) for end in ("fixed", "sampled")]
    assert names[1] - names[0] == {"end_head.weight", "end_head.bias"}
    assert abstract_params(TINY)[0].keys() == names[0]


def test_the_count_of_flops_is_an_upper_bound() -> None:
    fixed = dataclasses.replace(CASE.thought, config=dataclasses.replace(CASE.thought.config, end="fixed"))
    costs = [step_flops(TINY, settings, 2, 8).necessary for settings in (fixed, CASE.thought)]
    assert costs[0] < costs[1] < 1.2 * costs[0]  # the head's product with a vector is small beside a tiny vocabulary


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"thought\.length_penalty is 0\.1; it must be 0 where end is 'fixed'"):
        from_mapping(Config, {"thought": {"length_penalty": 0.1}})
    with pytest.raises(ConfigError, match=r"thought\.end is 'later'"):
        from_mapping(Config, {"thought": {"end": "later"}})
    with pytest.raises(AssertionError, match="no end head"):
        run(random_model(CASE.decoder, 7.0), uniforms())
