"""The HTML page of a checkpoint: text coloured by the effect of thoughts, the thoughts themselves, and charts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.reports.figures import (
    gain_by_decile,
    reward_histogram,
    training_curves,
    weight_histogram,
)
from quietstar_jax.reports.observe import Window
from quietstar_jax.reports.page import render, tiles
from quietstar_jax.reports.pieces import Pieces, visible
from quietstar_jax.reports.thought_use_figures import ensemble_curve, perturbation_curves, thought_only_bars
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.token_scores import TokenScores

LEVELS = (0.02, 0.1, 0.5, 1.5)  # nats: thresholds of the four strengths of colour
CLEAR = 0.1  # nats: a change worth counting
EXAMPLES = 6  # of the most helped and of the most harmed tokens


@dataclass(frozen=True)
class Observed:
    """The content of the page: windows in the order of the text, with the thoughts of the model."""

    model: LoadedModel
    settings: ThoughtSettings
    windows: Sequence[Window]
    observations: Sequence[TokenScores]  # of each window, as from `observe`
    about: str  # the kind of text, if the reader may not know it
    notes: Sequence[str]  # how the page was made, and what was left out
    use: Mapping[str, Any] = field(default_factory=dict)  # as from `measure_use`; empty = not measured


def checkpoint_page(observed: Observed, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page as HTML.

    Args:
      metrics: records of the run's `metrics.jsonl`; empty if there is no run.
    """
    seen = observed.observations
    base_nll = np.concatenate([scores.base.nll for scores in seen])
    talk_nll = np.concatenate([scores.talk.nll for scores in seen], axis=1)  # [R, tokens]
    gain = base_nll - talk_nll[0]
    pieces = Pieces(observed.model.tokenizer)
    data = page_data(observed, pieces, start=int(gain.argmax()))
    step = "" if observed.model.step is None else f", step {observed.model.step:,}"
    body = [
        "<h1>What the thoughts changed</h1>",
        f'<p class="where">{escape(observed.model.path)}{step}</p>',
        _introduction(observed.settings, len(talk_nll)),
        _key_figures(base_nll, talk_nll),
        _reading(observed, pieces, len(talk_nll) > 1),
        _examples(observed, pieces, gain),
        "<h2>The same in figures</h2>",
        '<div class="charts">',
        gain_by_decile(np.concatenate([scores.base_entropy for scores in seen]), base_nll, gain),
        reward_histogram(
            np.concatenate([scores.reward[made_thoughts(scores)] for scores in seen]), observed.settings.tokens_ahead
        ),
        weight_histogram(np.concatenate([scores.weight[made_thoughts(scores)] for scores in seen])),
        "</div>",
        _use(observed.use),
        _training(metrics),
        "<footer>" + "".join(f'<p class="note">{escape(note)}</p>' for note in observed.notes) + "</footer>",
    ]
    return render("What the thoughts changed", "\n".join(body), data)


def made_thoughts(scores: TokenScores) -> np.ndarray:
    """Returns which thoughts the policy of thinking makes, [R, tokens] bool."""
    return np.ones(scores.weight.shape, bool) if scores.made is None else scores.made


def page_data(observed: Observed, pieces: Pieces, start: int) -> dict[str, Any]:
    """Returns the data of every predicted token for the page's script.

    Keys: `pieces` (texts), `levels`, `ahead` (K), `start` (the token shown first) and `tokens`, with `i` (its piece),
    `b` (loss without thoughts), `k` (per thought: loss, reward, mixing weight, pieces), `p` and `q` (likeliest next
    tokens without and with the greedy thought: piece, probability, 1 where it is the true one).
    """
    numbers: dict[str, int] = {}
    words = pieces.words

    def piece(text: str) -> int:
        shown = visible(text.removeprefix(" ") if words else text)
        return numbers.setdefault(shown.replace(" ", "·") or "∅", len(numbers))

    def likeliest(ids: np.ndarray, probabilities: np.ndarray, true: int) -> list[list[Any]]:
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        return [[piece(pieces.alone(token)), round(p, 5), int(token == true)] for token, p in pairs]

    tokens = []
    for window, seen in zip(observed.windows, observed.observations, strict=True):
        for j, token in enumerate(window.tokens[1:].tolist()):
            columns = (seen.talk.nll[:, j], seen.reward[:, j], seen.weight[:, j], seen.thoughts[:, j].tolist())
            thoughts = [
                [*(round(float(x), 4) for x in figures), list(map(piece, pieces(ids))) if made else []]
                for *figures, ids, made in zip(*columns, made_thoughts(seen)[:, j], strict=True)
            ]
            tokens.append(
                {
                    "i": piece(pieces.alone(token)),
                    "b": round(float(seen.base.nll[j]), 4),
                    "k": thoughts,
                    "p": likeliest(seen.base.top_ids[j], seen.base.top_probabilities[j], token),
                    "q": likeliest(seen.talk.top_ids[0, j], seen.talk.top_probabilities[0, j], token),
                }
            )
    return {
        "pieces": list(numbers),
        "levels": LEVELS,
        "ahead": observed.settings.tokens_ahead,
        "start": start,
        "tokens": tokens,
    }


def shade(gain: float) -> str:
    """Returns the colour class of a gain in nats; empty for a gain near 0."""
    level = sum(abs(gain) >= edge for edge in LEVELS)
    return f"{'g' if gain > 0 else 'l'}{level}" if level else ""


