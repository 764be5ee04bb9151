"""The summary of a run: as text, and as the content of `summary.json`."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quietstar_jax.config import Config
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.settings import OnResume, to_mapping
from quietstar_jax.thoughts.ending import thought_ids
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.resume import MARKED

CONTEXT_TOKENS = 24
MOST_HELPFUL = 3


def most_helpful_thoughts(
    scores: TokenScores, batches: Sequence[Mapping[str, np.ndarray]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Returns the thoughts that increased the likelihood of the true next token the most, at most one per sequence.

    Each is given with its context, the true next token, the token's probability without and with the thought, and the
    mixing weight.
    """
    if not scores.thinks:
        return []
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    gain = np.where(scores.real, scores.base.nll - scores.talk.nll, -np.inf)
    best = gain.argmax(axis=1)
    rows = np.argsort(-gain[np.arange(len(gain)), best], kind="stable")[:MOST_HELPFUL]
    places, thoughts = scores.thought_places(), []
    for row in rows:
        j = int(best[row])
        if not np.isfinite(gain[row, j]):
            continue
        thoughts.append(
            {
                "context": tokenizer.decode(tokens[row, max(0, j + 1 - CONTEXT_TOKENS) : j + 1].tolist()),
                "thought": tokenizer.decode(thought_ids(scores.thoughts[row, max(0, places[row, j])])),
                "next_token": tokenizer.decode([int(tokens[row, j + 1])]),
                "probability_without_thought": float(np.exp(-scores.base.nll[row, j])),
                "probability_with_thought": float(np.exp(-scores.talk.nll[row, j])),
                "mixing_weight": float(scores.weight[row, j]),
            }
        )
    return thoughts


def config_hash(config: Config) -> str:
    """Returns a hash of all settings that affect the weights or the metrics of a run."""
    settings = to_mapping(config)
    for name in MARKED[OnResume.UNRELATED]:
        *groups, last = name.split(".")[1:]
        functools.reduce(operator.getitem, groups, settings).pop(last)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def format_summary(summary: Mapping[str, Any]) -> str:
    """Returns the table printed at the end of a run."""
    counted = f"held-out text, {summary['tokens']:,} tokens" if summary.get("tokens") else "held-out text"
    lines = ["", f"{counted:<34}{'without thoughts':>18}{'with thoughts':>16}"]

    def row(label: str, name: str, unit: str, scale: float = 1.0) -> None:
        pair = [summary.get(f"{name}_{kind}_thoughts") for kind in ("without", "with")]
        if None not in pair:
            lines.append(f"{label:<34}" + "".join(f"{value * scale:>{w}.{d}f}" for value, w, d in _columns(pair, unit)))

    row("loss, nats per token", "loss", "nats")
    row("next token right, %", "accuracy", "percent", 100)
    row("final answer right, %", "answer_accuracy", "percent", 100)
    row("loss of the answer, nats", "answer_loss", "nats")
    for kind, rates in summary.get("answers_by_kind", {}).items():
        pair = f"{100 * rates['without_thoughts']:>18.1f}{100 * rates['with_thoughts']:>16.1f}"
        lines.append(f"{'    ' + kind + ', %':<34}{pair}")
    if "useful_thought_rate" in summary:
        lines.append(f"{'thoughts with the right steps, %':<34}{'':>18}{100 * summary['useful_thought_rate']:>16.1f}")
        sampled = 100 * summary["useful_sampled_thought_rate"]
        lines.append(f"{'    of sampled thoughts, %':<34}{'':>18}{sampled:>16.1f}")
    kept = {name.removeprefix("answers_kept_"): x for name, x in summary.items() if name.startswith("answers_kept_")}
    if kept:
        lines += ["", f"{'thoughts at some positions only,':<34}{'answers kept if':>18}{'thinking rate':>16}"]
        lines.append(f"{'chosen by':<34}{'15 % think, %':>18}{'keeping 97 %, %':>16}")
        for policy, share in kept.items():
            rate = 100 * summary[f"thinking_rate_{policy}"]
            lines.append(f"{'    ' + policy:<34}{100 * share:>18.1f}{rate:>16.1f}")
    if step := summary.get("thoughts_collapsed_at_step"):
        lines += ["", f"Thoughts collapsed at step {step}; the record of kind `warning` in metrics.jsonl says more."]
    if summary.get("deciles"):
        lines += ["", "loss by tenth of the tokens, by entropy of the prediction without thoughts, lowest first:"]
        for i, decile in enumerate(summary["deciles"]):
            pair = f"{decile['loss_without_thoughts']:>18.4f}{decile['loss_with_thoughts']:>16.4f}"
            lines.append(f"{'    ' + str(i + 1):<34}{pair}")
    for i, sample in enumerate(summary.get("sample_thoughts", [])):
        lines += [
            "",
            f"thought {i + 1}, after: ... {sample['context']}",
            f"    thought:    {sample['thought']}",
            f"    next token: {sample['next_token']!r}, mixing weight {sample['mixing_weight']:.3f}",
            f"    its probability: {sample['probability_without_thought']:.3f} without the thought, "
            f"{sample['probability_with_thought']:.3f} with it",
        ]
    lines += ["", *(f"{name + ':':<14}{path}" for name, path in summary["paths"].items())]
    return "\n".join(lines)


def _columns(pair: Sequence[Any], unit: str) -> list[tuple[float, int, int]]:
    digits = 4 if unit == "nats" else 1
    return [(pair[0], 18, digits), (pair[1], 16, digits)]
