"""Whatever is typed, a command ends in work, help, or one message with status 2; settings mean what is typed."""

from __future__ import annotations

import errno
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from quietstar_jax import aot, evaluate, export, generate, report, study, train
from quietstar_jax.command_line import SHARED, CommandParser, parse_with_config
from quietstar_jax.config import Config, from_config_dict
from quietstar_jax.config_file import read_config
from quietstar_jax.data import build, prepare
from quietstar_jax.errors import MOST_CHARACTERS, MOST_LINES, ConfigError, bounded, run_command
from tests import command_lines

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (train, study, aot, evaluate, generate, report, export, prepare, build)


@pytest.mark.filterwarnings("ignore:coroutine")  # of a file whose get_config is one
def test_mutated_command_lines_end_in_work_help_or_one_message(tmp_path):
    counts = Counter()
    for number, (words, found) in enumerate(command_lines.run(2500, seed=7, folder=tmp_path)):
        assert found in ("accepted", "help", "refused"), (words, found)
        assert number > 8 or found == "accepted", words  # the lines that are mutated work
        counts[found] += 1
    assert counts["accepted"] > 300
    assert counts["refused"] > 1000


@pytest.mark.parametrize("main", [train.main, aot.main])
def test_all_settings_are_listed(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # of the terminal
    with pytest.raises(SystemExit) as ended:
        main(["--help-settings"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "data.synthetic.documents=1000000" in printed
    lines = printed.splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"  \S+=", line)]
    assert len(settings) > 100
    assert all(lines[i + 1].startswith("      ") for i in settings)  # each with its values and its meaning
    about = lines[lines.index("  thought.reward='information_gain'") + 1 :]
    assert "one of information_gain, probability, mean_probability; reward of a thought" in about[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_help_fits_a_screen_and_its_example_works(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    (example,) = (shlex.split(line)[1:] for line in lines if line.startswith("example: "))
    assert example[:3] == ["python", "-m", command.__name__]
    read = parse_with_config if command in (train, aot) else CommandParser.parse_args
    read(command.make_parser(), example[3:])


def test_a_flag_of_several_commands_means_the_same_in_all():
    found = defaultdict(dict)
    for command in COMMANDS:
        for action in command.make_parser()._actions:
            for flag in action.option_strings:
                kind = "one or more" if flag == "--data" else type(action).__name__  # the only flag that may differ
                default = action.default if flag in ("--seed", "--dtype", "--revision", "--thoughts") else ""
                found[flag][command.__name__] = repr((kind, action.type, action.metavar, action.help, default))
    for flag, meanings in found.items():
        assert len(set(meanings.values())) == 1, (flag, meanings)
    several = {flag for flag, meanings in found.items() if len(meanings) > 1}
    assert several == {*SHARED, "-h", "--help", "--config", "--config.NAME", "--help-settings"}


@pytest.mark.parametrize(
    ("command", "arguments", "advice"),
    [
        (prepare, "--source x --tokenizer y --output z", "--data"),
        (generate, "--checkpoint x --input=y --output z", "--data"),
        (generate, "--checkpoint x --prompt y --thoughts show", "--show-thoughts"),
        (report, "--checkpoint x --data y --documents 3 --output z", "--limit"),
        (report, "--checkpoint x --data y --max-tokens 3 --output z", "--page-tokens"),
        (report, "--study x --output z", "--workdir"),
        (evaluate, "--chekpoint x", "Did you mean --checkpoint"),
        (evaluate, "--thought-len 3", "Did you mean --thought-length"),  # flags are not abbreviated
        (train, "--confg x", "Did you mean --config"),
    ],
)
def test_another_flag_is_suggested(command, arguments, advice):
    with pytest.raises(ConfigError) as error:
        command.main(arguments.split())
    assert advice in str(error.value)


def test_errors_of_the_library_name_flags():
    parser = generate.make_parser()
    with pytest.raises(ConfigError) as error, parser.naming_flags():
        raise ConfigError("max_tokens is 0; not `max_length`, `synthetic`, `data.seed`, `data.workers`, seed")
    assert str(error.value) == "--max-tokens is 0; not --max-length, `synthetic`, --seed, `data.workers`, seed"


def config_of(*arguments: str) -> Config:
    return parse_with_config(train.make_parser(), ["--config", str(ROOT / "configs/quickstart.py"), *arguments])[1]


def test_settings_mean_what_is_typed():
    config = config_of(
        "--config.seed=5", "--config.seed", "-0", "--config.data.train=('a', 'b')", "--config.data.validation='c',",
        "--config.phases[1].learning_rate=1e-3", "--config.phases[1].rates.decoder", "0", "--config.workdir=a=b",
        "--noconfig.logging.progress_bar", "--config.logging.tensorboard", "--config.phases[0].steps=1_0",
        "--config.data.train[1]=x y", "--config.phases[2].fresh_optimizer=TRUE",
        "--config.model.rematerialize", "--config.data.packing", "packed", "--config.data.weights=(2, 1)",
    )  # fmt: skip
    assert (config.seed, config.workdir) == (0, "a=b")
    assert (config.data.train, config.data.validation) == (("a", "x y"), ("c",))
    assert (config.phases[1].learning_rate, config.phases[1].rates.decoder) == (1e-3, 0.0)
    assert (config.logging.progress_bar, config.logging.tensorboard) == (False, True)
    assert config.phases[0].steps == 10
    assert config.phases[2].fresh_optimizer is True
    assert (config.model.rematerialize, config.data.packing) == (True, "packed")
    assert config.data.weights == (2.0, 1.0)
    phases = config_of("--config.phases=[{'name': 'a', 'steps': 3}, {'steps': 4}]").phases
    assert [(phase.name, phase.steps) for phase in phases] == [("a", 3), ("thoughts", 4)]


def test_a_setting_reaches_what_refers_to_it(tmp_path):
    file = tmp_path / "references.py"
    file.write_text(
        "import ml_collections\n"
        "def get_config(seed='0'):\n"
        "    config = ml_collections.ConfigDict({'seed': int(seed), 'data': {'sequence_length': 100}})\n"
        "    config.evaluation = {'batches': config.data.get_ref('sequence_length') + 1}\n"
        "    return config\n"
    )
    config = read_config(f"{file}:3", [("data.sequence_length", "50"), ("checkpoint.keep_latest", "7")])
    assert (config.seed, config.data.sequence_length, config.evaluation.batches) == (3, 50, 51)
    assert config.checkpoint.keep_latest == 7  # not in the file
    file.write_text(file.read_text().replace("100", "200"))  # in the same second: no stale code is read
    assert read_config(str(file)).data.sequence_length == 200


def test_a_file_that_fails_is_named_with_the_line(tmp_path):
    file = tmp_path / "fails.py"
    for text, line, message in (
        ("x = 1\nimport no_such_module", 2, "No module named 'no_such_module'"),
        ("def get_config():\n\n    return 1 / 0", 3, "ZeroDivisionError"),
        ("x = (", 1, "SyntaxError"),
        ("raise SystemExit(3)", 1, "SystemExit: 3"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_config(str(file))
        assert f"{file}, line {line}: " in str(error.value)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 2**63}, "config.seed"),
        ({"data": {"synthetic": {"documents": 10**30}}}, "config.data.synthetic.documents"),
        ({"data": {"sequence_length": 10**15}}, "config.data.sequence_length"),
        ({"data": {"sequence_length": 2**30}}, "config.phases[0].batch_size"),
        ({"data": {"workers": 10**6}}, "config.data.workers"),
        ({"phases": [{"batch_size": 10**12}]}, "config.phases[0].batch_size"),
        ({"phases": [{"batch_size": 2**28}]}, "config.phases[0].batch_size"),
        ({"phases": [{"num_thoughts": 2**30}]}, "config.phases[0] has thoughts of"),
        ({"phases": [{"steps": 2**31 - 1, "name": "a"}, {"steps": 1}]}, "config.phases has 2147483648 steps"),
        ({"evaluation": {"reach": 17}, "thought": {"mixing": "probabilities"}}, "config.evaluation.reach"),
        ({"evaluation": {"reach": 2}}, "config.evaluation.reach"),
        (
            {"thought": {"positions": "start"}, "data": {"packing": "packed", "document_mask": False}},
            "config.data.document_mask",
        ),
        ({"evaluation": {"reach": 2}, "thought": {"mixing": "probabilities", "gate": True}}, "config.evaluation.reach"),
        ({"evaluation": {"batch_size": 2**30}}, "config.evaluation.batch_size"),
        ({"model": {"architecture": {"vocab_size": 2**31 - 1, "hidden_size": 2**20}}}, "architecture.hidden_size"),
        ({"thought": {"positions": "stride", "position_fraction": 5e-324}}, "config.thought.position_fraction"),
        ({"thought": {"positions": "entropy", "position_pattern": "a"}}, "config.thought.position_pattern"),
        ({"thought": {"positions": "random", "position_pattern": "("}}, "config.thought.position_pattern"),
        ({"thought": {"positions": "stride", "positions_per_sequence": 1}}, "config.thought.positions_per_sequence"),
        (
            {"thought": {"positions": "random", "positions_per_sequence": 1, "position_fraction": 0.5}},
            "config.thought.position_fraction",
        ),
        ({"workdir": "a\0b"}, "config.workdir"),
        ({"data": {"train": ("\udc80",)}}, "config.data.train[0]"),
        ({"seed": 10**9999}, "config.seed is a value of type int"),
    ],
)
def test_absurd_values_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError) as error:
        from_config_dict(settings)
    assert named in str(error.value)


