"""The text of a checkpoint's page, token by token, and the data that its script shows in the panel beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from quietstar_jax.reports.observe import Observed
from quietstar_jax.reports.page import visible
from quietstar_jax.reports.pieces import Pieces
from quietstar_jax.thoughts.ending import thought_ids

LETTERS = "AB"  # of two models
LEVELS = (0.02, 0.1, 0.5, 1.5)  # nats: thresholds of the four strengths of colour


def page_data(models: Sequence[Observed], start: int) -> dict[str, Any]:
    """Returns the data of every predicted token for the page's script.

    Keys: `pieces` (texts), `words` (whether the spaces between tokens are not part of any), `levels`, `ahead` (K),
    `start` (the token shown first), `tokens` (the piece of each) and `models`, each with its `name` and its `tokens`:
    `b` (loss without thoughts), `k` (per thought: loss, reward, mixing weight, pieces), `p` and `q` (likeliest next
    tokens without and with the greedy thought: piece, probability, 1 where it is the true one).

    Args:
      models: what each model thought in the same windows.
    """
    numbers: dict[str, int] = {}
    pieces = Pieces(models[0].model.tokenizer)
    text = [token for window in models[0].windows for token in window.tokens[1:].tolist()]
    return {
        "tokens": [_number(pieces.alone(token), pieces.words, numbers) for token in text],
        "models": [
            {"name": name, "tokens": list(_token_data(one, numbers))}
            for name, one in zip(labelled([model_name(one) for one in models]), models, strict=True)
        ],
        "pieces": list(numbers),
        "words": pieces.words,
        "levels": LEVELS,
        "ahead": models[0].settings.tokens_ahead,
        "start": start,
    }


def model_name(observed: Observed) -> str:
    """Returns the path of the model as given, with the step of a run."""
    model = observed.model
    return model.path if model.step is None else f"{model.path}, step {model.step:,}"


def labelled(names: Sequence[str]) -> list[str]:
    """Returns the names of two models with the letters by which the page calls them."""
    return [f"{letter}: {name}" for letter, name in zip(LETTERS, names, strict=False)]


def _number(text: str, words: bool, numbers: dict[str, int]) -> int:
    """Returns the number of a piece, which is added to `numbers` if it is new."""
    shown = visible(text.removeprefix(" ") if words else text)
    return numbers.setdefault(shown.replace(" ", "·") or "∅", len(numbers))


def _token_data(observed: Observed, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the figures of each token; adds their pieces to `numbers`."""
    pieces = Pieces(observed.model.tokenizer)

    def piece(text: str) -> int:
        return _number(text, pieces.words, numbers)

    def likeliest(ids: np.ndarray, probabilities: np.ndarray, true: int) -> list[list[Any]]:
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        return [[piece(pieces.alone(token)), round(p, 5), int(token == true)] for token, p in pairs]

    for window, seen in zip(observed.windows, observed.observations, strict=True):
        for j, token in enumerate(window.tokens[1:].tolist()):
            columns = (seen.talk.nll[:, j], seen.reward[:, j], seen.weight[:, j], seen.thoughts[:, j].tolist())
            thoughts = [
                [*(round(float(x), 4) for x in figures), list(map(piece, pieces(thought_ids(ids)))) if made else []]
                for *figures, ids, made in zip(*columns, seen.made_thoughts[:, j], strict=True)
            ]
            yield {
                "b": round(float(seen.base.nll[j]), 4),
                "k": thoughts,
                "p": likeliest(seen.base.top_ids[j], seen.base.top_probabilities[j], token),
                "q": likeliest(seen.talk.top_ids[0, j], seen.talk.top_probabilities[0, j], token),
            }


def shade(gain: float) -> str:
    """Returns the colour class of a gain in nats; empty for a gain near 0."""
    level = sum(abs(gain) >= edge for edge in LEVELS)
    return f"{'g' if gain > 0 else 'l'}{level}" if level else ""


def _key() -> str:
    """The legend of the colours."""
    edges = [f"{sign}{edge:g}" for sign, row in (("−", LEVELS[::-1]), ("", LEVELS)) for edge in row]
    kinds = [f"l{level}" for level in range(len(LEVELS), 0, -1)] + [""] + [f"g{i + 1}" for i in range(len(LEVELS))]
    shades = "".join(f'<i class="{kind}"></i>' for kind in kinds)
    return (
        f'<div class="key" role="note" aria-label="Legend: gain of a token in nats"><div class="shades">{shades}</div>'
        f'<div class="edges">{"".join(f"<span>{edge}</span>" for edge in edges)}</div><div class="ends"><span>the '
        "thought did harm</span><span>the thought helped, nats</span></div></div>"
    )


def reading(models: Sequence[Observed], sampled: bool) -> str:
    """Returns the legend, the search and the filter, the text, and the panel of a token's thoughts.

    Args:
      sampled: whether there are sampled thoughts.
    """
    about = f"<p>{escape(models[0].about)}</p>" if models[0].about else ""
    colours = {"greedy": "the greedy thought", "sampled": "the sampled thoughts, on average"}
    modes = _choice("Colour by", "mode", colours) if sampled else ""
    if len(models) > 1:
        letters = {str(i): letter for i, letter in enumerate(LETTERS)}
        modes += _choice("Gain of", "model", {**letters, "difference": "A less that of B"})
    texts = f'<div id="texts" role="group" aria-label="The text, by token">{"".join(_texts(models[0]))}</div>'
    return (
        f"<h2>The text</h2>{about}<p>Point at a token or tap it to see what the model thought just before it; a ring "
        "marks the token that the panel is about. A click selects the token, Escape ends the selection. With the "
        "keyboard, Tab enters the text, the arrow keys go from token to token and from line to line, and Enter "
        "selects. Grey tokens are not predicted: no text precedes them. ↵ is a line break, · a space, → a tab, ⟨E2⟩ a "
        f"byte of a character that several tokens make up.</p>{_key()}{modes}"
        f'<div class="reading"><div>{_TOOLS}{texts}</div>{_PANEL}</div>'
    )


_TOOLS = (
    '<div class="tools" id="tools" role="search"><input type="search" id="find" placeholder="find …" '
    'aria-label="Find in tokens and thoughts"><span><button type="button" id="back" aria-label="previous token found" '
    'disabled>‹</button> <button type="button" id="next" aria-label="next token found" disabled>›</button><output '
    'id="count"></output></span><span><label><input type="checkbox" id="helped"> helped by more than</label> <input '
    'type="number" id="least" value="0.5" min="0" step="0.1" aria-label="least gain, nats"> nats</span></div>'
)
_PANEL = (
    '<aside class="panel" id="panel" tabindex="0" aria-label="Thoughts before the chosen token"><button type="button" '
    'class="close" id="close" aria-label="close the panel">×</button><div id="thoughts" aria-live="polite"><p '
    'class="soft">A script shows the thoughts here, but this viewer did not run it.</p></div></aside>'
)


def _choice(title: str, name: str, choices: Mapping[str, str]) -> str:
    """One of several values, of which the first is chosen."""
    inputs = (
        f'<label><input type="radio" name="{name}" value="{value}"{"" if i else " checked"}> {escape(text)}</label>'
        for i, (value, text) in enumerate(choices.items())
    )
    return f"<fieldset><legend>{escape(title)}</legend>{''.join(inputs)}</fieldset>"


def _texts(observed: Observed) -> Iterator[str]:
    """Yields HTML of all documents as coloured tokens."""
    pieces = Pieces(observed.model.tokenizer)
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
