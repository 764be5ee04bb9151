"""Long thoughts: attention and logits in blocks change neither loss nor gradients, and memory grows linearly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts import score
from quietstar_jax.thoughts.attention import prefix_xla
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.objective import count_targets
from quietstar_jax.thoughts.sample import Thoughts
from tests.thoughts.cases import Case, random_model, relative_error, worst_errors

CASES = (
    Case("windows_and_caps", settings={"thought_length": 9}, config={"entropy_bonus": 0.1},
         architecture={"num_heads": 4, "num_kv_heads": 2, "sliding_window": 5, "full_attention_layers": (1,),
                       "score_cap": 1.5, "logit_cap": 2.0}),
    Case("rematerialize", mask=("1111111", "1111100"), settings={"thought_length": 8, "rematerialize": True},
         config={"mixing": "none", "advantage": "leave_one_out", "positive_only": False}),
    Case("sampled_ends", settings={"thought_length": 8},  # the last of the blocks of 3 tokens has one too many
         config={"end": "sampled", "length_penalty": 0.2, "entropy_bonus": 0.1, "policy_reduction": "sum"}),
)  # fmt: skip


def gradient_of(case: Case, thoughts: Thoughts, positions: jax.Array) -> tuple[Any, Any]:
    """(parameters, loss and gradient as a function of them)."""
    settings = case.thought
    params, graphdef = split(random_model(case.decoder, settings.config.embedding_scale, heads=settings.config.heads))
    tokens, mask = case.text()
    counts = count_targets(mask, settings.tokens_ahead)

    def loss(params: Any) -> jax.Array:
        return quiet_star_loss(
            merge(graphdef, params), tokens, mask, lambda *_: thoughts, counts, settings, case.positions_per_chunk,
            choose=lambda _: positions,
        )[0]  # fmt: skip

    return params, jax.jit(jax.value_and_grad(loss))


@pytest.mark.some(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_blocks_change_neither_loss_nor_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    thoughts, positions = case.thoughts(), jnp.arange(case.length)
    params, whole = gradient_of(case, thoughts, positions)
    wanted, wanted_gradients = whole(params)
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", 4)
    monkeypatch.setattr(score, "TOKEN_BLOCK", 3)
    found, gradients = gradient_of(case, thoughts, positions)[1](params)
    assert relative_error(found, wanted) < 2e-6
    assert not worst_errors(gradients, wanted_gradients, 1e-4)


def test_memory_grows_linearly_with_the_length_of_a_thought() -> None:
    """The temporaries of the compiled gradient, with one position in a text: twice the length, at most 2.2 times."""

    def temporaries(length: int) -> int:
        case = Case(
            "long", batch=1, length=8, settings={"thought_length": length, "tokens_ahead": 1}, positions_per_chunk=1,
            config={"mixing": "none"}, architecture={"num_layers": 1, "vocab_size": 512},
        )  # fmt: skip
        nothing = jnp.zeros((1, 2, 1, length))
        thoughts = Thoughts(nothing.astype(jnp.int32), nothing, nothing)
        params, gradient = gradient_of(case, thoughts, jnp.array([[4]]))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert 1.0 < temporaries(512) / temporaries(256) < 2.2
