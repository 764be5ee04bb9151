"""The layout of the published checkpoints, with the weights of the golden files: in, out and in again, the same loss.

The published config.json has no word about thoughts; the embedding has rows for start and end; the thought embeddings
have a second, unused row and are stored divided by 100.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.export_hf.export_run import ExportOptions, export
from quietstar_jax.hf.config_json import architecture_to_hf
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.models.parameters import split
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.objective import count_targets
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.training.base import can_think
from tests.hf.checkpoints import load_thinking
from tests.hf.runs import END, START, start_run, write_tokenizer
from tests.thoughts.cases import relative_error, worst_errors
from tests.thoughts.test_golden import FILES, Golden, read


def write_published(folder: Path, golden: Golden) -> dict[str, np.ndarray]:
    """A folder as it was published; returns its tensors."""
    names = [name for name in golden.arrays if name.startswith("param/")]
    theirs = {name.removeprefix("param/"): np.asarray(golden.arrays[name]) for name in names}
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    config = architecture_to_hf(golden.architecture)
    config |= {"torch_dtype": "float32", "max_thoughts": 16, "merged_talk_heads": True, "use_weighted_talk_head": True}
    (folder / "config.json").write_text(json.dumps(config))
    start, end = golden.settings.meta_tokens
    assert (start, end) == (golden.architecture.vocab_size - 2, golden.architecture.vocab_size - 1)
    write_tokenizer(folder, start, START, END)
    return theirs


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def through(request, tmp_path_factory) -> dict[str, Any]:
    """A golden file's weights written as published, run through a run of no steps, and exported."""
    folder, golden = tmp_path_factory.mktemp("published"), read(request.param)
    theirs = write_published(folder / "published", golden)
    scale = golden.settings.config.embedding_scale
    run, _ = start_run(folder / "run", folder / "published", keep_thoughts=True, embedding_scale=scale)
    export(folder / "run", folder / "out", ExportOptions())
    return {"golden": golden, "theirs": theirs, "run": run, "folder": folder}


def test_it_is_known_for_what_it_is(through):
    opened = open_checkpoint(str(through["folder"] / "published"))
    assert can_think(opened)
    assert through["run"].vocabulary.meta_tokens == through["golden"].settings.meta_tokens


def test_out_comes_what_went_in(through):
    exported = load_file(through["folder"] / "out" / "model.safetensors")
    assert set(exported) == set(through["theirs"])
    for name, value in through["theirs"].items():
        assert exported[name].tobytes() == value.tobytes(), name


@pytest.mark.some(2)
def test_golden_loss_and_gradients_through_an_export(through):
    golden, s = through["golden"], through["golden"].settings
    opened = open_checkpoint(str(through["folder"] / "out"))
    model = load_thinking(opened, s.config.embedding_scale)

    @jax.jit
    def objective(model: QuietStar, tokens: jax.Array, mask: jax.Array, thoughts: jax.Array) -> Any:
        given = Thoughts(thoughts, jnp.zeros(thoughts.shape, jnp.float32))
        counts = count_targets(mask, s.tokens_ahead)
        return jax.value_and_grad(
            lambda model: quiet_star_loss(model, tokens, mask, lambda *_: given, counts, s, tokens.shape[1])[0]
        )(model)

    loss, gradient = objective(model, golden.tokens, golden.mask, golden.thoughts)
    assert relative_error(loss, golden.arrays["loss"]) <= 1e-5
    assert not worst_errors(split(gradient)[0], golden.ours("grad"), 1e-4)