def _introduction(settings: ThoughtSettings, thoughts: int) -> str:
    several = "once by always taking the likeliest word (<em>greedy</em>)"
    several += f", and {thoughts - 1} times at random" if thoughts > 1 else ""
    return (
        "<p>A language model reads text and predicts it token by token (a token is a word, or a piece of one). This "
        f"model may think before every single token: it writes {settings.thought_length} hidden tokens, then "
        f"predicts. Here it did so at every place of the text below: {several}. The colours say whether that "
        "helped.</p><p>The "
        "measure is the <em>nat</em>: a gain of 0.7 nats means that the true next token became twice as likely, 2.3 "
        "nats ten times; a negative number, that it became less likely.</p>"
    )


def _key_figures(base_nll: np.ndarray, talk_nll: np.ndarray) -> str:
    gain, without, with_thoughts = base_nll - talk_nll[0], float(base_nll.mean()), float(talk_nll[0].mean())
    return tiles(
        [
            (f"{without:.3f} → {with_thoughts:.3f}", "mean loss without → with greedy thoughts, nats; less is better"),
            (f"{(gain >= CLEAR).mean():.1%}", f"of the tokens became clearly likelier (by {CLEAR} nats or more)"),
            (f"{(gain <= -CLEAR).mean():.1%}", "became clearly less likely"),
            (f"{gain.size:,}", f"tokens were predicted, with {len(talk_nll)} thoughts before each"),
        ]
    )  # fmt: skip


def _key() -> str:
    """The legend of the colours."""
    between = list(itertools.pairwise(LEVELS))
    up = [*(f"{low:g} – {high:g}" for low, high in between), f"over {LEVELS[-1]:g}"]
    down = [*(f"−{high:g} – −{low:g}" for low, high in between), f"below −{LEVELS[-1]:g}"]
    cells = [f'<span class="l{level}">{down[level - 1]}</span>' for level in range(len(LEVELS), 0, -1)]
    cells += ["<span>no change</span>", *(f'<span class="g{level}">{text}</span>' for level, text in enumerate(up, 1))]
    inner = f"<em>the thought did harm</em>{''.join(cells)}<em>the thought helped, nats</em>"
    return f'<div class="key" role="note" aria-label="Legend: gain of a token in nats">{inner}</div>'


def _reading(observed: Observed, pieces: Pieces, sampled: bool) -> str:
    about = f"<p>{escape(observed.about)}</p>" if observed.about else ""
    modes = ""
    if sampled:
        choice = '<label><input type="radio" name="mode" value="{}" {}> {}</label>'.format
        greedy = choice("greedy", "checked", "the greedy thought")
        modes = f"{greedy}{choice('sampled', '', 'the sampled thoughts, on average')}"
        modes = f"<fieldset><legend>Colour by</legend>{modes}</fieldset>"
    texts = f'<div id="texts" role="group" aria-label="The text, by token">{"".join(_texts(observed, pieces))}</div>'
    panel = '<aside class="panel" id="panel" aria-live="polite" aria-label="Thoughts before the chosen token">'
    panel += '<p class="soft">A script shows the thoughts here, but this viewer did not run it.</p></aside>'
    return (
        f"<h2>The text</h2>{about}<p>Point at a token to see what the model thought just before it. A click selects "
        "the token, Escape ends the selection; with the keyboard, Tab enters the text and the arrow keys go from "
        "token to token. Grey tokens are not predicted: no text precedes them. ↵ is a line break, · a space, → a tab, "
        f"⟨E2⟩ a byte of a character that several tokens make up.</p>{_key()}{modes}"
        f'<div class="reading">{texts}{panel}</div>'
    )


def _texts(observed: Observed, pieces: Pieces) -> Iterator[str]:
    """Yields HTML of all documents as coloured tokens."""
    special = set(observed.model.tokenizer.fast.all_special_ids)
    index, document = 0, -1
    for window, seen in zip(observed.windows, observed.observations, strict=True):
        if window.document != document:
            yield "</p></section>" if document >= 0 else ""
            document = window.document
            yield f'<section class="doc"><h3 title="document {document + 1}">{document + 1}</h3><p class="text">'
        else:
            yield '<span class="cut" title="the model starts a new text here"> ⋯ </span>'
        gains = (seen.base.nll - seen.talk.nll[0]).tolist()
        for place, (token, text) in enumerate(zip(window.tokens.tolist(), pieces(window.tokens.tolist()), strict=True)):
            kinds = [shade(gains[place - 1])] if place else ["first"]
            kinds += ["special"] if token in special else []
            words = text.strip(" ")
            if pieces.words:  # the space before it is not part of any token
                yield text[: len(text) - len(text.lstrip(" "))] if place else ""
                text = words
            number = f' data-i="{index}" tabindex="-1"' if place else ""
            index += 1 if place else 0
            shown = "\n".join(_signs(part) for part in _lines(text))
            yield f'<span class="{" ".join(["t", *filter(None, kinds)])}"{number}>{shown}</span>'
    yield "</p></section>"


def _signs(text: str) -> str:
    """Escapes text as HTML, with pale signs for blanks that would be invisible."""
    blank = not text.strip(" \n")
    shown = escape(visible(text.replace(" ", "·") if blank else text))
    return "".join(f'<span class="ws">{c}</span>' if c in "↵→" or (blank and c == "·") else c for c in shown)


def _lines(text: str) -> list[str]:
    """Splits after every line break, which stays in its line, so that its sign is shown before the line ends."""
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + parts[-1:]


def _examples(observed: Observed, pieces: Pieces, gain: np.ndarray) -> str:
    """The tokens that changed most in either direction; a click jumps to one."""
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
    columns = column("helped most, nats", helped) + column("harmed most, nats", harmed)
    return f'<h2>Where thoughts changed most</h2><div class="examples">{columns}</div>'


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
