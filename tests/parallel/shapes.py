"""The training step and the token scorer on many meshes of CPU devices against one device, in one process.

`JAX_NUM_CPU_DEVICES=8 python -m tests.parallel.shapes step 8,1,1,1 2,2,2,1 ...`: data, fsdp, tensor and position;
`step`, `objective` (a step whose terms need figures of the whole batch, and a reference), `adapters` (the same with
adapters), `gate` (a step with a thinking gate), `ends` (`objective` with thoughts whose end is sampled), `scores`, or
`policy` (scores where a policy of thinking chooses).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.config import Config, MeshConfig, ModelConfig
from quietstar_jax.data_config import DataConfig
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.models.parameters import GraphDef, merge, split
from quietstar_jax.parallel.mesh import make_mesh
from quietstar_jax.parallel.sharding import on_mesh
from quietstar_jax.thought_config import Phase, ThoughtConfig
from quietstar_jax.thoughts import score, text
from quietstar_jax.thoughts.attention import prefix_xla
from quietstar_jax.thoughts.controls import draw_uniforms
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_tokens
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.batch import Batch, to_device
from quietstar_jax.training.evaluation import AMONG, evaluation_settings, make_token_scorer, score_batches
from quietstar_jax.training.step import compile_train_step, initial_state, state_specs
from tests.thoughts.cases import random_model, worst_errors

ROWS, LENGTH = 16, 12
ARCHITECTURE = Architecture(
    vocab_size=104, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=4,
    sliding_window=5, full_attention_layers=(1,), rope_local_theta=50.0, norm_placement="around", norm_adds_one=True,
    qk_norm=True, qk_norm_all_heads=True, score_cap=4.0, logit_cap=30.0, embedding_multiplier=2.0,
)  # fmt: skip
PHASE = Phase(
    batch_size=ROWS, microbatches=2, thought_length=2, num_thoughts=2, tokens_ahead=2, policy_weight=3.0,
    learning_rate=1e-2, warmup_steps=0,
)  # fmt: skip
VOCABULARY = Vocabulary(pad_id=0, meta_tokens=(5,), start_tokens=(1,), end_tokens=(2,), end_token=2, start_token=1)
ARRAYS, STRUCTURE = split(random_model(ARCHITECTURE, 7.0))
PARAMS = jax.device_get(ARRAYS)  # a step gives up what it is given
SCORES = ("scores", "policy")
ADAPTERS = Adapters("all", rank=3, alpha=5.0)


def with_random(config: Config) -> tuple[dict[str, np.ndarray], GraphDef]:
    """The parameters, with random adapters and random optional heads if the configuration has them."""
    names, structure = abstract_params(ARCHITECTURE, config.model.adapters, config.thought.heads)
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in names.items() if name not in PARAMS}
    return PARAMS | {name: 0.4 * value for name, value in drawn.items()}, structure


OBJECTIVE = {
    "advantage": "batch_std", "advantage_scale": "batch", "advantage_clip": 1.5, "positive_only": False,
    "kl_weight": 0.3, "kl_in_reward": 0.1, "importance_cap": 1.2, "entropy_target": 3.0, "entropy_bonus": 0.2,
    "talk_reduction": "log_mean_exp", "positions": "random", "positions_per_sequence": 6,
}  # fmt: skip


def config(mesh: MeshConfig, thought: dict[str, Any] | None = None, **model: Any) -> Config:
    return Config(
        model=ModelConfig(architecture=ARCHITECTURE, **model), phases=(PHASE,), mesh=mesh,
        data=DataConfig(sequence_length=LENGTH),
        thought=ThoughtConfig(embedding_scale=7.0, positions_per_chunk=2, **thought or {}),
    )  # fmt: skip


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 100, (ROWS, LENGTH)).astype(np.int32)
    mask, second = (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (ROWS, 1)) for _ in range(2))
    return {
        "tokens": tokens,
        "mask": mask,
        "starts": np.where(second, 0, second.sum(axis=1, keepdims=True)).astype(np.int32),
    }


def step_on(config: Config, devices: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, first Adam moments, which are the gradients) after one step."""
    params, structure = with_random(config)
    with jax.set_mesh(mesh := make_mesh(config.mesh, ARCHITECTURE, devices)):
        state = initial_state(params, config, objective=True)
        if state.reference is not None:  # a divergence from equal weights would be 0, or rounding
            other = jax.device_get(split(random_model(ARCHITECTURE, 7.0, seed=5, heads=config.thought.heads))[0])
            adapters = {name: 0.5 * value for name, value in state.reference.items()}
            state = state._replace(reference=adapters if state.frozen else other)
        state = jax.device_put(state, on_mesh(mesh, state_specs(state, structure)))
        step = compile_train_step(config, PHASE, structure, VOCABULARY, state)
        state, metrics = step(state, to_device(rows()), jax.random.key(1), np.int32(0))
        metrics = {name: value for name, value in metrics.items() if not name.startswith("entropy_p")}
        if state.entropy_bonus is not None:
            metrics["next_entropy_bonus"] = state.entropy_bonus
        return jax.device_get((metrics, state.opt_state[1].mu))


