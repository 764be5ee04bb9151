"""The thinking gate in an export: torch and JAX think at the same positions, and the export is read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.generate import Generator
from quietstar_jax.inference.batch import thinking_rate
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.text import read_text
from tests.export_hf.exports import exported_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PROMPTS = [[0, 5, 6, 7, 8], [0, 9], [0, 11, 4, 12, 13, 14, 15]]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` with a gate, and its export `out`, which recommends it."""
    return exported_run(tmp_path_factory.mktemp("gate"), ExportOptions(think="gate:0.1"), gate=True)


def test_torch_generates_what_jax_does(folder):
    ours = Generator(dataclasses.replace(load_model(folder / "run"), eos_ids=()), batch_size=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()
    assert model.generation_config.thinking == "gate:0.1"
    texts = {}
    for think in ("gate:0.1", "gate:-0.4", "always"):
        found = ours.generate(PROMPTS, max_tokens=NEW, think=think)
        texts[think] = [one.token_ids for one in found]
        for prompt, one in zip(PROMPTS, found, strict=True):
            options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, think=think)
            (theirs,) = model.generate(torch.tensor([prompt]), **options)
            assert tuple(theirs[len(prompt) :].tolist()) == one.token_ids
        assert think == "always" or 0 < thinking_rate(found) < 1
    assert texts["gate:0.1"] != texts["always"], "a gate that changes nothing proves nothing"
    given = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        made = model(given, think="gate:0.1").thoughts[0, :, 0] >= 0
    run = load_model(folder / "run")
    tokens = jnp.array([PROMPTS[2]], jnp.int32)
    text = read_text(merge(run.graphdef, run.params).decoder, tokens, jnp.ones(tokens.shape, bool), dtype=jnp.float32)
    weight, bias, log_slope = (np.asarray(run.params[f"gate.{name}"]) for name in ("weight", "bias", "log_slope"))
    gain = (np.asarray(text.hidden)[0] @ weight + bias) / np.exp(log_slope)
    assert 0 < (gain > 0.1).mean() < 1
    np.testing.assert_array_equal(made.numpy(), gain > 0.1)


def test_an_export_is_read_back(folder):
    run, out = (load_model(folder / name) for name in ("run", "out"))
    assert out.thought.gate
    assert (out.think, run.think) == ("gate:0.1", "always")
    assert run.params.keys() == out.params.keys()
    for name in ("gate.weight", "gate.bias", "gate.log_slope"):
        assert np.any(run.params[name])
        np.testing.assert_array_equal(run.params[name], out.params[name])
    found, again = (
        Generator(model, batch_size=3).generate(PROMPTS, max_tokens=4, think="gate:0.1") for model in (run, out)
    )
    assert [one.token_ids for one in found] == [one.token_ids for one in again]


def test_a_model_without_a_gate_refuses_the_policy(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"think is 'gate:0.1', but .* has no thinking gate"):
        Generator.open(run).generate(PROMPTS[:1], think="gate:0.1")
    with pytest.raises(ConfigError, match=r"think is 'gate:0.1', but the run has no thinking gate"):
        export(run, tmp_path / "out", ExportOptions(think="gate:0.1"))
    export(run, tmp_path / "out", ExportOptions())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="no thinking gate"):
        model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, think="gate:0.1")
    with pytest.raises(ValueError, match=r"gate:0\.1"):
        model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, think="gate")
