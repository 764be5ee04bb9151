"""The command line from a run to a page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError, UserError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.report import main
from quietstar_jax.reports.make import measure_selective
from quietstar_jax.reports.observe import Window, observe
from quietstar_jax.reports.options import MOST_TOKENS
from quietstar_jax.training.loop import train
from tests.training.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(workdir, data__validation=(), thought__gate=True, thought__gate_tokens_ahead=2)
    train(dataclasses.replace(config, phases=config.phases[1:]))
    return workdir


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_a_page_of_a_run(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "quietstar_jax.report", "--checkpoint", str(run), "--data", "synthetic"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([*command, "--limit", "3", "--output", str(page)], cwd=ROOT, env=environment, check=True,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.stdout == f"{page} ({page.stat().st_size / 2**20:.1f} MB)\n"
    html = page.read_text()
    assert f"{run}, step 4" in html
    assert html.count('<section class="doc">') == 3
    assert "Phase “thoughts”, up to step 4" in html
    assert "synthetic corpus" in html
    assert html.count('aria-label="Loss with thoughts') == 4
    assert 'aria-label="Loss of the thought alone"' in html
    assert 'aria-label="Loss of several thoughts together"' in html
    assert html.count('aria-label="By thinking rate, ') == 2
    assert 'aria-label="Reliability of the thinking gate"' in html
    assert "thoughts make the true next 2 tokens likelier" in html
    assert [f"<td>{price}</td>" in html for price in (0.05, 0.1, 0.2, 0.5)] == [True] * 4
    assert not re.search("nan|inf", "".join(re.findall(r"<svg.*?</svg>", html)))
    entry = data_of(page)["models"][0]["tokens"][0]
    assert [len(thought[3]) for thought in entry["k"]] == [2, 2, 2, 2]  # as long as trained, greedy and three sampled


@pytest.mark.slow
def test_the_gate_is_compared_with_what_it_is_trained_to_predict(run: Path) -> None:
    model, windows = load_model(run), [Window(0, np.arange(6, 26, dtype=np.int32))]
    by_ahead = {}
    for ahead in (1, 2):
        settings = model.settings(None, ahead)
        seen = observe(model, settings, windows, samples=0, seed=0)
        by_ahead[ahead] = measure_selective(model, settings, windows, seen, 0)["gate"]
    gain = seen[0].reward[0]  # over two tokens
    for found in by_ahead.values():
        assert found["tokens_ahead"] == 2
        assert [row["pays"] for row in found["prices"]] == [
            float((gain > row["price"]).mean()) for row in found["prices"]
        ]
    assert not np.allclose(gain, seen[0].base.nll - seen[0].talk.nll[0]), "the gain of the next token is another"


def test_thoughts_only_where_the_policy_makes_them(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["--checkpoint", str(run), "--data", "synthetic", "--limit", "1", "--samples", "1", "--output", str(page)]
    main([*command, "--think", "gate:-50"])
    assert "<td>-50</td>" in page.read_text()
    main([*command, "--think", "every:2"])
    tokens = data_of(page)["models"][0]["tokens"]
    for j, entry in enumerate(tokens):
        thinks = (j + 1) % 2 == 0
        assert [len(thought[3]) for thought in entry["k"]] == [2 * thinks] * 2
        assert thinks or [thought[:3] for thought in entry["k"]] == [[entry["b"], 0, 0]] * 2
    assert f"{len(tokens) // 2 / len(tokens):.1%} of the tokens, chosen by the policy every:2" in page.read_text()
    for think, message in (("never", "nothing to show"), ("margin:0", "thinks nowhere")):
        with pytest.raises(UserError, match=message):
            main([*command, "--think", think])


def test_other_text_and_other_thoughts(run: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "text.jsonl", tmp_path / "page.html"
    text.write_text('{"words": "sum 3 +1 ask 4 ."}\n{"words": "bob has 3"}\n')
    arguments = ["--checkpoint", str(run / "checkpoints"), "--data", str(text), "--output", str(page)]
    arguments += ["--text-key", "words", "--thought-length", "3", "--samples", "0", "--page-tokens", "9"]
    main([*arguments, "--step", "2", "--picture", str(tmp_path / "one.svg")])
    assert [(tmp_path / f"one_{theme}.svg").read_text().count("<svg") for theme in ("light", "dark")] == [1, 1]
    html, data = page.read_text(), data_of(page)
    assert ", step 2<" in html
    assert "Phase “thoughts”, up to step 2" in html
    assert len(data["tokens"]) == 6 + 1  # the second document is cut after two tokens
    assert [len(thought[3]) for thought in data["models"][0]["tokens"][0]["k"]] == [3]
    assert "<fieldset>" not in html
    assert "Loss of several thoughts together" not in html
    assert "the first 2 of 2 documents" in html


@pytest.mark.slow
def test_an_export_thinks_as_the_run_does(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "exported", ExportOptions("quietstar", "float32", "1GB"), None)
    pages = [tmp_path / "run.html", tmp_path / "export.html"]
    text = ["--data", "synthetic", "--limit", "2", "--tokens-ahead", "2"]
    for checkpoint, page in zip((run, tmp_path / "exported"), pages, strict=True):
        main(["--checkpoint", str(checkpoint), *text, "--output", str(page)])
    of_run, of_export = map(data_of, pages)
    assert of_run["models"][0]["tokens"] == of_export["models"][0]["tokens"]
    assert "no training records" in pages[1].read_text()


def test_an_own_text_and_two_steps_of_a_run(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["--checkpoint", str(run), "--prompt", "sum 3 +1 ask", "--prompt", "bob has 3", "--output", str(page)]
    main([*arguments, "--samples", "1", "--against-step", "2"])
    html, data = page.read_text(), data_of(page)
    assert html.count('<section class="doc">') == 2
    assert "that of --prompt, at most" in html
    assert [data["pieces"][i] for i in data["tokens"]] == ["3", "+1", "ask", "<eos>", "has", "3", "<eos>"]
    assert [model["name"] for model in data["models"]] == [f"A: {run}, step 4", f"B: {run}, step 2"]
    ours, theirs = (model["tokens"] for model in data["models"])
    assert [len(ours), len(theirs)] == [7, 7]
    assert all(one["b"] != other["b"] for one, other in zip(ours, theirs, strict=True))
    assert "Thoughts: one greedy and 1 sampled (seed 0) before every token, with the weights of" in html
    assert html.count("at step 2.</p>") == 1


def test_what_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    file = other / "tokenizer" / "tokenizer.json"
    saved = json.loads(file.read_text())
    words = saved["model"]["vocab"]
    words["sum"], words["bob"] = words["bob"], words["sum"]
    file.write_text(json.dumps(saved))
    arguments = ["--checkpoint", str(run), "--prompt", "sum 3", "--output", str(tmp_path / "page.html")]
    for against, message in (
        (["--against", str(other)], "reads the text as other tokens"),
        (["--against", str(run)], "compare a checkpoint with itself. Give another model as --against"),
        (["--against", str(tmp_path), "--against-step", "2"], "omit --against-step"),
        (["--against-step", "3"], "has no checkpoint of step 3; it has 2, 4"),
    ):
        with pytest.raises(UserError, match=message):
            main([*arguments, *against])


def test_a_study_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--picture needs --checkpoint"):
        main(["--workdir", str(tmp_path), "--output", str(tmp_path / "page.html"), "--picture", "one.svg"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data synthetic --thought-length 0", "--thought-length is .0.; .*1 or more"),
        (f"--data synthetic --page-tokens {MOST_TOKENS + 1}", "--page-tokens is 20001; .* 20000"),
        ("--data synthetic --samples 17", "--samples is 17; .* 16"),
        ("", "needs one text: give either --data, .* or --prompt"),
        ("--data synthetic --prompt x", "needs one text"),
    ],
)
def test_impossible_wishes(arguments: str, message: str, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(ConfigError, match=message):
        main(["--checkpoint", str(run), "--output", str(page), *arguments.split()])
    assert not page.exists()


def test_a_model_that_never_thought(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "plain", data__validation=())
    train(dataclasses.replace(config, phases=(dataclasses.replace(config.phases[0], steps=0),)))
    with pytest.raises(CheckpointError, match="was not trained with thoughts"):
        main(["--checkpoint", str(tmp_path / "plain"), "--data", "synthetic", "--output", str(tmp_path / "page.html")])
