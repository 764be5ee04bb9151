"""Identifies folders and tensors that are not a causal language model in safetensors, and says what to do.

A user who gives an adapter, a GGUF file or a reward model needs the kind of the folder and the next step, not which
tensors are missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quietstar_jax.errors import short
from quietstar_jax.hf.json_file import read_json

SAVE = "load it with transformers and write it with `save_pretrained(FOLDER)`"
# (pattern of a file or folder name, kind of the folder, advice). The first match is reported.
KINDS = (
    ("adapter_config.json", "a PEFT adapter, not a complete model", ""),
    ("*.gguf", "a model in GGUF, the format of llama.cpp", "Fetch the safetensors of the same model"),
    ("consolidated*", "a model in the original format of Meta or Mistral (consolidated.*)",
     "Fetch its Hugging Face version, or convert it with the convert_*_weights_to_hf.py of transformers"),
    ("params.json", "a model in the original format of Meta or Mistral (params.json)",
     "Fetch its Hugging Face version, or convert it with the convert_*_weights_to_hf.py of transformers"),
    ("*.distcp", "a distributed checkpoint of PyTorch", f"Convert it to one state dict, {SAVE}"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed",
     "Run its zero_to_fp32.py, and put model.safetensors and config.json into one folder"),
    ("global_step*", "a checkpoint of DeepSpeed",
     "Run its zero_to_fp32.py, and put model.safetensors and config.json into one folder"),
    ("model_index.json", "a pipeline of diffusers, not a language model", "Give a causal language model"),
    ("*.onnx", "a model in ONNX", "Fetch the safetensors of the same model"),
    ("tf_model*.h5", "TensorFlow weights", f"Convert them: {SAVE}"),
    ("*.h5", "TensorFlow weights", f"Convert them: {SAVE}"),
    ("*.msgpack", "Flax weights of transformers", f"Convert them: {SAVE} (transformers 4, from_flax=True)"),
    ("*.npz", "numpy or MLX weights", "Fetch the safetensors of the same model"),
)  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_LANGUAGE = re.compile(r".*For(SequenceClassification|TokenClassification|QuestionAnswering|RewardModel\w*)")
QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_zero_point|weight_packed|absmax|quant_map|SCB"
    r"|quant_state\..*|weight\.(absmax|quant_map|quant_state\..*))"
)
# Heads that read the decoder's hidden states but do not change its predictions, and the parts that read images.
IGNORED_HEADS = re.compile(
    r"(v|q|value|reward|rm|critic|regression|classification|medusa|eagle|mtp|draft|aux)_?heads?\b.*"
    r"|(score|critic|classifier|qa_outputs|ilql_heads|vhead|(model\.)?(vision_tower|multi_modal_projector))\..*",
    re.IGNORECASE,
)
THOUGHT_PARTS = re.compile(
    r"((talk|mixing|thought)_?heads?|thought_gate(_log_slope)?|thought_end|(start|end)_embedding)\b.*"
)


def describe_folder(folder: Path) -> str:
    """Describes a folder without model.safetensors and says what to do; the text follows `FOLDER: ` in a message."""
    names = sorted(os.listdir(folder))
    for pattern, kind, advice in KINDS:
        if any(fnmatch(name, pattern) for name in names):
            return f"it is {kind}. {advice or adapter_advice(folder)}."
    return _incomplete(folder, names)


def adapter_advice(folder: Path) -> str:
    """Returns how to merge an adapter, or train it further."""
    config = read_json(folder / "adapter_config.json")
    base, method = (short(config.get(key, "?"), str) for key in ("base_model_name_or_path", "peft_type"))
    return (
        f"It is of type {method} and belongs to the model {base}. Merge it: load both with peft, call "
        "`merge_and_unload()`, then `save_pretrained(FOLDER)`, and give that folder; or train it further, with "
        "config.model.checkpoint set to the model, config.model.adapter to this folder, and config.model.adapters to "
        "its maps, rank and alpha"
    )


def describe_tensors(config: Mapping[str, Any], names: Collection[str]) -> str:
    """Describes tensors that do not fit config.json; returns "" if they are of no known kind."""
    if any("lora_" in name or ".ia3_" in name for name in names):
        return (
            "They belong to an adapter that was not merged. Load the model with peft, call `merge_and_unload()`, then "
            "`save_pretrained(FOLDER)`, and give that folder."
        )
    if any(QUANTIZED.fullmatch(name) for name in names):
        return "They are quantized weights. Use the unquantized checkpoint of this model."
    if any(".experts." in name or "block_sparse_moe" in name for name in names):
        return "They are a mixture of experts, which is not supported. Use a dense model."
    thought = sorted(name for name in names if THOUGHT_PARTS.fullmatch(name))
    if thought:
        return (
            f"They are a Quiet-STaR whose mixing head is not that of the published checkpoints ({_some(thought)}). "
            "Remove these tensors to use the decoder alone; its thoughts cannot be read."
        )
    if is_classifier(config) and "lm_head.weight" not in names:
        return classifier_advice(config)
    return ""


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a class that does not predict the next token."""
    classes = config.get("architectures")
    named = classes if isinstance(classes, list) else []
    return any(isinstance(name, str) and NOT_LANGUAGE.fullmatch(name) for name in named)


def classifier_advice(config: Mapping[str, Any]) -> str:
    """Describes a classifier or reward model, and says what to do."""
    return (
        f"It is a {short(config['architectures'][0], str)} without a language-model head: a classifier or reward "
        "model. Give the language model on which it is based."
    )


def _incomplete(folder: Path, names: list[str]) -> str:
    """Describes a folder that matches none of `KINDS` and lacks model.safetensors."""
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return (
            f"it has {_some(shards)}, but neither model.safetensors nor model.safetensors.index.json, which lists the "
            "files of the model. Fetch the checkpoint again, or rename a single file to model.safetensors."
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"it has only pickled weights ({_some(pickled)}), which can run code and are not read. Fetch the "
            f"safetensors of the same model, or convert them: {SAVE}."
        )
    inside = [name for name in names if os.path.isfile(folder / name / "config.json")]
    if inside:
        return f"it has no weights, but the folders in it are models: {_some(inside)}. Give one of these."
    if "snapshots" in names:
        return "it is an entry of the Hugging Face cache. Give the folder of a commit in its `snapshots`."
    if any(name.startswith("tokenizer") for name in names):
        return "it has a tokenizer but no weights (model.safetensors). Fetch the complete model."
    return f"it has no weights (model.safetensors); it has {_some(names) or 'nothing'}. Give a Hugging Face model."


def _some(names: list[str]) -> str:
    """Returns the first few names as a list for a message."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(short(name, str) for name in names[:4]) + more
