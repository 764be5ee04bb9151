"""Opens a trained model for use: a run, an exported or published checkpoint, or a plain Hugging Face model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import NO_ADAPTERS, Adapters, Architecture
from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint, is_run, open_run, run_tokenizer
from quietstar_jax.config import ComputeDtype, Config, ModelConfig, PrefixAttention
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.data.vocabulary import UNUSED, unused_ids
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.hf.canonical import EMBEDDING, LM_HEAD
from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.generation import stops_and_suppressed, thinking, thinking_reach
from quietstar_jax.hf.load import Info, load_parameters
from quietstar_jax.hf.names import decoder_entries, quietstar_entries
from quietstar_jax.io import is_url, place
from quietstar_jax.methods.mixings import REACHING
from quietstar_jax.methods.thinking import ThinkPolicy
from quietstar_jax.models.parameters import GraphDef, stored_dtype
from quietstar_jax.parallel.mesh import check_kernels
from quietstar_jax.settings import from_mapping, one_of, to_mapping
from quietstar_jax.thought_config import MOST_REACH, ThoughtConfig
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, thought_settings
from quietstar_jax.training.base import PUBLISHED_MIXING, PUBLISHED_SCALE, can_think, file_heads, run_weights

PUBLISHED_LENGTH = 9  # T of checkpoints whose config.json has none: the paper's main setting
Layout = Callable[[Mapping[str, jax.ShapeDtypeStruct]], Mapping[str, jax.sharding.Sharding]]


@dataclass(frozen=True)
class LoadedModel:
    """The weights of a model, and all that is needed to use them.

    Attributes:
      params: those of `thoughts.model.QuietStar`, by dotted path; if the model cannot think, all but the decoder is
        zero.
      dtype: of the computation, `float32` or `bfloat16`. Weights that are only read in this dtype are stored in it (see
        `stored_dtype`), so the results equal those with float32 weights.
      vocabulary: includes the ids that no thought may contain.
      thought: settings of thoughts in training; mixing, embedding scale, gate and `end` are always exact,
        the rest only for runs.
      thought_length, tokens_ahead: T and K as trained; T is 0 if the model has not learned to think, K is 1 if it was
        not recorded.
      bos: ids that begin a text, as in training; eos_ids: ids that end a text, each of them alone.
      suppressed_ids: ids that the checkpoint's generation_config.json suppresses.
      path: as given; step: of a run's checkpoint, else None; commit: of a hub id, else empty.
      prefix_attention: as in `ModelConfig`.
      think: the policy of thinking that its generation_config.json recommends, see `methods/thinking.py`; `never` if
        the model cannot think.
      reach: for how many tokens it recommends to use a thought, see `thoughts/reach.py`.
    """

    params: dict[str, jax.Array]
    graphdef: GraphDef
    architecture: Architecture
    dtype: ComputeDtype
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    thought: ThoughtConfig
    thought_length: int
    tokens_ahead: int
    bos: tuple[int, ...]
    eos_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    path: str
    step: int | None
    commit: str
    prefix_attention: PrefixAttention = "auto"
    think: str = "always"
    reach: int = 1

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids that are never generated: meta tokens of thoughts, suppressed ids, and ids that are not a token."""
        ids = {*self.vocabulary.meta_tokens, *self.vocabulary.unused, *self.suppressed_ids}
        return tuple(sorted(i for i in ids if i < self.architecture.vocab_size))

    @property
    def can_think(self) -> bool:
        """Whether the model has a trained mixing head."""
        return self.thought_length > 0

    def check_policy(self, policy: ThinkPolicy) -> ThinkPolicy:
        """Returns the policy of thinking, if the model can follow it.

        Raises:
          CheckpointError: it needs a thinking gate, and the model has none.
        """
        if policy.needs_gate and not self.thought.gate:
            raise CheckpointError(
                f"think is '{policy}', but {self.path} has no thinking gate. Give another policy, or a model that was "
                "trained with `thought.gate`."
            )
        if policy.needs_start and self.vocabulary.start_token is None:
            raise CheckpointError(
                f"think is '{policy}', but {self.path} has no single token that starts thoughts. Give another policy, "
                "or a model that was trained with one token as `thought.initial_start_token`."
            )
        return policy

    def own_reach(self, tokens_ahead: int | None = None) -> int:
        """Returns the reach where none is given: as recommended, at most a given K; 1 if the mixing cannot reach."""
        reach = self.reach if self.thought.mixing in REACHING else 1
        return min(reach, tokens_ahead or reach)

    def settings(
        self, thought_length: int | None = None, tokens_ahead: int = 1, reach: int = 1
    ) -> ThoughtSettings:  # fmt: skip
        """Returns the settings for the functions of `thoughts`, with one thought per position.

        Args:
          thought_length: T; None = as trained, 0 = no thoughts.
          tokens_ahead: K; raised to `reach` if it is smaller.
          reach: for how many next tokens a thought is used, see `thoughts.reach`.

        Raises:
          CheckpointError: thoughts are requested from a model that cannot think.
          ConfigError: the length is negative, or the model cannot have this reach.
        """
        length = self.thought_length if thought_length is None else thought_length
        if length < 0:
            raise ConfigError(f"thought_length is {length}; it must be 0 (no thoughts) or more.")
        if length and not self.can_think:
            raise CheckpointError(
                f"{self.path} has no trained mixing head, so it has no thoughts. Set `thoughts` to off, or give a run "
                "or an export that was trained with thoughts."
            )
        if not 1 <= reach <= MOST_REACH:
            raise ConfigError(f"reach is {reach}; it must be within 1 .. {MOST_REACH}.")
        if reach > 1 and self.thought.mixing not in REACHING:
            raise ConfigError(
                f"reach is {reach}, but {self.path} was trained with the mixing {self.thought.mixing!r}. Set `reach` "
                f"to 1, or give a model that was trained with `thought.mixing` = {' or '.join(map(repr, REACHING))}."
            )
        model = ModelConfig(compute_dtype=self.dtype, prefix_attention=self.prefix_attention)
        config = Config(model=model, thought=self.thought)
        return thought_settings(
            config, self.vocabulary, thought_length=length, tokens_ahead=max(tokens_ahead, reach), reach=reach
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of the weights, wherever they are stored."""
        digest = hashlib.sha256()
        for name in sorted(self.params):
            value = np.asarray(self.params[name])
            digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
            digest.update(np.ascontiguousarray(value).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """Source and properties of the model, for the results of an evaluation. Reads all weights."""
        return {
            "checkpoint": self.path,
            "step": self.step,
            "commit": self.commit,
            "checkpoint_hash": self.fingerprint,
            "dtype": self.dtype,
            "architecture": to_mapping(self.architecture),
            "thought_length": self.thought_length,
            "mixing": self.thought.mixing,
        }


def load_model(
    path: str | Path, *, step: int | None = None, revision: str = "", dtype: ComputeDtype = "float32",
    prefix_attention: PrefixAttention = "auto", layout: Layout | None = None,
) -> LoadedModel:  # fmt: skip
    """Opens a model; does not change its files.

    Args:
      path: a run's workdir or the `checkpoints` folder in it; a Hugging Face folder or hub id, of a Quiet-STaR as
        exported or published, or of a plain model (which cannot think).
      step: of a run's checkpoint; None = the newest.
      revision: of a hub id.
      dtype: of the computation, `float32` or `bfloat16`.
      prefix_attention: as in `ModelConfig`, for this machine; it need not be that of training.
      layout: function from the abstract parameters to their shardings; None = all on the first device.

    Raises:
      UserError: the path is none of these, is broken, or has no step although one is given.
    """
    if problems := one_of("dtype", dtype, ComputeDtype):
        raise ConfigError(f"{problems[0]}.")
    check_kernels(prefix_attention, jax.devices()[0])
    folder = place(str(path), "The model")
    if is_run(folder):
        if revision:
            raise CheckpointError(f"{path} is a run and has no revision {revision!r}. Omit `revision`.")
        model = _of_run(str(path), open_run(folder, step), dtype, layout)
        return dataclasses.replace(model, prefix_attention=prefix_attention)
    if step is not None or is_url(folder):
        raise CheckpointError(
            f"{path} is not a run with checkpoints, so it has no step{'' if step is None else f' {step}'}. "
            "Give the work directory of a run, or omit `step` and give a folder or hub id."
        )
    model = _of_files(str(path), open_checkpoint(str(path), revision), revision, dtype, layout)
    return dataclasses.replace(model, prefix_attention=prefix_attention)


def _of_run(path: str, run: RunCheckpoint, dtype: ComputeDtype, layout: Layout | None) -> LoadedModel:
    thinking_phases = [phase for phase in run.config.phases if phase.thought_length]
    tokenizer = run_tokenizer(run).within(run.architecture.vocab_size)
    eos, suppressed = stops_and_suppressed(run.generation, tokenizer.eos_id, run.workdir)
    abstract, graphdef = _abstract(run.architecture, dtype, layout, run.config.model.adapters, run.config.thought.heads)
    return LoadedModel(
        params=run_weights(run, abstract),
        graphdef=graphdef,
        architecture=run.architecture,
        dtype=dtype,
        tokenizer=tokenizer,
        vocabulary=run.vocabulary._replace(
            unused=unused_ids(tokenizer, run.architecture.vocab_size, {UNUSED: run.vocabulary.unused})
        ),
        thought=run.config.thought,
        thought_length=run.config.evaluation_thought_length if thinking_phases else 0,
        tokens_ahead=max((phase.tokens_ahead for phase in thinking_phases), default=1),
        bos=tokenizer.begins(run.config.data.prepend_bos),
        eos_ids=eos,
        suppressed_ids=suppressed,
        path=path,
        step=run.step,
        commit=run.model_commit,
        think=thinking(run.generation, run.workdir) if thinking_phases else "never",
        reach=thinking_reach(run.generation, run.workdir) if thinking_phases else 1,
    )


def _of_files(
    path: str, files: CheckpointFiles, revision: str, dtype: ComputeDtype, layout: Layout | None
) -> LoadedModel:
    tokenizer = load_tokenizer(path, revision)
    thinks, meta = can_think(files), _meta_tokens(files, tokenizer)
    source = _TextRows(files, meta)
    architecture = source.architecture
    tokenizer = tokenizer.within(architecture.vocab_size, known=meta)
    heads = file_heads(files) if thinks else ()
    start_token, end_token = (
        _token(files, name, architecture.vocab_size) if thinks else None
        for name in ("thought_start_token", "thought_end_token")
    )
    abstract, graphdef = _abstract(architecture, dtype, layout, heads=heads)
    params = load_parameters(
        source,
        quietstar_entries(architecture, heads) if thinks else decoder_entries(architecture, "decoder."),
        shardings={name: value.sharding for name, value in abstract.items()},
        dtypes={name: value.dtype for name, value in abstract.items()},
    )
    for name in abstract.keys() - params.keys():
        params[name] = jnp.zeros(abstract[name].shape, abstract[name].dtype, device=abstract[name].sharding)
    eos, suppressed = stops_and_suppressed(files.generation, None, files.folder)
    return LoadedModel(
        params=params,
        graphdef=graphdef,
        architecture=architecture,
        dtype=dtype,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(
            tokenizer.pad_id,
            meta,
            (),
            (),
            pause_id=tokenizer.pad_id,
            unused=unused_ids(tokenizer, architecture.vocab_size, files.config),
            start_token=start_token,
            end_token=end_token,
        ),
        thought=_thought_config(files, tokenizer, meta, end_token) if thinks else ThoughtConfig(),
        thought_length=_thought_length(files) if thinks else 0,
        tokens_ahead=1,
        bos=tokenizer.begins(),
        eos_ids=eos or (tokenizer.eos_id,),
        suppressed_ids=suppressed,
        path=path,
        step=None,
        commit=files.commit,
        think=thinking(files.generation, files.folder) if thinks else "never",
        reach=thinking_reach(files.generation, files.folder) if thinks else 1,
    )


def _abstract(
    architecture: Architecture,
    dtype: ComputeDtype,
    layout: Layout | None,
    adapters: Adapters = NO_ADAPTERS,
    heads: Sequence[str] = (),
) -> tuple[dict[str, jax.ShapeDtypeStruct], GraphDef]:
    """Shapes, dtypes and shardings of the parameters, and the graphdef."""
    shapes, graphdef = abstract_params(architecture, adapters, heads)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = layout(shapes) if layout else dict.fromkeys(shapes, here)
    return {
        name: jax.ShapeDtypeStruct(value.shape, jnp.dtype(stored_dtype(name, dtype)), sharding=shardings[name])
        for name, value in shapes.items()
    }, graphdef


class _TextRows:
    """A checkpoint without the rows that an export added for start and end: the vocabulary of training."""

    def __init__(self, files: CheckpointFiles, meta: tuple[int, ...]):
        theirs = architecture_from_hf(files.config, files.folder)
        rows, all_rows = files.config.get("text_vocab_size", theirs.vocab_size), theirs.vocab_size
        others = {*meta, *_ids(files, "config.json: unused_token_ids", files.config.get("unused_token_ids", []))}
        if type(rows) is not int or not 0 < rows <= all_rows or not set(range(rows, all_rows)) <= others:
            raise CheckpointError(
                f"{files.folder}/config.json: text_vocab_size is {rows!r}; it must be at most vocab_size ({all_rows}), "
                "and only thought_token_ids and unused_token_ids may be at or above it. Export the model again."
            )
        self.architecture = dataclasses.replace(theirs, vocab_size=rows)
        self.added = all_rows - rows
        self.config = files.config
        self.tensors: Mapping[str, Info] = {
            name: dataclasses.replace(info, shape=(rows, *info.shape[1:])) if self._longer(name, info) else info
            for name, info in files.tensors.items()
        }
        self._files = files

    def read(self, name: str) -> np.ndarray:
        """One tensor, as `CheckpointFiles.read`."""
        tensor = self._files.read(name)
        return tensor[: self.architecture.vocab_size] if name in (EMBEDDING, LM_HEAD) else tensor

    def _longer(self, name: str, info: Info) -> bool:
        return name in (EMBEDDING, LM_HEAD) and info.shape[:1] == (self.architecture.vocab_size + self.added,)


def _thought_config(
    files: CheckpointFiles, tokenizer: Tokenizer, meta: tuple[int, ...], end_token: int | None
) -> ThoughtConfig:
    """The settings of thoughts in config.json."""
    settings = {
        "mixing": files.config.get("thought_mixing", PUBLISHED_MIXING),
        "embedding_scale": files.config.get("thought_embedding_scale", PUBLISHED_SCALE),
        "gate": "gate" in file_heads(files),
        "end": "sampled" if "end_head" in file_heads(files) else "fixed" if end_token is None else "token",
    }
    if len(meta) == 2:
        settings |= dict(zip(("start_token", "end_token"), (tokenizer.decode([i]) for i in meta), strict=True))
    return from_mapping(ThoughtConfig, settings, root=f"{files.folder}/config.json: thought")


def _token(files: CheckpointFiles, name: str, rows: int) -> int | None:
    """The id of one of `rows` in a field of config.json; None if an export has no such token."""
    found = files.config.get(name)
    if found is not None and (type(found) is not int or not 0 <= found < rows):
        raise CheckpointError(
            f"{files.folder}/config.json: {name} is {found!r}; it must be a token id, 0 .. {rows - 1}."
        )
    return found


def _thought_length(files: CheckpointFiles) -> int:
    length = files.config.get("thought_length", PUBLISHED_LENGTH)
    if type(length) is not int or length < 0:
        raise CheckpointError(f"{files.folder}/config.json: thought_length is {length!r}; it must be 0 or more.")
    return length


def _meta_tokens(files: CheckpointFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the start and end token; empty if the tokenizer has no such tokens."""
    ids = files.config.get("thought_token_ids")
    if ids is not None:
        return _ids(files, "config.json: thought_token_ids", ids)
    token_ids = (tokenizer.token_id(token) for token in (ThoughtConfig.start_token, ThoughtConfig.end_token))
    return tuple(token for token in token_ids if token is not None)


def _ids(files: CheckpointFiles, name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{files.folder}/{name} is {value!r}; it must be a list of token ids.")
    return tuple(ids)
