"""The HTML page of runs that are training: their newest figures, their curves, and some of their thoughts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from quietstar_jax.reports.figures import Line, curves, measured_steps, points_of
from quietstar_jax.reports.page import figure, render, table, visible
from quietstar_jax.reports.svg import number

MOST_RUNS = 8  # colours in chart.css
CHARTS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {  # title -> ((metric, class beside run's) .., caption)
    "loss, nats per token": (
        (("base_loss", "dashed "), ("talk_loss_1", "")),
        "Dashed: without thoughts; solid: with thoughts. Loss of the next token in the batches of training.",
    ),
    "reward, nats": ((("reward", ""),), "How much sampled thoughts helped, on average."),
    "thought entropy, nats per token": ((("entropy", ""),), "How varied thoughts are; near 0, all are the same."),
}
FIGURES: dict[str, tuple[str, str, Callable[[float], str]]] = {  # column -> (kind of record, metric, format)
    "loss without thoughts": ("train", "base_loss", lambda x: number(x, 4)),
    "with": ("train", "talk_loss_1", lambda x: number(x, 4)),
    "reward": ("train", "reward", lambda x: number(x, 4)),
    "entropy": ("train", "entropy", lambda x: number(x, 3)),
    "held-out loss without": ("evaluation", "loss_without_thoughts", lambda x: number(x, 4)),
    "with ": ("evaluation", "loss_with_thoughts", lambda x: number(x, 4)),
    "tokens per second": ("speed", "tokens_per_second", lambda x: number(x, 0)),
}


@dataclass(frozen=True)
class RunState:
    """What the files of a run say: `summary` is that of its end, empty before; `total_steps` is 0 if unknown."""

    name: str
    running: bool
    total_steps: int
    records: Sequence[Mapping[str, Any]]  # of `metrics.jsonl`
    summary: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that has a record."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def status(self) -> str:
        """What the run is doing."""
        if self.running:
            return "training" if self.records else "starting"
        ended_at = self.summary.get("step")  # fewer steps than now, if phases were added to a finished run
        return "stopped" if ended_at is None or ended_at < self.total_steps else "finished"

    def last(self, kind: str) -> Mapping[str, Any]:
        """The newest record of a kind; empty if there is none."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})

    @property
    def thoughts(self) -> tuple[int, Sequence[Mapping[str, Any]]]:
        """The newest thoughts, and their step."""
        evaluation = self.last("evaluation")
        source = evaluation if evaluation.get("sample_thoughts") else self.summary  # older runs: only at their end
        return source.get("step", 0), source.get("sample_thoughts", [])


def runs_page(runs: Sequence[RunState], reload_seconds: int = 0) -> str:
    """Returns the page as HTML; with `reload_seconds`, browsers load it again after this time."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    again = f"This page is written and loaded again every {reload_seconds} s." if reload_seconds else ""
    body = [
        "<h1>Training</h1>",
        f'<p class="where">State of {now}. {again}</p>',
        f'<p class="runs">{"".join(_swatch(i) + escape(run.name) for i, run in enumerate(runs))}</p>',
        _status(runs),
        *(f'<p class="note">{escape(run.name)}: {escape(text)}</p>' for run in runs if (text := _warning(run))),
        "<h2>Curves</h2>",
        '<div class="charts">',
        *(_chart(runs, title, *of) for title, of in CHARTS.items()),
        "</div>",
        "<h2>Thoughts</h2><p>From the newest evaluation: the greedy thoughts that helped most with held-out text.</p>",
        *(_thoughts(run) for run in runs),
    ]
    title = "Training: " + ", ".join(run.name for run in runs)
    return render(title, "\n".join(body), reload_seconds=reload_seconds)


def _swatch(run: int) -> str:
    return f'<span class="swatch run{run}"></span>'


def _status(runs: Sequence[RunState]) -> str:
    rows = []
    for run in runs:
        phase = run.records[-1]["phase"] if run.records else ""
        steps = f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
        values = [(run.last(kind).get(metric), form) for kind, metric, form in FIGURES.values()]
        cells = ["" if value is None else form(value) for value, form in values]
        rows.append([run.name, run.status, steps, phase, *cells])
    return table(["run", "state", "step", "phase", *FIGURES], rows)


def _warning(run: RunState) -> str:
    return str(run.last("warning").get("warning", ""))


def _chart(runs: Sequence[RunState], title: str, series: Sequence[tuple[str, str]], caption: str) -> str:
    lines = []
    for i, run in enumerate(runs):
        records = measured_steps(run.records)
        for metric, kind in series:
            raw = f"raw run{i}" if len(runs) == 1 else ""  # single values of several runs would hide their means
            lines.append(Line(raw, f"smooth {kind}run{i}", run.name, points_of(records, metric)))
    drawn = [line for line in lines if line.points]
    return figure(title, curves(title, drawn), caption) if drawn else ""


def _thoughts(run: RunState) -> str:
    step, thoughts = run.thoughts
    if not thoughts:
        return f'<h3>{escape(run.name)}</h3><p class="soft">No thoughts have been evaluated yet.</p>'
    rows = [
        [
            f"… {visible(sample['context'])}", visible(sample["thought"]), visible(sample["next_token"]),
            f"{sample['probability_without_thought']:.1%} → {sample['probability_with_thought']:.1%}",
            number(sample["mixing_weight"], 2),
        ]
        for sample in thoughts
    ]  # fmt: skip
    head = ["after", "thought", "next token", "its probability without → with", "mixing weight"]
    words = table(head, rows).replace('class="data"', 'class="data words"')
    return f"<h3>{escape(run.name)}, step {step:,}</h3>{words}"
