"""A picture of one thought, for a README or a model card: a text coloured by gain, and the thought that helped most."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quietstar_jax.reports.observe import Observed
from quietstar_jax.reports.page import asset, visible, write_page
from quietstar_jax.reports.pieces import Pieces
from quietstar_jax.reports.reading import LEVELS, shade
from quietstar_jax.reports.svg import number, text_mark
from quietstar_jax.thoughts.ending import thought_ids

WIDTH, MARGIN, LINE, ADVANCE = 860, 26, 34, 9.6  # pixels; ADVANCE is that of one column of a text
COLUMNS = int((WIDTH - 2 * MARGIN) / ADVANCE)
ABOVE, BELOW = 6, 1  # lines of the text that are shown before and after that of the token
SHOWN = 4  # likeliest tokens
LONGEST = 14  # characters of a token in the panel
BAR = 200  # pixels of a probability of 1
THEMES = ("light", "dark")
_SHADES = {f"{sign}{level}": f"--{name}{level}" for sign, name in (("g", "up"), ("l", "down")) for level in range(1, 5)}
_STYLE = "".join(
    [
        "text { fill: var(--ink); font: 15px system-ui, sans-serif; } .soft { fill: var(--soft); font-size: 14px; }",
        ".head { font-size: 18px; font-weight: 600; } .paper { fill: var(--paper); } .panel { fill: var(--raised); }",
        ".mono { font: 16px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; } .pale { fill: var(--soft); }",
        ".chip { fill: var(--paper); stroke: var(--line); }",
        ".chosen { fill: none; stroke: var(--ink); stroke-width: 2; }",
        ".true { fill: var(--accent); } .false { fill: var(--other); opacity: 0.55; }",
        *(f".{shade} {{ fill: var({name}); }} " for shade, name in _SHADES.items()),
        ".on-g3, .on-l3 { fill: var(--on-strong); } .on-g4 { fill: var(--on-up4); } .on-l4 { fill: var(--on-down4); }",
    ]
)


class _Token(NamedTuple):
    text: str
    kind: str  # shade, or empty
    pale: bool  # the first token and special ones
    chosen: bool
    gap: int  # columns before it
    ends_line: bool

    @property
    def columns(self) -> int:
        return columns(self.text)


def write_pictures(path: Path, observed: Observed) -> list[Path]:
    """Writes `thought_picture` in light and dark colours: `NAME.svg` becomes `NAME_light.svg` and `NAME_dark.svg`.

    Raises:
      ConfigError: a file cannot be written.
    """
    stem = path.with_suffix("") if path.suffix == ".svg" else path
    paths = [stem.with_name(f"{stem.name}_{theme}.svg") for theme in THEMES]
    for place, theme in zip(paths, THEMES, strict=True):
        write_page(place, thought_picture(observed, theme), "--picture")
    return paths


def thought_picture(observed: Observed, theme: str) -> str:
    """Returns an SVG of the document with the token that its greedy thought helped most, and of this thought.

    Args:
      theme: one of `THEMES`: its colours do not depend on the settings of the viewer.
    """
    window, place = most_helped(observed)
    pieces, seen = Pieces(observed.model.tokenizer), observed.observations[window]
    tokens, j = observed.windows[window].tokens.tolist(), place - 1
    truth = _piece(pieces, tokens[place])[:LONGEST]
    odds = np.exp(-np.array([seen.base.nll[j], seen.talk.nll[0, j]], np.float64))

    y, marks = MARGIN + 16, [_text(MARGIN, MARGIN + 16, "What one thought changed", "head")]
    where = "every token" if seen.made is None else f"{seen.made[0].mean():.0%} of the tokens"
    colour = f"The model thinks before {where}. Colour: how much likelier a thought made the true token."
    marks.append(_text(MARGIN, y + 24, colour, "soft"))
    lines = list(_wrapped(_tokens(observed, window, place, pieces)))
    at = next(i for i, line in enumerate(lines) if any(token.chosen for token in line))
    shown, y = lines[max(0, at - ABOVE) : at + BELOW + 1], y + 46
    for line in shown:
        marks += _text_line(line, y)
        y += LINE
    marks += _legend(y + 4)
    top = y + 40
    inner, y = MARGIN + 18, top + 30
    start = inner + 190 + ADVANCE * columns(truth)
    newest = max(0, int(seen.thought_places()[0, j]))
    title = "The thought before" if newest == j else "The thought used for"  # it began before an earlier token
    marks += [_text(inner, y, title, "soft"), _chip(inner + 148, y, truth, "chosen")]
    marks.append(_text(start - 14, y, ":", "soft"))
    x = start
    for piece in map(visible, pieces(list(thought_ids(seen.thoughts[0, newest])))):
        piece = piece.strip(" ") or "·"
        if x + 16 + ADVANCE * columns(piece) > WIDTH - inner:
            x, y = start, y + LINE
        marks.append(_chip(x, y, piece, "chip"))
        x += 24 + ADVANCE * columns(piece)
    y += 38
    for side, (title, prediction) in enumerate(
        (("Next token without the thought", (seen.base.top_ids[j], seen.base.top_probabilities[j])),
         ("and with it", (seen.talk.top_ids[0, j], seen.talk.top_probabilities[0, j])))
    ):  # fmt: skip
        marks += _bars(inner + side * (WIDTH - 2 * inner) / 2, y, title, *prediction, tokens[place], pieces)
    y += 26 + SHOWN * 26
    figures = (
        f"Probability of the true token: {odds[0]:.1%} without, {odds[1]:.1%} with the thought. Gain: "
        f"{number(float(seen.base.nll[j] - seen.talk.nll[0, j]), 2)} nats. Mixing weight: "
        f"{number(float(seen.weight[0, j]), 2)}."
    )
    marks.append(_text(inner, y + 4, figures, "soft"))
    bottom = y + 22
    panel = _box(MARGIN, top, WIDTH - 2 * MARGIN, bottom - top, "panel", 10)
    label = escape(f"A text coloured by what the thoughts changed, and the thought before {truth}. {figures}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + MARGIN}" role="img" '
        f'aria-label="{label}" xml:space="preserve"><style>:root {{{theme_colours(theme)}}}{_STYLE}</style>'
        f"{_box(0, 0, WIDTH, bottom + MARGIN, 'paper', 12)}{panel}{''.join(marks)}</svg>\n"
    )


def most_helped(observed: Observed) -> tuple[int, int]:
    """Returns (window, place in it) of the token with the largest gain of its greedy thought; not a special token."""
    special = observed.model.tokenizer.fast.all_special_ids
    best = []
    for window, seen in zip(observed.windows, observed.observations, strict=True):
        gain = np.where(np.isin(window.tokens[1:], special), -np.inf, seen.base.nll - seen.talk.nll[0])
        best.append((float(gain.max()), int(gain.argmax()) + 1))
    index = max(range(len(best)), key=lambda i: best[i][0])
    return index, best[index][1]


def theme_colours(theme: str) -> str:
    """Returns the colours of the style sheet for one theme, as CSS variables."""
    block = re.findall(r":root \{(.*?)\}", asset("chart.css"), re.DOTALL)[THEMES.index(theme)]
    return " ".join(re.findall(r"--[\w-]+: #\w+;", block))


def columns(text: str) -> int:
    """Returns the columns of a text in a monospaced font: wide characters have two, combining ones none."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def _tokens(observed: Observed, window: int, place: int, pieces: Pieces) -> Iterator[_Token]:
    special, seen = set(observed.model.tokenizer.fast.all_special_ids), observed.observations[window]
    ids = observed.windows[window].tokens.tolist()
    gains = ["", *map(shade, (seen.base.nll - seen.talk.nll[0]).tolist())]
    for i, text in enumerate(pieces(ids)):
        gap = int(pieces.words and i > 0)
        shown = visible(text.strip(" ") if pieces.words else text)
        yield _Token(shown[:COLUMNS], gains[i], i == 0 or ids[i] in special, i == place, gap, "\n" in text)


