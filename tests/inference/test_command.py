"""The command line: to the terminal and from file to file, resumed, refused; what an export generates."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietstar_jax.errors import ConfigError, DataError, UserError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.generate import Generator, Token, main
from quietstar_jax.inference.batch_files import generate_file
from quietstar_jax.inference.terminal import print_tokens
from quietstar_jax.io import lock_file
from quietstar_jax.training.loop import train
from tests.training.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (None, None, 1.0, 0.9, 0.5, ())  # of `Generator.job`: sampled texts and thoughts
PROMPT = "sum 1 +7 +3 +4 +2 +5 ask"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was trained to think two tokens, and its export."""
    folder = tmp_path_factory.mktemp("run")
    train(tiny_config(folder / "run", evaluation__batches=0, data__validation=()))
    export(folder / "run", folder / "exported", ExportOptions())
    return folder / "run"


@pytest.fixture(scope="module")
def generator(run) -> Generator:
    return Generator.open(run, batch_size=2)


def call(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_to_the_terminal(run, generator, capsys):
    call("--checkpoint", run, "--prompt", PROMPT, "--max-tokens", 4)
    (expected,) = generator.generate([PROMPT], max_tokens=4)
    assert capsys.readouterr().out == f"{PROMPT}{expected.text}\n"


@pytest.mark.parametrize("checkpoint", ["run", "exported"])
def test_thoughts_are_shown_before_their_tokens(run, generator, capsys, checkpoint):
    call("--checkpoint", run.parent / checkpoint, "--prompt", PROMPT, "--max-tokens", 3, "--show-thoughts")
    (expected,) = generator.generate([PROMPT], max_tokens=3)
    shown = "".join(f"[{token.thought} | {token.mixing_weight:.3f}]{token.text}" for token in expected.tokens)
    assert capsys.readouterr().out == f"{PROMPT}{shown}\n"
    assert all(len(token.thought_ids) == 2 for token in expected.tokens)


def test_thoughts_are_dimmed_and_cannot_steer_the_terminal():
    out = io.StringIO()
    token = Token(5, "yes\n", "a\n\x1b[31mb ", (1, 2), 0.25, True)
    print_tokens([token], out, show_thoughts=True, colour=True)
    assert out.getvalue() == "\x1b[2m[a\\n\\x1b[31mb | 0.250]\x1b[0myes\n"


def test_other_lengths_and_no_thoughts(run, generator, capsys):
    call("--checkpoint", run, "--prompt", PROMPT, "--thoughts", "off", "--max-tokens", 4)
    (plain,) = generator.generate([PROMPT], max_tokens=4, thoughts=False)
    assert capsys.readouterr().out == f"{PROMPT}{plain.text}\n"
    call("--checkpoint", run, "--prompt", PROMPT, "--show-thoughts", "--thought-length", 4, "--max-tokens", 1)
    assert len(capsys.readouterr().out.split("[")[1].split(" | ")[0].split()) == 4


def test_thoughts_only_where_the_policy_makes_them(run, generator, tmp_path, capsys):
    options = ("--max-tokens", 4, "--think", "every:2", "--show-thoughts")
    call("--checkpoint", run, "--prompt", PROMPT, *options)
    (expected,) = generator.generate([PROMPT], max_tokens=4, think="every:2")
    shown = [f"[{t.thought} | {t.mixing_weight:.3f}]" if t.thought_ids else "" for t in expected.tokens]
    read = len(generator.encode(PROMPT))
    assert [*map(bool, shown)] == [(read + k) % 2 == 0 for k in range(len(shown))]
    assert len(shown) > 1
    texts = "".join(thought + token.text for thought, token in zip(shown, expected.tokens, strict=True))
    assert capsys.readouterr().out == f"{PROMPT}{texts}\n"
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": PROMPT}])
    call("--checkpoint", run, "--data", source, "--output", tmp_path / "out.jsonl", *options, "--quiet")
    (row,) = read_lines(tmp_path / "out.jsonl")
    assert row["thoughts"] == [token.thought if token.thought_ids else None for token in expected.tokens]
    assert row["thinking_rate"] == round(sum(map(bool, shown)) / len(shown), 6)
    with pytest.raises(ConfigError, match="--think is 'every:2', but --thoughts is off"):
        call("--checkpoint", "nowhere", "--prompt", PROMPT, *options, "--thoughts", "off")


def test_from_file_to_file(run, generator, tmp_path, capsys):
    rows = [{"id": 7, "prompt": PROMPT}, {"prompt": "convert 2 rod ask", "more": {"é": [1]}}, {"prompt": PROMPT}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    options = ("--max-tokens", 5, "--temperature", 1.0, "--top-p", 0.9, "--seed", 3, "--batch-size", 2, "--quiet")
    call("--checkpoint", run, "--data", source, "--output", tmp_path / "out.jsonl", *options, "--show-thoughts")
    assert "3 texts" in capsys.readouterr().out
    found = read_lines(tmp_path / "out.jsonl")
    made = generator.generate([row["prompt"] for row in rows], max_tokens=5, temperature=1.0, top_p=0.9, seed=3)
    for row, given, one in zip(found, rows, made, strict=True):
        assert {name: row[name] for name in given} == given
        assert (row["completion"], row["finish_reason"]) == (one.text, one.finish_reason)
        assert (row["thoughts"], len(row["mixing_weights"])) == ([*one.thoughts], len(one.tokens))
    assert made[0].token_ids != made[2].token_ids, "the same prompt twice is drawn twice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("think", ["every:3", "random:0.5", "never", "always"])
def test_rows_of_a_file_do_not_depend_on_their_neighbours(generator, tmp_path, think):
    """Prompts of different lengths, in batches of two: each row is the text of its prompt alone."""
    prompts = ["sum", PROMPT, "convert 2 rod ask", "sum 1 +7 +3 +4", "ask"]
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    generate_file(generator, source, tmp_path / "out.jsonl", generator.job(8, 9, *SETTINGS, think), show_thoughts=True)
    rows, made = read_lines(tmp_path / "out.jsonl"), []
    options = dict(max_tokens=9, temperature=1.0, top_p=0.9, thought_temperature=0.5)
    for prompt, row in zip(prompts, rows, strict=True):
        (alone,) = generator.generate([prompt], think=think, **options)
        assert row["completion"] == alone.text
        assert [thought or "" for thought in row["thoughts"]] == [*alone.thoughts]
        made += [bool(token.thought_ids) for token in alone.tokens]
    if think in ("never", "always"):
        texts = generator.generate(prompts, thoughts=think == "always", **options)
        assert [row["completion"] for row in rows] == [one.text for one in texts]
        assert set(made) == {think == "always"}
    else:
        assert 0 < sum(made) < len(made)


KILLED = """
import sys, time
from quietstar_jax.inference.batch import Batch
from quietstar_jax.generate import main
finish = Batch.finish
Batch.finish = lambda self: (finish(self), time.sleep(1.0))[0]
main(sys.argv[1:])
"""


def test_killed_and_run_again_it_goes_on(run, generator, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": f"sum {n} +1 ask"} for n in range(1, 9)])
    output = tmp_path / "out.jsonl"
    arguments = ["--checkpoint", str(run), "--data", str(source), "--output", str(output), "--max-tokens", "3"]
    arguments += ["--batch-size", "2", "--temperature", "1", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, env=environment)
    partial, deadline = Path(f"{output}.partial"), time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with partial.open("a") as file:
        file.write('{"prompt": "sum 5')  # a line that was being written
    kept = read_lines_of(partial)
    record = Path(f"{partial}.json")
    made_with = record.read_text()
    with pytest.raises(DataError, match=r"max_tokens: 3 -> 4"):
        call(*arguments, "--max-tokens", "4")
    call(*arguments)
    found = read_lines(output)
    assert found[: len(kept)] == kept
    assert not record.exists()
    record.write_text(made_with)  # as a kill between the last two acts leaves it
    with pytest.raises(DataError, match=r"max_tokens: 3 -> 4"):
        call(*arguments, "--max-tokens", "4")
    call(*arguments)
    assert read_lines(output) == found
    assert not record.exists()
    prompts = [row["prompt"] for row in read_lines(source)]
    expected = generator.generate(prompts, max_tokens=3, temperature=1.0)
    assert [row["completion"] for row in found] == [one.text for one in expected]


def read_lines_of(partial: Path) -> list[dict]:
    return [json.loads(line) for line in partial.read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no file or folder"),
        (b"", "is empty"),
        (b"\xff", "not UTF-8"),
        (b'{"prompt": "sum"}\n\n{"prompt": 3}', "line 3: .*'prompt'; it is 3"),
        (b'{"text": "sum"}', "the fields are 'text'"),
        (b'["sum"]', "element 1 of the array: a JSON str"),
        (b'{"prompt": ', "line 1: broken JSON"),
        (b'{"prompt": "sum"}\n{"prompt": ""}', "line 2: The prompt is empty"),
        (b'{"prompt": "%s"}' % (b"sum " * 99), "line 1: The prompt is too long"),
        (b'{"prompt": "sum", "completion": 1}', "'completion' already"),
    ],
)
def test_prompts_that_cannot_be_read(generator, tmp_path, lines, message):
    source = tmp_path / "in.jsonl"
    if lines is not None:
        source.write_bytes(lines)
    job = generator.job(1, 5, None, None, 0.0, 1.0, 0.0, ())
    with pytest.raises(DataError, match=message):
        generate_file(generator, source, tmp_path / "out.jsonl", job)
    assert not list(tmp_path.glob("out*")), "nothing is left"


def test_an_output_that_another_process_writes_is_left_alone(generator, tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", [{"prompt": "sum"}]), tmp_path / "out.jsonl"
    job = generator.job(1, 5, None, None, 0.0, 1.0, 0.0, ())
    partial = Path(f"{output}.partial")
    with partial.open("wb") as file:
        lock_file(file, partial)
        file.write(b'{"prompt": "half')
        file.flush()
        with pytest.raises(ConfigError, match="Another process is writing"):
            generate_file(generator, source, output, job)
        assert partial.read_bytes() == b'{"prompt": "half'
    generate_file(generator, source, output, job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    with partial.open("wb") as file:
        os.replace(partial, output)
        partial.touch()
        with pytest.raises(ConfigError, match="has finished"):
            lock_file(file, partial)


def test_outputs_that_cannot_be_written(generator, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "sum"}])
    job = generator.job(1, 5, None, None, 0.0, 1.0, 0.0, ())
    with pytest.raises(DataError, match="exists already"):
        generate_file(generator, source, source, job)
    with pytest.raises(DataError, match=r"folder .* is missing"):
        generate_file(generator, source, tmp_path / "none/out.jsonl", job)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((), ConfigError, "Give --prompt, or"),
        (("--prompt", "a", "--data", "x", "--output", "y"), ConfigError, "Give --prompt, or"),
        (("--data", "x"), ConfigError, "--data and --output"),
        (("--prompt", ""), UserError, "empty"),
        (("--prompt", "sum " * 99), UserError, "too long"),
        (("--prompt", "sum", "--top-p", "2"), ConfigError, "--top-p is 2.0"),
        (("--prompt", "sum", "--step", "99"), UserError, "no checkpoint of step 99"),
    ],
)
def test_command_lines_that_cannot_be(run, arguments, kind, message):
    with pytest.raises(kind, match=message):
        call("--checkpoint", run, *arguments)
