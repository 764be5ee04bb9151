"""The base of a run (`config.model.checkpoint`): initial weights from a Hugging Face model or from another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint, named_run, open_run, run_tokenizer
from quietstar_jax.config import Config, ModelConfig
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.vocabulary import UNUSED
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.load import build, load_parameters
from quietstar_jax.hf.names import HEADS, decoder_entries, quietstar_entries, thought_entries
from quietstar_jax.models.adapters import A, B, is_adapter, learns, merge_adapters
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.parameters import split, stored_dtype
from quietstar_jax.thoughts.model import abstract_params, init_quiet_star, initialize
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.base_record import Base, RecordedBase, base_record
from quietstar_jax.training.step import initial_thought_embeddings

PUBLISHED_SCALE, PUBLISHED_MIXING = 100.0, "hidden_states"  # for checkpoints whose config.json has no such fields

Abstract = Mapping[str, jax.ShapeDtypeStruct]


def open_base(model: ModelConfig, step: int | None = None) -> Base | None:
    """Opens the base of a run without reading weights; returns None if the run begins with random weights.

    Args:
      step: which checkpoint, if the base is a run; None = the newest.

    Raises:
      CheckpointError: the base is missing, incomplete or damaged.
    """
    if not model.checkpoint:
        return None
    if (run := named_run(model.checkpoint)) is None:
        return open_checkpoint(model.checkpoint, model.revision)
    if model.revision:
        raise CheckpointError(
            f"config.model.checkpoint {model.checkpoint} is a run and has no revision {model.revision!r}. "
            "Leave config.model.revision empty."
        )
    return open_run(run, step)


def base_architecture(base: Base) -> Architecture:
    """Returns the architecture of a base."""
    return base.architecture if isinstance(base, RunCheckpoint) else architecture_from_hf(base.config, base.folder)


def open_base_again(recorded: RecordedBase, owner: object) -> Base:
    """Opens the base of a run with adapters, whose checkpoints lack the frozen weights.

    Args:
      owner: the run, for messages.

    Raises:
      CheckpointError: the base is missing, or its files are not those that the adapters were trained on.
    """
    model, saved = recorded.model, recorded.content
    try:
        base = open_base(recorded.source, saved.get("step"))
        assert base is not None
        found = base_record(base, frozen=True)["base"]
    except (CheckpointError, DataError, OSError) as error:
        advice = "Put this folder, or a link to it, where it was."
        if "step" in saved:
            advice = (
                f"This base is a run, and the adapters need its checkpoint of step {saved['step']}, unchanged: restore "
                "it. A run that continues deletes its older checkpoints, unless its config.checkpoint.keep_every_steps "
                "or keep_phase_ends keeps them."
            )
        raise CheckpointError(
            f"The checkpoints of {owner} contain only the weights that learn; the others are read from its base, "
            f"config.model.checkpoint {model.checkpoint}, which cannot be opened: {error}\n{advice}"
        ) from error
    if found != saved:
        raise CheckpointError(
            f"The base {model.checkpoint} is not the one that the adapters of {owner} were trained on: its files have "
            f"{found['bytes']:,} bytes and the hash {found['content'][:16]}, but had {saved['bytes']:,} bytes and "
            f"the hash {saved['content'][:16]}. Restore these files, or set config.model.checkpoint to a copy of them."
        )
    return base


def base_vocabulary(base: Base | None) -> Mapping[str, Any]:
    """Returns a mapping like config.json that may list the ids that are not tokens."""
    if base is None:
        return {}
    return {UNUSED: base.vocabulary.unused} if isinstance(base, RunCheckpoint) else base.config


def has_thought(base: Base | None) -> bool:
    """Whether the mixing head and thought embeddings of a base are trained; a phase with thoughts trains those of a
    run."""
    if base is None:
        return False
    if isinstance(base, CheckpointFiles):
        return can_think(base)
    begun = [phase for phase, start, _ in base.config.phase_spans() if start < base.step]
    return not base.vocabulary.start_tokens or any(phase.thought_length for phase in begun)


def can_think(files: CheckpointFiles) -> bool:
    """Whether a checkpoint has the mixing head and thought embeddings of the published Quiet-STaR checkpoints."""
    return any(entry.name in files.tensors for entry in thought_entries(1))


def base_heads(base: Base) -> tuple[str, ...]:
    """Returns those of the `HEADS` that a base has."""
    return file_heads(base) if isinstance(base, CheckpointFiles) else base.config.thought.heads


def file_heads(files: CheckpointFiles) -> tuple[str, ...]:
    """Returns those of the `HEADS` that a checkpoint has."""
    return tuple(head for head, tensor in HEADS.items() if tensor in files.tensors)


def check_base(base: Base | None, config: Config, tokenizer: Tokenizer, meta: tuple[int | None, int | None]) -> None:
    """Checks that the tokenizer and the thoughts of a base fit the configuration.

    Args:
      meta: ids of the start and end tokens of a thought; None for a token that the tokenizer lacks.

    Raises:
      ConfigError: the base was trained with another tokenizer, or with other thoughts.
    """
    if isinstance(base, RunCheckpoint) and run_tokenizer(base).fingerprint() != tokenizer.fingerprint():
        raise ConfigError(
            f"config.data.tokenizer {config.data.tokenizer!r} is not the tokenizer of the run "
            f"{config.model.checkpoint}. Leave it empty: the run's own is then used."
        )
    if base is not None and has_thought(base):
        check_thoughts(base, config, meta)


def load_base(base: Base, architecture: Architecture, config: Config, vocabulary: Vocabulary, key: jax.Array,
              abstract: Abstract) -> dict[str, jax.Array]:  # fmt: skip
    """Returns all parameters of a run that begins from a base; parameters that the base lacks are initialised.

    Every process reads the files and keeps its own shards.

    Args:
      abstract: shapes, dtypes and shardings of all parameters except adapters.

    Raises:
      CheckpointError: a weight is missing or cannot be read.
    """
    scale = config.thought.embedding_scale
    lacking = tuple(f"{head}." for head in HEADS if head not in base_heads(base))
    new = {name: value for name, value in abstract.items() if name.startswith(lacking)}
    if new:
        others = {name: value for name, value in abstract.items() if name not in new}
        params = load_base(base, architecture, config, vocabulary, key, others)

        def make_heads(key: jax.Array) -> dict[str, jax.Array]:
            made, _ = split(init_quiet_star(architecture, [0], [0], scale, key, heads=tuple(HEADS)))
            return {name: made[name] for name in new}

        return params | jax.jit(make_heads, out_shardings={name: x.sharding for name, x in new.items()})(key)
    if isinstance(base, RunCheckpoint):
        params = base_weights(base, architecture, abstract)
        if vocabulary.start_tokens:  # the thought embeddings are not trained yet
            return params | initial_thought_embeddings(params, vocabulary, scale)
        return _rescaled(params, base.config.thought.embedding_scale, scale)
    if can_think(base):
        return _rescaled(base_weights(base, architecture, abstract), _scale_of(base), scale)
    names = [name for name in abstract if not name.startswith("decoder.")]
    params = base_weights(base, architecture, {name: x for name, x in abstract.items() if name not in names})

    def make(params: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        weights = {name.removeprefix("decoder."): value for name, value in params.items()}
        decoder = build(lambda: Decoder(architecture, nnx.Rngs(0)), weights)
        made, _ = split(initialize(decoder, vocabulary.start_tokens, vocabulary.end_tokens, scale, key))
        return {name: made[name] for name in names}

    return params | jax.jit(make, out_shardings={name: abstract[name].sharding for name in names})(params, key)


def base_weights(base: Base, architecture: Architecture, abstract: Abstract) -> dict[str, jax.Array]:
    """Returns parameters of a base as they are stored; adapters of a base that is a run are merged.

    Args:
      abstract: shapes, dtypes and shardings of the parameters to return.

    Raises:
      CheckpointError: a weight is missing or cannot be read.
    """
    shardings: Any = {name: value.sharding for name, value in abstract.items()}
    if isinstance(base, RunCheckpoint):
        adapters = base.config.model.adapters
        if adapters.maps == "none":
            return run_weights(base, abstract)
        needed, replicated = dict(abstract), _replicated(shardings)
        for name, value in abstract_params(architecture, adapters)[0].items():
            if is_adapter(name):
                weight = name.removesuffix(A).removesuffix(B)
                needed[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=replicated)
                needed[weight] = jax.ShapeDtypeStruct(  # rounded once, after the sum
                    abstract[weight].shape, value.dtype, sharding=abstract[weight].sharding
                )

        def merge(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
            merged = merge_adapters(params, adapters)
            return {name: merged[name].astype(value.dtype) for name, value in abstract.items()}

        return jax.jit(merge, out_shardings=shardings)(run_weights(base, needed))
    entries = decoder_entries(architecture, "decoder.")
    if can_think(base):
        entries = quietstar_entries(architecture, base_heads(base))
    dtypes: Any = {name: value.dtype for name, value in abstract.items()}
    return load_parameters(base, entries, shardings=shardings, dtypes=dtypes, only=abstract)


def run_weights(run: RunCheckpoint, abstract: Abstract) -> dict[str, jax.Array]:
    """Returns parameters of a run: from its checkpoint, and those that adapters freeze from its base.

    Args:
      abstract: shapes, dtypes and shardings of the parameters to return.

    Raises:
      CheckpointError: a weight cannot be read, or the base is missing or has changed.
    """
    model = run.config.model
    learned = {name: value for name, value in abstract.items() if learns(name, model.adapters)}
    params = run.parameters.restore(learned)
    if len(learned) == len(abstract):
        return params
    base = open_base_again(RecordedBase.of(run), run.workdir)
    # Rounded to the dtype in which they were frozen, if this is narrower than the requested one.
    rounded = {
        name: jax.ShapeDtypeStruct(
            value.shape,
            min(value.dtype, jnp.dtype(stored_dtype(name, model.frozen_dtype)), key=lambda dtype: dtype.itemsize),
            sharding=value.sharding,
        )
        for name, value in abstract.items()
        if name not in learned
    }
    frozen = base_weights(base, run.architecture, rounded)
    return params | {name: value.astype(abstract[name].dtype) for name, value in frozen.items()}


def _replicated(shardings: Mapping[str, Sharding]) -> Sharding:
    """A sharding on the devices of these, under which each device has the whole array."""
    some = next(iter(shardings.values()))
    return NamedSharding(some.mesh, PartitionSpec()) if isinstance(some, NamedSharding) else some


def _scale_of(files: CheckpointFiles) -> float:
    return files.config.get("thought_embedding_scale", PUBLISHED_SCALE)


def _rescaled(params: dict[str, jax.Array], theirs: float, ours: float) -> dict[str, jax.Array]:
    if theirs == ours:
        return params
    return params | {name: params[name] * (theirs / ours) for name in ("start_embedding", "end_embedding")}


def check_thoughts(base: Base, config: Config, meta: tuple[int | None, int | None]) -> None:
    """Raises ConfigError if the thoughts of a trained base do not fit the configuration."""
    if isinstance(base, RunCheckpoint):
        source, mixing, ids = str(base.workdir), base.config.thought.mixing, list(base.vocabulary.meta_tokens) or None
    else:
        source, theirs = str(base.folder), base.config
        mixing, ids = theirs.get("thought_mixing", PUBLISHED_MIXING), theirs.get("thought_token_ids")
        scale = theirs.get("thought_embedding_scale", PUBLISHED_SCALE)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
            raise ConfigError(
                f"{source}/config.json: thought_embedding_scale is {scale!r}; it must be a number above 0."
            )
    if mixing != config.thought.mixing:
        raise ConfigError(
            f"config.thought.mixing is {config.thought.mixing!r}, but {source} was trained with {mixing!r}. Set it to "
            "the same value."
        )
    if ids is not None and ids != [token for token in meta if token is not None or isinstance(base, CheckpointFiles)]:
        raise ConfigError(
            f"config.thought.start_token {config.thought.start_token!r} and end_token {config.thought.end_token!r} "
            f"have the ids {list(meta)}, but in {source} thoughts start and end with {ids}. Set the tokens with these "
            "ids."
        )
