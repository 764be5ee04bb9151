"""From a checked configuration to what the loop works with: tokenizer, weights, shapes. Nothing is compiled here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding

from quietstar_jax.config import Architecture, Config
from quietstar_jax.data.pipeline import check_vocabulary
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.errors import ConfigError
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.load import build, load_parameters
from quietstar_jax.hf.names import decoder_entries, quietstar_entries, thought_entries
from quietstar_jax.hf.vocabulary import unused_ids
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.families import architecture_from_hf
from quietstar_jax.models.parameters import Structure, disassemble
from quietstar_jax.parallel.layout import on_mesh
from quietstar_jax.parallel.mesh import check_batches, check_kernels, make_mesh
from quietstar_jax.settings import to_mapping
from quietstar_jax.thoughts.model import QuietStar, fresh, initialize
from quietstar_jax.training.step import TrainState, Vocabulary, initial_state, state_specs

PUBLISHED_SCALE, PUBLISHED_MIXING = 100.0, "hidden_states"  # of checkpoints whose config.json does not say


@dataclass(frozen=True)
class Run:
    """A run before its first step."""

    config: Config
    tokenizer: Tokenizer
    architecture: Architecture
    structure: Structure
    vocabulary: Vocabulary
    key: jax.Array
    mesh: Mesh  # of all devices; the context of everything that is compiled (`jax.set_mesh`)
    files: CheckpointFiles | None  # of the Hugging Face checkpoint that it starts from

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps beside its arrays, enough to use it without the original model."""
        return {
            "config": to_mapping(self.config),
            "architecture": to_mapping(self.architecture),
            "model_commit": self.files.commit if self.files else "",
            "generation": dict(self.files.generation) if self.files else {},
            "vocabulary": {name: ids for name, ids in self.vocabulary._asdict().items() if name != "unused"},
            "unused_ids": self.vocabulary.unused,
        }


def prepare(config: Config) -> Run:
    """Loads the tokenizer, finds the model's shape, lays out the devices, and checks that all of it fits.

    Raises:
      ConfigError, DataError, CheckpointError: before any weight is read.
    """
    files = open_checkpoint(config.model.checkpoint, config.model.revision) if config.model.checkpoint else None
    architecture = architecture_from_hf(files.config, files.folder) if files else config.model.architecture
    tokenizer = load_tokenizer(_tokenizer_name(config), config.model.revision if not config.data.tokenizer else "")
    if files is None:
        check_vocabulary(tokenizer, architecture.vocab_size)
    tokenizer = tokenizer.within(architecture.vocab_size)
    check_length(config, architecture)
    meta = (tokenizer.token_id(config.thought.start_token), tokenizer.token_id(config.thought.end_token))
    learned = files is not None and can_think(files)
    if files and learned:
        check_thoughts(files, config, meta)
    start_tokens = _embedding_tokens(tokenizer, config.thought.initial_start_token, "initial_start_token")
    end_tokens = _embedding_tokens(tokenizer, config.thought.initial_end_token, "initial_end_token")
    mesh = make_mesh(config.mesh, architecture)
    check_batches(config, mesh)
    check_kernels(config.model.prefix_attention, mesh.devices.flat[0])
    return Run(
        config=config,
        tokenizer=tokenizer,
        architecture=architecture,
        structure=abstract_structure(architecture),
        vocabulary=Vocabulary(
            pad_id=tokenizer.pad_id,
            meta_tokens=tuple(token for token in meta if token is not None),
            start_tokens=() if learned else start_tokens,
            end_tokens=() if learned else end_tokens,
            pause_id=start_tokens[0],
            unused=unused_ids(tokenizer, architecture.vocab_size, files.config if files else {}),
        ),
        key=jax.random.key(config.seed),
        mesh=mesh,
        files=files,
    )


def abstract_params(architecture: Architecture) -> tuple[dict[str, Any], Structure]:
    """Shapes and dtypes of all parameters, and the structure that holds them; allocates nothing."""
    return disassemble(jax.eval_shape(lambda: fresh(architecture, [0], [0], 1.0, jax.random.key(0))))


def abstract_structure(architecture: Architecture) -> Structure:
    """The structure of the model of this shape."""
    return abstract_params(architecture)[1]


