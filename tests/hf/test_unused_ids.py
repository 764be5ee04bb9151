"""A vocabulary padded beyond the tokenizer: its spare ids are in no thought and in no text, wherever the model goes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from quietstar_jax.data.vocabulary import UNUSED, unused_ids
from quietstar_jax.errors import CheckpointError
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.thoughts.controls import random_tokens
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import make_token_scorer
from tests.checkpoint.saved import edit
from tests.hf.runs import start_run, write_tokenizer
from tests.models.test_parity import VOCAB, random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SPARE = tuple(range(VOCAB - 4, VOCAB))
TOKENS = np.random.default_rng(1).integers(2, VOCAB - 4, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders of a run whose likeliest tokens are spare ids by far, of its export, and of a run from that."""
    folder = tmp_path_factory.mktemp("unused")
    original = random_model("llama")
    with torch.no_grad():
        original.lm_head.weight[list(SPARE)] = 50 * original.lm_head.weight[list(range(7, 11))]
    original.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", VOCAB - 4)
    run, _ = start_run(folder / "run", folder / "hf")
    assert run.vocabulary.unused == SPARE
    export(folder / "run", folder / "export", ExportOptions())
    again, _ = start_run(folder / "again", folder / "export", keep_thoughts=True)
    assert again.vocabulary.unused == SPARE  # though the tokenizer has names for them now
    export(folder / "again", folder / "export of that", ExportOptions())
    return {path.name: path for path in folder.iterdir() if path.name != "hf"}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow("run"), slow("export"), slow("again"), "export of that"])
def test_no_thought_and_no_text_has_them(places, name) -> None:
    model = load_model(places[name])
    assert set(SPARE) <= set(model.settings().meta_tokens)
    scorer = make_token_scorer(model.graphdef, model.settings())
    batch = Batch(TOKENS, np.ones(TOKENS.shape, bool))
    for key in (None, jax.random.key(0)):
        assert not np.isin(scorer(model.params, batch, key).thoughts, SPARE).any()
    for thoughts in (0, 3):
        (score,) = ContinuationScorer(model, model.settings(thoughts), batch_size=1)(
            [Continuation(TOKENS[0].tolist(), 8)]
        )
        assert not np.isin(score.base.best, SPARE).any()
        (made,) = Generator(model, batch_size=1).generate(
            [TOKENS[0].tolist()], max_tokens=12, thoughts=bool(thoughts), thought_length=thoughts or None,
            temperature=1.0, thought_temperature=1.0,
        )  # fmt: skip
        assert len(made.tokens)
        ids = [i for token in made.tokens for i in (token.id, *token.thought_ids)]
        assert not np.isin(ids, SPARE).any()


def test_the_torch_module_leaves_them_out(places) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(places["export"], trust_remote_code=True).eval()
    assert model.config.unused_token_ids == list(SPARE)
    with torch.no_grad():
        made = model.generate(torch.tensor(TOKENS, dtype=torch.long), max_new_tokens=5)
        thoughts = model(torch.tensor(TOKENS, dtype=torch.long)).thoughts
    assert not np.isin(thoughts, SPARE).any()
    assert not np.isin(made, SPARE).any()
    ours = load_model(places["run"])
    scores = make_token_scorer(ours.graphdef, ours.settings())(ours.params, Batch(TOKENS, np.ones(TOKENS.shape, bool)))
    np.testing.assert_array_equal(thoughts, scores.thoughts[:, 0])


def test_random_thoughts_have_none() -> None:
    assert set(np.asarray(random_tokens(np.linspace(0, 0.999, 500), 12, (3, 10, 11))).tolist()) == {*range(10)} - {3}


def test_a_run_of_an_earlier_version_is_opened_and_masked_too(places, tmp_path) -> None:
    record = places["run"] / "checkpoints/0/config/metadata"
    kept = record.read_text()
    said = json.loads(kept)
    assert said.pop("unused_ids") == list(SPARE)
    edit(places["run"] / "checkpoints/0", "config", json.dumps(said))
    try:
        assert set(SPARE) <= set(load_model(places["run"]).settings().meta_tokens)
    finally:
        record.write_text(kept)


def test_ids_with_gaps_and_bad_lists(places) -> None:
    tokenizer = load_model(places["run"]).tokenizer
    assert unused_ids(tokenizer, VOCAB - 5, {}) == ()
    assert unused_ids(tokenizer, VOCAB - 3, {UNUSED: [5]}) == (5, VOCAB - 4)
    for wrong in ("x", [1, "x"], 5, [True], {"a": 1}):
        with pytest.raises(CheckpointError, match=UNUSED):
            unused_ids(tokenizer, VOCAB, {UNUSED: wrong})
