"""Random faults over every command that writes, with counts: `make torture`, or `python -m tests.torture --faults 100`.

A fault is a signal at a random instant of a command (kill -9, SIGTERM, SIGINT), a full disk, or a flipped bit, a
truncation or a missing file in what a run has saved. Afterwards the same command is given again until it is done. What
counts is the result: the same bytes as without the fault, or one message that says what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.commands import Ended, run_command

SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
COMMANDS = ("train", "prepare", "export", "generate", "evaluate", "study")
TRIES = 4  # starts of a command after a fault, until it must be done
CONFIG = """
from pathlib import Path
from tests.training.tiny import tiny_config_dict

def get_config():
    config = tiny_config_dict(Path("must/be/set"))
    config.data.validation = ()
    config.data.workers = 0
    config.checkpoint.update(every_steps=1, keep_latest=3)
    return config
"""
STUDY = """
from quietstar_jax.studies.study import Study

def get_study():
    variants = {{"a": {{}}, "b": {{"phases[1].policy_weight": 0.0}}}}
    return Study(base={base!r}, variants=variants, baseline="a", seeds=(0,))
"""


class Torture:
    """One folder with what the commands read, and what each of them makes without a fault."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.config = folder / "config.py"
        self.config.write_text(CONFIG)
        self.run = folder / "reference"
        self.commands: dict[str, Callable[[Path], tuple[object, ...]]] = {
            "train": lambda out: ("train", "--config", self.config, f"--config.workdir={out}"),
            "prepare": lambda out: ("data.prepare", "--data", folder / "text.jsonl", "--tokenizer", "synthetic",
                                    "--output", out, "--shards", 3, "--workers", 1),
            "export": lambda out: ("export", "--checkpoint", self.run, "--output", out, "--format", "quietstar"),
            "generate": lambda out: ("generate", "--checkpoint", self.run, "--data", folder / "prompts.jsonl",
                                     "--output", out, "--max-tokens", 4, "--batch-size", 2, "--quiet"),
            "evaluate": lambda out: ("evaluate", "--checkpoint", self.run, "--task", "numeric_cot", "--data",
                                     folder / "questions.jsonl", "--samples", 2, "--max-tokens", 3, "--records",
                                     out.with_suffix(".records"), "--output", out, "--thoughts", "off"),
            "study": lambda out: ("study", "--study", folder / "study.py", "--workdir", out),
        }  # fmt: skip
        rows = [{"text": f"ann has {i % 9} coin . ask {(i + i // 9) % 9} ."} for i in range(3000)]
        prompts = [{"prompt": f"sum {i} +1 ask"} for i in range(6)]
        questions = [{"question": f"sum {i} +1 ask", "answer": f"#### {i + 1}"} for i in range(4)]
        for name, lines in (("text", rows), ("prompts", prompts), ("questions", questions)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        (folder / "study.py").write_text(STUDY.format(base=str(self.config)))
        self.seconds: dict[str, float] = {}
        self.wanted: dict[str, str] = {}
        self.counts: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def prepare_reference(self, names: list[str]) -> None:
        """Runs every command once without a fault."""
        for name in ["train", *(name for name in names if name != "train")]:
            out = self.run if name == "train" else self.folder / f"whole_{name}"
            start = time.monotonic()
            ended = self.start(name, out)
            if ended.returncode:
                sys.exit(f"{name} fails without a fault: {ended.stderr}")
            self.seconds[name], self.wanted[name] = time.monotonic() - start, result_of(out)

    def start(self, name: str, out: Path, **how: object) -> Ended:
        module, *arguments = self.commands[name](out)
        return run_command(str(module), *arguments, **how)  # type: ignore[arg-type]

    def interrupted(self, name: str, kind: str) -> str:
        """A signal at a random instant, then the same command until it is done."""
        out = self.folder / "out" / name
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        ended = self.start(name, out, after=(self.random.uniform(0, self.seconds[name]), SIGNALS[kind]))
        return self.finished(name, out, ended)

    def finished(self, name: str, out: Path, ended: Ended) -> str:
        for _ in range(TRIES):
            if "Traceback" in ended.stderr:
                return f"traceback: {ended.stderr.strip().splitlines()[-1][:200]}"
            if not ended.returncode:
                break
            ended = self.start(name, out)
        if ended.returncode:
            return f"lost: {ended.stderr.strip()[-300:]}"
        if result_of(out) != self.wanted[name]:
            return "silently wrong"
        left = [p.name for p in out.parent.iterdir() if p != out and p.suffix != ".records" and size(p) > 10_000]
        return f"left behind: {left}" if left else "ok"

    def full_disk(self, name: str) -> str:
        """A disk that is full at a random moment; the same command after room is made."""
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        whole = size(self.run if name == "train" else self.folder / f"whole_{name}")
        room = int(self.random.uniform(0.02, 1.0) * whole) // 4096 * 4096 + 8192
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
        try:
            out = disk / name
            ended = self.start(name, out)
            if ended.returncode and "Traceback" not in ended.stderr and ended.returncode != 2:
                return f"status {ended.returncode}: {ended.stderr.strip()[-200:]}"
            subprocess.run(["mount", "-o", f"remount,size={20 * whole + (1 << 20)}", disk], check=True)
            return self.finished(name, out, ended)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    def damaged(self, reader: str, kind: str) -> str:
        """A damaged file of a saved step: its reader says so, or takes another step and comes to the same."""
        run = self.folder / "damaged" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.copytree(self.run, run)
        steps = sorted((p for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
        files = sorted(p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size)
        damage(self.random.choice(files), kind, self.random)
        out = self.folder / "damaged" / "out"
        if reader == "train":  # the summary is missing as after a kill: the run is read again
            (run / "summary.json").unlink()
            ended = self.start("train", run)
            return self.finished("train", run, ended)
        whole, self.run = self.run, run
        try:
            ended = self.start(reader, out)
        finally:
            self.run = whole
        if "Traceback" in ended.stderr:
            return f"traceback: {ended.stderr.strip().splitlines()[-1][:200]}"
        if ended.returncode == 2:
            return "ok" if steps[-1].name in ended.stderr else f"unclear: {ended.stderr[:200]}"
        return "silently wrong" if result_of(out) != self.wanted[reader] else "ok"  # a file that is not read

    def faults(self) -> list[tuple[str, str, Callable[[], str]]]:
        found: list[tuple[str, str, Callable[[], str]]] = []
        for name in self.wanted:
            found += [(name, kind, lambda n=name, k=kind: self.interrupted(n, k)) for kind in SIGNALS]  # type: ignore[misc]
            if name in ("train", "prepare", "export"):
                found.append((name, "full disk", lambda n=name: self.full_disk(n)))  # type: ignore[misc]
            if name in ("train", "export", "generate"):
                found += [(name, kind, lambda n=name, k=kind: self.damaged(n, k)) for kind in DAMAGES]  # type: ignore[misc]
        return found


DAMAGES = ("flipped bit", "truncated", "missing")


def damage(path: Path, kind: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def result_of(path: Path) -> str:
    """A hash of what a command made; of a run, of its weights as they are exported and its losses."""
    if (path / "checkpoints").is_dir():
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        return hashlib.sha256(json.dumps(losses).encode()).hexdigest()
    if (path / "study.json").is_file():
        runs = json.loads((path / "study.json").read_text())["runs"]
        return hashlib.sha256(json.dumps([run["figures"] for run in runs], sort_keys=True).encode()).hexdigest()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        if file == path and content.startswith(b"{\n"):  # of evaluate: what it measured, and not where
            content = json.dumps(json.loads(content)["without_thoughts"], sort_keys=True).encode()
        digest.update(str(file.relative_to(path)).encode() + b"\0" + content)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), given.seed)
        torture.prepare_reference(given.commands)
        kinds = torture.faults()
        wrong = 0
        for number in range(given.faults):
            name, kind, fault = kinds[number % len(kinds)]
            outcome = fault()
            torture.counts[name, kind, outcome.partition(":")[0]] += 1
            if outcome != "ok":
                wrong += 1
                print(f"fault {number}, {name}, {kind}: {outcome}", flush=True)
        print(f"\nseed {given.seed}\n| command | fault | outcome | times |\n|---|---|---|---|")
        for (name, kind, outcome), times in sorted(torture.counts.items()):
            print(f"| {name} | {kind} | {outcome} | {times} |")
        print(f"{given.faults - wrong} faults passed, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
