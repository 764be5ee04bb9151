"""What generation costs: attention touches the blocks that are seen, and nothing copies the cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.generate import Sizes, make_engine, measure
from quietstar_jax.inference import engine as engine_module
from quietstar_jax.inference.decode_state import DecodeConfig
from quietstar_jax.inference.engine import Request
from quietstar_jax.inference.kv_cache import key_block
from quietstar_jax.inference.sampling import Sampling
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.settings import ThoughtSettings

SIZES = Sizes(layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, mlp=24, vocab=50, batch=2, prompt=70, tokens=4,
              thought_length=3)  # fmt: skip


def requests(*lengths: int) -> list[Request]:
    return [Request((5, *[7] * (n - 1)), 4, np.zeros(2, np.uint32)) for n in lengths]


def emitted(sizes: Sizes, lengths: tuple[int, ...], poisoned: slice) -> list:
    """What is generated when these keys and values of the cache are not numbers."""
    engine = make_engine(sizes)
    asked = requests(*lengths)
    state = engine.start(asked, 512)
    poison = jax.tree.map(lambda x: x.at[:, :, :, poisoned].set(jnp.nan), state.cache)
    plan = DecodeConfig(ThoughtSettings(sizes.thought_length), tokens_per_call=4)
    return list(engine.decode(state._replace(cache=poison), engine.knobs(asked, Sampling()), plan, np.ones(2, bool)))


def test_blocks_behind_the_longest_text_are_not_touched():
    block = key_block()
    clean, poisoned = (emitted(SIZES, (block + 6, 20), part) for part in (slice(0, 0), slice(2 * block, None)))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    (broken,) = emitted(SIZES, (block + 6, 20), slice(block, None))
    assert np.isnan(broken.weight).any() or not np.array_equal(broken.tokens, clean[0].tokens), "the next one is"


def test_blocks_out_of_the_window_are_not_touched():
    block = key_block()
    windowed = dataclasses.replace(SIZES, window=9)
    clean, poisoned = (emitted(windowed, (2 * block + 20,) * 2, part) for part in (slice(0, 0), slice(0, 2 * block)))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@pytest.mark.parametrize(
    ("thought_length", "think", "reach"), [(0, "always", 1), (3, "always", 1), (3, "every", 1), (3, "every", 3)]
)
def test_the_cache_is_changed_in_place(thought_length, think, reach):
    """A copy of the cache among the temporaries would show: it is far larger than all else."""
    engine, asked = make_engine(SIZES), requests(3, 3)
    state = engine.start(asked, 1 << 16, reach)
    cache_bytes = sum(x.nbytes for x in state.cache)
    settings = ThoughtSettings(thought_length, config=ThoughtConfig(mixing="probabilities"), reach=reach)
    plan = DecodeConfig(settings, think, tokens_per_call=4)
    state, knobs = engine.with_thought(state, plan), engine.knobs(asked, Sampling(think=parse_policy("every:2")))
    compiled = engine.step(plan).lower(engine.params, state, np.ones(2, bool), knobs).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache_bytes / 8
    assert memory.alias_size_in_bytes >= cache_bytes


@pytest.mark.some(1)
@pytest.mark.parametrize("think", ["never", "always", "every:2"])
def test_small_decoders_run_without_a_loop_over_layers(monkeypatch, think):
    """The weights of a layer are then no slices of a stack, which the CPU would copy; the texts are the same."""
    policy, outputs, copies = parse_policy(think), [], []
    plan = DecodeConfig(ThoughtSettings(0 if think == "never" else 3), policy.name, tokens_per_call=4)
    for layers in (engine_module.UNROLLED_LAYERS, 1):
        monkeypatch.setattr(engine_module, "UNROLLED_LAYERS", layers)
        engine, asked = make_engine(dataclasses.replace(SIZES, batch=1)), requests(70)
        knobs, alive = engine.knobs(asked, Sampling(think=policy)), np.ones(1, bool)
        state = engine.with_thought(engine.start(asked, 512), plan)
        lowered = engine.step(plan).lower(engine.params, state, alive, knobs).as_text()
        copies.append("tensor<2x16x24xf32>" in lowered)  # `gate` and `up` of both layers
        outputs.append(list(engine.decode(engine.start(asked, 512), knobs, plan, alive)))
    assert copies == [False, True]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.thoughts, theirs.thoughts)
        np.testing.assert_allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_text_that_has_ended_gets_no_more_tokens():
    engine, asked = make_engine(SIZES), requests(5, 3)

    def tokens(*eos_ids: int) -> np.ndarray:
        plan = DecodeConfig(ThoughtSettings(0), eos_ids=eos_ids, tokens_per_call=4)
        knobs, wanted = engine.knobs(asked, Sampling()), np.ones(2, bool)
        return next(engine.decode(engine.start(asked, 512), knobs, plan, wanted)).tokens.T

    free = tokens()
    eos = free[0, 1]
    for row, ended in zip(free.tolist(), tokens(eos).tolist(), strict=True):
        kept = row.index(eos) + 1 if eos in row else 4
        assert ended == row[:kept] + [-1] * (4 - kept)


def test_the_benchmark_measures_what_it_says():
    result = measure(dataclasses.replace(SIZES, think="every:2"), 1)
    assert result["thinking_rate"] == 0.5
    assert result["passes_with_policy"] == 1 + 0.5 * (3 + 2)
    assert result["ratio_with_policy"] == pytest.approx(
        result["tokens_per_second_without_thoughts"] / result["tokens_per_second_with_policy"]
    )
    assert result["tokens_per_second_with_thoughts"] > 0
    assert result["ratio"] == pytest.approx(
        result["tokens_per_second_without_thoughts"] / result["tokens_per_second_with_thoughts"]
    )
    assert result["cache_bytes"] == 2 * 2 * 2 * 1 * 512 * 8 * 4
    assert result["ratio_allowed"] == 6
