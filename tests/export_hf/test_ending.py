"""Thoughts that the model ends, in an export: torch and JAX end the same thoughts, and the export is read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quietstar_jax.errors import CheckpointError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.generate import Generator
from quietstar_jax.hf.json_file import read_json
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.thoughts.ending import thought_ids
from tests.export_hf.exports import exported_run, tensors, write_checkpoint
from tests.hf.runs import start_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PROMPTS = [[0, 5, 6, 7, 8], [0, 9], [0, 11, 4, 12, 13, 14, 15]]
NEW = 10


@pytest.fixture(scope="module", params=["sampled", "token"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` with thoughts that end by a head or at the token 2 (`---`), and its export `out`."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sampled":
        return exported_run(folder, end="sampled")
    weights = tensors(write_checkpoint(folder / "hf"))
    weights["lm_head.weight"][2] *= 11  # so that the token is sometimes certain, and sometimes impossible
    save_file(weights, folder / "hf" / "model.safetensors", {"format": "pt"})
    start_run(folder / "run", folder / "hf", end="token")
    export(folder / "run", folder / "out", ExportOptions())
    return folder


def test_torch_thinks_what_jax_does(folder):
    """Thoughts of several lengths, among them empty ones, then the same tokens and mixing weights."""
    ours = Generator(dataclasses.replace(load_model(folder / "run"), eos_ids=()), batch_size=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()
    lengths, made = set(), set()
    for think in ("always", "every:2", "start:0.2"):
        for prompt, one in zip(PROMPTS, ours.generate(PROMPTS, max_tokens=NEW, think=think), strict=True):
            text = torch.tensor([[*prompt, *one.token_ids]])
            with torch.no_grad():
                seen = model(text, think=think)
            (theirs,) = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                                       think=think)  # fmt: skip
            assert tuple(theirs[len(prompt) :].tolist()) == one.token_ids
            for token, thought, weight in zip(
                one.tokens, seen.thoughts[0, len(prompt) - 1 :], seen.mixing_weight[0, len(prompt) - 1 :], strict=False
            ):
                assert token.thought_ids == thought_ids(thought.tolist())
                assert token.has_thought == (-1 not in thought.tolist())
                made |= {token.has_thought} if think == "start:0.2" else set()
                assert token.mixing_weight == pytest.approx(float(weight), abs=1e-5)
                lengths |= {len(token.thought_ids)} if token.has_thought else set()
                assert folder.name.startswith("sampled") or 2 not in token.thought_ids
    assert {0, 6} < lengths, "thoughts that never or always end show little"
    assert folder.name.startswith("sampled") or made == {True, False}


def test_a_text_does_not_depend_on_its_neighbours(folder):
    model = dataclasses.replace(load_model(folder / "run"), eos_ids=())
    together = Generator(model, batch_size=3).generate(PROMPTS, max_tokens=6, thought_temperature=1.0, seed=4)
    for prompt, one in zip(PROMPTS, together, strict=True):
        (alone,) = Generator(model, batch_size=3).generate([prompt], max_tokens=6, thought_temperature=1.0, seed=4)
        assert [token.thought_ids for token in alone.tokens] == [token.thought_ids for token in one.tokens]
        assert alone.token_ids == one.token_ids
    assert len({len(token.thought_ids) for one in together for token in one.tokens}) > 1


def test_an_export_is_read_back(folder):
    run, out = (load_model(folder / name) for name in ("run", "out"))
    written = read_json(folder / "out" / "config.json")
    assert (out.thought.end, out.thought.gate) == (run.thought.end, False)
    assert run.params.keys() == out.params.keys()
    assert run.settings().start_token == out.settings().start_token == written["thought_start_token"] == 2
    assert run.settings().end_token == out.settings().end_token == written.get("thought_end_token")
    if run.thought.end == "token":
        assert written["thought_end_token"] == 2
        return
    assert written["thought_end"] is True
    for name in ("end_head.weight", "end_head.bias"):
        assert np.any(run.params[name])
        np.testing.assert_array_equal(run.params[name], out.params[name])


@pytest.mark.parametrize("field", ["thought_start_token", "thought_end_token"])
@pytest.mark.parametrize("id", [-1, 10**6, "2", True, 1.0])
def test_a_token_that_cannot_begin_or_end_thoughts_is_refused(folder, tmp_path, field, id):
    for file in (folder / "out").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(tmp_path / "config.json") | {field: id}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is .*; it must be a token id, 0 \.\. "):
        load_model(tmp_path)
