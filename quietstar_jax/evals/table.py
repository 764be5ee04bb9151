"""Evaluation results as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODES = {"without_thoughts": "without thoughts", "with_thoughts": "with thoughts"}
PERCENT = {
    "accuracy": "accuracy, %",
    "exact_match": "exact match (greedy decoding), %",
    "official_probability": "official metric (probability), %",
}
PLAIN = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
SHOWN = 5  # of the tokens helped and harmed


def format_result(result: Mapping[str, Any]) -> str:
    """Formats the table that an evaluation prints at its end."""
    modes = [mode for mode in MODES if mode in result]
    what = result["model"]["checkpoint"]
    step = "" if result["model"]["step"] is None else f", step {result['model']['step']}"
    lines = ["", f"{result['task']} of {what}{step}", _counted(result), ""]
    lines.append(f"{'':<36}" + "".join(f"{MODES[mode]:>26}" for mode in modes))
    for name in (*PERCENT, *PLAIN):
        if name in result[modes[0]]:
            lines.append(_row(name, [result[mode] for mode in modes]))
    lines += _votes(result, modes)
    lines += _comparison(result)
    lines += _use(result)
    lines += _deciles(result, modes)
    for name, title in (("helped", "helped"), ("harmed", "harmed")):
        if result.get(name):
            lines += ["", f"tokens that thoughts {title} most:", *map(_moment, result[name][:SHOWN])]
    return "\n".join(lines)


def _counted(result: Mapping[str, Any]) -> str:
    if "tokens" in result:
        return (
            f"{result['tokens']} tokens of {result['texts']} texts ({result['bytes']} bytes), windows of "
            f"{result['window']} tokens, at least {result['context']} of them context"
        )
    left_out = f"; {result['too_long']} omitted, longer than {result['longest_tokens']} tokens"
    return f"{result['questions']} questions" + (left_out if result["too_long"] else "")


def _row(name: str, values: list[Mapping[str, Any]]) -> str:
    scale, digits = (100, 2) if name in PERCENT else (1, 4)
    cells = []
    for value in values:
        interval = value.get(f"{name}_interval")
        interval = None if interval is None else (scale * interval[0], scale * interval[1])
        text = _with_interval(scale * value[name], interval, f".{digits}f")
        cells.append(f"{text:>26}")
    return f"{(PERCENT | PLAIN)[name]:<36}" + "".join(cells)


def _votes(result: Mapping[str, Any], modes: list[str]) -> list[str]:
    if "majority_accuracy" not in result[modes[0]]:
        return []
    lines = ["", f"accuracy of the majority of k samples, %, at temperature {result['temperature']}:"]
    for k in result[modes[0]]["majority_accuracy"]:
        cells = [100 * result[mode]["majority_accuracy"][k] for mode in modes]
        lines.append(f"{'    k = ' + k:<36}" + "".join(f"{cell:>26.2f}" for cell in cells))
    answered = [100 * result[mode]["answered"] for mode in modes]
    return [*lines, f"{'samples with a number, %':<36}" + "".join(f"{cell:>26.2f}" for cell in answered)]


def _comparison(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in result.get("comparison", {}).items():
        scale = 100 if name in PERCENT else 1
        p_value = "" if found["p_value"] is None else f", p = {found['p_value']:.3g} ({found['test']})"
        label = (PERCENT | PLAIN)[name]
        lines.append(f"    {label}: {scale * found['difference']:+.4g} with thoughts{p_value}")
    return ["", "the same items with and without thoughts:", *lines] if lines else []


def _use(result: Mapping[str, Any]) -> list[str]:
    """Whether predictions use what the thoughts say: losses with their intervals, and differences with theirs."""
    if "thought_only" not in result:
        return []
    alone, together = result["thought_only"], result.get("ensemble")
    lines = ["", f"{'nats per token of the thought alone, without the text:':<68}{'gain':>32}"]
    lines.append(_use_row("an empty thought", alone["empty_thought"]))
    lines.append(_use_row("the thought", alone, alone["gain_over_empty_thought"]))
    if together:
        lines += ["", f"{'nats per token of ' + str(together['samples']) + ' sampled thoughts:':<68}{'gain':>32}"]
        lines.append(_use_row("one of them, on average", together["one_thought"]))
        lines.append(_use_row("their mean probability", together, together["gain_over_one_thought"]))
        lines.append(_use_row("the same, against no thoughts", together, together["gain_over_no_thoughts"]))
    for kind, rows in result.get("perturbed", {}).items():
        lines += ["", f"{'nats per token with thoughts perturbed by ' + kind + ':':<68}{'change':>32}"]
        for row in rows:
            what = f"{row['percent']} % ({row['changed_tokens']} tokens of each)"
            lines.append(_use_row(what, row, row["change"] if row["percent"] else None))
    return lines


def _use_row(what: str, loss: Mapping[str, Any], difference: Mapping[str, Any] | None = None) -> str:
    cells = [_with_interval(loss["nats_per_token"], loss["nats_per_token_interval"], ".4f")]
    if difference is not None:
        cells.append(_with_interval(difference["difference"], difference["interval"], "+.4f"))
    return f"{'    ' + what:<36}" + "".join(f"{cell:>32}" for cell in cells)


def _with_interval(value: float, interval: tuple[float, float] | None, spell: str) -> str:
    return f"{value:{spell}}" + ("" if interval is None else f" ({interval[0]:{spell}} .. {interval[1]:{spell}})")


def _deciles(result: Mapping[str, Any], modes: list[str]) -> list[str]:
    if "deciles" not in result:
        return []
    lines = [
        "",
        "nats per token by tenth of the tokens, by entropy of the prediction without thoughts, lowest first:",
    ]
    for number, row in enumerate(result["deciles"], start=1):
        cells = [row[f"loss_{mode}"] for mode in modes]
        lines.append(f"{'    ' + str(number):<36}" + "".join(f"{cell:>26.4f}" for cell in cells))
    return lines


def _moment(found: Mapping[str, Any]) -> str:
    nll = f"{found['nats_without_thoughts']:.2f} -> {found['nats_with_thoughts']:.2f} nats"
    return f"    {nll}: ...{found['context']!r} {found['token']!r} (thought: {found['thought']!r})"
