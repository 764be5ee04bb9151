"""The base of a run (`config.model.checkpoint`): initial weights from a Hugging Face model or from another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint, named_run, open_run, run_tokenizer
from quietstar_jax.config import Config, ModelConfig
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.sources.files import one_file
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.vocabulary import UNUSED
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.load import build, load_parameters
from quietstar_jax.hf.names import decoder_entries, quietstar_entries, thought_entries
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.families import architecture_from_hf
from quietstar_jax.models.parameters import split
from quietstar_jax.thoughts.model import QuietStar, init_quiet_star, initialize
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.step import initial_thought_embeddings

PUBLISHED_SCALE, PUBLISHED_MIXING = 100.0, "hidden_states"  # for checkpoints whose config.json has no such fields

Base = CheckpointFiles | RunCheckpoint
Shardings = Mapping[str, Sharding]


def open_base(model: ModelConfig) -> Base | None:
    """Opens the base of a run without reading weights; returns None if the run begins with random weights.

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
    return open_run(run)


def base_architecture(base: Base) -> Architecture:
    """Returns the architecture of a base."""
    return base.architecture if isinstance(base, RunCheckpoint) else architecture_from_hf(base.config, base.folder)


def base_record(base: Base | None) -> dict[str, Any]:
    """Returns what a run records about its base, so that it can resume without the base."""
    if base is None:
        return {"model_commit": "", "generation": {}, "base": {}}
    if isinstance(base, RunCheckpoint):
        folder = base.parameters.folder
        files = sorted(folder / name for name in manifest.files(folder))
        commit = base.model_commit
    else:
        files, commit = sorted({info.file for info in base.tensors.values()}), base.commit
    content = fingerprint("", [one_file(str(file)) for file in files])
    return {
        "model_commit": commit,
        "generation": dict(base.generation),
        "base": {name: content[name] for name in ("bytes", "marks")},
    }


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
              shardings: Shardings) -> dict[str, jax.Array]:  # fmt: skip
    """Returns all parameters of a run that begins from a base; parameters that the base lacks are initialised.

    Every process reads the files and keeps its own shards.

    Raises:
      CheckpointError: a weight is missing or cannot be read.
    """
    scale = config.thought.embedding_scale
    if isinstance(base, RunCheckpoint):
        return _of_run(base, architecture, vocabulary, scale, shardings)
    if can_think(base):
        return split(load_thinking(base, architecture, scale, shardings=shardings))[0]
    params = load_parameters(base, decoder_entries(architecture, "decoder."), shardings=shardings)
    names = [name for name in shardings if name not in params]

    def make(params: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        weights = {name.removeprefix("decoder."): value for name, value in params.items()}
        decoder = build(lambda: Decoder(architecture, nnx.Rngs(0)), weights)
        made, _ = split(initialize(decoder, vocabulary.start_tokens, vocabulary.end_tokens, scale, key))
        return {name: made[name] for name in names}

    return params | jax.jit(make, out_shardings={name: shardings[name] for name in names})(params, key)


def _of_run(
    run: RunCheckpoint, architecture: Architecture, vocabulary: Vocabulary, embedding_scale: float, shardings: Shardings
) -> dict[str, jax.Array]:
    shapes = jax.eval_shape(lambda: split(init_quiet_star(architecture, [0], [0], 1.0, jax.random.key(0)))[0])
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name]) for name, value in shapes.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params: dict[str, jax.Array] = checkpointer.restore(run.parameters.folder, abstract)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(f"{run.parameters.folder} cannot be read: {error}") from error
    if vocabulary.start_tokens:  # the thought embeddings are not trained yet
        return params | initial_thought_embeddings(params, vocabulary, embedding_scale)
    return _rescaled(params, run.config.thought.embedding_scale, embedding_scale)


def load_thinking(
    files: CheckpointFiles, architecture: Architecture, embedding_scale: float, *, shardings: Shardings | None = None
) -> QuietStar:
    """Returns the model of a checkpoint in the published layout, with all of its weights: nothing is initialised.

    Args:
      embedding_scale: start and end embeddings are stored divided by this number; converted from that of the file.
      shardings: as in `load_parameters`.

    Raises:
      CheckpointError: as in `load_parameters`.
    """
    parameters = load_parameters(files, quietstar_entries(architecture), shardings=shardings)
    theirs = files.config.get("thought_embedding_scale", PUBLISHED_SCALE)
    return build(
        lambda: init_quiet_star(architecture, [0], [0], 1.0, jax.random.key(0)),
        _rescaled(parameters, theirs, embedding_scale),
    )


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