def score_policy(settings: ThoughtSettings, params: Any, batch: Batch, _: Any, __: Any, among: Any) -> TokenScores:
    """Scores with sampled thoughts at so few positions that the last chunks of all rows are empty."""
    size, key = batch.tokens.shape, jax.random.key(4)  # padding to the mesh changes the number of rows, not the draws
    places = jnp.broadcast_to(jnp.arange(size[1]), size)
    thinking = Thinking(parse_policy("random:0.25"), places, jax.random.uniform(key, (ROWS, LENGTH))[: size[0]], among)
    uniforms = draw_uniforms(key, (ROWS, 2, LENGTH, settings.thought_length))
    uniforms = jax.tree.map(lambda x: x[: size[0]], uniforms)
    where = jnp.arange(size[1] - 1)
    return score_tokens(merge(STRUCTURE, params), *batch, where, uniforms, settings, greedy=0, thinking=thinking)


def scores_on(config: Config, devices: list[Any], kind: str = "scores") -> Any:
    """Scores after sampled thoughts, of a number of rows that no mesh divides."""
    with jax.set_mesh(mesh := make_mesh(config.mesh, ARCHITECTURE, devices)):
        params = jax.device_put(PARAMS, on_mesh(mesh, state_specs(PARAMS, STRUCTURE)))
        settings = evaluation_settings(config, VOCABULARY)
        scorer = make_token_scorer(STRUCTURE, settings)
        given = {name: value[:7] for name, value in rows().items()}
        if kind == "policy":
            given[AMONG] = np.tile(np.arange(LENGTH) % 5 != 1, (7, 1))
            scorer = jax.jit(functools.partial(score_policy, dataclasses.replace(settings, reach=2, tokens_ahead=2)))
        return score_batches(scorer, params, [given], jax.random.key(2))


def function(kind: str) -> Any:
    return functools.partial(scores_on, kind=kind) if kind in SCORES else step_on


def thought(kind: str) -> dict[str, Any]:
    kinds = {"objective": OBJECTIVE, "adapters": OBJECTIVE, "gate": {"gate": True, "gate_prices": (-0.1, 0.2)}}
    kinds["policy"] = {"mixing": "probabilities", "end": "token"}
    kinds["ends"] = OBJECTIVE | {"end": "sampled", "length_penalty": 0.1}
    return kinds.get(kind, {})


def model(kind: str) -> dict[str, Any]:
    adapted = {"adapters": ADAPTERS, "checkpoint": "the base", "frozen_dtype": "float32", "rematerialize": True}
    return adapted if kind == "adapters" else {}


def named(scores: TokenScores) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(scores)}


@functools.cache
def alone(kind: str, **settings: Any) -> Any:
    return function(kind)(config(MeshConfig(), thought(kind), **settings), jax.devices()[:1])


def compare(kind: str, shape: str, **settings: Any) -> None:
    sizes = dict(zip(("data", "fsdp", "tensor", "position"), map(int, shape.split(",")), strict=True))
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    tolerance = 2e-2 if settings else 1e-5 if kind in ("step", "gate", *SCORES) else 1e-4
    settings |= model(kind)
    spread = config(MeshConfig(**sizes), thought(kind), **settings)
    if kind not in SCORES:
        (metrics, gradients), (wanted, wanted_gradients) = step_on(spread, devices), alone(kind, **settings)
        assert ("end_head.weight" in wanted_gradients) == ("empty_thought_rate" in wanted) == (kind == "ends")
        assert ("gate.weight" in wanted_gradients) == ("gate_loss" in wanted) == (kind == "gate")
        wrong = worst_errors(metrics, wanted, tolerance) | worst_errors(gradients, wanted_gradients, 10 * tolerance)
    else:
        found, wanted = scores_on(spread, devices, kind), alone(kind, **settings)
        assert len(np.unique(wanted.thoughts)) > (10 if kind == "policy" else 20)
        assert wanted.made is None or 0.1 < wanted.made.mean() < 0.4
        wrong = worst_errors(named(found), named(wanted), tolerance)
        wrong |= {"thoughts": 1.0} if not np.array_equal(found.thoughts, wanted.thoughts) else {}
    assert not wrong, f"mesh {sizes}: {wrong}"
    print(shape, "equal", flush=True)


if __name__ == "__main__":
    text.LOGITS_BYTES = 1  # one row at a time
    prefix_xla.KEY_BLOCK, score.TOKEN_BLOCK = 3, 1  # chains of 5 tokens have two blocks, and logits are of one token
    for shape in sys.argv[2:]:
        compare(sys.argv[1], shape)
