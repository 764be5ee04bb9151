"""Thoughts as sampled: which tokens, how likely, and that nothing but the text and the draws decides."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.parameters import split
from quietstar_jax.thoughts.attention import prefix_xla
from quietstar_jax.thoughts.chains import chain_pass, chain_step, empty_chains
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import Thoughts, draw_tokens, mask_meta_tokens, sample_thoughts
from quietstar_jax.thoughts.score import chain_hidden_states, score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, entropy, read_text
from tests.thoughts import oracle
from tests.thoughts.cases import Case, random_model

CASE = Case(
    "sample", length=8, mask=("11111111", "11111100"), settings={"thought_length": 3},
    architecture={"num_heads": 4, "num_kv_heads": 2, "sliding_window": 6},
)  # fmt: skip
LARGEST = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.fixture(scope="module")
def model() -> QuietStar:
    return random_model(CASE.decoder, CASE.thought.config.embedding_scale)


@partial(jax.jit, static_argnames=("settings", "chunk"))
def sample(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, draws: jax.Array | None, settings: ThoughtSettings, chunk: int
) -> tuple[Text, Thoughts]:
    text = read_text(model.decoder, tokens, mask, dtype=settings.dtype)
    return text, sample_thoughts(model, text, jnp.arange(tokens.shape[1]), draws, settings, chunk)


def uniforms() -> jax.Array:
    s = CASE.thought
    return jax.random.uniform(jax.random.key(3), (CASE.batch, s.num_thoughts, CASE.length, s.thought_length))


def test_greedy_thoughts_and_their_entropy_equal_the_oracle(model: QuietStar) -> None:
    settings = dataclasses.replace(CASE.thought, num_thoughts=1)
    tokens, mask = CASE.text()
    _, thoughts = sample(model, tokens, mask, None, settings, 3)
    params = split(model)[0]
    for b, j in np.ndindex(*tokens.shape):
        expected, logits = oracle.greedy_thought(CASE.decoder, settings, params, tokens[b], mask[b], j)
        assert thoughts.tokens[b, 0, j].tolist() == expected
        probabilities = [np.exp(row.astype(np.float64) - row.max()) for row in logits]
        each = [row[row > 0] / row.sum() for row in probabilities]
        by_hand = [-(row * np.log(row)).sum() for row in each]
        np.testing.assert_allclose(thoughts.entropy[b, 0, j], by_hand, rtol=2e-5, atol=1e-5)


def test_thoughts_do_not_depend_on_chunks_or_on_splitting_the_batch(model: QuietStar) -> None:
    (tokens, mask), draws = CASE.text(), uniforms()
    _, whole = sample(model, tokens, mask, draws, CASE.thought, 8)
    for chunk in (3, 1):
        np.testing.assert_array_equal(sample(model, tokens, mask, draws, CASE.thought, chunk)[1].tokens, whole.tokens)
    for b in range(CASE.batch):
        row = slice(b, b + 1)
        _, part = sample(model, tokens[row], mask[row], draws[row], CASE.thought, 3)
        np.testing.assert_array_equal(part.tokens, whole.tokens[row])
        np.testing.assert_allclose(part.entropy, whole.entropy[row], atol=1e-5)
    assert (whole.tokens[:, 0] != whole.tokens[:, 1]).any(), "both thoughts of every position are the same"


def test_temperature_of_sampling(model: QuietStar) -> None:
    """Cold draws are the greedy thoughts, hot ones nearly uniform; the entropy is that of what was drawn from."""
    (tokens, mask), draws = CASE.text(), uniforms()

    def at(temperature: float) -> Thoughts:
        config = dataclasses.replace(CASE.thought.config, sampling_temperature=temperature)
        return sample(model, tokens, mask, draws, dataclasses.replace(CASE.thought, config=config), 8)[1]

    greedy = sample(model, tokens, mask, None, CASE.thought, 8)[1]
    np.testing.assert_array_equal(at(1e-4).tokens, greedy.tokens)
    allowed = CASE.decoder.vocab_size - len(CASE.thought.meta_tokens)
    np.testing.assert_allclose(at(1e4).entropy, np.log(allowed), atol=1e-3)


def test_meta_tokens_never_appear(model: QuietStar) -> None:
    tokens, mask = CASE.text()
    settings = dataclasses.replace(CASE.thought, meta_tokens=tuple(range(2, 13)))
    for draws in (None, uniforms(), jnp.full_like(uniforms(), LARGEST)):
        _, thoughts = sample(model, tokens, mask, draws, settings, 8)
        assert set(np.unique(thoughts.tokens)) <= {0, 1}
    assert mask_meta_tokens(jnp.ones((2, 3)), (1,)).tolist() == [[1.0, float(np.float32(-1e10)), 1.0]] * 2
    assert mask_meta_tokens(jnp.ones(3), ()).tolist() == [1.0] * 3


def test_score_gives_the_log_probabilities_the_sampler_drew_from(model: QuietStar) -> None:
    """At equal temperatures the parallel scorer and the step-by-step sampler see the same distributions."""
    (tokens, mask), draws = CASE.text(), uniforms()
    config = dataclasses.replace(CASE.thought.config, sampling_temperature=1.7, score_temperature=1.7)
    settings = dataclasses.replace(CASE.thought, config=config)
    text, thoughts = sample(model, tokens, mask, draws, settings, 8)
    positions = jnp.arange(CASE.length)
    log_probs = score_thoughts(model, text, positions, thoughts.tokens, settings).log_probs

    hidden = chain_hidden_states(model, text, positions, thoughts.tokens, settings)[0]
    logits = np.asarray(mask_meta_tokens(model.decoder.logits(hidden), settings.meta_tokens) / 1.7, np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy(jnp.asarray(logits, jnp.float32)), thoughts.entropy, atol=1e-5)
    chosen = np.take_along_axis(probabilities, np.asarray(thoughts.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, np.log(chosen), atol=1e-5)
    np.testing.assert_array_equal(draw_tokens(jnp.asarray(logits, jnp.float32), draws), thoughts.tokens)


@pytest.mark.parametrize(
    ("dtype", "block"), [(jnp.float32, 64), (jnp.bfloat16, 64), (jnp.float32, 2)], ids=["float32", "bfloat16", "blocks"]
)
def test_chain_steps_equal_the_chain_pass(
    model: QuietStar, dtype: jnp.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", block)
    tokens, mask = CASE.text()
    positions, length = jnp.array([0, 2, 5, 7]), 5
    text = read_text(model.decoder, tokens, mask, dtype=dtype)
    shape = (CASE.batch, 2, positions.size, length, CASE.decoder.hidden_size)
    embeddings = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    at_once, _ = chain_pass(model.decoder, embeddings, positions, text.prefix, mask)
    chain_kv = empty_chains(model.decoder.architecture, *shape[:4], dtype)
    step = jax.jit(chain_step)
    for c in range(length):
        hidden, chain_kv = step(
            model.decoder, embeddings[..., c, :], jnp.int32(c), positions, text.prefix, mask, chain_kv
        )
        error = np.abs(np.asarray(hidden - at_once[..., c, :], np.float32)).max()
        assert error < (1e-5 if dtype == jnp.float32 else 0.1), (c, error)
    assert hidden.dtype == at_once.dtype == dtype


def test_entropy_by_hand() -> None:
    halves = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(entropy(halves), 1.5 * np.log(2), rtol=1e-6)
    assert entropy(jnp.array([0.0, -1e10])) == 0.0
    np.testing.assert_allclose(entropy(jnp.zeros((2, 8)) + 5.0), np.full(2, np.log(8)), rtol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 3, 12, 49, 50])
def test_draws_follow_the_distribution(vocab: int) -> None:
    """Chi-square of 40,000 draws. Tokens of probability 0 are never drawn."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=vocab).astype(np.float32)
    if vocab > 2:
        logits[[0, vocab - 1]] = -1e10
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    draws = 40_000
    uniforms = jax.random.uniform(jax.random.key(vocab), (draws,))
    tokens = draw_tokens(jnp.broadcast_to(logits, (draws, vocab)), uniforms)
    counts = np.bincount(tokens, minlength=vocab)
    assert tokens.dtype == jnp.int32
    assert counts.size == vocab
    likely = probabilities > 0
    assert not counts[~likely].any()
    expected = draws * probabilities[likely]
    statistic, freedom = ((counts[likely] - expected) ** 2 / expected).sum(), max(likely.sum() - 1, 1)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


