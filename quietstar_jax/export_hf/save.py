"""Writes our parameters as a Hugging Face folder, with one tensor in memory at a time.

The format `base` is the decoder alone with an unchanged tokenizer: a model of the same shape as the one that training
began from. It has no start and end tokens: with tied embeddings, their rows would also be rows of the head, and the
model could predict them. The format `quietstar` adds the mixing head and the thought embeddings under their published
names, and a torch module that thinks. Start and end tokens that the tokenizer lacks get new rows after the existing
ones, which stay the same bit for bit. The format `adapter` is the adapters of the decoder alone, as peft stores them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from quietstar_jax.architecture import Adapters, Architecture, FamilyName
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.vocabulary import UNUSED
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf.added_tokens import add_tokens, pad_as_trained
from quietstar_jax.export_hf.options import DTYPES, ExportOptions
from quietstar_jax.hf.adapter import WEIGHTS as ADAPTER_WEIGHTS
from quietstar_jax.hf.adapter import adapter_entries, check_expressible
from quietstar_jax.hf.canonical import EMBEDDING, LM_HEAD
from quietstar_jax.hf.config_json import architecture_to_hf
from quietstar_jax.hf.files import ADAPTER, INDEX
from quietstar_jax.hf.generation import generation_config
from quietstar_jax.hf.names import (
    HEADS,
    Entry,
    Shape,
    Target,
    decoder_entries,
    parameter_shapes,
    quietstar_entries,
    to_theirs,
)
from quietstar_jax.hf.safetensors_file import FLOAT_DTYPES, ITEM_BYTES, write_file
from quietstar_jax.io import new_folder
from quietstar_jax.methods.mixings import REACHING
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.models.families import FAMILIES

MODULE = Path(__file__).with_name("torch_module.py")
SHIPPED_MODULE = "modeling_quietstar"


class Parameters(Protocol):
    """The parameters of `QuietStar`, by dotted path."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    def read(self, target: Target) -> np.ndarray: ...


@dataclass(frozen=True)
class Thoughts:
    """The properties of thoughts that an export stores."""

    length: int  # T when the exported model generates; 0 = it does not think
    embedding_scale: float  # start and end embeddings are stored divided by this number
    mixing: str = "hidden_states"
    heads: tuple[str, ...] = ()  # see `ThoughtConfig.heads`
    start_token: str = "<|startthought|>"
    end_token: str = "<|endthought|>"
    starting_id: int | None = None  # of the token that starts thoughts in texts, `Vocabulary.start_token`
    ending_id: int | None = None  # of the token at which thoughts end, see `ThoughtConfig.end`
    unused_ids: tuple[int, ...] = ()  # ids of the model that are not tokens: never in a thought, never generated