def _wrapped(tokens: Iterator[_Token]) -> Iterator[Sequence[_Token]]:
    line: list[_Token] = []
    used = 0
    for token in tokens:
        if line and (used + token.gap + token.columns > COLUMNS or line[-1].ends_line):
            yield line
            line, used = [], 0
        line.append(token)
        used += token.columns + (token.gap if used else 0)
    yield line


def _text_line(line: Sequence[_Token], y: float) -> Iterator[str]:
    x = float(MARGIN)
    for i, token in enumerate(line):
        x += ADVANCE * token.gap * (i > 0)
        width = ADVANCE * token.columns
        if token.kind:
            yield _box(x, y - 4, width, LINE - 8, token.kind, 3)
        if token.chosen:
            yield _box(x - 2, y - 6, width + 4, LINE - 4, "chosen", 5)
        yield _mono(x, y + 15, token.text, "pale" if token.pale else f"on-{token.kind}")
        x += width


def _legend(y: float) -> Iterator[str]:
    yield _text(MARGIN, y + 12, "less likely", "soft")
    x = MARGIN + 78
    for kind in [f"l{level}" for level in range(len(LEVELS), 0, -1)] + [f"g{i + 1}" for i in range(len(LEVELS))]:
        yield _box(x, y, 22, 16, kind, 3)
        x += 24
    edges = ", ".join(f"{edge:g}" for edge in LEVELS)
    yield _text(x + 6, y + 12, f"more likely; the shades begin at {edges} nats", "soft")


def _bars(
    x: float, y: float, title: str, ids: np.ndarray, odds: np.ndarray, truth: int, pieces: Pieces
) -> Iterator[str]:
    yield _text(x, y, title, "soft")
    names = [_piece(pieces, token)[:LONGEST] for token in ids[:SHOWN].tolist()]
    room = ADVANCE * max(map(columns, names)) + 10
    for row, (name, token, odd) in enumerate(zip(names, ids.tolist(), odds.tolist(), strict=False)):
        at, kind = y + 12 + row * 26, "true" if token == truth else "false"
        yield _mono(x, at + 15, name, "")
        yield _box(x + room, at + 1, max(BAR * odd, 1.5), 18, kind, 3)
        yield _text(x + room + BAR * odd + 8, at + 15, f"{odd:.1%}", "soft")


def _piece(pieces: Pieces, token: int) -> str:
    text = visible(pieces.alone(token).removeprefix(" ") if pieces.words else pieces.alone(token))
    return text.replace(" ", "·") or "∅"


def _chip(x: float, y: float, text: str, kind: str) -> str:
    return _box(x, y - 18, ADVANCE * columns(text) + 16, 26, kind, 6) + _mono(x + 8, y, text, "")


def _mono(x: float, y: float, text: str, kind: str) -> str:
    width = f'textLength="{ADVANCE * columns(text):.1f}" lengthAdjust="spacingAndGlyphs"'
    return text_mark(x, y, text, f"mono {kind}".strip(), "start", width if columns(text) else "")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return text_mark(x, y, text, kind, "start")


def _box(x: float, y: float, width: float, height: float, kind: str, radius: float) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>'
