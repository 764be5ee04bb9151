"""Tokenizers and observations made by hand; a model with random weights."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar_jax.architecture import Architecture
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.models.parameters import split
from quietstar_jax.reports.observe import LIKELIEST, Observed, Window
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary
from quietstar_jax.thoughts.token_scores import Prediction, TokenScores
from quietstar_jax.training.setup import abstract_structure

NASTY = "a </script><b>x</b> &amp;\n\n\té€ <!-- 😀 \x01\u202e"


def byte_level() -> Tokenizer:
    """Byte-level BPE of single bytes and a merge that ends in the middle of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "aâ", "<eos>"])}
    backend = Backend(models.BPE(vocabulary, merges=[("a", "â")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer("bytes", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer: `▁` for spaces, `<0xE2>` for bytes of unknown characters."""
    words = ["▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, merges=[("▁", "a")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer("fallback", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def random_model(max_positions: int = 64) -> LoadedModel:
    """A tiny model on the embedded corpus whose mixing head is not zero."""
    architecture = Architecture(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        max_positions=max_positions, initializer_range=0.5,
    )  # fmt: skip
    params = split(init_quiet_star(architecture, [8], [9], 100.0, jax.random.key(0)))[0]
    params["mixing_head.out"] = jax.random.normal(jax.random.key(1), params["mixing_head.out"].shape)
    tokenizer = load_tokenizer("synthetic")
    return LoadedModel(
        params=params, graphdef=abstract_structure(architecture), architecture=architecture, dtype="float32",
        tokenizer=tokenizer, vocabulary=Vocabulary(0, (4, 5), (), (), 8), thought=ThoughtConfig(), thought_length=3,
        tokens_ahead=2, bos=(), eos_ids=(tokenizer.eos_id,), suppressed_ids=(), path="a/run", step=7, commit="",
    )  # fmt: skip


def observed(tokenizer: Tokenizer, texts: list[str], gains: list[float], thought: str = "ab") -> Observed:
    """Greedy gains that repeat along the text, with one sampled thought that gains nothing."""
    thinking = tokenizer.encode(thought)
    windows, seen = [], []
    for document, text in enumerate(texts):
        tokens = np.array(tokenizer.encode(text), np.int32)
        count = len(tokens) - 1
        gain = np.resize(np.array(gains), count)
        base = np.linspace(0.0, 5.0, count)
        odds = np.tile(np.linspace(0.5, 0.1, LIKELIEST), (count, 1))
        ids = np.stack([np.roll(np.arange(LIKELIEST), j) for j in range(count)])
        ids[:, 0] = tokens[1:]
        windows.append(Window(document, tokens))
        likeliest = {"top_ids": ids, "top_probabilities": odds}
        right = np.zeros(count, bool)
        nll = np.stack([base - gain, base])
        talk = Prediction(nll, ids[None, :, 0], right[None], **{name: x[None] for name, x in likeliest.items()})
        seen.append(
            TokenScores(
                real=~right, base=Prediction(base, ids[:, 0], right, **likeliest), base_entropy=base, talk=talk,
                reward=np.stack([gain, 0 * gain]), weight=np.full((2, count), 0.25), thought_entropy=0 * nll,
                thoughts=np.tile(np.array(thinking), (2, count, 1)),
            )
        )  # fmt: skip
    namespace: Any = type("Opened", (), {"tokenizer": tokenizer, "path": "runs/<mine>", "step": 3})
    settings = ThoughtSettings(thought_length=len(thinking), tokens_ahead=2)
    return Observed(cast(LoadedModel, namespace), settings, windows, seen, "", ["made by <hand>"])
