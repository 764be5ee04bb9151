"""The page of a study: every seed, every difference, the right numbers beside them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.io import write_json
from quietstar_jax.report import main
from quietstar_jax.reports.drawings import drawings
from quietstar_jax.reports.make import report_study
from quietstar_jax.reports.page import write_page
from quietstar_jax.reports.study_page import _near, study_page
from quietstar_jax.studies.results import RESULTS
from quietstar_jax.studies.table import compare
from tests.reports.browser import CHROMIUM, Browser

VALUES = {"pause": [0.2, 0.3, 0.25], "thoughts": [0.9, 0.8, 0.95], "<odd>": [0.91, 0.8]}


def results() -> dict:
    figures = {v: {seed: {"accuracy": x} for seed, x in enumerate(xs)} for v, xs in VALUES.items()}
    begun = {"run": "thoughts/seed_0", "step": 560}
    return {
        "study": {
            "base": "configs/x.py", "baseline": "thoughts", "metrics": ["accuracy", "never_measured"],
            "variants": {"pause": {"thought.control": "pause"}, "thoughts": {}, "<odd>": {"a": "<b>"}},
        },
        "runs": [
            {"variant": v, "seed": s, "begun_from": begun if v == "pause" else None, "figures": run}
            for v, runs in figures.items() for s, run in runs.items()
        ],
        "missing": [{"variant": "<odd>", "seed": 2}],
        "rows": compare(figures, "thoughts", ["accuracy", "never_measured"]),
    }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_json(tmp_path / RESULTS, results())
    return report_study(tmp_path)


def test_every_run_and_every_difference_is_drawn(page: str) -> None:
    dots = re.findall(r'<circle class="(\w+)"[^>]*><title>([^<]*)</title>', page)
    seeds = [tip for kind, tip in dots if kind == "seed"]
    assert len(seeds) == 8 + 5  # values, and pairs with the baseline
    assert "pause, seed 1: 0.3" in seeds
    assert "pause, seed 1: -0.5" in seeds
    assert next(tip for kind, tip in dots if kind == "mean") == "thoughts: mean 0.8833 over 3 seeds"
    difference = np.mean(np.subtract(VALUES["pause"], VALUES["thoughts"]))
    assert f"pause: mean difference {difference:+.4g}" in page
    assert re.search(r">p 0\.01\d?, n 3<", page)
    assert "&lt;odd&gt; (seed 2)" in page
    assert "<odd>" not in page
    assert "thoughts (step 560)" in page
    assert page.count("<svg") == 2  # what no run has measured is left out


def test_two_metrics_are_drawn_against_each_other() -> None:
    losses = {"a": 1.0, "b": 1.1, "c": 1.2, "d": 1.3, "e": 1.4, "far": 50.0, "unmeasured": None}
    figures = {v: {0: {"loss": x, "answers": 0.5} if x else {"loss": 1.0}} for v, x in losses.items()}
    study = {"base": "x.py", "baseline": "a", "metrics": ["loss", "answers"], "variants": {v: {} for v in losses}}
    study["fronts"] = [["loss", "answers"]]
    runs = [{"variant": v, "seed": 0, "begun_from": None, "figures": run[0]} for v, run in figures.items()]
    page = study_page({"study": study, "runs": runs, "rows": compare(figures, "a", ["loss", "answers"])}, "")
    front = drawings(page)["answers_against_loss.svg"]
    found = re.findall(r"<title>(\w+): loss ([\d.]+), answers 0\.5<", front)
    assert found == [("a", "1"), ("b", "1.1"), ("c", "1.2"), ("d", "1.3"), ("e", "1.4")]
    assert "Too far from the others to be drawn: far (50, 0.5)." in page
    assert "answers_against_loss.svg" not in drawings(study_page({"study": study, "runs": [], "rows": []}, ""))


@pytest.mark.parametrize(
    ("values", "far"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.6], []),  # most are equal
        ([0.0, 0.0, 0.0, 0.0, 0.6], []),
        ([0.5, 0.5, 0.5001, 0.5, 0.6], []),  # almost equal
        ([1.0, 1.1, 1.2, 1.3, 50.0], [50.0]),
        ([2.0, 2.01, 2.02, 2.03, 3.5], [3.5]),
        ([], []),
    ],
)
def test_values_too_far_from_the_others(values: list[float], far: list[float]) -> None:
    assert np.array(values)[~_near(np.array(values))].tolist() == far


def test_charts_are_files_of_their_own(page: str, tmp_path: Path) -> None:
    found = drawings(page)
    assert list(found) == ["accuracy.svg", "accuracy_differences.svg"]
    assert list(drawings(page + page)) == [*found, "accuracy_2.svg", "accuracy_differences_2.svg"]
    charts = [f'<svg viewBox="0 0 1 1" role="img" aria-label="{label}"></svg>' for label in ("x 2", "x", "x")]
    assert list(drawings("".join(charts))) == ["x_2.svg", "x.svg", "x_3.svg"]
    for svg in found.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        colours = root.find("{http://www.w3.org/2000/svg}style").text
        assert ":root" in colours
        assert "svg .seed" in colours
    command = ["--workdir", str(tmp_path), "--output", str(tmp_path / "page.html")]
    main([*command, "--figures", str(tmp_path / "figures")])
    assert {path.name: path.read_text("utf-8") for path in (tmp_path / "figures").iterdir()} == found
    with pytest.raises(ConfigError, match=r"--figures .*page\.html.* cannot be written"):
        main([*command, "--figures", str(tmp_path / "page.html")])


def test_a_single_run_is_shown_too(tmp_path: Path) -> None:
    found = results()
    found["runs"] = [run for run in found["runs"] if run["variant"] == "pause" and run["seed"] == 0]
    found["rows"] = compare({"pause": {0: {"accuracy": 0.2}}, "thoughts": {}}, "thoughts", ["accuracy"])
    write_json(tmp_path / RESULTS, found)
    assert "No seed was run with both" in report_study(tmp_path)


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not contain the results of a study"):
        report_study(tmp_path)
    (tmp_path / RESULTS).write_text('{"rows": []}')
    with pytest.raises(DataError, match="does not contain the results of a study"):
        report_study(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page)
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.querySelectorAll('circle.seed').length") == 13
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        for name, svg in drawings(page).items():
            write_page(tmp_path / name, svg)
            browser.open(tmp_path / name)
            seen = "getComputedStyle(document.querySelector('circle.mean')).stroke"
            assert browser.run(seen) in ("rgb(31, 111, 174)", "rgb(116, 185, 238)")
        assert browser.complaints == []


def test_an_interval_of_two_pairs_ends_at_the_edge_of_the_chart(tmp_path: Path) -> None:
    values = {"pause": [0.2, 0.3], "thoughts": [0.8, 0.85]}
    figures = {variant: {seed: {"accuracy": x} for seed, x in enumerate(xs)} for variant, xs in values.items()}
    found = results() | {"rows": compare(figures, "thoughts", ["accuracy"])}
    found["runs"] = [
        {"variant": variant, "seed": seed, "begun_from": None, "figures": run}
        for variant, runs in figures.items() for seed, run in runs.items()
    ]  # fmt: skip
    write_json(tmp_path / RESULTS, found)
    html = report_study(tmp_path)
    assert re.search(r">p 0\.0\d+, n 2, ⟷<", html)
    whiskers = re.findall(r'<polyline class="whisker" points="([-\d.]+),[-\d.]+ ([-\d.]+),', html)
    assert len(whiskers) == 3
    assert all(0 <= float(x) <= 700 for pair in whiskers for x in pair)
