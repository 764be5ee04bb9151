"""The page of runs that train, from their files alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.io import write_json
from quietstar_jax.lock import Lock
from quietstar_jax.report import main
from quietstar_jax.reports import follow
from quietstar_jax.training.metrics import write_metrics
from quietstar_jax.training.workdir import LOCK
from tests.reports.browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parents[2]
THOUGHT = {
    "context": "a <b>", "thought": "x\ny", "next_token": "c", "probability_without_thought": 0.1,
    "probability_with_thought": 0.9, "mixing_weight": 0.25,
}  # fmt: skip
REFRESH = '<meta http-equiv="refresh" content="1">'


def records(steps: int) -> list[dict]:
    found = []
    for step in range(1, steps + 1):
        thinks = {"talk_loss_1": 1.5, "reward": 0.125 * step, "entropy": 2.0} if step > 2 else {}
        phase = "thoughts" if thinks else "plain"
        found.append({"kind": "train", "step": step, "phase": phase, "base_loss": 3.0 - 0.1 * step, **thinks})
    evaluated = {"loss_without_thoughts": 2.5, "loss_with_thoughts": 2.25, "sample_thoughts": [THOUGHT]}
    return [*found, {"kind": "evaluation", "step": steps, "phase": "thoughts", **evaluated}]


def a_run(workdir: Path, steps: int, total: int = 6) -> Path:
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", {"config": {"phases": [{"steps": 2}, {"steps": total - 2}]}})
    write_metrics(workdir / "metrics.jsonl", records(steps))
    if steps == total:
        write_json(workdir / "summary.json", {"step": steps, "sample_thoughts": [THOUGHT]})
    return workdir


def rows(html: str) -> list[list[str]]:
    found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [row for row in found if row]


def test_two_runs_that_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, stopped = a_run(tmp_path / "study/a/seed_0", 6), a_run(tmp_path / "study/b/seed_0", 4)
    (stopped / LOCK).write_text(json.dumps({"process": 2**22 + 1, "host": "x"}))  # killed on another machine
    page = tmp_path / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "STALE_SECONDS", 0)
        main(["--follow", str(whole), f"{stopped}/", str(whole), "--output", str(page), "--figures", str(tmp_path)])
    html = page.read_text()
    assert rows(html)[:2] == [
        ["a/seed_0", "finished", "6 of 6", "thoughts", "2.4000", "1.5000", "0.7500", "2.000", "2.5000", "2.2500", ""],
        ["b/seed_0", "stopped", "4 of 6", "thoughts", "2.6000", "1.5000", "0.5000", "2.000", "2.5000", "2.2500", ""],
    ]
    assert rows(html)[2] == ["… a &lt;b&gt;", "x↵y", "c", "10.0% → 90.0%", "0.25"]
    assert re.findall(r'class="smooth (\w*) ?(run\d)"', html) == [
        ("dashed", "run0"), ("", "run0"), ("dashed", "run1"), ("", "run1"), *2 * [("", "run0"), ("", "run1")]
    ]  # fmt: skip
    assert "refresh" not in html
    assert "reward_nats.svg" in {path.name for path in tmp_path.iterdir()}
    assert capsys.readouterr().out.endswith(f"{page} (0.0 MB)\n")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_page_of_runs_on_a_phone(tmp_path: Path) -> None:
    runs = [str(a_run(tmp_path / name, 6)) for name in ("a", "b")]
    main(["--follow", *runs, "--output", str(tmp_path / "page.html")])
    colours = "Array.from(document.querySelectorAll('{}'), (one) => getComputedStyle(one).{}).join(';')"
    with Browser(tmp_path / "profile", width=360, height=740) as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.documentElement.scrollWidth") == 360
        swatches = browser.run(colours.format(".swatch", "borderTopColor")).split(";")
        lines = browser.run(colours.format("svg .smooth:not(.dashed)", "stroke")).split(";")
        assert len(set(swatches)) == 2
        assert lines == 3 * swatches
        assert browser.complaints == []


def test_it_follows_until_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pages = a_run(tmp_path / "run", 2), []
    lock = Lock(run / LOCK, "the run", print)

    def sleep(seconds: float) -> None:
        assert seconds == 1
        if len(pages) == 1:
            write_metrics(run / "metrics.jsonl", records(6))
        else:
            write_json(run / "summary.json", {"step": 6})
            lock.__exit__()

    lock.__enter__()
    monkeypatch.setattr(follow.time, "sleep", sleep)
    last = follow.follow([run], pages.append, 1)
    assert [rows(page)[0][1:3] for page in [*pages, last]] == [
        ["training", "2 of 6"], ["training", "6 of 6"], ["finished", "6 of 6"]
    ]  # fmt: skip
    assert [REFRESH in page for page in [*pages, last]] == [True, True, False]
    assert "raw run0" in last


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_leaves_a_complete_page_and_no_device_is_used(tmp_path: Path) -> None:
    run, page = a_run(tmp_path / "run", 2), tmp_path / "page.html"
    command = [
        sys.executable,
        "-m",
        "quietstar_jax.report",
        "--follow",
        str(run),
        "--every",
        "1",
        "--output",
        str(page),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "absent"}  # any use of it would fail
    with Lock(run / LOCK, "the run", print):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)
        wait_for(lambda: page.exists() and "2 of 6" in page.read_text(), process)
        write_metrics(run / "metrics.jsonl", records(5))
        wait_for(lambda: "5 of 6" in page.read_text(), process)
        assert REFRESH in page.read_text()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert out.splitlines()[-1] == f"{page} (0.0 MB)"
    assert REFRESH not in page.read_text()
    assert page.read_text().endswith("</html>\n")


def test_what_is_not_a_run(tmp_path: Path) -> None:
    page = ["--output", str(tmp_path / "page.html")]
    for arguments, message in (
        (["--follow", str(tmp_path)], "is not the work directory of a run: it has no metrics.jsonl. Give --follow"),
        (["--follow", *(f"{tmp_path}/{i}" for i in range(9))], "--follow has 9 runs"),
        (["--workdir", str(tmp_path), "--every", "2"], "--every needs --follow"),
        (["--follow", str(tmp_path), "--prompt", "x"], "--prompt needs --checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*arguments, *page])