def test_64_bits_are_enough_where_they_make_sense():
    most = 2**63 - 1
    config = from_config_dict({"seed": most, "data": {"synthetic": {"documents": most}}})
    assert (config.seed, config.data.synthetic.documents) == (most, most)


def ended(capsys: pytest.CaptureFixture, error: BaseException) -> tuple[int, str]:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(command)
    return caught.value.code, capsys.readouterr().err


def test_messages_fit_a_screen(capsys):
    for message in ("x" * 10**6, "line\n" * 10**4, ("y" * 500 + "\n") * 30, "\x1b[31m\r\0"):
        assert len(bounded(message)) <= MOST_CHARACTERS
        assert bounded(message).count("\n") < MOST_LINES
        assert bounded(message).replace("\n", "").isprintable()
    long = "first: " + "z" * 10**5 + " and what to do"
    assert bounded(long).startswith("first: ")
    assert bounded(long).endswith(" and what to do")
    assert ended(capsys, ConfigError(long))[1].endswith(" and what to do\n")


def test_errors_of_the_system_are_messages_and_defects_are_not(capsys):
    for number in (errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG, errno.EROFS):
        status, message = ended(capsys, OSError(number, "reason", "/some/file"))
        assert status == 2
        assert "/some/file" in message
    assert ended(capsys, MemoryError())[0] == 2
    library = RuntimeError("write() failed: No space left on device; writing /some/file")  # as array_record says it
    assert ended(capsys, library) == (2, f"error: {library}\n")
    for defect in (ValueError("x"), OSError("x"), RuntimeError("x"), KeyError("x")):
        with pytest.raises(type(defect)):
            run_command(lambda defect=defect: (_ for _ in ()).throw(defect))
    with pytest.raises(SystemExit) as status:
        run_command(lambda: 1)
    assert status.value.code == 1
