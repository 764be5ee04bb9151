"""The HTML page of a checkpoint: text coloured by the effect of thoughts, the thoughts themselves, and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from quietstar_jax.reports.figures import (
    gain_by_decile,
    reward_histogram,
    training_curves,
    weight_histogram,
)
from quietstar_jax.reports.front_figures import front_charts
from quietstar_jax.reports.gate_figures import gate_figures
from quietstar_jax.reports.observe import Observed, thinking_rate
from quietstar_jax.reports.page import render, tiles, visible
from quietstar_jax.reports.pieces import Pieces
from quietstar_jax.reports.reading import LEVELS, labelled, model_name, page_data, reading
from quietstar_jax.reports.thought_use_figures import ensemble_curve, perturbation_curves, thought_only_bars
from quietstar_jax.thoughts.settings import ThoughtSettings

CLEAR = 0.1  # nats: a change worth counting
EXAMPLES = 6  # of the most helped and of the most harmed tokens


def checkpoint_page(models: Sequence[Observed], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page as HTML.

    Args:
      models: one, or two in the same windows; the charts are about the first.
      metrics: records of the run's `metrics.jsonl`; empty if there is no run.
    """
    observed, seen = models[0], models[0].observations
    losses = [_losses(one) for one in models]
    base_nll, talk_nll = losses[0]
    gains = [base - talk[0] for base, talk in losses]
    gain, change = gains[0], gains[0] - gains[1] if len(models) > 1 else gains[0]
    made = [thinking_rate(one.observations) for one in models]
    names = [model_name(one) for one in models]
    data = page_data(models, start=int(change.argmax()))
    body = [
        "<h1>What the thoughts changed</h1>",
        f'<p class="where">{escape(" against ".join(names))}</p>',
        _introduction(observed.settings, len(talk_nll), made),
        _key_figures(names, losses, made),
        reading(models, len(talk_nll) > 1),
        _examples(observed, change, len(models) > 1),
        f"<h2>The same in figures{escape(f': {names[0]}') if len(models) > 1 else ''}</h2>",
        '<div class="charts">',
        gain_by_decile(np.concatenate([scores.base_entropy for scores in seen]), base_nll, gain),
        reward_histogram(
            np.concatenate([scores.reward[scores.made_thoughts] for scores in seen]), observed.settings.tokens_ahead
        ),
        weight_histogram(np.concatenate([scores.weight[scores.made_thoughts] for scores in seen])),
        "</div>",
        _use(observed.use),
        _selective(observed.selective, metrics),
        _training(metrics),
        "<footer>"
        + "".join(f'<p class="note">{escape(note)}</p>' for one in models for note in one.notes)
        + "</footer>",
    ]
    return render("What the thoughts changed", "\n".join(body), data)


def _losses(observed: Observed) -> tuple[np.ndarray, np.ndarray]:
    """Returns the losses of all tokens without thoughts, [tokens], and with each, [R, tokens]."""
    seen = observed.observations
    return np.concatenate([scores.base.nll for scores in seen]), np.concatenate(
        [scores.talk.nll for scores in seen], axis=1
    )


def _introduction(settings: ThoughtSettings, thoughts: int, made: Sequence[float]) -> str:
    """`thoughts`: R; `made`: for each model, the share of the tokens that have thoughts."""
    several = "once by always taking the likeliest word (<em>greedy</em>)"
    most = "up to " if settings.samples_end else ""
    shares = " or ".join(f"{share:.1%}" for share in dict.fromkeys(made))
    where = "at every place" if min(made) == 1 else f"before {shares} of the tokens (chosen by a rule)"
    several += f", and {thoughts - 1} times at random" if thoughts > 1 else ""
    return (
        "<p>A language model reads text and predicts it token by token (a token is a word, or a piece of one). This "
        f"model may think before every single token: it writes {most}{settings.thought_length} hidden tokens, then "
        f"predicts. Here it did so {where} of the text below: {several}. The colours say whether that "
        "helped.</p><p>The "
        "measure is the <em>nat</em>: a gain of 0.7 nats means that the true next token became twice as likely, 2.3 "
        "nats ten times; a negative number, that it became less likely.</p>"
    )


def _key_figures(names: Sequence[str], losses: Sequence[tuple[np.ndarray, np.ndarray]], made: Sequence[float]) -> str:
    heads = [f"<h3>{escape(title)}</h3>" for title in labelled(names)] if len(names) > 1 else [""]
    return "".join(head + _key_tiles(*one, share) for head, one, share in zip(heads, losses, made, strict=True))


