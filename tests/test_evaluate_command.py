"""The command line of evaluation: what it prints, what it writes, and how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.evals.table import MODES, PERCENT, PLAIN
from quietstar_jax.evaluate import main
from quietstar_jax.reports.measurements import read_measurements
from quietstar_jax.reports.measurements_page import measurements_page
from tests.evals.models import write_plain, write_run
from tests.evals.test_questions import write_lines
from tests.material import material

NUMBERS = [{"question": f"{a} + {b}?", "answer": f"So.\n#### {a + b}"} for a in range(3) for b in range(4)]
CHOICES = [
    {"prompt": f"Next after {i}?", "options": [str(i + 1), str(i), "none"], "key": 0, "meta": {"id": i}}
    for i in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_run(folder / "run", write_plain(folder / "plain"))
    write_lines(folder / "numbers.jsonl", NUMBERS)
    write_lines(folder / "choices.jsonl", CHOICES)
    write_lines(folder / "text.jsonl", [{"text": "one two three. " * 9}, {"text": "four."}])
    return folder


def evaluate(capsys, folder, *more, checkpoint="run", task="gsm8k", data="numbers.jsonl", length=2):
    main(
        ["--checkpoint", str(folder / checkpoint), "--task", task, "--data", str(folder / data), "--json",
         *(["--thought-length", str(length)] if checkpoint == "run" else []), "--batch-size", "8", "--quiet", *more]
    )  # fmt: skip
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_numbers_with_and_without_thoughts(folder, capsys, tmp_path):
    found = evaluate(capsys, folder, "--output", str(tmp_path / "result.json"))
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert (found["questions"], found["too_long"], found["thoughts"]) == (12, 0, "both")
    for mode in ("without_thoughts", "with_thoughts"):
        rates = found[mode]
        assert 0 < rates["official_probability"] < 1
        low, high = rates["official_probability_interval"]
        assert low <= rates["official_probability"] <= high
    assert found["official_probability"] == found["with_thoughts"]["official_probability"]
    assert found["with_thoughts"] != found["without_thoughts"]
    compared = found["comparison"]["official_probability"]
    change = found["with_thoughts"]["official_probability"] - found["without_thoughts"]["official_probability"]
    assert compared["difference"] == pytest.approx(change)
    assert 0 < compared["p_value"] <= 1
    assert len(found["checkpoint_hash"]) == len(found["data_hash"]) == 64
    assert found["model"]["step"] == 0
    assert found["config"]["thought_length"] == 2
    assert found["versions"]["jax"]


def test_results_become_a_page(folder, capsys, tmp_path):
    asked = [(model, *what) for model in ("run", "plain")
             for what in (("gsm8k", "numbers.jsonl"), ("language_modeling", "text.jsonl"))]  # fmt: skip
    files = [tmp_path / f"{i}.json" for i in range(len(asked))]
    found = [
        evaluate(capsys, folder, "--output", str(file), "--window", "90", checkpoint=model, task=task, data=data)
        for file, (model, task, data) in zip(files, asked, strict=True)
    ]
    series = read_measurements(files)
    assert [one.task for one in series] == ["gsm8k", "language_modeling"]
    for one, results in zip(series, (found[::2], found[1::2]), strict=True):
        assert [item.name for item in one.measurements] == ["plain (no steps)", "run"]
        for item, result in zip(one.measurements, results[::-1], strict=True):
            by_mode = {mode: result[mode] for mode in MODES if mode in result}
            for name, label in (PERCENT | PLAIN).items():
                if name in result:
                    assert {mode: value.value for mode, value in item.values[label].items()} == {
                        mode: values[name] for mode, values in by_mode.items()
                    }
    assert series[0].measurements[1].differences[PERCENT["exact_match"]].p_value == 1
    assert measurements_page(series).count("<svg") == 6  # three metrics each


def test_one_mode_gives_the_same_figures(folder, capsys):
    both = evaluate(capsys, folder)
    on, off = (evaluate(capsys, folder, "--thoughts", mode) for mode in ("on", "off"))
    assert on["with_thoughts"] == both["with_thoughts"]
    assert off["without_thoughts"]["exact_match"] == both["without_thoughts"]["exact_match"]
    assert off["official_probability"] == pytest.approx(both["without_thoughts"]["official_probability"], rel=1e-4)
    assert "without_thoughts" not in on
    assert "with_thoughts" not in off
    assert "comparison" not in {**on, **off}


@pytest.mark.slow
def test_a_policy_of_thinking(folder, capsys, tmp_path):
    """Where it thinks, the figures are those with thoughts; where not, those without."""
    plain = evaluate(capsys, folder)
    everywhere, nowhere, some = (evaluate(capsys, folder, "--think", p) for p in ("entropy:0", "margin:0", "every:2"))
    assert everywhere["with_thoughts"] == plain["with_thoughts"] | {"thinking_rate": 1.0}
    assert nowhere["with_thoughts"] == plain["without_thoughts"] | {"thinking_rate": 0.0}
    assert (some["think"], plain["think"]) == ("every:2", "always")
    assert 0 < some["thinking_rate"] < 1
    assert some["with_thoughts"]["official_probability"] not in (
        plain["with_thoughts"]["official_probability"], plain["without_thoughts"]["official_probability"],
    )  # fmt: skip
    text = dict(task="language_modeling", data="text.jsonl")
    found = evaluate(capsys, folder, "--think", "random:0.5", "--perturb", "replace", **text)
    assert 0.3 < found["thinking_rate"] < 0.7
    assert found["perturbed"]["replace"][0]["nats_per_token"] == found["with_thoughts"]["nats_per_token"]
    off = evaluate(capsys, folder, "--think", "never")
    assert (off["thoughts"], off["think"]) == ("off", "never")
    few = ["--think", "every:2", "--samples", "1", "--max-tokens", "6", "--limit", "1"]
    votes = evaluate(capsys, folder, *few, "--records", str(tmp_path / "records.jsonl"), task="gsm8k_cot")
    assert votes["thinking_rate"] == pytest.approx(0.5, abs=0.1)


def test_something_else_in_the_place_of_thoughts(folder, capsys):
    own = evaluate(capsys, folder)
    found = {kind: evaluate(capsys, folder, "--control", kind) for kind in ("random", "pause")}
    losses = {own["with_thoughts"]["official_probability"]}
    for kind, one in found.items():
        assert one["without_thoughts"] == own["without_thoughts"]
        assert one["config"]["control"] == kind
        losses.add(one["with_thoughts"]["official_probability"])
    assert len(losses) == 3
    main(["--checkpoint", str(folder / "run"), "--task", "gsm8k", "--data", str(folder / "numbers.jsonl"),
          "--thought-length", "2", "--control", "random", "--quiet"])  # fmt: skip
    assert "instead of each thought: random" in capsys.readouterr().out


def test_own_fields_and_choices(folder, capsys):
    fields = ["--field", "question=prompt", "--field", "choices=options", "--field", "answer=key"]
    found = evaluate(capsys, folder, *fields, task="multiple_choice", data="choices.jsonl", checkpoint="plain")
    assert found["questions"] == 6
    assert found["thoughts"] == "off"
    assert "with_thoughts" not in found
    assert 0 <= found["accuracy"] <= 1


def test_long_questions_are_counted_not_cropped(folder, capsys, tmp_path):
    rows = [*NUMBERS[:3], {"question": "long " * 20, "answer": "#### 7"}]
    write_lines(tmp_path / "mixed.jsonl", rows)
    found = evaluate(capsys, folder, "--max-length", "40", data=tmp_path / "mixed.jsonl", checkpoint="plain")
    assert (found["questions"], found["too_long"], found["longest_tokens"]) == (3, 1, 40)
    short = evaluate(capsys, folder, "--limit", "3", data=tmp_path / "mixed.jsonl", checkpoint="plain")
    assert found["official_probability"] == pytest.approx(short["official_probability"], rel=1e-5)
    with pytest.raises(DataError, match="All 4 questions are longer than 10 tokens"):
        evaluate(capsys, folder, "--max-length", "10", data=tmp_path / "mixed.jsonl", checkpoint="plain")
    with pytest.raises(ConfigError, match=r"--max-length is 258; .* 257"):
        evaluate(capsys, folder, "--max-length", "258", checkpoint="plain")


def test_language_modeling(folder, capsys):
    found = evaluate(capsys, folder, "--window", "32", task="language_modeling", data="text.jsonl")
    assert (found["texts"], found["tokens"], found["context"]) == (2, 15 * 9 + 5, 16)
    assert found["nats_per_token"] == found["with_thoughts"]["nats_per_token"]
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / np.log(2), rel=1e-6)
    assert len(found["deciles"]) == 10


@pytest.mark.slow
def test_whether_thoughts_are_used(folder, capsys):
    text = {"task": "language_modeling", "data": "text.jsonl"}
    greedy = evaluate(capsys, folder, "--window", "32", "--perturb", "delete", **text)
    rows = greedy["perturbed"]["delete"]
    assert [row["percent"] for row in rows] == [0, 20, 40, 60, 80, 100]
    assert rows[0]["nats_per_token"] == greedy["with_thoughts"]["nats_per_token"]
    assert rows[5]["nats_per_token"] != rows[0]["nats_per_token"]
    low, high = rows[5]["change"]["interval"]
    assert low <= rows[5]["nats_per_token"] - rows[0]["nats_per_token"] + 1e-9
    assert high >= rows[5]["nats_per_token"] - rows[0]["nats_per_token"] - 1e-9
    assert greedy["thought_only_loss"] == greedy["thought_only"]["nats_per_token"]
    assert "ensemble" not in greedy
    one, several = (evaluate(capsys, folder, "--window", "32", "--samples", n, **text) for n in "13")
    assert "perturbed" not in one
    assert one["ensemble"]["nats_per_token"] == one["with_thoughts"]["nats_per_token"]
    assert one["ensemble"]["gain_over_one_thought"]["interval"] == [0, 0]
    assert several["ensemble"]["samples"] == 3
    gain = several["with_thoughts"]["nats_per_token"] - several["ensemble"]["nats_per_token"]
    assert several["ensemble"]["gain_over_one_thought"]["difference"] == pytest.approx(gain)
    assert gain > 0
    off = evaluate(capsys, folder, "--thoughts", "off", **text)
    assert not {"thought_only", "thought_only_loss", "perturbed"} & set(off)


@pytest.mark.slow
def test_the_table_of_the_use_of_thoughts(folder, capsys):
    main(["--checkpoint", str(folder / "run"), "--task", "language_modeling", "--data", str(folder / "text.jsonl"),
          "--thought-length", "2", "--window", "32", "--perturb", "shuffle", "--samples", "2", "--quiet"])  # fmt: skip
    printed = capsys.readouterr().out
    for part in ("without the text", "2 sampled thoughts", "perturbed by shuffle", "100 % (2 tokens of each)"):
        assert part in printed
    assert max(map(len, printed.split("tokens that thoughts")[0].splitlines())) <= 120


def test_the_table_for_people(folder, capsys):
    main(["--checkpoint", str(folder / "run"), "--task", "gsm8k", "--data", str(folder / "numbers.jsonl"),
          "--thought-length", "2", "--batch-size", "8"])  # fmt: skip
    printed = capsys.readouterr()
    for part in ("12 questions", "without thoughts", "official metric (probability), %", "p = "):
        assert part in printed.out
    assert "12/12" in printed.err


def test_refusals(folder, capsys):
    for error, match, more in [
        (ConfigError, "Did you mean gsm8k", {"task": "gsm8"}),
        (CheckpointError, "no trained mixing head", {"checkpoint": "plain", "args": ["--thoughts", "on"]}),
        (CheckpointError, "no trained mixing head", {"checkpoint": "plain", "args": ["--thoughts", "both"]}),
        (ConfigError, "--thoughts is 'yes'", {"args": ["--thoughts", "yes"]}),
        (CheckpointError, "--think is 'every:2'.* no trained", {"checkpoint": "plain", "args": ["--think", "every:2"]}),
        (ConfigError, "--think is 'sometimes'", {"args": ["--think", "sometimes"]}),
        (ConfigError, "--think is 'always', but --thoughts is off", {"args": ["--think=always", "--thoughts=off"]}),
        (DataError, "no file or folder .*nothing.jsonl", {"data": "nothing.jsonl"}),
        (DataError, "there is no field 'question'", {"data": "choices.jsonl"}),
        (ConfigError, "--field is 'prompt=x'", {"args": ["--field", "prompt=x"]}),
        (ConfigError, "--limit is .-1", {"args": ["--limit", "-1"]}),
        (ConfigError, "--output", {"args": ["--output", "/nowhere/at/all.json"]}),
        (ConfigError, "--window is 999", {"task": "language_modeling", "data": "text.jsonl",
                                          "args": ["--window", "999"]}),
        (ConfigError, "--perturb is 'shufle'; .*did you mean shuffle", {"args": ["--perturb", "shufle"]}),
        (ConfigError, "--control is 'pauses'; .*did you mean pause", {"args": ["--control", "pauses"]}),
        (ConfigError, "--control is 'pause', but --task is gsm8k_cot", {
            "task": "gsm8k_cot", "args": ["--control", "pause"]}),
        (ConfigError, "--control is 'pause', but .*plain cannot think", {
            "checkpoint": "plain", "args": ["--control", "pause"]}),
        (ConfigError, "--reach is 2, but .*plain cannot think", {"checkpoint": "plain", "args": ["--reach", "2"]}),
        (ConfigError, "--reach is 2, but .* with the mixing 'hidden_states'", {"args": ["--reach", "2"]}),
        (ConfigError, "--reach is 17; it must be within 1 .. 16", {"args": ["--reach", "17"]}),
        (ConfigError, "--perturb is 'delete', but --task is gsm8k", {"args": ["--perturb", "delete"]}),
        (ConfigError, "--perturb is 'delete', but --thoughts is off", {
            "task": "language_modeling", "data": "text.jsonl", "args": ["--perturb", "delete", "--thoughts", "off"]}),
        (ConfigError, "--samples is 2, but --thoughts is off", {
            "task": "language_modeling", "data": "text.jsonl", "args": ["--samples", "2", "--thoughts", "off"]}),
        (ConfigError, "--perturb is 'delete', but .*plain cannot think", {
            "task": "language_modeling", "data": "text.jsonl", "args": ["--perturb", "delete"], "checkpoint": "plain"}),
    ]:  # fmt: skip
        arguments = more.pop("args", [])
        with pytest.raises(error, match=match):
            evaluate(capsys, folder, *arguments, **more)


@pytest.mark.slow
def test_two_devices_share_a_batch(folder, capsys):
    one = evaluate(capsys, folder)
    arguments = one["config"]
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 2)\n"
        "from quietstar_jax.evaluate import main\n"
        f"main(['--checkpoint', {arguments['checkpoint']!r}, '--task', 'gsm8k', '--data', {arguments['data']!r}, "
        "'--thought-length', '2', '--batch-size', '7', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert two["versions"]["devices"] == "2"
    assert two["checkpoint_hash"] == one["checkpoint_hash"]
    for mode in ("without_thoughts", "with_thoughts"):
        assert two[mode]["official_probability"] == pytest.approx(one[mode]["official_probability"], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "data"),
    [("gsm8k", "data/gsm8k/test.jsonl"), ("commonsense_qa", "data/commonsenseqa/dev_rand_split.jsonl")],
)
def test_real_questions_and_a_real_model(capsys, task, data):
    checkpoint, file = material("models/stories260k"), material(data)
    found = evaluate(capsys, file.parent, "--limit", "4", task=task, data=file, checkpoint=checkpoint)
    assert found["questions"] == 4
    assert 0 < found["official_probability"] < 0.5


@pytest.mark.some(1)
@pytest.mark.parametrize(("task", "data"), [("gsm8k", "numbers.jsonl"), ("language_modeling", "text.jsonl")])
def test_the_front_has_the_figures_of_single_policies(folder, capsys, tmp_path, task, data):
    given = dict(task=task, data=data)
    plain = evaluate(capsys, folder, **given)
    found = evaluate(capsys, folder, "--think-front", "--figures", str(tmp_path / "charts"), **given)
    front = found.pop("front")
    assert found["with_thoughts"] == plain["with_thoughts"]
    assert list(front["policies"]) == ["random", "entropy", "margin", "start", "entropy_band"]
    right = "exact_match" if task == "gsm8k" else "accuracy"
    for points in (of_policy["points"] for of_policy in front["policies"].values()):
        assert (points[0]["think"], points[-1]["think"]) == ("never", "always")
        assert points[0]["right"] == pytest.approx(plain["without_thoughts"][right])
        assert points[-1]["right"] == pytest.approx(plain["with_thoughts"][right])
        middle = points[len(points) // 2]
        single = evaluate(capsys, folder, "--think", middle["think"], **given)
        assert 0 < middle["thinking_rate"] < 1
        assert middle["thinking_rate"] == pytest.approx(single["with_thoughts"]["thinking_rate"])
        assert middle["right"] == pytest.approx(single["with_thoughts"][right])
        if task == "language_modeling":
            assert middle["nats_per_token"] == pytest.approx(single["with_thoughts"]["nats_per_token"], rel=1e-5)
    charts = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert len(charts) == 2
    assert all(name.startswith("by_thinking_rate") for name in charts)


def test_the_front_as_a_table(folder, capsys):
    main(["--checkpoint", str(folder / "run"), "--task", "gsm8k", "--data", str(folder / "numbers.jsonl"),
          "--thought-length", "2", "--think-front", "--quiet"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "(a position predicts one token of an answer)" in printed
    assert printed.count("    never  ") == printed.count("    always  ") == 5


@pytest.mark.parametrize(
    ("more", "given", "message"),
    [
        (["--think-front", "--think", "every:2"], {}, "think is 'every:2', but --think-front"),
        (["--think-front"], dict(task="gsm8k_cot"), "--think-front is set, but --task is gsm8k_cot"),
        (["--think-front"], dict(task="spans"), "--task is spans; it must be one of gsm8k, .*, language_modeling"),
        (["--think-front", "--thoughts", "off"], {}, "--think-front is True, but --thoughts is off"),
        (["--think-front"], dict(checkpoint="plain"), "--think-front is True, but .* cannot think"),
        (["--figures", "charts"], {}, "--figures needs --think-front"),
    ],
)
def test_fronts_that_cannot_be(folder, capsys, more, given, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(capsys, folder, *more, **given)
