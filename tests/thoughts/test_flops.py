"""Costs counted by hand."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.config import Config
from quietstar_jax.models.parameters import split
from quietstar_jax.thought_config import CONTROLS, Phase, RateScales, ThoughtConfig
from quietstar_jax.thoughts.flops import Flops, decoder_flops, step_flops
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, phase_settings
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.step import initial_state, make_train_step

SMALL = Architecture(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=3
)
PROJECTIONS = 2 * (4 * 6 + 2 * 4 * 3 + 6 * 4)  # query, key and value, output
FEED_FORWARD = 2 * 3 * 4 * 6
HEAD = 2 * 4 * 10


def test_one_token() -> None:
    assert decoder_flops(SMALL, keys=5) == 2 * (PROJECTIONS + FEED_FORWARD + 2 * 2 * 6 * 5)


def test_a_step_part_by_part() -> None:
    settings = ThoughtSettings(thought_length=2, num_thoughts=3, tokens_ahead=2, policy_weight=1.0)
    found = step_flops(SMALL, settings, batch=1, length=7)
    assert found.base == 7 * (decoder_flops(SMALL, 4) + HEAD)
    assert found.sampling == 7 * 3 * 2 * (decoder_flops(SMALL, 4 + 1.5) + HEAD)
    assert found.scoring == 7 * 3 * 5 * decoder_flops(SMALL, 4 + 3)
    mixing = 2 * (4 * 4 + 4 * 4 + 4)
    assert found.scoring_heads == 7 * 3 * (2 * HEAD + 2 * (HEAD + mixing)) + 7 * 2 * 4 * 4
    assert found.backward == 2 * (found.base + found.scoring + found.scoring_heads)
    assert found.recomputation == 0
    assert found.necessary == sum(found)
    lean = step_flops(SMALL, dataclasses.replace(settings, rematerialize=True), batch=1, length=7)
    assert lean.recomputation == 7 * decoder_flops(SMALL, 4) + found.scoring
    assert lean.necessary == found.necessary


def test_a_frozen_decoder_costs_the_way_to_what_learns() -> None:
    settings = ThoughtSettings(thought_length=2, num_thoughts=3, tokens_ahead=2, policy_weight=1.0)
    head_only = step_flops(SMALL, settings, 1, 7, RateScales(decoder=0.0, thought_embeddings=0.0))
    mixing = 7 * 3 * 2 * 2 * (4 * 4 + 4 * 4 + 4) + 7 * 2 * 4 * 4
    assert head_only.backward == 2 * mixing
    embeddings_too = step_flops(SMALL, settings, 1, 7, RateScales(decoder=0.0))
    assert embeddings_too.backward == mixing + head_only.scoring + head_only.scoring_heads


def test_adapters_cost_the_way_through_everything_and_their_own_gradients() -> None:
    settings = ThoughtSettings(thought_length=2, num_thoughts=3, tokens_ahead=2, policy_weight=1.0)
    adapters = Adapters("all", rank=3)
    whole, found = step_flops(SMALL, settings, 1, 7), step_flops(SMALL, settings, 1, 7, adapters=adapters)
    a = SMALL
    width, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    sizes = (a.hidden_size + width) * 2 + (a.hidden_size + kv) * 2 + (a.hidden_size + a.intermediate_size) * 3
    added = a.num_layers * 2 * 3 * sizes  # per token
    assert found.base == whole.base + 7 * added
    assert found.scoring == whole.scoring + 7 * 3 * 5 * added
    assert found.scoring_heads == whole.scoring_heads
    frozen = 7 * (decoder_flops(SMALL, 0) + HEAD) + 7 * 3 * 5 * decoder_flops(SMALL, 0)  # not counted a second time
    mixing = 7 * 3 * 2 * 2 * (4 * 4 + 4 * 4 + 4) + 7 * 2 * 4 * 4
    all_twice = 2 * (found.base + found.scoring + found.scoring_heads)
    assert found.backward == all_twice - frozen - (found.scoring_heads - mixing)
    compared = dataclasses.replace(settings, config=ThoughtConfig(kl_weight=0.1))
    reference = step_flops(SMALL, compared, 1, 7, adapters=adapters).reference
    assert reference == 7 * decoder_flops(SMALL, 4, adapters) + found.scoring + 7 * 3 * 2 * HEAD  # adapters stay on
    resting = step_flops(SMALL, settings, 1, 7, RateScales(adapters=0.0), adapters)
    assert resting.backward == mixing + found.scoring + found.scoring_heads
    plain = step_flops(SMALL, ThoughtSettings(thought_length=0), 1, 7, adapters=adapters)
    assert plain.backward == 2 * plain.base - 7 * (decoder_flops(SMALL, 0) + HEAD)


def test_only_what_is_computed_is_counted() -> None:
    settings = ThoughtSettings(thought_length=2, num_thoughts=3, tokens_ahead=2, policy_weight=1.0, rematerialize=True)
    mixing = 7 * 3 * 2 * 2 * (4 * 4 + 4 * 4 + 4) + 7 * 2 * 4 * 4

    def cost(rates: RateScales = RateScales(), policy_weight: float = 1.0, **config: str) -> Flops:  # noqa: B008
        thought = dataclasses.replace(settings.config, **config)
        changed = dataclasses.replace(settings, policy_weight=policy_weight, config=thought)
        return step_flops(SMALL, changed, 1, 7, rates)

    whole = cost()
    assert whole.scoring_heads - cost(policy_weight=0.0).scoring_heads == 7 * 3 * 2 * HEAD
    assert cost(control="pause").scoring_heads == cost(policy_weight=0.0).scoring_heads
    assert [cost(control=c).sampling for c in CONTROLS] == [whole.sampling, 0, 0, whole.sampling]
    assert whole.scoring_heads - cost(mixing="none").scoring_heads == mixing
    assert whole.backward - cost(RateScales(mixing_head=0.0)).backward == mixing
    assert cost(RateScales(0.0, 0.0, 1.0)).backward == whole.scoring + whole.scoring_heads
    assert cost(RateScales(0.0, 0.0, 0.0)).backward == 0
    assert cost(RateScales(0.0, 1.0, 0.0)).recomputation == 0
    assert cost(RateScales(0.0, 1.0, 1.0)).recomputation == whole.scoring


def test_further_forward_passes_of_the_objective() -> None:
    settings = ThoughtSettings(thought_length=2, num_thoughts=3, tokens_ahead=2, policy_weight=1.0)
    text, thought_heads = 7 * decoder_flops(SMALL, 4), 7 * 3 * 2 * HEAD

    def cost(rates: RateScales = RateScales(), weight: float = 1.0, distill: float = 0.0, **config: Any) -> Flops:  # noqa: B008
        thought = ThoughtConfig(**config)
        changed = dataclasses.replace(settings, policy_weight=weight, distill_weight=distill, config=thought)
        return step_flops(SMALL, changed, 1, 7, rates)

    plain = cost()
    talking = plain.scoring + plain.scoring_heads - thought_heads
    batch = cost(advantage_scale="batch")
    assert batch == plain._replace(rewarding=plain.base + talking)
    assert batch.necessary == plain.necessary + batch.rewarding
    kl = cost(kl_weight=0.1)
    assert kl == plain._replace(reference=text + plain.scoring + thought_heads)
    assert kl.necessary == plain.necessary + kl.reference
    both = cost(kl_in_reward=0.1, advantage_scale="batch")  # one reference for the thoughts, which are drawn once
    assert both == kl._replace(rewarding=batch.rewarding + thought_heads)
    assert cost(weight=0.0, kl_weight=0.1, advantage_scale="batch") == cost(weight=0.0)
    assert cost(advantage="batch_std") == batch

    taught = cost(distill=1.0)
    assert taught.scoring_heads == plain.scoring_heads + 7 * HEAD
    assert taught.necessary == plain.necessary + 3 * 7 * HEAD
    frozen = RateScales(decoder=0.0)
    assert cost(frozen, distill=1.0).necessary == cost(frozen).necessary + 7 * HEAD
    every = cost(RateScales(0.0, 0.0, 0.0), distill=1.0, kl_weight=0.1, advantage_scale="batch")
    assert every.necessary == sum(every) - every.recomputation
    assert every.backward == 0

    settings = dataclasses.replace(settings, num_thoughts=1)  # the advantage of a single thought is its reward
    assert cost(advantage="batch_std") == cost()
    assert cost(advantage="batch_std", advantage_scale="batch").rewarding > 0


@functools.cache
def compiled_cost(
    control: str, policy_weight: float, distill_weight: float = 0.0, **objective: Any
) -> tuple[float, float]:
    """FLOPs of a small training step as XLA counts them, and as we do."""
    architecture = dataclasses.replace(
        SMALL, vocab_size=3000, hidden_size=32, intermediate_size=64, num_layers=1, head_dim=16
    )
    phase = Phase(
        batch_size=2, thought_length=3, num_thoughts=2, tokens_ahead=1, policy_weight=policy_weight,
        distill_weight=distill_weight,
    )  # fmt: skip
    thought = ThoughtConfig(control=control, positions_per_chunk=16, **objective)
    config, vocabulary = Config(phases=(phase,), thought=thought), Vocabulary(0, (1, 2), (0,), (0,))
    params, graphdef = split(init_quiet_star(architecture, [0], [0], 100.0, jax.random.key(0)))
    step = jax.jit(make_train_step(config, phase, graphdef, vocabulary))
    batch = Batch(jnp.ones((2, 16), jnp.int32), jnp.ones((2, 16), bool))
    with jax.numpy_dtype_promotion("standard"):  # for optax
        compiled = step.lower(
            initial_state(params, config, objective=True), batch, jax.random.key(0), jnp.int32(0)
        ).compile()
    ours = step_flops(architecture, phase_settings(config, phase, vocabulary), 2, 16)
    # XLA counts the body of a loop once, here of that over the T tokens that are sampled.
    return compiled.cost_analysis()["flops"], ours.necessary - ours.sampling * 2 / 3


@pytest.mark.some(1)
@pytest.mark.parametrize(("control", "policy_weight"), [("none", 0.0), ("pause", 1.0), ("random", 1.0)])
def test_what_a_setting_saves_is_what_the_compiler_saves(control: str, policy_weight: float) -> None:
    """To the part that is no matrix product, which is large in so small a model: softmax over the vocabulary."""
    (theirs, ours), (all_theirs, all_ours) = compiled_cost(control, policy_weight), compiled_cost("none", 1.0)
    assert all_ours - ours == pytest.approx(all_theirs - theirs, rel=0.2)
    assert all_ours - ours > 0.05 * all_ours


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("distill_weight", "objective"),
    [(0.0, {"advantage_scale": "batch"}), (0.0, {"kl_weight": 0.1}), (1.0, {}),
     (0.0, {"kl_in_reward": 0.1, "advantage_scale": "batch"})],
    ids=["batch rewards", "reference", "distillation", "reference in batch rewards"],
)  # fmt: skip
def test_what_an_objective_adds_is_what_the_compiler_adds(distill_weight: float, objective: dict[str, Any]) -> None:
    """Without mixing, which computes the text's logits at the positions that think once more than is counted."""
    theirs, ours = compiled_cost("none", 1.0, distill_weight, mixing="none", **objective)
    their_plain, our_plain = compiled_cost("none", 1.0, mixing="none")
    assert ours - our_plain == pytest.approx(theirs - their_plain, rel=0.2)
    assert ours - our_plain > 0.05 * our_plain


def test_a_plain_step() -> None:
    found = step_flops(SMALL, ThoughtSettings(thought_length=0), batch=2, length=7)
    assert found.necessary == 3 * 14 * (decoder_flops(SMALL, 4) + HEAD)


def test_the_benchmark_runs_and_names_its_figures() -> None:
    sizes = "--layers 1 --hidden 8 --heads 2 --kv-heads 1 --head-dim 4 --mlp 8 --vocab 16 --length 8 --thought-length 2"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *sizes.split(), "--steps", "1", "--json"],
        cwd=Path(__file__).resolve().parents[2], env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(ended.stdout.splitlines()[-1])
    names = ("step_seconds", "compile_seconds", "necessary_flops", "utilisation", "temp_bytes", "peak_rss_bytes",
             "thought_tokens_per_second")  # fmt: skip
    assert all(found[name] > 0 for name in names)
