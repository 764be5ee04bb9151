"""Tiny checkpoints in the layout of Hugging Face, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from quietstar_jax.architecture import Architecture
from quietstar_jax.errors import CheckpointError
from quietstar_jax.hf.config_json import architecture_from_hf, architecture_to_hf
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.load import TensorSource, build, load_parameters
from quietstar_jax.hf.names import decoder_entries, quietstar_entries
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.model import QuietStar, abstract_params

TINY = Architecture(
    "llama", vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6
)
ARCHITECTURES = [
    TINY,
    Architecture(**{**vars(TINY), "tie_embeddings": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    Architecture(**{**vars(TINY), "family": "qwen3", "qk_norm": True, "num_layers": 1}),
    Architecture(**{**vars(TINY), "family": "phi3", "rotary_fraction": 0.7}),
    Architecture(
        **{**vars(TINY), "family": "gemma2", "norm_adds_one": True, "norm_placement": "around", "score_cap": 3.0,
           "embedding_multiplier": 8**0.5, "qkv_bias": True, "output_bias": True}
    ),
    Architecture(**{**vars(TINY), "family": "olmo2", "norm_placement": "after", "qk_norm": True,
                    "qk_norm_all_heads": True}),
]  # fmt: skip


def random_tensors(architecture: Architecture, dtype=np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {entry.name: draw.standard_normal(entry.shape).astype(dtype) for entry in decoder_entries(architecture)}


def write(folder: Path, tensors: dict[str, np.ndarray], architecture: Architecture = TINY) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(architecture)))
    return folder


def write_sharded(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """Two shards and their index; returns the weight map."""
    write(folder, {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path) -> Decoder:
    opened = open_checkpoint(str(folder))
    return load_decoder(opened, architecture_from_hf(opened.config))


def load_decoder(source: TensorSource, architecture: Architecture, **options: Any) -> Decoder:
    """The decoder alone, with the weights of a checkpoint; options as of `load_parameters`."""
    parameters = load_parameters(source, decoder_entries(architecture), **options)
    return build(lambda: Decoder(architecture, nnx.Rngs(0)), parameters)


def load_thinking(files: CheckpointFiles, embedding_scale: float) -> QuietStar:
    """The model of a checkpoint in the published layout, its start and end embeddings divided by this number."""
    architecture = architecture_from_hf(files.config)
    params = load_parameters(files, quietstar_entries(architecture))
    ratio = files.config.get("thought_embedding_scale", 100.0) / embedding_scale
    params |= {name: ratio * params[name] for name in ("start_embedding", "end_embedding")}
    return merge(abstract_params(architecture)[1], params)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    return str(error.value)