def abstract_state(config: Config, architecture: Architecture, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layout of the training state; a checkpoint of any mesh is read to where this says."""
    params, structure = abstract_params(architecture)
    state = jax.eval_shape(lambda params: initial_state(params, config), params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        on_mesh(mesh, state_specs(state, structure)),
    )


def first_state(run: Run) -> TrainState:
    """Step 0: weights of the Hugging Face checkpoint, with its thoughts where it can think; or random ones.

    Every process reads the files and keeps its own parts.
    """
    vocabulary, scale = run.vocabulary, run.config.thought.embedding_scale
    key = jax.random.fold_in(run.key, jnp.iinfo(jnp.int32).max)  # no step folds this number in

    meta: tuple[Any, Any, float] = (vocabulary.start_tokens, vocabulary.end_tokens, scale)
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(run.config, run.architecture, run.mesh))
    if run.files is None:
        make = jax.jit(lambda key: disassemble(fresh(run.architecture, *meta, key))[0], out_shardings=layout.params)
        params = make(key)
    elif can_think(run.files):
        params, _ = disassemble(load_thinking(run.files, run.architecture, scale, shardings=layout.params))
    else:
        entries = decoder_entries(run.architecture, "decoder.")
        params = load_parameters(run.files, entries, shardings=layout.params)
        params |= _begin_to_think(params, run.architecture, meta, key, layout.params)
    return start_optimizer(run, params)


def start_optimizer(run: Run, params: dict[str, jax.Array]) -> TrainState:
    """Step 0 with these weights, which are given up, and new Adam moments."""
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(run.config, run.architecture, run.mesh))
    start = jax.jit(lambda params: initial_state(params, run.config), out_shardings=layout, donate_argnums=0)
    return start(params)


def _begin_to_think(
    params: dict[str, jax.Array], architecture: Architecture, meta: tuple[Any, Any, float], key: jax.Array,
    layout: dict[str, Any],
) -> dict[str, jax.Array]:  # fmt: skip
    """What a decoder with these parameters lacks to think, as `thoughts.model.initialize` makes it."""
    names = [name for name in layout if name not in params]

    def make(params: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        weights = {name.removeprefix("decoder."): value for name, value in params.items()}
        decoder = build(lambda: Decoder(architecture, nnx.Rngs(0)), weights)
        made, _ = disassemble(initialize(decoder, *meta, key))
        return {name: made[name] for name in names}

    return jax.jit(make, out_shardings={name: layout[name] for name in names})(params, key)


def can_think(files: CheckpointFiles) -> bool:
    """Whether a checkpoint is in the layout of the published Quiet-STaR, with a mixing head and thought embeddings."""
    return any(entry.name in files.tensors for entry in thought_entries(1))


def load_thinking(
    files: CheckpointFiles, architecture: Architecture, embedding_scale: float, *,
    shardings: Mapping[str, Sharding] | None = None,
) -> QuietStar:  # fmt: skip
    """A checkpoint of the published layout with all that it learned: nothing is initialised anew.

    Args:
      embedding_scale: what start and end embedding shall be stored divided by; the file may have another.
      shardings: as in `load_parameters`.

    Raises:
      CheckpointError: as `load_parameters`.
    """
    parameters = load_parameters(files, quietstar_entries(architecture), shardings=shardings)
    theirs = files.config.get("thought_embedding_scale", PUBLISHED_SCALE)
    if theirs != embedding_scale:
        for name in ("start_embedding", "end_embedding"):
            parameters[name] = parameters[name] * (theirs / embedding_scale)
    return build(lambda: fresh(architecture, [0], [0], 1.0, jax.random.key(0)), parameters)


def check_thoughts(files: CheckpointFiles, config: Config, meta: tuple[int | None, int | None]) -> None:
    """Raises ConfigError where a checkpoint has learned to think in another way than the run is configured for."""
    theirs = files.config
    scale = theirs.get("thought_embedding_scale", PUBLISHED_SCALE)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e30:
        raise ConfigError(
            f"{files.folder}/config.json: thought_embedding_scale is {scale!r}; it takes a number above 0."
        )
    mixing = theirs.get("thought_mixing", PUBLISHED_MIXING)
    if mixing != config.thought.mixing:
        raise ConfigError(
            f"config.thought.mixing is {config.thought.mixing!r}, but {files.folder} has learned to think with "
            f"{mixing!r}. Set it to that."
        )
    ids = theirs.get("thought_token_ids")
    if ids is not None and ids != list(meta):
        raise ConfigError(
            f"config.thought.start_token {config.thought.start_token!r} and end_token {config.thought.end_token!r} "
            f"have the ids {list(meta)}, but in {files.folder} thoughts start and end with {ids}. Name the tokens of "
            "these ids."
        )


def check_length(config: Config, architecture: Architecture) -> None:
    """Raises ConfigError where a thought would reach past the positions that the model knows."""
    thinking = [(phase.thought_length, phase.tokens_ahead) for phase in config.phases]
    thinking.append((config.evaluation_thought_length, config.evaluation.tokens_ahead))
    longest = max(length + ahead + 1 if length else 0 for length, ahead in thinking)
    needed = config.data.sequence_length + longest
    if needed > architecture.max_positions:
        raise ConfigError(
            f"config.data.sequence_length is {config.data.sequence_length}; with thoughts that is {needed} positions, "
            f"but the model knows {architecture.max_positions}. Shorten the sequences or the thoughts."
        )


def _tokenizer_name(config: Config) -> str:
    name = config.data.tokenizer or config.model.checkpoint
    if not name:
        raise ConfigError(
            "config.data.tokenizer is empty and there is no model checkpoint to take a tokenizer from. Set it to a "
            "folder or hub id with a tokenizer, or to `synthetic` for the embedded corpus."
        )
    return name


def _embedding_tokens(tokenizer: Tokenizer, text: str, field: str) -> tuple[int, ...]:
    tokens = tuple(tokenizer.encode(text))
    if not tokens or tokenizer.unk_id in tokens:
        raise ConfigError(
            f"config.thought.{field} is {text!r}, which is no token of the tokenizer {tokenizer.name}. "
            "Choose a text whose embedding a thought should begin or end with."
        )
    return tokens
