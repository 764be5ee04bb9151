"""Costs counted by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from quietstar_jax.config import Architecture, RateScales
from quietstar_jax.thoughts.flops import decoder_flops, step_flops
from quietstar_jax.thoughts.settings import ThoughtSettings

SMALL = Architecture(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=3
)
PROJECTIONS = 2 * (4 * 6 + 2 * 4 * 3 + 6 * 4)  # query, key and value, output
FEED_FORWARD = 2 * 3 * 4 * 6
HEAD = 2 * 4 * 10


def test_one_token() -> None:
    assert decoder_flops(SMALL, keys=5) == 2 * (PROJECTIONS + FEED_FORWARD + 2 * 2 * 6 * 5)


def test_a_step_part_by_part() -> None:
    settings = ThoughtSettings(length=2, count=3, tokens_ahead=2)
    found = step_flops(SMALL, settings, batch=1, length=7)
    assert found.base == 7 * (decoder_flops(SMALL, 4) + HEAD)
    assert found.sampling == 7 * 3 * 2 * (decoder_flops(SMALL, 4 + 1.5) + HEAD)
    assert found.scoring == 7 * 3 * 5 * decoder_flops(SMALL, 4 + 3)
    mixing = 2 * (4 * 4 + 4 * 4 + 4)
    assert found.scoring_heads == 7 * 3 * (2 * HEAD + 2 * (HEAD + mixing)) + 7 * 2 * 4 * 4
    assert found.backward == 2 * (found.base + found.scoring + found.scoring_heads)
    assert found.recomputation == 0
    assert found.necessary == sum(found)
    lean = step_flops(SMALL, dataclasses.replace(settings, rematerialize=True), batch=1, length=7)
    assert lean.recomputation == 7 * decoder_flops(SMALL, 4) + found.scoring
    assert lean.necessary == found.necessary


def test_a_frozen_decoder_costs_the_way_to_what_learns() -> None:
    settings = ThoughtSettings(length=2, count=3, tokens_ahead=2)
    head_only = step_flops(SMALL, settings, 1, 7, RateScales(decoder=0.0, thought_embeddings=0.0))
    mixing = 7 * 3 * 2 * 2 * (4 * 4 + 4 * 4 + 4) + 7 * 2 * 4 * 4
    assert head_only.backward == 2 * mixing
    embeddings_too = step_flops(SMALL, settings, 1, 7, RateScales(decoder=0.0))
    assert embeddings_too.backward == mixing + head_only.scoring + head_only.scoring_heads


def test_a_plain_step() -> None:
    found = step_flops(SMALL, ThoughtSettings(length=0), batch=2, length=7)
    assert found.necessary == 3 * 14 * (decoder_flops(SMALL, 4) + HEAD)


def test_the_benchmark_runs_and_names_its_figures() -> None:
    sizes = "--layers 1 --hidden 8 --heads 2 --kv-heads 1 --head-dim 4 --mlp 8 --vocab 16 --length 8 --thought-length 2"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *sizes.split(), "--steps", "1", "--json"],
        cwd=Path(__file__).resolve().parents[2], env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(ended.stdout.splitlines()[-1])
    names = ("step_seconds", "compile_seconds", "necessary_flops", "utilisation", "temp_bytes", "peak_rss_bytes",
             "thought_tokens_per_second")  # fmt: skip
    assert all(found[name] > 0 for name in names)
