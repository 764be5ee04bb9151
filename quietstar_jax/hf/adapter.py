"""LoRA adapters in the folders of peft: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.errors import CheckpointError, ConfigError, short
from quietstar_jax.hf.files import ADAPTER, check_regular, listing
from quietstar_jax.hf.json_file import read_json
from quietstar_jax.hf.load import load_parameters
from quietstar_jax.hf.names import Entry, Target, decoder_entries
from quietstar_jax.hf.safetensors_file import TensorInfo, read_header, read_tensor
from quietstar_jax.models.adapters import MAPS, A, B

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name, before that of the adapted module in the base
# Fields of adapter_config.json that must be empty: they add weights, or change what rank and scale mean. An
# initialisation not in `INITIALISATIONS` changes the base, so that the adapter belongs to a different base.
UNSUPPORTED = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layer_replication", "trainable_token_indices", "target_parameters", "megatron_config", "arrow_config",
    "alora_invocation_tokens", "kasa_config", "monteclora_config", "use_bdlora", "velora_config",
)  # fmt: skip
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_expressible(adapters: Adapters, architecture: Architecture) -> None:
    """Checks that peft can represent adapters.

    Raises:
      ConfigError: there are none, they include norms, or one linear map of the base's files is several of ours.
    """
    problem = ""
    if adapters.maps == "none":
        problem = "the model has no adapters (config.model.adapters.maps is 'none')"
    elif adapters.norms:
        problem = "the norms have learned too (config.model.adapters.norms), which an adapter does not contain"
    elif not adapter_entries(architecture, adapters):
        problem = (
            f"the family {architecture.family} stores several linear maps as one tensor, which peft adapts as one; "
            "here each has an adapter of its own"
        )
    if problem:
        raise ConfigError(f"A PEFT adapter is impossible: {problem}. The formats base and quietstar merge adapters.")


def adapter_entries(architecture: Architecture, adapters: Adapters) -> list[Entry]:
    """Returns the entries of a PEFT adapter; empty if a tensor of the base contains several of the adapted maps."""
    entries, rank = [], adapters.rank
    paths = {f"decoder.layers.{name}" for name in MAPS[adapters.maps]}
    for entry in decoder_entries(architecture, "decoder."):
        adapted = [target for target in entry.targets if target.path in paths]
        if adapted and len(entry.targets) > 1:
            return []
        for target in adapted:
            # Their tensors are A [r, in] and B [out, r], ours A [I, r] and B [r, O], where I and O may be several axes.
            (outputs, inputs), stem = entry.shape, PREFIX + entry.name.removesuffix(".weight")
            count = 1 if target.shape[0] == inputs else 2
            a, b = (*target.shape[:count], rank), (rank, *target.shape[count:])
            for name, shape, ours, suffix in (
                ("lora_A", (rank, inputs), a, A),
                ("lora_B", (outputs, rank), b, B),
            ):
                filled = (Target(target.path + suffix, ours, target.layer),)
                entries.append(Entry(f"{stem}.{name}.weight", shape, filled, transpose=True))
    return entries


def adapter_config(architecture: Architecture, adapters: Adapters, base: str, revision: str) -> dict[str, Any]:
    """Returns adapter_config.json; `base` and `revision` name the model on which peft puts the adapter."""
    modules = {entry.name.split(".")[-3] for entry in adapter_entries(architecture, adapters)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "use_rslora": adapters.rank_stabilized,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT adapter whose weights are not read yet, and the entries of those of our parameters that it fills."""

    tensors: Mapping[str, TensorInfo]
    entries: list[Entry]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as `CheckpointFiles.read`."""
        return read_tensor(self.tensors[name])

    def load(self, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        """Returns the parameters that the adapter fills, by dotted path.

        Raises:
          CheckpointError: a tensor is missing, unexpected, or has another shape or dtype.
        """
        return load_parameters(self, self.entries, shardings=shardings)


def open_adapter(folder: Path, architecture: Architecture, adapters: Adapters) -> AdapterFiles:
    """Opens an adapter that peft has saved.

    It may adapt fewer maps than `adapters`, but each in all layers; the other adapters begin without effect.

    Raises:
      CheckpointError: the folder is not a LoRA adapter in safetensors, or uses something that is not supported.
      ConfigError: rank, scale or maps differ from the settings; the message says which values fit.
    """
    if not (folder / ADAPTER).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"config.model.adapter {folder} is not a folder with {ADAPTER} and {WEIGHTS}. Give the folder that "
            "`save_pretrained` of peft has written."
        )
    check_regular(folder)
    check_expressible(dataclasses.replace(adapters, norms=False), architecture)
    config = read_json(folder / ADAPTER)
    _check_kind(folder, config)
    wrong = [
        f"config.model.adapters.{name} is {ours!r}, the adapter has {theirs!r}"
        for name, ours, theirs in (
            ("rank", adapters.rank, config.get("r")),
            ("alpha", adapters.alpha, config.get("lora_alpha")),
            ("rank_stabilized", adapters.rank_stabilized, bool(config.get("use_rslora", False))),
        )
        if ours != theirs
    ]
    if wrong:
        raise ConfigError(listing(f"The adapter {folder} needs other settings:", wrong))
    tensors = read_header(folder / WEIGHTS)
    every = {entry.name: entry for entry in adapter_entries(architecture, adapters)}
    unknown = [short(name, str) for name in tensors if name not in every]
    if unknown:
        raise ConfigError(
            listing(f"{folder / WEIGHTS} has tensors outside config.model.adapters.maps={adapters.maps}:", unknown)
            + ("\n" if adapters.maps == "all" else "\nSet config.model.adapters.maps to all. ")
            + "Adapters of embeddings and of the head are not supported."
        )
    paths = {target.path for name in tensors for target in every[name].targets}
    # A and B of a map, so that one without the other is reported as missing.
    paths |= {path.removesuffix(end) + other for path in paths for end, other in ((A, B), (B, A)) if path.endswith(end)}
    entries = [entry for entry in every.values() if entry.targets[0].path in paths]
    return AdapterFiles(tensors, entries)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind, bias, start = config.get("peft_type"), config.get("bias", "none"), config.get("init_lora_weights", True)
    problems = [] if kind == "LORA" else [f"peft_type is {short(kind)}, not LORA"]
    problems += [] if bias == "none" else [f"bias is {short(bias)}, not none"]
    problems += [f"{name} is {short(config[name])}" for name in UNSUPPORTED if config.get(name)]
    if start not in INITIALISATIONS:
        problems.append(f"init_lora_weights is {short(start)}, which changes the base: convert the adapter to LoRA")
    if problems:
        raise CheckpointError(listing(f"{folder / ADAPTER} is not supported:", problems))
