"""Chains of thought: what is asked, what is counted, and that a killed run goes on where it stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.questions import Question
from quietstar_jax.evals.records import Records
from quietstar_jax.evals.statistics import interval_of_difference
from quietstar_jax.evals.voting import CONCLUSION, STEPS, Sampling, measure_votes
from quietstar_jax.evaluate import main
from quietstar_jax.inference.batch import Generation
from tests.evals.models import bytes_tokenizer, write_plain, write_run
from tests.evals.test_questions import write_lines

SAMPLING = Sampling(samples=3, temperature=0.7, max_tokens=10, thought_length=2, seed=0)


@dataclass
class Scripted:
    """Stands in for a generator: answers that were written beforehand, in turn for each question."""

    answers: dict[str, list[str]]
    batch_size: int = 6
    steps: str = " step {}.\n\n"

    def __post_init__(self):
        self.calls = []
        self.model = SimpleNamespace(tokenizer=bytes_tokenizer())

    def encode(self, text):
        return tuple(text.encode())

    def generate(self, prompts, **settings):
        self.calls.append((prompts, settings))
        if prompts[0].endswith(STEPS):
            return [Generation(self.steps.format(i), (), "stop") for i, _ in enumerate(prompts)]

        def question(prompt):
            return prompt.removeprefix("Q: ").partition("\n")[0]

        turn = {}
        for prompt in prompts:
            turn.setdefault(question(prompt), iter(self.answers[question(prompt)]))
        return [Generation(next(turn[question(prompt)]), (), "stop") for prompt in prompts]


def questions(*pairs):
    return [Question(text, answer, (), line) for line, (text, answer) in enumerate(pairs, start=1)]


def measured(generator, asked, path, modes=("without_thoughts",), longest=1000, sampling=SAMPLING):
    finished = []
    with Records(path, {"seed": 0}) as records:
        found = measure_votes(asked, generator, sampling, modes, longest, records, finished.append)
    assert sum(finished) == len(asked) * len(modes)
    return found


def test_votes_by_hand(tmp_path):
    generator = Scripted({"a": [" 18.", " $18.00", " 7"], "b": [" 3 apples", " none", " 1,000"]})
    found = measured(generator, questions(("a", "18"), ("b", "1,000")), tmp_path / "records.jsonl")
    votes = found["without_thoughts"]
    # a: right, right, wrong; b: wrong, silent, right. k = 1: 2/3 and 1/3. k = 3: a wins, b ties.
    assert votes["majority_accuracy"]["1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert votes["majority_accuracy"]["3"] == pytest.approx((1 + 0.5) / 2)
    assert votes["accuracy"] == votes["majority_accuracy"]["3"]
    assert votes["answered"] == pytest.approx(5 / 6)
    (steps, drawn), (conclusions, _) = generator.calls
    assert drawn["stop"] == ("Q:", "\n\n\n", "<s>")
    assert steps == ["Q: a" + STEPS] * 3 + ["Q: b" + STEPS] * 3  # two questions fill a batch
    assert conclusions[0] == "Q: a" + STEPS + " step 0." + CONCLUSION
    assert (drawn["temperature"], drawn["thoughts"]) == (0.7, False)
    assert len(set(drawn["seed"])) == 6


def test_both_modes_and_what_is_on_record(tmp_path):
    asked = questions(("a", "18"), ("b", "3"))
    path = tmp_path / "records.jsonl"
    generator = Scripted({"a": [" 18"] * 3, "b": [" 4"] * 3})
    modes = ("without_thoughts", "with_thoughts")
    found = measured(generator, asked, path, modes, sampling=dataclasses.replace(SAMPLING, reach=3))
    assert found["comparison"]["accuracy"] == {
        "difference": 0.0, "interval": interval_of_difference(0, 0, 2), "p_value": 1.0, "test": "McNemar, exact",
    }  # fmt: skip
    assert [settings["thoughts"] for _, settings in generator.calls] == [False, False, True, True]
    assert [settings["think"] for _, settings in generator.calls] == [None, None, "always", "always"]
    assert [settings["reach"] for _, settings in generator.calls] == [None, None, 3, 3]
    assert "thinking_rate" not in found["with_thoughts"]
    again = Scripted({})
    assert measured(again, asked, path, modes) == found
    assert not again.calls


def test_questions_that_leave_no_room_are_counted(tmp_path):
    asked = questions(("a", "18"), ("b" * 500, "3"))
    found = measured(Scripted({"a": [" 18"] * 3}), asked, tmp_path / "records.jsonl", longest=200)
    assert (found["questions"], found["too_long"]) == (1, 1)
    with pytest.raises(DataError, match="max_tokens"):
        measured(Scripted({}), asked, tmp_path / "more.jsonl", longest=50)


def test_steps_that_read_again_leave_no_room_lose_their_end(tmp_path):
    # 10 tokens were allowed; read again, the steps are 31.
    generator = Scripted({"a": [" 18"] * 3}, steps=" " + "é" * 15)
    longest = len("Q: a" + STEPS + CONCLUSION) + SAMPLING.max_tokens + 12
    found = measured(generator, questions(("a", "18")), tmp_path / "records.jsonl", longest=longest)
    assert found["without_thoughts"]["accuracy"] == 1
    (conclusion, *_), _ = generator.calls[1]
    assert conclusion.startswith("Q: a" + STEPS + " é")
    assert conclusion.endswith("é" + CONCLUSION)
    assert len(conclusion.encode()) + 12 <= longest
    (record,) = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()][1:]
    assert record["texts"] == [conclusion.removeprefix("Q: a" + STEPS) + " 18"] * 3


def test_records_of_something_else_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    with Records(path, {"seed": 0, "task": "gsm8k"}) as records:
        records.append({"line": 1})
        with pytest.raises(ConfigError, match="Another process"):
            Records(path, {"seed": 0, "task": "gsm8k"})
    with pytest.raises(ConfigError, match=r"measurement.seed: 0 -> 1"):
        Records(path, {"seed": 1, "task": "gsm8k"})
    with path.open("a") as file:
        file.write('{"line": 2, "numb')  # killed here
    with Records(path, {"seed": 0, "task": "gsm8k"}) as records:
        assert records.found == [{"line": 1}]
        records.append({"line": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [{"line": 1}, {"line": 2}]
    path.write_text("some text\n")
    with pytest.raises(DataError, match="is not JSON"):
        Records(path, {"seed": 0})
    with pytest.raises(DataError, match="cannot be written"):
        Records(tmp_path / "none" / "records.jsonl", {})


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, capsys):
    write_run(tmp_path / "run", write_plain(tmp_path / "plain"))
    write_lines(tmp_path / "set.jsonl", [{"question": f"{a} + 1?", "answer": a + 1} for a in range(9)])
    records = tmp_path / "records.jsonl"

    def command(path):
        return [
            "--checkpoint", str(tmp_path / "run"), "--task", "numeric_cot", "--data", str(tmp_path / "set.jsonl"),
            "--thought-length", "1", "--samples", "2", "--max-tokens", "4", "--batch-size", "2", "--records", str(path),
            "--thoughts", "on", "--json",
        ]  # fmt: skip

    process = subprocess.Popen(
        [sys.executable, "-m", "quietstar_jax.evaluate", *command(records)], env=dict(os.environ),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not records.exists() or len(records.read_bytes().splitlines()) < 4:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = records.read_bytes()
    main(command(records))
    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole_lines = before[: before.rfind(b"\n") + 1]
    assert records.read_bytes().startswith(whole_lines)  # nothing was asked twice
    assert 4 <= len(whole_lines.splitlines()) < 10
    main(command(tmp_path / "unbroken.jsonl"))
    unbroken = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert records.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert resumed["with_thoughts"] == unbroken["with_thoughts"]
