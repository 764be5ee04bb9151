"""A reach above 1: each prediction mixes those after the thoughts of the last positions, worked one by one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.thoughts.controls import draw_uniforms
from quietstar_jax.thoughts.ending import ENDED
from quietstar_jax.thoughts.score import chain_hidden_states
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_tokens, think
from quietstar_jax.thoughts.score_use import UseWanted
from quietstar_jax.thoughts.text import read_text
from tests.thoughts.cases import Case, random_model

MASK = ("1111111", "0111111")  # the second is padded on the left, as continuations are
STARTS = jnp.array([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1]])


def odds_of(head, base, after):
    """The output of the mixing head, from its weights."""
    x = base @ head.base_in[...] + after @ head.thought_in[...] + head.in_bias[...]
    x = jnp.maximum(jnp.maximum(x, 0) @ head.hidden[...] + head.hidden_bias[...], 0)
    return (x @ head.out[...])[..., 0]


@pytest.mark.parametrize("starts", [None, STARTS])
@pytest.mark.parametrize("made", [None, (True, False, True, True, False, True, True)])
def test_predictions_one_by_one(starts, made):
    case = Case("reach", config={"mixing": "probabilities"}, mask=MASK, positions_per_chunk=2)
    settings = dataclasses.replace(case.thought, reach=3, tokens_ahead=3)
    model = random_model(case.decoder, 7.0)
    tokens, mask = case.text()
    uniforms = draw_uniforms(jax.random.key(3), (2, settings.num_thoughts, case.length, settings.thought_length))
    positions, thinking = jnp.arange(case.length), None
    if made:  # the policy `random` thinks where its draw is below the rate
        draws = jnp.broadcast_to(jnp.where(jnp.array(made), 0.1, 0.9), tokens.shape)
        thinking = Thinking(parse_policy("random:0.5"), jnp.broadcast_to(positions, tokens.shape), draws)
    found = score_tokens(
        model, tokens, mask, starts, positions[1:], uniforms, settings, thinking=thinking, likeliest=3, greedy=0
    )
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype)
    thoughts = think(model, text, positions, uniforms, settings, 0).tokens
    _, after, _ = chain_hidden_states(model, text, positions, thoughts, settings)
    softmax = jax.nn.softmax
    for b in range(2):
        for r in range(settings.num_thoughts):
            for j in range(1, case.length - 1):
                mixed, rest = softmax(model.decoder.logits(text.hidden[b, j])), 1.0
                for k in (2, 1, 0):
                    begun = 0 if starts is None else int(starts[b, j + 1])
                    if j - k < begun or not mask[b, max(j - k, 0)] or (made and not made[j - k]):
                        continue
                    w = 1 / (1 + np.exp(1 - odds_of(model.mixing_head, text.hidden[b, j], after[b, r, j - k, k])))
                    mixed = (1 - w) * mixed + w * softmax(model.decoder.logits(after[b, r, j - k, k]))
                    rest *= 1 - w
                if not found.real[b, j - 1]:
                    continue
                at = b, r, j - 1
                np.testing.assert_allclose(found.talk.nll[at], -np.log(mixed[tokens[b, j + 1]]), atol=2e-5)
                np.testing.assert_allclose(found.weight[at], 1 - rest, atol=1e-5)
                np.testing.assert_allclose(found.talk.top_probabilities[at], np.sort(mixed)[::-1][:3], rtol=1e-4)
                assert found.talk.best[at] == found.talk.top_ids[at][0]
    computed = jnp.array(made or (True,) * case.length)[:, None] & (mask[:, None, :, None] | (made is None))
    np.testing.assert_array_equal(found.thoughts, jnp.where(computed, thoughts, ENDED)[:, :, 1:])


def test_a_reach_of_1_is_the_usual_prediction_and_a_longer_one_keeps_the_rewards():
    case = Case("reach", config={"mixing": "probabilities"}, mask=MASK)
    model, shape = random_model(case.decoder, 7.0), (2, 2, case.length, case.thought.thought_length)
    uniforms, positions = draw_uniforms(jax.random.key(3), shape), jnp.arange(2, 5)
    settings = dataclasses.replace(case.thought, tokens_ahead=3)
    one, three = (
        score_tokens(
            model, *case.text(), None, positions, uniforms, dataclasses.replace(settings, reach=reach), greedy=1,
            use=UseWanted(),
        )
        for reach in (1, 3)
    )  # fmt: skip
    for name in ("real", "base", "reward", "thoughts", "thought_entropy", "base_entropy", "use"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), getattr(one, name), getattr(three, name))
    assert np.abs(one.talk.nll - three.talk.nll).max() > 1e-3
    assert (three.weight > one.weight).all()


def test_no_prediction_depends_on_the_token_it_predicts_or_later_ones():
    case = Case("reach", config={"mixing": "probabilities"})
    model, (tokens, mask) = random_model(case.decoder, 7.0), case.text()
    settings = dataclasses.replace(case.thought, reach=3, tokens_ahead=3)
    uniforms = draw_uniforms(jax.random.key(3), (2, 2, case.length, settings.thought_length))
    one, other = (
        score_tokens(model, x, mask, None, jnp.arange(case.length), uniforms, settings, likeliest=4, greedy=0)
        for x in (tokens, tokens.at[:, 4:].set((tokens[:, 4:] + 1) % 7))
    )
    np.testing.assert_array_equal(one.talk.top_ids[:, :, :4], other.talk.top_ids[:, :, :4])
    np.testing.assert_allclose(one.talk.top_probabilities[:, :, :4], other.talk.top_probabilities[:, :, :4], rtol=1e-5)
    assert np.abs(one.talk.top_probabilities[:, :, 4] - other.talk.top_probabilities[:, :, 4]).max() > 1e-3