def test_draws_invert_the_cumulative_distribution_exactly() -> None:
    """Probabilities in eighths, draws in the middle of each eighth: every token as often as it weighs."""
    eighths = np.array([0, 1, 0, 3, 0, 2, 2, 0, 0])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(eighths / 8), jnp.float32)
    uniforms = jnp.asarray((np.arange(8) + 0.5) / 8, jnp.float32)
    tokens = draw_tokens(jnp.broadcast_to(logits, (8, eighths.size)), uniforms)
    assert tokens.tolist() == np.repeat(np.arange(9), eighths).tolist()


@pytest.mark.parametrize("uniform", [0.0, LARGEST])
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
def test_extreme_draws_hit_the_first_and_the_last_possible_token(vocab: int, uniform: float) -> None:
    logits = np.random.default_rng(0).normal(size=(64, vocab)).astype(np.float32)
    if vocab > 2:
        logits[:, [0, vocab - 1]] = -1e10
        if vocab > 100:
            logits[:, -200:] = -1e10
    tokens = np.asarray(draw_tokens(jnp.asarray(logits), jnp.full(64, uniform, jnp.float32)))
    possible = np.flatnonzero(logits[0] > -1e9)
    assert np.isin(tokens, possible).all()
    if uniform == 0.0 or vocab < 100:  # with many tokens the last float32 below 1 rounds into any of the last few
        assert (tokens == possible[0 if uniform == 0.0 else -1]).all()


def test_no_gradient_flows_through_the_choice(model: QuietStar) -> None:
    tokens, mask = CASE.text()

    def total_entropy(model: QuietStar) -> jax.Array:
        return sample(model, tokens, mask, uniforms(), CASE.thought, 8)[1].entropy.sum()

    gradient = split(jax.grad(total_entropy)(model))[0]
    assert not any(np.asarray(g).any() for g in gradient.values())
