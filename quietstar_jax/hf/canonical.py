"""Maps tensor names to those of transformers, independent of the wrappers that the model had when it was saved.

torch.compile, DDP and FSDP add components to names, trainers and value heads store the model under a prefix, and a
matrix that is both embedding and head may be stored under either name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quietstar_jax.errors import CheckpointError, short
from quietstar_jax.hf.config_json import tied
from quietstar_jax.hf.folder_kinds import classifier_advice, is_classifier
from quietstar_jax.hf.safetensors_file import TensorInfo

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Name components that wrappers add; no supported model has a module with such a name.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
ANCHOR = "layers.0.post_attention_layernorm.weight"  # exists in every family, and only in decoders
DECODER_PREFIXES = ("embed_tokens.", "layers.", "norm.")  # prefixes of the names in a decoder
Tensors = dict[str, TensorInfo]


def canonical_names(folder: Path, tensors: Mapping[str, TensorInfo]) -> Tensors:
    """Returns the tensors with the decoder under `model.` and its head under `lm_head.weight`.

    Raises:
      CheckpointError: two tensors get the same name, or several models are stored together.
    """
    plain: Tensors = {}
    for name, info in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in plain:
            raise CheckpointError(
                f"{folder} contains two tensors for {short(bare, str)}: {short(plain[bare].name, str)} and "
                f"{short(name, str)}. Remove the one that does not belong to the model."
            )
        plain[bare] = info
    roots = sorted(name.removesuffix(ANCHOR) for name in plain if name == ANCHOR or name.endswith(f".{ANCHOR}"))
    if not roots or "model." in roots:
        return plain
    if len(roots) > 1:
        raise CheckpointError(
            f"{folder} contains several models: their names begin with "
            f"{', '.join(short(root, str) for root in roots[:4])}. Write one of them to its own folder."
        )
    (root,) = roots
    outer = root.removesuffix("model.")
    if root:
        logging.warning("%s: the model's tensors are those that begin with %r.", folder, root)

    def renamed(name: str) -> str:
        inside = name.startswith(root) and name.removeprefix(root).startswith(DECODER_PREFIXES)
        return f"model.{name.removeprefix(root)}" if inside else name.removeprefix(outer)

    return {renamed(name): info for name, info in plain.items()}


def tie(
    folder: Path, config: dict[str, Any], tensors: Tensors, read: Callable[[TensorInfo], np.ndarray]
) -> tuple[dict[str, Any], Tensors]:
    """Returns config and tensors; a tied model has only one matrix, under the name of the embedding.

    The rules are those of transformers 5. A matrix stored under one name is both embedding and head. Two equal matrices
    are tied. Two different matrices are not tied, whatever config.json says, and a warning is logged. (transformers 4
    uses the embedding.)

    Raises:
      CheckpointError: the model is a classifier without a language-model head, so tying does not apply.
    """
    if is_classifier(config) and LM_HEAD not in tensors:
        raise CheckpointError(f"{folder} cannot be used. {classifier_advice(config)}")
    if tied(config) is not True or LM_HEAD not in tensors:
        return config, tensors
    head = tensors[LM_HEAD]
    embedding = tensors.get(EMBEDDING, head)
    apart = (embedding.file, embedding.offset) != (head.file, head.offset)
    if apart and not (embedding.shape == head.shape and np.array_equal(read(embedding), read(head), equal_nan=True)):
        logging.warning(
            "%s: config.json ties the embeddings (tie_word_embeddings), but %s and %s are both stored and differ: both "
            "are used, as transformers 5 does. Set tie_word_embeddings to false to remove this warning.",
            folder, EMBEDDING, LM_HEAD,
        )  # fmt: skip
        return {**config, "tie_word_embeddings": False}, tensors
    return config, {EMBEDDING: embedding, **{name: info for name, info in tensors.items() if name != LM_HEAD}}
