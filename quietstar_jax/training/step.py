"""One optimizer step as one compiled function: draw random numbers, think, talk, learn, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config, Phase
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.parallel.axes import (
    constrain,
    constrain_tree,
    manual_shard_map,
    merge_microbatches,
    split_microbatches,
)
from quietstar_jax.parallel.sharding import shard_batch, specs_like_parameters
from quietstar_jax.thoughts.chunks import max_positions_per_chunk, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.controls import Uniforms, draw_uniforms, sample_or_control
from quietstar_jax.thoughts.diagnostics import histogram_quantiles
from quietstar_jax.thoughts.loss import (
    Metrics,
    Rewarded,
    Think,
    language_model_loss,
    quiet_star_loss,
    reward_thoughts,
)
from quietstar_jax.thoughts.model import QuietStar, mean_embedding
from quietstar_jax.thoughts.objective import Counts, adapted_entropy_bonus, count_targets, with_batch_std
from quietstar_jax.thoughts.positions import Choose, at_positions, choose, count_chosen
from quietstar_jax.thoughts.reference import reference_log_probs
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary
from quietstar_jax.thoughts.text import Text
from quietstar_jax.training.optimizer import apply_updates, learning_rate, make_optimizer, rate_scale


class Batch(NamedTuple):
    """A batch of token sequences.

    Attributes:
      tokens: [B, L] int32.
      mask: [B, L] bool, True for real tokens, False for padding.
      starts: [B, L] int32, for each token the index of the first token of its document; None if each row is one
        document, or if the documents of a row attend to each other.
    """

    tokens: jax.Array
    mask: jax.Array
    starts: jax.Array | None = None


class Draws(NamedTuple):
    """The random numbers of one step, uniform in [0, 1). A microbatch or a device uses the rows of its sequences.

    Attributes:
      thoughts: random numbers for thoughts at all L positions.
      positions: [B, L], for choosing the positions that think.
    """

    thoughts: Uniforms
    positions: jax.Array


def draw(
    key: jax.Array, shape: tuple[int, ...], settings: ThoughtSettings, row_numbers: np.ndarray | None = None
) -> Draws:
    """Returns the random numbers of a step for tokens of shape [B, L].

    Args:
      row_numbers: [B], for each row the number of its sequence in the batch, which selects its draws; None = in order.
    """
    batch, length = shape
    thoughts = draw_uniforms(key, (batch, settings.num_thoughts, length, settings.thought_length))
    draws = Draws(thoughts, jax.random.uniform(jax.random.fold_in(key, 0), (batch, length)))
    if row_numbers is not None:
        draws = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim)[row_numbers], draws)
    return jax.tree.map(lambda x: constrain(x, "batch", ...), draws)


def to_device(rows: Mapping[str, np.ndarray]) -> Batch:
    """Moves a complete batch of the data pipeline to the device, or shards it over the mesh."""
    return Batch(**jax.tree.map(shard_batch, dict(rows)))


class Shared(NamedTuple):
    """What all sequences of a step share; see `quiet_star_loss` and `TrainState`."""

    counts: Counts
    entropy_bonus: jax.Array | None
    reference: dict[str, jax.Array] | None


TrainStep = Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def thought_settings(config: Config, vocabulary: Vocabulary, **shape: Any) -> ThoughtSettings:
    """Returns `ThoughtSettings` from the settings that all thoughts of a run share, and from the fields in `shape`."""
    return ThoughtSettings(
        meta_tokens=(*vocabulary.meta_tokens, *vocabulary.unused),
        pad_id=vocabulary.pad_id,
        pause_id=vocabulary.pause_id,
        compute_dtype=config.model.compute_dtype,
        prefix_attention=config.model.prefix_attention,
        config=config.thought,
        **shape,
    )


def phase_settings(config: Config, phase: Phase, vocabulary: Vocabulary) -> ThoughtSettings:
    """Returns the thought settings of one phase."""
    until_now = config.phases[: [item.name for item in config.phases].index(phase.name) + 1]
    return thought_settings(
        config,
        vocabulary,
        thought_length=phase.thought_length,
        num_thoughts=phase.num_thoughts,
        tokens_ahead=phase.tokens_ahead,
        policy_weight=phase.policy_weight,
        distill_weight=phase.distill_weight,
        longest_thought=max(item.thought_length for item in until_now),
        rematerialize=config.model.rematerialize,
    )


def initial_state(params: dict[str, jax.Array], config: Config) -> TrainState:
    """Returns the state at step 0 with these weights, which are also the reference if one is needed."""
    thought = config.thought
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optimizer).init(params),
        entropy_bonus=jnp.float32(thought.entropy_bonus) if thought.entropy_target else None,
        reference=jax.tree.map(jnp.copy, params) if thought.needs_reference else None,
    )


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
    settings = phase_settings(config, phase, vocabulary)
    optimizer = make_optimizer(config.optimizer)
    axes = graphdef.axes_by_name
    some = config.thought.positions != "all"

    def chunks(model: QuietStar, batch: Batch) -> tuple[int, int]:
        sizes: tuple[Any, ...] = (model.decoder.architecture, settings, *batch.tokens.shape)
        return max_positions_per_chunk(*sizes), max_sampled_positions_per_chunk(*sizes)

    def choose_there(draws: Draws) -> Choose:
        return lambda text: choose(text, draws.positions, settings)

    def think_there(batch: Batch, draws: Draws, reference: Any) -> Think:
        def think(model: QuietStar, text: Text, positions: jax.Array) -> Thoughts:
            scored, sampled = chunks(model, batch)
            uniforms = jax.tree.map(lambda x: at_positions(x, positions), draws.thoughts)
            thoughts = sample_or_control(model, text, positions, uniforms, settings, sampled)
            if reference is None or not settings.reinforced:
                return thoughts
            model = merge(graphdef, reference)
            log_probs = reference_log_probs(model, text, positions, thoughts.tokens, settings, scored)
            return thoughts._replace(reference_log_probs=log_probs)

        return think

    def loss(params: Any, piece: tuple[Batch, Draws, Thoughts | None], shared: Shared) -> tuple[jax.Array, Metrics]:
        (batch, draws, thoughts), model = piece, merge(graphdef, params)
        if not phase.thought_length:
            return language_model_loss(model, batch.tokens, batch.mask, shared.counts, settings, batch.starts)
        return quiet_star_loss(
            model, batch.tokens, batch.mask,
            think_there(batch, draws, shared.reference) if thoughts is None else lambda *_: thoughts,
            shared.counts, settings, chunks(model, batch)[0],
            starts=batch.starts,
            choose=choose_there(draws),
            frozen=lambda name: not rate_scale(name, phase.rates),
            entropy_bonus=shared.entropy_bonus,
        )  # fmt: skip

    def own_rows(psum: Any, params: Any, rows: Any, shared: Shared) -> tuple[Any, Metrics]:
        """Gradients and metrics of one shard of the data axis, summed over all shards at the end."""
        gradient = jax.grad(loss, has_aux=True)
        gradients, metrics = accumulate(lambda piece: gradient(params, piece, shared), rows, phase.microbatches)
        return psum((constrain_tree(gradients, axes), metrics), "data")

    def own_rewards(_: Any, params: Any, rows: tuple[Batch, Draws], reference: Any) -> Rewarded:
        """Thoughts and rewards of one shard of the data axis."""
        model = merge(graphdef, params)

        def reward(piece: tuple[Batch, Draws]) -> Rewarded:
            batch, draws = piece
            return reward_thoughts(
                model, batch.tokens, batch.mask, think_there(batch, draws, reference), settings,
                chunks(model, batch)[0], starts=batch.starts, choose=choose_there(draws),
            )  # fmt: skip

        return map_microbatches(reward, rows, phase.microbatches)

    def step(state: TrainState, batch: Batch, key: jax.Array, phase_start: jax.Array) -> tuple[TrainState, Metrics]:
        draws = draw(jax.random.fold_in(key, state.step), batch.tokens.shape, settings, row_numbers)
        chosen = count_chosen(batch.mask, draws.positions, settings, batch.starts) if some else None
        counts = count_targets(batch.mask, phase.tokens_ahead, chosen, batch.starts)
        thoughts, bonus = None, state.entropy_bonus
        if settings.reinforced and config.thought.needs_batch_rewards:
            rewarded = manual_shard_map(own_rewards, ("data",), ((), ("rows",), ()), ("rows",))(
                state.params, (batch, draws), state.reference
            )
            thoughts = rewarded.thoughts
            counts = with_batch_std(counts, rewarded.rewards, rewarded.scored, config.thought.advantage)
        gradients, metrics = manual_shard_map(own_rows, ("data",), ((), ("rows",), ()), ())(
            state.params, (batch, draws, thoughts), Shared(counts, bonus, state.reference)
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = learning_rate(phase, state.step - phase_start)
        params = apply_updates(state.params, updates, rate, phase.rates)
        if never_thought:
            params |= initial_thought_embeddings(params, vocabulary, config.thought.embedding_scale)
        if "entropy_histogram" in metrics:
            metrics |= histogram_quantiles(metrics.pop("entropy_histogram"), len(params["decoder.embedding"]))
        if bonus is not None and "policy_entropy" in metrics:
            metrics["entropy_bonus"] = bonus
            bonus = adapted_entropy_bonus(
                bonus, metrics["policy_entropy"], target=config.thought.entropy_target,
                step=config.thought.entropy_bonus_step, largest=config.thought.entropy_bonus_max,
            )  # fmt: skip
        metrics |= {
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),  # of the new weights: not finite if they have diverged
            "learning_rate": rate,
        }
        return TrainState(state.step + 1, params, opt_state, bonus, state.reference), metrics

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
