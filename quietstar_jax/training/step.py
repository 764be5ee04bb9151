"""One optimizer step as one compiled function: draw random numbers, think, talk, learn, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.models.adapters import learns
from quietstar_jax.models.parameters import GraphDef, is_gate, stored_dtype
from quietstar_jax.parallel.axes import (
    constrain_tree,
    manual_shard_map,
    merge_microbatches,
    split_microbatches,
)
from quietstar_jax.parallel.sharding import specs_like_parameters
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.diagnostics import histogram_quantiles
from quietstar_jax.thoughts.ending import length_figures
from quietstar_jax.thoughts.loss import (
    Metrics,
    Rewarded,
)
from quietstar_jax.thoughts.model import mean_embedding
from quietstar_jax.thoughts.objective import adapted_entropy_bonus, count_targets, with_batch_std
from quietstar_jax.thoughts.positions import count_chosen
from quietstar_jax.thoughts.settings import Vocabulary, phase_settings
from quietstar_jax.training.batch import Batch, draw
from quietstar_jax.training.batch_loss import BatchLoss, Rows, Shared
from quietstar_jax.training.optimizer import apply_updates, learning_rate, make_optimizer

TrainStep = Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def initial_state(weights: dict[str, jax.Array], config: Config, *, objective: bool = False) -> TrainState:
    """Returns the state at step 0 with these weights, of which those that never learn are stored in `frozen_dtype`.

    Args:
      weights: all weights by dotted path.
      objective: also with the state of the objective, as when the first phase that trains thoughts begins.
    """
    params = {name: value for name, value in weights.items() if learns(name, config.model.adapters)}
    frozen = {
        name: value.astype(stored_dtype(name, config.model.frozen_dtype))
        for name, value in weights.items()
        if name not in params
    }
    state = TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.optimizer).init(params), frozen=frozen)
    return state._replace(**objective_state(params, config)) if objective else state


def objective_state(params: dict[str, jax.Array], config: Config) -> dict[str, Any]:
    """Returns the fields `entropy_bonus` and `reference` when the first phase that trains thoughts begins."""
    thought = config.thought
    compared = {name: x for name, x in params.items() if not (name.startswith("mixing_head.") or is_gate(name))}
    return {
        "entropy_bonus": jnp.float32(thought.entropy_bonus) if thought.entropy_target else None,
        "reference": jax.tree.map(jnp.copy, compared) if thought.needs_reference else None,
    }


def make_train_step(
    config: Config, phase: Phase, graphdef: GraphDef, vocabulary: Vocabulary, row_numbers: np.ndarray | None = None
) -> TrainStep:
    """Returns the step of a phase: `(state, batch, key, first step of the phase) -> (state, metrics)`.

    The step is a pure function, not yet compiled. The key is that of the run: each step folds in its number. Until the
    first phase with thoughts, the start and end embeddings are recomputed from the token embeddings after each step,
    unless the run began with trained ones.

    Args:
      row_numbers: [B], for each row the number of its sequence in the batch, so that thoughts do not depend on which
        process reads which sequence; None = in order.
    """
    until_now = [p.name for p in config.phases].index(phase.name) + 1
    never_thought = bool(vocabulary.start_tokens) and not any(p.thought_length for p in config.phases[:until_now])
    embeddings_follow = never_thought and learns("decoder.embedding", config.model.adapters)
    settings = phase_settings(config, phase, vocabulary)
    optimizer = make_optimizer(config.optimizer)
    axes = graphdef.axes_by_name
    objective = BatchLoss(graphdef, settings, phase.rates)

    def gradients_of_rows(psum: Any, params: Any, rows: Rows, shared: Shared) -> tuple[Any, Metrics]:
        """Gradients and metrics of one shard of the data axis, summed over all shards at the end."""
        gradient = jax.grad(objective.loss, has_aux=True)
        gradients, metrics = accumulate(lambda part: gradient(params, part, shared), rows, phase.microbatches)
        return psum((constrain_tree(gradients, {name: axes[name] for name in gradients}), metrics), "data")

    def rewards_of_rows(_: Any, params: Any, rows: Rows, shared: Shared) -> Rewarded:
        """Thoughts and rewards of one shard of the data axis."""
        return map_microbatches(lambda part: objective.rewards(params, part, shared), rows, phase.microbatches)

    def step(state: TrainState, batch: Batch, key: jax.Array, phase_start: jax.Array) -> tuple[TrainState, Metrics]:
        draws = draw(jax.random.fold_in(key, state.step), batch.tokens.shape, settings, row_numbers)
        some = settings.config.positions != "all"
        chosen = count_chosen(*batch[:2], draws.positions, settings, batch.starts) if some else None
        counts = count_targets(batch.mask, phase.tokens_ahead, chosen, batch.starts)
        rows, bonus = Rows(batch, draws), state.entropy_bonus
        shared = Shared(counts, bonus, state.reference, state.frozen)
        if settings.needs_batch_rewards:
            all_rewards = manual_shard_map(rewards_of_rows, ("data",), ((), ("rows",), ()), ("rows",))
            rewarded = all_rewards(state.params, rows, shared)
            rows = rows._replace(thoughts=rewarded.thoughts, positions=rewarded.positions)
            counts = with_batch_std(counts, rewarded.rewards, rewarded.scored, config.thought.advantage)
            shared = shared._replace(counts=counts)
        all_gradients = manual_shard_map(gradients_of_rows, ("data",), ((), ("rows",), ()), ())
        gradients, metrics = all_gradients(state.params, rows, shared)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = learning_rate(phase, state.step - phase_start)
        params = apply_updates(state.params, updates, rate, phase.rates)
        if embeddings_follow:
            params |= initial_thought_embeddings(params, vocabulary, config.thought.embedding_scale)
        if "entropy_histogram" in metrics:
            metrics |= histogram_quantiles(metrics.pop("entropy_histogram"), len(state.weights["decoder.embedding"]))
        if "length_histogram" in metrics:
            metrics |= length_figures(metrics.pop("length_histogram"))
        if bonus is not None and "policy_entropy" in metrics:
            metrics["entropy_bonus"] = bonus
            bonus = adapted_entropy_bonus(
                bonus, metrics["policy_entropy"], target=config.thought.entropy_target,
                step=config.thought.entropy_bonus_step, largest=config.thought.entropy_bonus_max,
            )  # fmt: skip
        metrics |= {
            # Without the gate, which is clipped apart: as in a run without it.
            "gradient_norm": optax.tree.norm({name: x for name, x in gradients.items() if not is_gate(name)}),
            "parameter_norm": optax.tree.norm(params),  # of the new weights: not finite if they have diverged
            "learning_rate": rate,
        }
        return TrainState(state.step + 1, params, opt_state, bonus, state.reference, state.frozen), metrics

    return step


def state_specs(state: TrainState, graphdef: GraphDef) -> TrainState:
    """Returns the sharding of a training state, or of its shapes, as a tree of `PartitionSpec`."""
    return specs_like_parameters(state, graphdef.axes_by_name)


def compile_train_step(
    config: Config, phase: Phase, graphdef: GraphDef, vocabulary: Vocabulary, state: TrainState,
    row_numbers: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """Returns `make_train_step` under `jax.jit`, sharded over the mesh of the context; the input state is donated.

    Args:
      state: a training state, or its shapes.
    """
    step = make_train_step(config, phase, graphdef, vocabulary, row_numbers)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_specs(state, graphdef), PartitionSpec()))


def initial_thought_embeddings(
    params: Mapping[str, jax.Array], vocabulary: Vocabulary, embedding_scale: float
) -> dict[str, jax.Array]:
    """Returns the initial start and end embeddings: means of the embeddings of their tokens, divided by the scale."""
    embedding = params["decoder.embedding"]
    return {
        "start_embedding": mean_embedding(embedding, vocabulary.start_tokens, embedding_scale),
        "end_embedding": mean_embedding(embedding, vocabulary.end_tokens, embedding_scale),
    }


def accumulate(fn: Callable[[Any], Any], batch: Any, pieces: int) -> Any:
    """Returns the sum of `fn` over `pieces` equal parts of the batch [B, ...], with one part in memory at a time."""
    if pieces == 1:
        return fn(batch)
    parts = jax.tree.map(lambda x: split_microbatches(x, pieces), batch)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None), zeros, parts)[0]


def map_microbatches(fn: Callable[[Any], Any], batch: Any, pieces: int) -> Any:
    """Returns `fn` of `pieces` equal parts of the batch [B, ...], one after the other, joined along the batch axis."""
    if pieces == 1:
        return fn(batch)
    mapped = jax.lax.map(fn, jax.tree.map(lambda x: split_microbatches(x, pieces), batch))
    return jax.tree.map(merge_microbatches, mapped)
