"""A tiny model that thinks, for all tests of generation."""

from __future__ import annotations

import dataclasses

import pytest

from quietstar_jax.generate import Generator
from tests.hf.checkpoints import TINY, random_tensors, write
from tests.hf.runs import END, START, start_run, write_tokenizer

ARCHITECTURE = dataclasses.replace(
    TINY, family="mistral", vocab_size=40, max_positions=96, sliding_window=9, num_layers=1
)
WORDS = 36  # the tokenizer knows these and the two tokens of a thought: ids 38 and 39 are not tokens


@pytest.fixture(scope="session")
def generator(tmp_path_factory) -> Generator:
    folder = tmp_path_factory.mktemp("model")
    write(folder / "hf", random_tensors(ARCHITECTURE), ARCHITECTURE)
    write_tokenizer(folder / "hf", WORDS, START, END)
    start_run(folder / "run", folder / "hf")
    return Generator.open(folder / "run", batch_size=3)