def _key_tiles(base_nll: np.ndarray, talk_nll: np.ndarray, made: float) -> str:
    several = f"{len(talk_nll)} thought{'s' if len(talk_nll) > 1 else ''}"
    which = f"with {several} before each" if made == 1 else f"{made:.1%} of them with {several} of their own"
    gain, without, with_thoughts = base_nll - talk_nll[0], float(base_nll.mean()), float(talk_nll[0].mean())
    return tiles(
        [
            (f"{without:.3f} → {with_thoughts:.3f}", "mean loss without → with greedy thoughts, nats; less is better"),
            (f"{(gain >= CLEAR).mean():.1%}", f"of the tokens became clearly likelier (by {CLEAR} nats or more)"),
            (f"{(gain <= -CLEAR).mean():.1%}", "became clearly less likely"),
            (f"{gain.size:,}", f"tokens were predicted, {which}"),
        ]
    )  # fmt: skip


def _examples(observed: Observed, gain: np.ndarray, compared: bool) -> str:
    """The tokens that changed most in either direction; a click jumps to one.

    Args:
      gain: [tokens] in nats; if two models are compared, the difference of their gains.
    """
    pieces = Pieces(observed.model.tokenizer)
    shown: list[tuple[str, str]] = []
    for window in observed.windows:
        texts = [visible(text) for text in pieces(window.tokens.tolist())]
        shown += [("".join(texts[max(0, place - 16) : place]), texts[place]) for place in range(1, len(texts))]

    def item(i: int) -> str:
        change = f"{gain[i]:+.2f}".replace("-", "−")
        before, token = map(escape, shown[i])
        return f'<li><button data-jump="{i}"><b>{change}</b><span>… {before}<b>{token}</b></span></button></li>'

    def column(title: str, order: np.ndarray) -> str:
        items = "".join(map(item, order[:EXAMPLES].tolist()))
        return f"<div><h3>{title}</h3><ol>{items or '<li>none</li>'}</ol></div>"

    order = np.argsort(-gain, kind="stable")
    helped, harmed = order[gain[order] >= LEVELS[0]], order[::-1][gain[order[::-1]] <= -LEVELS[0]]
    titles = ("helped most, nats", "harmed most, nats")
    title = "Where thoughts changed most"
    if compared:
        titles = ("thoughts of A gained more, nats", "thoughts of B gained more, nats")
        title = "Where the thoughts of A and B differ most"
    columns = column(titles[0], helped) + column(titles[1], harmed)
    return f'<h2>{title}</h2><div class="examples">{columns}</div>'


def _use(use: Mapping[str, Any]) -> str:
    if not use:
        return ""
    ensemble = [ensemble_curve(use["ensembles"])] if "ensembles" in use else []
    return "\n".join(
        [
            "<h2>Is a thought used?</h2>",
            "<p>A prediction may gain from the additional computation of a thought alone, whatever the thought says. "
            "These measurements tell whether what it says matters.</p>",
            perturbation_curves(use["perturbed"], use["without_thoughts"], use["tokens"]),
            '<div class="charts">',
            thought_only_bars(use),
            *ensemble,
            "</div>",
        ]
    )


def _selective(selective: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    if not selective:
        return ""
    questions = next((record["answer_front"] for record in reversed(metrics) if "answer_front" in record), None)
    return "\n".join(
        [
            "<h2>Where to think?</h2>",
            "<p>A thought costs time. A policy of thinking (<code>--think</code>) makes thoughts only at the places "
            "where they are most likely to help. The figures are for greedy thoughts.</p>",
            '<div class="charts">',
            front_charts(selective["front"], "A position predicts one token of the text.", "tokens right"),
            gate_figures(selective["gate"]) if "gate" in selective else "",
            front_charts(questions, "A position predicts one token of a question or its answer.", "answers right")
            if questions
            else "",
            "</div>",
        ]
    )


def _training(metrics: Sequence[Mapping[str, Any]]) -> str:
    head = "<h2>How it was trained</h2>"
    if not metrics:
        return head + '<p class="soft">There are no training records with this checkpoint.</p>'
    return (
        f"{head}<p>Training went through phases. <span class='swatch a'></span>without thoughts<span "
        "class='swatch'></span>with thoughts; pale lines are single measurements, strong ones their running mean. "
        "The reward is how much sampled thoughts helped on average, the mixing weight how much the model relies on "
        "them (over all places, also the many where a thought has nothing to add), the entropy how varied they are "
        "(0: always the same word; nine tenths of the places are between its dashed lines). Thoughts have collapsed "
        f"where the entropy is near 0 and nearly all places have equal rewards.</p>{training_curves(metrics)}"
    )
