"""Tiny models that think, opened as a user opens them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.training.setup import Run
from tests.hf.runs import start_run, write_tokenizer
from tests.models.test_parity import VOCAB, random_model

PROMPT_LENGTHS = (11, 3, 7, 1)


class Thinker(NamedTuple):
    """A run of no steps, its parameters, the torch model that it began from, and the whole opened again."""

    run: Run
    state: TrainState
    original: Any
    model: LoadedModel


def thinker(folder: Path, variant: str, **thought: Any) -> Thinker:
    """A variant of `test_parity` that thinks six tokens, and whose texts never end; settings of `config.thought`."""
    original = random_model(variant)
    original.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", VOCAB)
    run, state = start_run(folder / "run", folder / "hf", **thought)
    model = dataclasses.replace(load_model(folder / "run"), eos_ids=())
    return Thinker(run, state, original, model)


def prompts(seed: int = 3) -> list[list[int]]:
    """Token ids of different lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, VOCAB, n).tolist() for n in PROMPT_LENGTHS]
