"""Tiny models that write any text: every byte is a token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quietstar_jax.architecture import Architecture
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.hf.names import decoder_entries
from quietstar_jax.models.families import FAMILIES
from tests.hf.checkpoints import TINY, write
from tests.hf.runs import start_run

SPECIAL = ("<s>", "</s>")
ARCHITECTURE = Architecture(**{**vars(TINY), "vocab_size": 258, "hidden_size": 16, "max_positions": 256})
GEMMA3 = dataclasses.replace(
    ARCHITECTURE, family="gemma3_text", tie_embeddings=True, sliding_window=5, full_attention_layers=(1,),
    rope_theta=1e6, rope_local_theta=1e4, embedding_multiplier=4.0, activation="gelu_tanh",
    **FAMILIES["gemma3_text"].fixed,
)  # fmt: skip


def bytes_tokenizer(*merged: str, begin: bool = False) -> Tokenizer:
    """Every byte a token, and more tokens of several characters.

    Args:
      begin: every text begins with <s>.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *merged])}
    backend = Backend(models.BPE(vocabulary, [(token[0], token[1:]) for token in merged]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer("bytes", fast)


def write_plain(folder: Path, architecture: Architecture = ARCHITECTURE, *, scale: float = 1.0) -> Path:
    """A model of random weights in Hugging Face layout with its tokenizer."""
    draw = np.random.default_rng(3)
    tensors = {
        entry.name: np.ones(entry.shape, np.float32) if "norm" in entry.name
        else (scale * draw.standard_normal(entry.shape) * entry.shape[-1] ** -0.5).astype(np.float32)
        for entry in decoder_entries(architecture)
    }  # fmt: skip
    write(folder, tensors, architecture)
    bytes_tokenizer(begin=True).save(folder)
    return folder


def write_run(folder: Path, plain: Path, **thought: object) -> Path:
    """Step 0 of a run from that model, with random thoughts that change every prediction."""
    start_run(folder, plain, initial_start_token="-", initial_end_token="-", **thought)
    return folder
