"""Architectures of well-known models by hub id, for plans without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.run_checkpoint import is_run
from quietstar_jax.config import ModelConfig
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.json_file import read_json
from quietstar_jax.settings import from_mapping
from quietstar_jax.training.resume import saved_record

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _hf(model_type: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, **more}  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _hf(
        "mistral", (32_000, 4096, 14_336, 32, 32, 8, 32_768), rope_theta=10_000.0, sliding_window=4096
    ),
    "mistralai/Mistral-7B-v0.3": _hf(
        "mistral", (32_768, 4096, 14_336, 32, 32, 8, 32_768), rope_theta=1e6, sliding_window=None
    ),
    "meta-llama/Llama-2-7b-hf": _hf("llama", (32_000, 4096, 11_008, 32, 32, 32, 4096), rope_theta=10_000.0),
    "meta-llama/Llama-3.1-8B": _hf(
        "llama", (128_256, 4096, 14_336, 32, 32, 8, 131_072), rope_parameters={**_LLAMA_3_ROPE, "factor": 8.0}
    ),
    "meta-llama/Llama-3.2-1B": _hf(
        "llama", (128_256, 2048, 8192, 16, 32, 8, 131_072), head_dim=64, tie_word_embeddings=True,
        rope_parameters={**_LLAMA_3_ROPE, "factor": 32.0},
    ),
    "HuggingFaceTB/SmolLM2-135M": _hf(
        "llama", (49_152, 576, 1536, 30, 9, 3, 8192), rope_theta=100_000.0, tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-7B": _hf("qwen2", (152_064, 3584, 18_944, 28, 28, 4, 131_072), rope_theta=1e6, rms_norm_eps=1e-6),
    "Qwen/Qwen3-8B": _hf(
        "qwen3", (151_936, 4096, 12_288, 36, 32, 8, 40_960), head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6
    ),
    "google/gemma-2-2b": _hf(
        "gemma2", (256_000, 2304, 9216, 26, 8, 4, 8192), head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "google/gemma-2-9b": _hf(
        "gemma2", (256_000, 3584, 14_336, 42, 16, 8, 8192), head_dim=256, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "google/gemma-3-1b-pt": _hf(
        "gemma3_text", (262_144, 1152, 6912, 26, 4, 1, 32_768), head_dim=256, rms_norm_eps=1e-6, sliding_window=512,
        tie_word_embeddings=True,
    ),
    "allenai/OLMo-2-1124-7B": _hf(
        "olmo2", (100_352, 4096, 11_008, 32, 32, 32, 4096), rope_theta=5e5, rms_norm_eps=1e-6
    ),
}  # fmt: skip


def planned_architecture(model: ModelConfig) -> Architecture:
    """Returns the architecture of a run's model, without its weights and without a network.

    It comes from the checkpoint of a run, from the config.json of a folder, or from the table above for a hub id;
    otherwise it is `model.architecture`.

    Raises:
      ConfigError: the hub id is not in the table, and `model.architecture` is not set.
      CheckpointError: a run has no checkpoint, or a folder has no readable config.json of a supported family.
    """
    folder = Path(model.checkpoint).expanduser()
    if model.checkpoint and is_run(folder):
        record = saved_record(folder)
        if record is None:
            raise CheckpointError(
                f"{folder} contains no checkpoint. Give the work directory of a run that has saved one."
            )
        return from_mapping(Architecture, record["architecture"], root="architecture")
    if model.checkpoint and folder.is_dir():
        return architecture_from_hf(read_json(folder / "config.json"), folder)
    if model.checkpoint in KNOWN:
        return architecture_from_hf(KNOWN[model.checkpoint])
    if model.checkpoint and model.architecture == Architecture():
        raise ConfigError(
            f"config.model.checkpoint is {model.checkpoint!r}, whose architecture is unknown without its config.json. "
            f"Give a folder that contains it, set config.model.architecture, or choose one of {', '.join(KNOWN)}."
        )
    return model.architecture
