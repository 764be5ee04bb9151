"""Turns a checked configuration into the inputs of the loop: tokenizer, model structure, vocabulary, weights."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from quietstar_jax.architecture import NO_ADAPTERS, Adapters, Architecture
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.data.pipeline import check_vocabulary
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.data.vocabulary import UNUSED, matching_ids, unused_ids
from quietstar_jax.errors import ConfigError
from quietstar_jax.hf.adapter import AdapterFiles, open_adapter
from quietstar_jax.models.adapters import is_adapter
from quietstar_jax.models.decoder import base_pass
from quietstar_jax.models.parameters import GraphDef, merge, split
from quietstar_jax.parallel.mesh import check_batches, check_kernels, make_mesh
from quietstar_jax.parallel.sharding import on_mesh
from quietstar_jax.settings import from_mapping, to_mapping
from quietstar_jax.thoughts.mixing import centered_bias
from quietstar_jax.thoughts.model import abstract_params, init_quiet_star
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.base import (
    base_architecture,
    base_vocabulary,
    base_weights,
    check_base,
    has_thought,
    load_base,
    open_base,
    open_base_again,
)
from quietstar_jax.training.base_record import Base, RecordedBase, adapter_record, base_record
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.resume import resumed_tokenizer, same_adapters, same_base, tokenizer_source
from quietstar_jax.training.step import accumulate, initial_state, objective_state, state_specs

NOT_RECORDED = ("unused", "preferred")  # fields of `Vocabulary`; `unused` has another name in the record


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run, before its first step or before it resumes."""

    config: Config
    tokenizer: Tokenizer
    architecture: Architecture
    graphdef: GraphDef
    vocabulary: Vocabulary
    key: jax.Array
    mesh: Mesh  # all devices; the context in which all functions are compiled (`jax.set_mesh`)
    base: Base | None  # the weights to start from; None also if a resumed run does not need them
    base_record: Mapping[str, Any]

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The data that a checkpoint stores in addition to its arrays, enough to use it without the original model."""
        return {
            "config": to_mapping(self.config),
            "architecture": to_mapping(self.architecture),
            "vocabulary": {name: ids for name, ids in self.vocabulary._asdict().items() if name not in NOT_RECORDED},
            "unused_ids": self.vocabulary.unused,
            "tokenizer": self.tokenizer.fingerprint(),
            **self.base_record,
        }


def prepare(config: Config, saved: Mapping[str, Any] | None = None) -> Run:
    """Loads the tokenizer, determines the architecture, makes the mesh, and checks that they fit together.

    Args:
      saved: `Run.record` in the work directory. With it, the base is opened only if the configuration names another.

    Raises:
      ConfigError, DataError, CheckpointError: the parts do not fit together; raised before any weight is read.
    """
    frozen = config.model.adapters.maps != "none"  # whether weights of the base must be read again on resume
    if saved and frozen and same_adapters(saved, config):
        known = (saved["model_commit"], saved.get("base_folder", "")) if same_base(saved, config) else ()
        base: Base | None = open_base_again(RecordedBase(config.model, saved["base"], *known), config.workdir)
        record = base_record(base) | {"base": saved["base"]}  # just compared: all bytes of the base have been read
    else:
        base = None if saved and same_base(saved, config) else open_base(config.model)
        record = base_record(base, frozen=frozen)
    if saved and base is None:
        record = {name: saved[name] for name in record if name in saved}
    if saved and config.model.checkpoint:
        architecture = from_mapping(Architecture, saved["architecture"], root="architecture")
    else:
        architecture = base_architecture(base) if base else config.model.architecture
    tokenizer = resumed_tokenizer(config, saved) if saved else load_tokenizer(*tokenizer_source(config))
    if not config.model.checkpoint:
        check_vocabulary(tokenizer, architecture.vocab_size)
    tokenizer = tokenizer.within(architecture.vocab_size)
    check_length(config, architecture)
    meta = (tokenizer.token_id(config.thought.start_token), tokenizer.token_id(config.thought.end_token))
    learned = not saved["vocabulary"]["start_tokens"] if saved else has_thought(base)
    if not saved:
        named_adapter(config, architecture)
        check_base(base, config, tokenizer, meta)
    record["adapter"] = adapter_record(config.model, saved)
    start_tokens = _embedding_tokens(tokenizer, config.thought.initial_start_token, "initial_start_token")
    end_tokens = _embedding_tokens(tokenizer, config.thought.initial_end_token, "initial_end_token")
    if config.thought.positions == "start":
        _only_token(start_tokens, "thought.positions", config)
    if config.evaluation.policy.needs_start:
        _only_token(start_tokens, "evaluation.think", config)
    mesh = make_mesh(config.mesh, architecture)
    check_batches(config, mesh)
    check_kernels(config.model.prefix_attention, mesh.devices.flat[0])
    return Run(
        config=config,
        tokenizer=tokenizer,
        architecture=architecture,
        graphdef=abstract_structure(architecture, config.model.adapters, config.thought.heads),
        vocabulary=Vocabulary(
            pad_id=tokenizer.pad_id,
            meta_tokens=tuple(token for token in meta if token is not None),
            start_tokens=() if learned else start_tokens,
            end_tokens=() if learned else end_tokens,
            pause_id=start_tokens[0],
            unused=unused_ids(
                tokenizer,
                architecture.vocab_size,
                {UNUSED: saved.get("unused_ids", [])} if saved else base_vocabulary(base),
            ),
            end_token=_only_token(end_tokens, "thought.end", config) if config.thought.end == "token" else None,
            start_token=start_tokens[0] if len(start_tokens) == 1 else None,
            preferred=_preferred_tokens(tokenizer, config.thought.position_pattern),
        ),
        key=jax.random.key(config.seed),
        mesh=mesh,
        base=base,
        base_record=record,
    )


def abstract_structure(
    architecture: Architecture, adapters: Adapters = NO_ADAPTERS, heads: Sequence[str] = ()
) -> GraphDef:
    """Returns the graph definition of the model with this architecture."""
    return abstract_params(architecture, adapters, heads)[1]


def abstract_state(config: Config, architecture: Architecture, mesh: Mesh, step: int = 0) -> TrainState:
    """Returns shapes, dtypes and shardings of the training state after a step.

    A checkpoint of this step and of any mesh can be restored into it.
    """
    params, graphdef = abstract_params(architecture, config.model.adapters, config.thought.heads)
    begun = config.policy_start is not None and step > config.policy_start
    state = jax.eval_shape(lambda params: initial_state(params, config, objective=begun), params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        on_mesh(mesh, state_specs(state, graphdef)),
    )


def first_state(run: Run) -> TrainState:
    """Returns the state at step 0, with the weights of the base (also its thought weights, if any) or random ones."""
    vocabulary, scale = run.vocabulary, run.config.thought.embedding_scale
    key = jax.random.fold_in(run.key, jnp.iinfo(jnp.int32).max)  # a number that no step folds in
    abstract = abstract_state(run.config, run.architecture, run.mesh).weights
    layout = {name: value.sharding for name, value in abstract.items()}
    base = run.base or open_base(run.config.model)
    if base:
        others: Any = {name: value for name, value in abstract.items() if not is_adapter(name)}
        weights = load_base(base, run.architecture, run.config, vocabulary, key, others)
        return start_optimizer(run, weights | first_adapters(run, layout))
    meta = (vocabulary.start_tokens, vocabulary.end_tokens, scale)
    init = functools.partial(init_quiet_star, run.architecture, *meta, heads=run.config.thought.heads)
    make = jax.jit(lambda key: split(init(key))[0], out_shardings=layout)
    return start_optimizer(run, make(key))


def first_adapters(run: Run, layout: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """Returns the weights of the adapters at step 0, in these shardings: without effect, or from `model.adapter`."""
    names = [name for name in layout if is_adapter(name)]

    def make(key: jax.Array) -> dict[str, jax.Array]:
        model = init_quiet_star(run.architecture, [0], [0], 1.0, key, run.config.model.adapters)
        params, _ = split(model)
        return {name: params[name] for name in names}

    key = jax.random.fold_in(run.key, jnp.iinfo(jnp.int32).max - 1)  # a number that no step folds in
    if not names:
        return {}
    first = jax.jit(make, out_shardings={name: layout[name] for name in names})(key)
    return first | (opened.load(layout) if (opened := named_adapter(run.config, run.architecture)) else {})


def named_adapter(config: Config, architecture: Architecture) -> AdapterFiles | None:
    """Opens the adapter that `config.model.adapter` names; None if it names none.

    Raises:
      CheckpointError, ConfigError: it cannot be used with these settings.
    """
    model = config.model
    return open_adapter(Path(model.adapter).expanduser(), architecture, model.adapters) if model.adapter else None


def frozen_weights(run: Run) -> dict[str, jax.Array]:
    """Returns the weights that adapters freeze, which checkpoints lack."""
    abstract: Any = abstract_state(run.config, run.architecture, run.mesh).frozen
    if not abstract:
        return {}
    assert run.base is not None
    return base_weights(run.base, run.architecture, abstract)


def start_optimizer(run: Run, params: dict[str, jax.Array]) -> TrainState:
    """Returns the state at step 0 with these weights, which are donated, and new Adam moments."""
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(run.config, run.architecture, run.mesh))
    start = jax.jit(lambda params: initial_state(params, run.config), out_shardings=layout, donate_argnums=0)
    return start(params)


def begin_objective(run: Run, state: TrainState) -> TrainState:
    """Returns the state at the beginning of the first phase that trains thoughts; see `objective_state`."""
    layout = abstract_state(run.config, run.architecture, run.mesh, int(state.step) + 1)
    shardings = jax.tree.map(
        lambda x: x.sharding, {"entropy_bonus": layout.entropy_bonus, "reference": layout.reference}
    )
    return state._replace(**jax.jit(lambda x: objective_state(x, run.config), out_shardings=shardings)(state.params))


def center_mixing_head(run: Run, state: TrainState, batch: Batch, microbatches: int = 1) -> TrainState:
    """Returns the state with the mixing head centred on the mean hidden state of a batch, unless it has learned.

    Args:
      microbatches: how many parts of the batch are read one after the other.
    """
    dtype = jnp.dtype(run.config.model.compute_dtype)

    def centered(weights: dict[str, jax.Array], batch: Batch) -> jax.Array:
        quiet_star = merge(run.graphdef, weights)

        def total(part: Batch) -> jax.Array:
            hidden, _, _ = base_pass(quiet_star.decoder, *part, dtype=dtype)
            return jnp.where(part.mask[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=(0, 1))

        mean, head = accumulate(total, batch, microbatches) / batch.mask.sum(), quiet_star.mixing_head
        return jnp.where(jnp.any(head.out[...]), head.in_bias[...], centered_bias(head, mean))

    name = "mixing_head.in_bias"
    make = jax.jit(centered, out_shardings=state.params[name].sharding)
    return state._replace(params=state.params | {name: make(state.weights, batch)})


def check_length(config: Config, architecture: Architecture) -> None:
    """Raises ConfigError if a thought would exceed the maximum number of positions of the model."""
    thinking = [(phase.thought_length, phase.tokens_ahead) for phase in config.phases]
    thinking.append((config.evaluation_thought_length, config.evaluation.scored_ahead))
    longest = max(length + ahead + 1 if length else 0 for length, ahead in thinking)
    needed = config.data.sequence_length + longest
    if needed > architecture.max_positions:
        raise ConfigError(
            f"config.data.sequence_length is {config.data.sequence_length}; with thoughts that is {needed} positions, "
            f"but the model has {architecture.max_positions}. Shorten the sequences or the thoughts."
        )


def _only_token(tokens: tuple[int, ...], setting: str, config: Config) -> int:
    """Returns the single token of `initial_end_token` (setting `thought.end`) or `initial_start_token` (others)."""
    name = "initial_end_token" if setting == "thought.end" else "initial_start_token"
    if len(tokens) > 1:
        raise ConfigError(
            f"config.thought.{name} is {getattr(config.thought, name)!r}, which is {len(tokens)} tokens of the "
            f"tokenizer. Where config.{setting} is {operator.attrgetter(setting)(config)!r}, it must be one."
        )
    return tokens[0]


def _preferred_tokens(tokenizer: Tokenizer, pattern: str) -> tuple[int, ...]:
    if not pattern:
        return ()
    found = matching_ids(tokenizer, pattern, tokenizer.vocab_size)
    if not found:
        raise ConfigError(
            f"config.thought.position_pattern is {pattern!r}, but no token of the tokenizer {tokenizer.name} matches "
            r"it. Choose a pattern that single tokens match, such as \d."
        )
    return found


def _embedding_tokens(tokenizer: Tokenizer, text: str, field: str) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode(text))
    if not tokens or tokenizer.unk_id in tokens:
        raise ConfigError(
            f"config.thought.{field} is {text!r}, which is not a token of the tokenizer {tokenizer.name}. "
            "Choose a text: the embeddings of its tokens initialize those of the start or end of a thought."
        )
    return tokens
