"""Every command of every document is accepted by the real parsers, and every link and file name leads somewhere.

`.ci/documented.py` also runs the commands, which takes long. This test takes seconds: no document can name a flag, a
setting, a file, a heading or a target of `make` that does not exist.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import quietstar_jax as qs
from quietstar_jax.command_line import CommandParser, parse_with_config
from quietstar_jax.commands import COMMANDS
from quietstar_jax.config import from_config_dict
from quietstar_jax.errors import UserError
from tests.launch.scripts import VARIABLES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md",
     *(ROOT / "docs").glob("*.md")]
)  # fmt: skip
COMMAND_OF = {f"quietstar_jax.{command.module}": name for name, command in COMMANDS.items()}
WITH_CONFIG = ("train", "aot")
# Programs of others, whose arguments are not checked here.
OTHERS = {"pip", "cd", "git", "xprof", "docker", "scontrol", "export", "tail", "lm_eval", "kubectl"}
FILE = re.compile(r"\b(?:configs|docs|tests|launch|benchmarks|quietstar_jax|\.ci)/[\w./-]+\.(?:py|md|sh|svg|css)\b")


class Stop(Exception):
    """Raised where a benchmark has parsed its arguments."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, *languages: str) -> Iterator[str]:
    for language, body in re.findall(r"^ *```(\w+)\n(.*?)^ *```", text, re.M | re.S):
        if language in languages:
            yield body


def lines_of(text: str) -> Iterator[str]:
    """The commands of all shell blocks, one per line, and those in the text that have arguments."""
    for body in blocks(text, "sh", "bash"):
        for line in re.sub(r"\\\n\s*", "", body).splitlines():
            line = line.strip().removesuffix(" &").removesuffix(" ...")
            if line and not line.startswith(("#", "for ", "done")):
                yield line
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    for line in re.findall(r"`((?:python -m|quietstar|make|launch/\w+\.sh) [^`]+)`", prose):
        line = " ".join(line.split())
        # Not those with a placeholder, such as FILE or runs/..., and not the bare name of a command.
        if not re.search(r"\.\.\.|[= ][A-Z]+\b", line) and not re.fullmatch(r"(python -m|quietstar) [\w.]+", line):
            yield line


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """(variables set before the command, its words); without its output file."""
    words = shlex.split(line.partition(" > ")[0].replace("$i", "0"), comments=True)
    variables = {}
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def check_module(module: str, words: Sequence[str]) -> None:
    """Parses the arguments of a command of the package, a benchmark or a test program."""
    if module in COMMAND_OF:
        check_command(COMMAND_OF[module], words)
    elif module.startswith(("benchmarks.", "tests.")):
        accepted = argparse.ArgumentParser.parse_args

        def parse(parser: argparse.ArgumentParser, _: object = None) -> None:
            accepted(parser, words)
            raise Stop

        with mock.patch.object(argparse.ArgumentParser, "parse_args", parse), pytest.raises(Stop):
            importlib.import_module(module).main()
    elif module == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests"))
    else:
        assert module in ("pip", "venv", "build"), module


def check_command(name: str, words: Sequence[str]) -> None:
    if name == "lm_eval":  # the harness parses its own flags
        assert words[:2] == ["--model", "quietstar"]
        return
    parser: CommandParser = importlib.import_module(f"quietstar_jax.{COMMANDS[name].module}").make_parser()
    if set(words) & {"--help", "--help-settings"}:
        assert f"{words[0]}" in parser.format_help()
        return
    args = parse_with_config(parser, words)[0] if name in WITH_CONFIG else parser.parse_args(words)
    for shipped in re.findall(r"configs/[\w/]+\.py", " ".join(words)):
        assert (ROOT / shipped).is_file(), shipped
    for folder in (vars(args).get("output"), vars(args).get("figures")):
        assert folder is None or not folder.is_absolute(), "a document names a folder of one machine"


def check_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", makefile, re.M), word


