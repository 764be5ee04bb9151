"""A mixing that only JAX can compute: it trains and scores, but is not exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import MODULE, ExportOptions, torch_names
from quietstar_jax.methods.mixings import MIXINGS, Logits
from quietstar_jax.methods.thinking import THINKING
from quietstar_jax.training.setup import prepare
from tests.export_hf.exports import write_checkpoint
from tests.hf.runs import our_predictions, start_run
from tests.training.test_step import step_of
from tests.training.tiny import tiny_config


@pytest.fixture
def average() -> Iterator[str]:
    """Registers the mixing `average`."""

    @MIXINGS.register(formula=r"\tfrac12 (x + x')", assumes="nothing", source="this test", head=False)
    def average(logits: Logits, base: jax.Array, talk: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        """The mean of the logits."""
        weight = jnp.full(talk.shape[:-1], 0.5, jnp.float32)
        return (logits(base)[:, None] + logits(talk)) / 2, weight

    yield "average"
    del MIXINGS["average"]


def test_every_mixing_and_policy_of_this_package_can_be_exported() -> None:
    assert torch_names("MIXINGS") == tuple(MIXINGS)
    assert torch_names("THINKING") == tuple(THINKING)


def test_it_trains(average: str, tmp_path: Path) -> None:
    run = prepare(tiny_config(tmp_path, thought__mixing=average))
    _, metrics = step_of(run, run.config.phases[1])
    assert np.isfinite(metrics["loss"])
    assert float(metrics["mixing_weight"]) == 0.5


def test_it_scores_but_is_not_exported(average: str, tmp_path: Path) -> None:
    run, state = start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf"), mixing=average)
    _, mixed, base = our_predictions(run, state, np.arange(2, 12)[None])
    assert np.isfinite(mixed).all()
    assert np.abs(mixed - base).max() > 0.01
    with pytest.raises(ConfigError) as error:
        export(tmp_path / "run", tmp_path / "out", ExportOptions())
    assert all(part in str(error.value) for part in (repr(average), f"MIXINGS in {MODULE}", "base"))
    assert {item.name for item in tmp_path.iterdir()} == {"run", "hf"}
    export(tmp_path / "run", tmp_path / "out", ExportOptions(format="base"))


def test_an_export_with_a_mixing_that_torch_does_not_have_is_not_loaded(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export(run, tmp_path / "out", ExportOptions())
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "thought_mixing": "average"}))
    with pytest.raises(ValueError, match=r"'average', but this module has only hidden_states.*to MIXINGS"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
