# ruff: noqa: E501  (a list of texts)
"""Mutated command lines and configuration files for every command, run in this process up to where work would begin.

`python -m tests.command_lines --cases 100000 --seed 1` runs more of them than the test does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from quietstar_jax import aot, evaluate, export, generate, report, study, train
from quietstar_jax.config import default_config
from quietstar_jax.data import build, prepare
from quietstar_jax.errors import MOST_CHARACTERS, MOST_LINES, run_command

ROOT = Path(__file__).resolve().parents[1]
VALUES = (
    "", " ", "0", "-1", "1", "2", "3.5", "-0", "1e3", "1e999", "nan", "inf", "-inf", "1_000", "0x10", "٣", "true", "False", "None",
    str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000, "-" + "9" * 400, "a" * 300, "a/" * 3000, "~nobody/x", "~",
    "\0", "a\0b", "\udc80", "\x1b[31mred", "é", "🙂" * 50, "a\nb", "\n" * 100, "(", ")", "()", "(1", "('a'", "('a',)", "[1, 2",
    "{}", "{'a': 1}", "[{'steps': 3}]", "[{'steps': 'x'}]", "1 +", "((((((((((" * 50, "-" * 3000 + "1", "[" * 3000, "a,b", ",",
    "/", ".", "..", "/dev/null", "/dev/zero", "/proc/self/mem", "/no/such/file", "{fifo}", "{folder}", "{binary}", "{closed}",
    "{fifo}/x", "{binary}/x", "hf:", "hf:a:b", "tfds:x", "prepared:", "gs://b", "https://", "*", "[", "synthetic", "v5e:4x4",
    "cpu:2", "cpu:99999999999999999999", "gpu:h100x0", "v5e:", "--", "-", "--help", "-h", "--config", "--json", "="
)  # fmt: skip
NAMES = (
    "", ".", "..", "seed", ".seed", "seed.", "seed.x", "seed[0]", "sede", "phases", "phases[0]", "phases[0].steps", "phases[-1].steps",
    "phases[9].steps", "phases[99999999999].steps", "phases[0", "phases0]", "phases[]", "phases[x].steps", "phases[0][0]",
    "phases[0]].steps", "phases[[0]].steps", "phases[0].steps.x", "data", "data.train", "data.train[0]", "data.train[5]", "data.train.x",
    "data..train", "data.train\0", "data.sequence_length", "data.synthetic.documents", "model.architecture", "é", "a b", "__class__",
    "seed.__class__", "items", "workdir", "model.architecture.hidden_size", "logging.progress_bar", "1", "[0]", "x" * 3000, "\udc80",
    "evaluation.batch_size", "optimizer.eps", "thought.position_fraction", "mesh.data", "phases[0].rates.decoder"
)  # fmt: skip
FILES = (
    "", "x = (", "def get_config(", "\0", "\xff\xfe", "raise ValueError('x')", "raise ValueError('y' * 10**5)", "import no_such_module",
    "import sys; sys.exit(0)", "import sys; sys.exit('bye')", "exit()", "raise SystemExit", "1/0", "def f(): return f()\nf()", "(" * 5000,
    "get_config = 3", "class get_config: pass", "def get_config(): return None", "def get_config(): return 3", "def get_config(): return {}",
    "def get_config(): return {1: 2}", "def get_config(): return {'seed': 10**9999}", "def get_config(a): return {'seed': int(a)}",
    "def get_config(a, b): return {}", "def get_config(*a, **k): return {}", "def get_config(): raise KeyError",
    "def get_config(): return get_config()", "def get_config(): import sys; sys.exit(3)", "async def get_config(): return {}",
    "def get_config():\n    yield {}", "def get_config(): return {'phases': 3, 'data': [], 'seed': {}, 'model': None}",
    "def get_config():\n    d = {}\n    d['data'] = d\n    return d", "def get_config(): return {'phases': [None, 3, {'steps': 'x'}]}",
    "class E(BaseException):\n    def __str__(self): raise self\nraise E", "def get_config(): return {'workdir': object(), 'seed': 1j}",
    "class R:\n    def __repr__(self): 1/0\ndef get_config(): return {'seed': R()}", "def get_config(): return {'workdir': '\\0'}",
    "import ml_collections\ndef get_config():\n    c = ml_collections.ConfigDict()\n    c.seed = ml_collections.config_dict.placeholder(int)\n    return c",
    "import ml_collections\ndef get_config():\n    c = ml_collections.ConfigDict()\n    c.seed = ml_collections.config_dict.required_placeholder(int)\n    return c",
    "import ml_collections\ndef get_config(): return ml_collections.FrozenConfigDict({'seed': 3})",
    "from quietstar_jax.config import Config\ndef get_config(): return Config()",
    "from quietstar_jax.config import Phase\ndef get_config(): return {'phases': (Phase(),)}",
    "from quietstar_jax.config import default_config, phase\ndef get_config():\n    phase(nothing=1)\n    return default_config()",
    "from quietstar_jax.config import default_config\ndef get_config():\n    c = default_config()\n    c.seed = 'x'\n    return c",
    "def get_study(): return 3", "get_study = None", "def get_study(): raise SystemExit",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study()",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study(3, None, [], seeds=3, metrics='x')",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study('{good}', {'a/b': {}, '': 3}, 'a')",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study('{good}', {'a': {'': 3, 'phases[': 2}}, 'a')",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study('{good}', {'a': {'seed': 10**9999}}, 'a', seeds=(-1, 'x'))",
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study('{bad}', {'a': {}}, 'a')",
)  # fmt: skip
GOOD_STUDY = (
    "from quietstar_jax.studies.study import Study\ndef get_study(): return Study('{good}', {'a': {'seed': 3}}, 'a')"
)


class Reached(Exception):
    """The command line was accepted."""


class Commands:
    """Command lines that work, and their mutations; a context manager that stops every command where work begins."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places = {
            name: str(folder / name) for name in ("fifo", "folder", "binary", "closed", "good", "bad", "study")
        }
        (folder / "folder").mkdir()
        (folder / "binary").write_bytes(bytes(range(256)))
        (folder / "closed").write_text("x")
        (folder / "closed").chmod(0)
        os.mkfifo(folder / "fifo")
        (folder / "good").write_text(f"def get_config(): return {{'workdir': {str(folder / 'run')!r}, 'seed': 1}}")
        (folder / "questions.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
        (folder / "study").write_text(GOOD_STUDY.replace("{good}", self.places["good"]))
        self.files = []
        for number, text in enumerate(FILES):
            path = folder / f"file_{number}.py"
            for name, place in self.places.items():
                text = text.replace("{" + name + "}", place)
            path.write_bytes(text.encode("latin-1"))
            self.files.append(str(path))
        (folder / "bad").write_text("import sys; sys.exit(0)")
        settings = ["--config", self.places["good"], "--config.seed=3", "--config.phases[0].steps=5", "--config.data.train=('x',)",
                    "--config.logging.progress_bar", "--noconfig.logging.tensorboard"]  # fmt: skip
        new, data = str(folder / "new"), str(folder / "questions.jsonl")
        self.lines: dict[Callable[[Sequence[str]], object], list[str]] = {
            train.main: settings,
            aot.main: [*settings, "--topology", "cpu:1", "--phase", "thoughts", "--search", "--tries=2", "--json"],
            study.main: ["--study", self.places["study"], "--workdir", new, "--seeds=0,1", "--variants", "a"],
            evaluate.main: ["--checkpoint", "x", "--task", "numeric", "--data", data, "--limit=3", "--step", "4",
                            "--temperature", "0.5", "--output", str(folder / "result.json"), "--field", "question=question",
                            "--max-length=5", "--records", new, "--batch-size", "3", "--thoughts=on", "--seed", "1"],
            generate.main: ["--checkpoint", "x", "--data", data, "--output", new, "--max-tokens=5", "--top-p", "0.4",
                            "--batch-size=3", "--step", "4", "--stop", "x", "--thoughts", "on", "--seed=1"],
            export.main: ["--checkpoint", "x", "--output", new, "--format", "base", "--dtype=bfloat16", "--step", "3",
                          "--max-shard-size", "1GB", "--push", "a/b", "--public"],
            report.main: ["--checkpoint", "x", "--data", data, "--output", str(folder / "page.html"), "--limit=3",
                          "--samples", "2", "--thought-length", "4", "--step", "3"],
            prepare.main: ["--data", data, "--tokenizer", "synthetic", "--output", new, "--shards", "2", "--workers=1"],
            build.main: ["gsm8k", "--data-dir", new, "--split", f"train={data}"],
        }  # fmt: skip

    def __enter__(self) -> Commands:
        self._stack = contextlib.ExitStack()
        config = default_config()
        config.workdir = str(self.folder / "run")
        for name in (
            "training.loop.train", "planning.plan.plan", "planning.search.search", "studies.runner.run_study",
            "inference.generator.Generator.open", "export_hf.export_run.export", "reports.make.report_checkpoint",
            "reports.make.report_study", "data.pretokenized.write.prepare", "data.builders.gsm8k.Gsm8k",
            "data.builders.gsm8k_text.Gsm8kText", "data.builders.commonsense_qa.CommonsenseQa",
            "data.builders.open_web_math.OpenWebMath", "evals.measure.load_model",
        ):  # fmt: skip
            self._stack.enter_context(mock.patch(f"quietstar_jax.{name}", side_effect=Reached))
        self._stack.enter_context(mock.patch("quietstar_jax.planning.targets.compile_only"))
        self._stack.enter_context(mock.patch("quietstar_jax.export.hub_token"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def mutated(self, draw: random.Random) -> tuple[Callable[[Sequence[str]], object], list[str]]:
        """A command and its arguments, of which some are changed."""
        main = draw.choice(list(self.lines))
        words = list(self.lines[main])
        for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
            place = draw.randrange(len(words) + 1)
            kind = draw.randrange(8)
            value = draw.choice((draw.choice(VALUES), draw.choice(VALUES), draw.choice(self.files)))
            for name, path in self.places.items():
                value = value.replace("{" + name + "}", path)
            if kind == 0 and place < len(words):
                del words[place]
            elif kind == 1 and place < len(words):
                words[place] = value
            elif kind == 2:
                words.insert(place, value)
            elif kind == 3 and place < len(words):
                words.insert(draw.randrange(len(words)), words[place])
            elif kind == 4 and place < len(words):
                flag, equals, _ = words[place].partition("=")
                words[place] = flag + (equals or "=") + value
            elif kind == 5 and place < len(words) and words[place]:
                at = draw.randrange(len(words[place]))
                words[place] = (
                    words[place][:at]
                    + draw.choice(("", "\0", ".", "[", "]", "=", "-", ":", "é", value))
                    + words[place][at + 1 :]
                )
            elif main in (train.main, aot.main):
                prefix = draw.choice(
                    ("--config.", "--config.", "--config.", "--noconfig.", "--config", "-config.", "--config:")
                )
                words.insert(place, prefix + draw.choice(NAMES) + draw.choice(("=", "=", "=", "")) + value)
            else:
                words.insert(place, f"--{draw.choice(('seed', 'step', 'data', 'output', 'limit', 'x', ''))}={value}")
        if main in (train.main, aot.main, study.main) and draw.random() < 0.2:
            words[1] = draw.choice(self.files) + draw.choice(("", "", "", ":1", ":x", ":", ":a:b"))
        return main, words


def outcome(main: Callable[[Sequence[str]], object], words: Sequence[str]) -> str:
    """What a command line ends in: `accepted`, `help`, `refused`; or else what is wrong with it."""
    said, printed = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed),
            mock.patch("sys.stdin", io.StringIO("x")),
        ):
            run_command(lambda: main(words))
    except Reached:
        return "accepted"
    except SystemExit as ended:
        if ended.code in (0, None):
            return "help" if printed.getvalue().startswith("usage:") else "ended with status 0"
        message = said.getvalue()
        if ended.code != 2 or not message.startswith("error: "):
            return f"status {ended.code}: {message[:500]}"
        if len(message) > MOST_CHARACTERS + 10 or message.count("\n") > MOST_LINES:
            return f"a message of {len(message)} characters, {message.count(chr(10))} lines"
        return "refused" if message.removesuffix("\n").replace("\n", "").isprintable() else "control characters"
    except BaseException:
        return traceback.format_exc()
    return "ended by itself"


def run(cases: int, seed: int, folder: Path) -> Iterator[tuple[list[str], str]]:
    """Arguments and outcomes of so many cases."""
    draw = random.Random(seed)
    with Commands(folder) as commands:
        for main, words in list(commands.lines.items()):
            yield [main.__module__, *words], outcome(main, words)
        for _ in range(cases):
            main, words = commands.mutated(draw)
            yield [main.__module__, *words], outcome(main, words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        for words, found in run(given.cases, given.seed, Path(place)):
            good = found in ("accepted", "help", "refused")
            counts[found if good else found.rstrip().splitlines()[-1][:100]] += 1
            if not good and counts[found.rstrip().splitlines()[-1][:100]] <= 2:
                print([word[:200] for word in words], found[-1500:], sep="\n", end="\n\n")
    print(dict(counts))