def check_launch(script: str, variables: dict[str, str], words: Sequence[str]) -> None:
    """Runs a launch script dry, and parses the arguments that it passes on."""
    ended = subprocess.run(
        [f"./{script}", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **VARIABLES, **variables}, timeout=30,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    if "--help" not in words:
        check_command("train", [word for word in words if word != "--dry-run"])


def check(line: str) -> None:
    variables, (program, *words) = words_of(line)
    if Path(program).name.startswith("python"):
        if words[:1] == ["-m"]:
            check_module(words[1], words[2:])
        else:
            assert (ROOT / words[0]).is_file(), words[0]
    elif program == "quietstar":
        assert words[0] in (*COMMANDS, "--help", "--version"), words[0]
        if words[0] in COMMANDS:
            check_command(words[0], words[1:])
    elif program == "make":
        check_make(words)
    elif program.startswith("launch/"):
        check_launch(program, variables, words)
    else:
        assert program in OTHERS, f"{program} is not checked: add it to OTHERS"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["python -m"])
    wrong = []
    for line in lines_of(path.read_text("utf-8")):
        try:
            check(line)
        except (AssertionError, UserError, ValueError, SystemExit) as error:
            wrong.append(f"{line}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_most_commands_are_documented() -> None:
    found = {words[2] for path in DOCUMENTS for line in lines_of(path.read_text("utf-8"))
             if len(words := words_of(line)[1]) > 2 and words[1] == "-m"}  # fmt: skip
    assert {f"quietstar_jax.{command.module}" for command in COMMANDS.values()} <= found


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_python_is_python(path: Path) -> None:
    for body in blocks(path.read_text("utf-8"), "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("quietstar_jax"):
                assert importlib.util.find_spec(str(node.module)), node.module


def test_the_notebook_has_no_outputs_and_names_what_exists() -> None:
    """`.ci/run` also executes it, from a fresh kernel."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in cells)
    sources = [re.sub(r"^( *)%.*", r"\1pass", "".join(cell["source"]), flags=re.M) for cell in cells]
    (configure,) = [source for source in sources if "get_config()" in source]
    names: dict[str, Any] = {}
    exec(configure, names)
    assert from_config_dict(names["config"]).workdir == "runs/notebook"  # a setting that does not exist is refused
    results = {name for kind in (qs.Generation, qs.Token, qs.Thoughts) for name in dir(kind)}
    results |= {field for kind in (qs.Generation, qs.Token, qs.Thoughts) for field in inspect.get_annotations(kind)}
    known = {"qs": {*qs.API}, "model": {*dir(qs.Model)}, "token": results, "here": results}
    commands = 0
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert node.attr in known[node.value.id], ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("model."):
            accepted = inspect.signature(getattr(qs.Model, ast.unparse(node.func).removeprefix("model."))).parameters
            assert {word.arg for word in node.keywords} <= {*accepted}, ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("python -m"):
            check(f"{node.value} page.html")
            commands += 1
    assert commands == 1


def anchors(path: Path) -> set[str]:
    """The fragments of the headings of a document, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        fragment = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = next(i for i in range(99) if (f"{fragment}-{i}" if i else fragment) not in found)
        found.add(f"{fragment}-{count}" if count else fragment)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_and_file_names_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset|href)="([^"]+)"', text)]
    wrong = []
    for target in targets:
        file, _, fragment = target.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        other = path.parent / file if file else path
        if not other.exists() or (fragment and fragment not in anchors(other)):
            wrong.append(target)
    plain = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    wrong += [name for name in FILE.findall(plain) if not any((root / name).exists() for root in (ROOT, path.parent))]
    assert not wrong, wrong


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", contents))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {qs.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_generated_parts_of_the_objectives_are_fresh() -> None:
    document = runpy.run_path(str(ROOT / "docs" / "objectives.py"))["document"]
    assert (ROOT / "docs" / "objectives.md").read_text("utf-8") == document(), "run `make docs`"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("python -m quietstar_jax.evaluate --checkpoint x --task gsm8k --dato y", "--dato"),
        ("python -m quietstar_jax.train --config configs/quickstart.py --config.sede=1", "config.sede"),
        ("python -m quietstar_jax.train --config configs/quickstrat.py", "configs/quickstrat.py"),
        ("quietstar trian --config configs/quickstart.py", "trian"),
        ("make quickstrat", "quickstrat"),
        ("make quickstart SEEED=1", "SEEED"),
        ("PROCESSES=2 launch/local.sh --config configs/quickstart.py --config.sede=1", "config.sede"),
        ("python -m benchmarks.generate --preset quickstrat", ""),
        ("rm -r runs", "rm is not checked"),
    ],
)
def test_a_wrong_command_is_found(line: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, UserError, SystemExit)) as error:
        check(line)
    assert problem in str(error.value)


def test_the_diffs_of_the_contributors_page_are_those_of_the_code(tmp_path: Path) -> None:
    diffs = list(blocks((ROOT / "docs" / "contributing.md").read_text("utf-8"), "diff"))
    assert len(diffs) == 3
    for diff in diffs:
        names = re.findall(r"^\+\+\+ b/(.+)$", diff, re.M)
        assert any(name.startswith("tests/") for name in names)
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        for direction in (["--reverse"], []):  # without the addition, then with it
            ended = subprocess.run(
                ["git", "apply", *direction, "-"], cwd=tmp_path, input=diff, capture_output=True, text=True,
                env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
            )  # fmt: skip
            assert ended.returncode == 0, f"{ended.stderr}\nUpdate the diff of {names} in docs/contributing.md."
            same = [(tmp_path / name).read_text() == (ROOT / name).read_text() for name in names]
            assert same == [not direction] * len(names)


def messages() -> str:
    """All texts of the package, one per line; … where a value is inserted."""
    found = []
    for path in (ROOT / "quietstar_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page, all_messages = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), messages()
    quoted = re.findall(r"^\| `([^`]+)`(?! \(from)", page, re.M)
    assert len(quoted) > 15
    for message in quoted:
        assert [part for part in message.split(" … ") if part not in all_messages] == [], message
