"""Charts as inline SVG. Colours are classes of the page's style sheet, so they follow its light and dark modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Range = tuple[float, float]


class Chart:
    """A drawing with a linear x and y axis. Marks are drawn in the order they are added."""

    def __init__(
        self, label: str, x: Range, y: Range, *, width: int = 420, height: int = 260, left: int = 58, right: int = 12,
        top: int = 12, bottom: int = 46,
    ):  # fmt: skip
        """Args: label: text alternative of the chart; x, y: values at the ends of the axes."""
        self._label, self.x, self._y = label, _wide(x), _wide(y)
        self._width, self._height = width, height
        self._left, self._right, self._top, self._bottom = left, width - right, top, height - bottom
        self._about = max(2, round((self._right - self._left) / 70))  # ticks along the bottom
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Converts values to pixels; values outside the axes are moved to the edge."""
        return (
            _between(x, self.x, self._left, self._right),
            _between(y, self._y, self._bottom, self._top),
        )

    def x_axis(self, title: str, ticks: Sequence[tuple[float, str]] | None = None) -> Chart:
        """Adds ticks (value, text) along the bottom; by default at round values."""
        for value, text in nice_ticks(self.x, self._about) if ticks is None else ticks:
            x, _ = self.at(value, self._y[0])
            self._marks.append(text_mark(x, self._bottom + 16, text, "tick", "middle"))
        middle = (self._left + self._right) / 2
        self._marks.append(text_mark(middle, self._height - 8, title, "axis", "middle"))
        return self

    def y_axis(self, title: str = "") -> Chart:
        """Adds horizontal grid lines at round values."""
        for value, text in nice_ticks(self._y, 5):
            _, y = self.at(0, value)
            kind = "zero" if value == 0 else "grid"
            self._marks.append(_line(self._left, y, self._right, y, kind))
            self._marks.append(text_mark(self._left - 6, y + 4, text, "tick", "end"))
        if title:
            x, y = 13, (self._top + self._bottom) / 2
            turned = f'transform="rotate(-90 {x} {y:.1f})"'
            self._marks.append(text_mark(x, y, title, "axis", "middle", turned))
        return self

    def x_grid(self) -> Chart:
        """Adds vertical grid lines at round values."""
        for value, _ in nice_ticks(self.x, self._about):
            x, _ = self.at(value, 0)
            self._marks.append(_line(x, self._top, x, self._bottom, "grid"))
        return self

    def y_names(self, names: Sequence[tuple[float, str]]) -> Chart:
        """Adds names (value, text) along the left side."""
        for value, name in names:
            _, y = self.at(0, value)
            self._marks.append(text_mark(self._left - 10, y + 4, name, "name", "end"))
        return self

    def beside(self, y: float, text: str) -> Chart:
        """Adds text to the right of the plot."""
        self._marks.append(text_mark(self._right + 10, self.at(0, y)[1] + 4, text, "strong", "start"))
        return self

    def bar(self, x0: float, x1: float, y: float, kind: str, tip: str) -> Chart:
        """Adds a bar from 0 to y between x0 and x1."""
        (left, top), (right, bottom) = self.at(x0, max(y, 0)), self.at(x1, min(y, 0))
        box = f'x="{left + 1:.1f}" y="{top:.1f}" width="{max(right - left - 2, 1):.1f}" height="{bottom - top:.1f}"'
        self._marks.append(f'<rect class="{kind}" {box} rx="1.5"><title>{escape(tip)}</title></rect>')
        return self

    def line(self, points: Sequence[tuple[float, float]], kind: str, tip: str = "") -> Chart:
        """Adds a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self._marks.append(f'<polyline class="{kind}" points="{path}">{title}</polyline>')
        return self

    def dot(self, x: float, y: float, kind: str, tip: str, radius: float = 4) -> Chart:
        """Adds a round mark."""
        cx, cy = self.at(x, y)
        place = f'cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}"'
        self._marks.append(f'<circle class="{kind}" {place}><title>{escape(tip)}</title></circle>')
        return self

    def text(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle", dy: float = 0) -> Chart:
        """Adds text `dy` pixels below a point."""
        px, py = self.at(x, y)
        self._marks.append(text_mark(px, py + dy, text, kind, anchor))
        return self

    def legend(self, y: float, kind: str, text: str, start: float = 0.0) -> Chart:
        """Adds a short line and its name at a height of the plot, from the fraction `start` of its width on."""
        left, right = self.x
        ends = [left + (start + offset) * (right - left) for offset in (0, 0.06, 0.07)]
        self.line([(ends[0], y), (ends[1], y)], kind)
        return self.text(ends[2], y, text, "name", "start", dy=4)

    def svg(self) -> str:
        """Returns the drawing as SVG."""
        head = f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{escape(self._label)}">'
        return head + "".join(self._marks) + "</svg>"


def nice_ticks(span: Range, about: int) -> list[tuple[float, str]]:
    """Returns round values within a span, with their texts."""
    low, high = sorted(_wide(span))
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - about))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, number(n * step, digits)) for n in range(first, last + 1)]


def number(value: float, digits: int) -> str:
    """Formats a number with a true minus sign, and zero without one."""
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def _wide(span: Range) -> Range:
    """Widens a span that is a single point."""
    low, high = span
    return span if high != low else (low - 0.5, high + 0.5)


def _between(value: float, span: Range, start: float, end: float) -> float:
    share = (value - span[0]) / (span[1] - span[0])
    return start + min(max(share, -0.02), 1.02) * (end - start)


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def text_mark(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    """Returns a text whose baseline starts, is centred or ends at a point; `more`: further attributes."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
