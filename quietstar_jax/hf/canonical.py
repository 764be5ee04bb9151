"""Tensors under the names that transformers gives them, whatever wrapped the model when it was saved.

torch.compile, DDP and FSDP add parts to names, trainers and value heads put the model under a name of their own, and a
matrix that is both embedding and head may be stored under either name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quietstar_jax.errors import CheckpointError, short
from quietstar_jax.hf.folder_kinds import classifier_advice, is_classifier
from quietstar_jax.hf.safetensors_file import TensorInfo

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parts that wrappers add to names: no model here has a module of such a name.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
ANCHOR = "layers.0.input_layernorm.weight"  # every family has it, and nothing but a decoder
OWN = ("embed_tokens.", "layers.", "norm.")  # what the names in a decoder begin with
Tensors = dict[str, TensorInfo]


def canonical_names(folder: Path, tensors: Mapping[str, TensorInfo]) -> Tensors:
    """The tensors with the decoder under `model.` and its head under `lm_head.weight`.

    Raises:
      CheckpointError: two tensors become one name, or several models are stored together.
    """
    plain: Tensors = {}
    for name, info in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise CheckpointError(
                f"{folder} holds two tensors for {short(bare, str)}: {short(plain[bare].name, str)} and "
                f"{short(name, str)}. Remove the one that does not belong to the model."
            )
        plain[bare] = info
    roots = sorted(name.removesuffix(ANCHOR) for name in plain if name == ANCHOR or name.endswith(f".{ANCHOR}"))
    if not roots or "model." in roots:
        return plain
    if len(roots) > 1:
        raise CheckpointError(
            f"{folder} holds several models: their names begin with {', '.join(short(root, str) for root in roots[:4])}"
            ". Write the one that you mean to a folder of its own."
        )
    (root,) = roots
    outer = root.removesuffix("model.")
    if root:
        logging.warning("%s: the model's tensors are those that begin with %r.", folder, root)

    def renamed(name: str) -> str:
        inside = name.startswith(root) and name.removeprefix(root).startswith(OWN)
        return f"model.{name.removeprefix(root)}" if inside else name.removeprefix(outer)

    return {renamed(name): info for name, info in plain.items()}


def tie(
    folder: Path, config: dict[str, Any], tensors: Tensors, read: Callable[[TensorInfo], np.ndarray]
) -> tuple[dict[str, Any], Tensors]:
    """The config and tensors with the head of a tied model left out, stored under the embedding's name.

    As transformers 5: a matrix stored under one name is both; stored twice and equal, it is one; stored twice and
    different, the model is not tied, whatever config.json says, with a warning. (transformers 4 uses the embedding.)

    Raises:
      CheckpointError: the model is a classifier, of which a head cannot be made by tying.
    """
    if is_classifier(config) and LM_HEAD not in tensors:
        raise CheckpointError(f"{folder} cannot be used. {classifier_advice(config)}")
    if config.get("tie_word_embeddings") is not True or LM_HEAD not in tensors:
        return config, tensors
    head = tensors[LM_HEAD]
    embedding = tensors.get(EMBEDDING, head)
    apart = (embedding.file, embedding.offset) != (head.file, head.offset)
    if apart and not (embedding.shape == head.shape and np.array_equal(read(embedding), read(head), equal_nan=True)):
        logging.warning(
            "%s: config.json ties the embeddings (tie_word_embeddings), but %s and %s are both stored and differ: both "
            "are used, as transformers 5 does. Set tie_word_embeddings to false to say so.", folder, EMBEDDING, LM_HEAD
        )  # fmt: skip
        return {**config, "tie_word_embeddings": False}, tensors
    return config, {EMBEDDING: embedding, **{name: info for name, info in tensors.items() if name != LM_HEAD}}