def save(
    output: Path, parameters: Parameters, architecture: Architecture, tokenizer: Tokenizer, thoughts: Thoughts,
    options: ExportOptions, card: Mapping[str, bytes], generation: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes a checkpoint folder that transformers loads.

    Memory: a few times the largest tensor. The folder gets its name when it is complete; until then it is named
    `OUTPUT.WRITER.incomplete`. If its writer is killed, the next export to OUTPUT removes it.

    Args:
      tokenizer: the model's tokenizer; if the format is `quietstar`, missing start and end tokens are added to it.
      card: files of the model card by name, different for each checkpoint and format. An output with them is complete.
      generation: generation_config.json of the model that training began from.

    Raises:
      CheckpointError: the output exists or cannot be written, the parameters do not fit the architecture, or a value
        is not finite in the dtype of the export.
      ConfigError, DataError: the shard size cannot be parsed, start and end cannot become tokens, or the torch module
        does not have the mixing.
    """
    if options.format == "quietstar":
        _check_exportable("mixing", thoughts.mixing, "MIXINGS")
        if options.think:
            policy = parse_policy(options.think)
            _check_exportable("policy of thinking", policy.name, "THINKING")
            if policy.needs_gate and "gate" not in thoughts.heads:
                raise ConfigError(
                    f"think is {options.think!r}, but the run has no thinking gate. Give another policy, or train with "
                    "config.thought.gate."
                )
            if policy.needs_start and thoughts.starting_id is None:
                raise ConfigError(
                    f"think is {options.think!r}, but config.thought.initial_start_token of the run is not one token. "
                    "Give another policy."
                )
        if options.reach > 1 and thoughts.mixing not in REACHING:
            raise ConfigError(
                f"reach is {options.reach}, but the run was trained with the mixing {thoughts.mixing!r}. Omit it, or "
                f"train with `thought.mixing` = {' or '.join(map(repr, REACHING))}."
            )
    if _is_there(output, card):
        return
    _check_parameters(parameters, architecture, thoughts.heads)
    ids: tuple[int, ...] = ()
    tokens = (thoughts.start_token, thoughts.end_token)
    known = tuple(i for i in map(tokenizer.token_id, tokens) if i is not None)
    if options.format == "quietstar":
        if "" in tokens or tokens[0] == tokens[1]:
            raise ConfigError(
                f"The tokens that start and end a thought are {tokens!r}; they must be two different texts."
            )
        ids = add_tokens(tokenizer, architecture.vocab_size, tokens)
    pad_as_trained(tokenizer)
    writer = _Writer(parameters, architecture, thoughts, ids, options)
    shards = _split(writer.tensor_shapes(), options)
    with _complete_folder(output) as folder:
        _write_files(folder, card)
        tokenizer.save(folder)
        _write_json(
            folder / "generation_config.json",
            generation_config(
                generation or {}, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
                suppressed=(*(ids or known), *thoughts.unused_ids), think=options.think, reach=options.reach,
                thinks=options.format == "quietstar",
            ),
        )  # fmt: skip
        if options.format == "quietstar":
            shutil.copyfile(MODULE, folder / f"{SHIPPED_MODULE}.py")
        for file, names in shards.filename_to_tensors.items():
            writer.write(folder / file, names)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            _write_json(folder / INDEX, index)
        _write_json(folder / "config.json", _config(architecture, tokenizer, thoughts, ids, options))


def save_adapter(
    output: Path, parameters: Parameters, architecture: Architecture, adapters: Adapters, config: Mapping[str, Any],
    dtype: str, card: Mapping[str, bytes],
) -> None:  # fmt: skip
    """Writes the adapters of the decoder as a folder that peft loads onto their base; other weights are left out.

    Args:
      config: adapter_config.json; dtype: as in `ExportOptions`; card: as in `save`.

    Raises:
      CheckpointError: the output exists or cannot be written, or a value is not finite in this dtype.
      ConfigError: peft cannot represent these adapters.
    """
    check_expressible(adapters, architecture)
    if _is_there(output, card):
        return
    entries = adapter_entries(architecture, adapters)
    tensors = (
        (entry.name, to_theirs(entry, [_cast(parameters.read(target), entry.name, dtype) for target in entry.targets]))
        for entry in entries
    )
    with _complete_folder(output) as folder:
        _write_files(folder, card)
        write_file(folder / ADAPTER_WEIGHTS, {entry.name: entry.shape for entry in entries}, DTYPES[dtype], tensors)
        _write_json(folder / ADAPTER, config)


@contextmanager
def _complete_folder(output: Path) -> Iterator[Path]:
    """Like `io.new_folder`, but raises CheckpointError."""
    try:
        with new_folder(output) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error}. Free some disk space there, or choose another folder."
        ) from error


class _Writer:
    """Converts our parameters to named tensors, each one only when it is written."""

    def __init__(
        self, parameters: Parameters, architecture: Architecture, thoughts: Thoughts, ids: Sequence[int],
        options: ExportOptions,
    ):  # fmt: skip
        entries = decoder_entries(architecture, "decoder.")
        if options.format == "quietstar":
            entries = quietstar_entries(architecture, thoughts.heads)
        self._parameters, self._options, self._scale = parameters, options, thoughts.embedding_scale
        self._entries = {entry.name: entry for entry in entries}
        self._ids, self._vocab = ids, architecture.vocab_size
        self._added = max(0, *(i + 1 - self._vocab for i in ids)) if ids else 0

    def tensor_shapes(self) -> dict[str, Shape]:
        """The shape of every tensor, including added rows."""
        return {
            name: (entry.shape[0] + self._added, *entry.shape[1:]) if name in (EMBEDDING, LM_HEAD) else entry.shape
            for name, entry in self._entries.items()
        }

    def write(self, file: Path, names: Sequence[str]) -> None:
        """Writes one file with these tensors."""
        shapes = self.tensor_shapes()
        tensors = ((name, self._tensor(self._entries[name])) for name in names)
        write_file(file, {name: shapes[name] for name in names}, DTYPES[self._options.dtype], tensors)

    def _tensor(self, entry: Entry) -> np.ndarray:
        """Returns one tensor in the dtype of the export, including the rows of start and end.

        Raises:
          CheckpointError: a value is not finite.
        """
        pieces = [self._parameters.read(target) for target in entry.targets]
        tensor = to_theirs(entry, [_cast(piece, entry.name, self._options.dtype) for piece in pieces])
        if entry.name not in (EMBEDDING, LM_HEAD) or not self._added:
            return tensor
        added = np.zeros((self._added, tensor.shape[1]), np.float32)
        if entry.name == EMBEDDING:
            for i, row in zip(self._ids, self._effective_embeddings(), strict=True):
                if i >= self._vocab:
                    added[i - self._vocab] = row
        else:
            # The mean of all rows: its logit is the mean logit, so the probability of an added token is at most 1 / V.
            added[:] = pieces[0].mean(axis=1, dtype=np.float64)
        return np.concatenate([tensor, _cast(added, entry.name, self._options.dtype)])

    def _effective_embeddings(self) -> np.ndarray:
        """The embeddings of start and end as the decoder reads them, [2, D]."""
        paths = ("start_embedding", "end_embedding")
        shapes = self._parameters.shapes
        stored = [self._parameters.read(Target(path, shapes[path])) for path in paths]
        return np.stack(stored) * np.float32(self._scale)


def _cast(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(FLOAT_DTYPES[DTYPES[dtype]], copy=False)
    if not np.isfinite(cast).all():
        advice = (
            f"are out of range for {dtype}: set `dtype` to bfloat16 or float32"
            if np.isfinite(array).all()
            else "are not finite"
        )
        raise CheckpointError(f"Tensor {name} cannot be exported: some of its values {advice}.")
    return cast


def _config(
    architecture: Architecture, tokenizer: Tokenizer, thoughts: Thoughts, ids: Sequence[int], options: ExportOptions
) -> dict[str, Any]:
    """Returns the config.json of an export."""
    rows = max(architecture.vocab_size, *(i + 1 for i in ids)) if ids else architecture.vocab_size
    config = architecture_to_hf(dataclasses.replace(architecture, vocab_size=rows))
    config |= _old_rope(config["rope_parameters"], FAMILIES[architecture.family].local_theta_field)
    config |= {"dtype": options.dtype, "torch_dtype": options.dtype}  # the second for transformers before 4.56
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config["pad_token_id"] = None  # torch would not train its row, and Phi-3's default may exceed the vocabulary
    marks = {"thought_start_token": thoughts.starting_id, "thought_end_token": thoughts.ending_id}
    if options.format == "quietstar":
        name = thinking_class(architecture.family)
        config |= {
            "architectures": [name],
            "auto_map": {"AutoModelForCausalLM": f"{SHIPPED_MODULE}.{name}"},
            "thought_length": thoughts.length,
            "thought_embedding_scale": thoughts.embedding_scale,
            "thought_mixing": thoughts.mixing,
            "thought_token_ids": list(ids),
            "text_vocab_size": architecture.vocab_size,
            **{name: token for name, token in marks.items() if token is not None},
            **{HEADS[head].removesuffix(".weight"): True for head in thoughts.heads},
        }
        # Rows that are not tokens, and tokens that have no row in the trained model.
        unused = [*thoughts.unused_ids, *sorted(set(range(architecture.vocab_size, rows)) - set(ids))]
        config |= {UNUSED: unused} if unused else {}
    return config


def thinking_class(family: FamilyName) -> str:
    """Returns the name of the class in the torch module for a family."""
    return f"QuietStar{FAMILIES[family].class_name}"


def _old_rope(parameters: Mapping[str, Any], local_theta: str) -> dict[str, Any]:
    """The rotary parameters in the format of transformers 4, which would otherwise silently use its defaults.

    Args:
      parameters: of all layers, or by kind of layer; local_theta: the field of the base in layers with a window.
    """
    if "full_attention" in parameters:
        base = {local_theta: parameters["sliding_attention"]["rope_theta"]} if local_theta else {}
        return base | _old_rope(parameters["full_attention"], "")
    beside = ("rope_theta", "partial_rotary_factor")
    old = {key: parameters[key] for key in beside if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in beside}
    return old if parameters["rope_type"] == "default" else {**old, "rope_scaling": scaling}


def _is_there(output: Path, card: Mapping[str, bytes]) -> bool:
    """Whether the folder already contains this export: an earlier call may have been killed after completing it.

    Raises:
      CheckpointError: the folder contains something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    with contextlib.suppress(OSError):
        if all((output / name).read_bytes() == content for name, content in card.items()):
            return True
    raise CheckpointError(f"{output} exists already. Remove it, or choose another folder.")


def torch_names(table: str) -> tuple[str, ...]:
    """Returns the keys of a table of the torch module, `MIXINGS` or `THINKING`, read without torch."""
    for node in ast.parse(MODULE.read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table:
            return tuple(ast.literal_eval(key) for key in node.value.keys)  # type: ignore[union-attr]
    raise AssertionError(f"{MODULE} has no {table}")


def _check_exportable(what: str, name: str, table: str) -> None:
    known = torch_names(table)
    if name not in known:
        raise ConfigError(
            f"The {what} {name!r} cannot be exported: the torch module of an export has only {', '.join(known)}. Add "
            f"a function that computes {name!r} to {table} in {MODULE}, or set `format` to base, which exports the "
            "decoder without thoughts."
        )


def _check_parameters(parameters: Parameters, architecture: Architecture, heads: Collection[str]) -> None:
    wanted = parameter_shapes(quietstar_entries(architecture, heads))
    found = dict(parameters.shapes)
    wrong = [path for path in {**wanted, **found} if wanted.get(path) != found.get(path)]
    if wrong:
        raise CheckpointError(
            "The parameters of the checkpoint do not fit its architecture (found, expected):\n"
            + "\n".join(f"  - {path}: {found.get(path)}, {wanted.get(path)}" for path in wrong)
        )


def _split(shapes: Mapping[str, Shape], options: ExportOptions) -> Any:
    """Assigns each tensor to a file."""
    size = ITEM_BYTES[DTYPES[options.dtype]]
    byte_size: Callable[[Any], int] = lambda shape: size * int(np.prod(shape))  # noqa: E731
    try:
        return split_state_dict_into_shards_factory(
            dict(shapes),
            get_storage_size=byte_size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=options.max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(
            f"max_shard_size is {options.max_shard_size!r}; it must be a number with a unit, such as 5GB."
        ) from error


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
