"""Evaluation results as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODES = {"without_thoughts": "without thoughts", "with_thoughts": "with thoughts"}
PERCENT = {
    "accuracy": "accuracy, %",
    "whole_span_accuracy": "whole spans right, %",
    "exact_match": "exact match (greedy decoding), %",
    "official_probability": "official metric (probability), %",
}
PLAIN = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
GROUPS = {"spans": "tokens in spans", "others": "other tokens"}
SHOWN = 5  # of the tokens helped and harmed
SHARES = (0, 2, 5, 10, 15, 20, 30, 50, 75, 100)  # of positions that think, in %: rows of the table of a policy


def format_result(result: Mapping[str, Any]) -> str:
    """Formats the table that an evaluation prints at its end."""
    modes = [mode for mode in MODES if mode in result]
    what = result["model"]["checkpoint"]
    step = "" if result["model"]["step"] is None else f", step {result['model']['step']}"
    control, reach = (result["config"].get(name) for name in ("control", "reach"))
    without = result["config"].get("exclude")
    replaced = f", with tokens that match {without!r} excluded" if without else ""
    replaced += f", instead of each thought: {control}" if control else ""
    replaced += f", a thought reaches {reach} tokens" if reach and reach > 1 else ""
    lines = ["", f"{result['task']} of {what}{step}{replaced}", _counted(result), ""]
    lines.append(f"{'':<36}" + "".join(f"{MODES[mode]:>26}" for mode in modes))
    for name in (*PERCENT, *PLAIN):
        if name in result[modes[0]]:
            lines.append(_row(name, [result[mode] for mode in modes]))
    for group, title in GROUPS.items():
        if group in result[modes[0]]:
            values = [result[mode][group] for mode in modes]
            whole = f", {result['whole_spans']} whole spans" if group == "spans" else ""
            lines += ["", f"{result['tokens'][group]} {title}{whole}:"]
            lines += [_row(name, values) for name in (*PERCENT, *PLAIN) if name in values[0]]
    lines += _votes(result, modes)
    lines += _comparison(result)
    lines += _use(result)
    lines += _front(result)
    lines += _deciles(result, modes)
    for name, title in (("helped", "helped"), ("harmed", "harmed")):
        if result.get(name):
            lines += ["", f"tokens that thoughts {title} most:", *map(_moment, result[name][:SHOWN])]
    return "\n".join(lines)


def _counted(result: Mapping[str, Any]) -> str:
    left_out = ""
    if result.get("too_long"):  # results for text have no such figure
        left_out = f"; {result['too_long']} omitted, longer than {result['longest_tokens']} tokens"
    if "window" in result:
        return (
            f"{result['tokens']} tokens of {result['texts']} texts ({result['bytes']} bytes), windows of "
            f"{result['window']} tokens, at least {result['context']} of them context"
        )
    count = f"{result['questions']} questions" if "questions" in result else f"{result['texts']} texts"
    return count + left_out


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
    """Lines of the differences with minus without thoughts, and of this model minus another."""
    found, lines = result.get("comparison"), []
    if found:
        lines += ["", "the same items with and without thoughts:", *_differences(found, " with thoughts")]
    other = result.get("against", {})
    for mode in MODES:
        if mode in other:
            here = f"this model {MODES[other['mode']]}, minus the other {MODES[mode]}"
            lines += ["", f"{here}, {other['texts']} texts ({other['records']}):", *_differences(other[mode])]
    return lines


def _differences(found: Mapping[str, Any], after: str = "", group: str = "") -> list[str]:
    """Lines of comparisons by metric, or by group of tokens and metric."""
    lines = []
    for name, value in found.items():
        if name in GROUPS:
            lines += _differences(value, after, f"{GROUPS[name]}, ")
            continue
        scale = 100 if name in PERCENT else 1
        p_value = "" if value["p_value"] is None else f", p = {value['p_value']:.3g} ({value['test']})"
        label = group + (PERCENT | PLAIN)[name]
        lines.append(f"    {label}: {scale * value['difference']:+.4g}{after}{p_value}")
    return lines


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


def right_name(result: Mapping[str, Any]) -> str:
    """What `right` counts in the front of a result."""
    return "exact match" if "questions" in result else "tokens right"


def _front(result: Mapping[str, Any]) -> list[str]:
    """Policies of thinking at some of their thresholds: for each of `SHARES`, the most positions up to this share."""
    if "front" not in result:
        return []
    front, of_answers = result["front"], "questions" in result
    what = "token of an answer" if of_answers else "scored token"
    lines = [
        "",
        f"if only some of the {front['positions']} positions think (a position predicts one {what}):",
        f"{'    policy':<36}{'thinking, %':>14}{'nats per token':>18}{right_name(result) + ', %':>18}{'kept, %':>14}",
    ]
    for name, found in front["policies"].items():
        shown = [max(p for p in range(len(found["points"])) if 100 * found["points"][p]["thinking_rate"] <= share)
                 for share in SHARES]  # fmt: skip
        lines += [_front_row(found["points"][i]) for i in sorted(set(shown))]
        if best := found["keeps_97_percent"]:
            policy = name.replace("_", " ")
            lines.append(f"    {policy}, the fewest thoughts that keep 97 % of what is right if all positions think:")
            lines.append(_front_row(best))
    return lines


def _front_row(point: Mapping[str, Any]) -> str:
    cells = [f"{100 * point['thinking_rate']:>14.2f}", f"{point['nats_per_token']:>18.4f}"]
    for name, width in (("right", 18), ("kept", 14)):
        cells.append(f"{'-':>{width}}" if point[name] is None else f"{100 * point[name]:>{width}.2f}")
    return f"{'    ' + point['think']:<36}" + "".join(cells)


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
