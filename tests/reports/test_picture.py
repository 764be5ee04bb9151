"""The picture of one thought: which token it shows, what it says, and that every mark is inside."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.reports.picture import (
    THEMES,
    WIDTH,
    columns,
    most_helped,
    theme_colours,
    thought_picture,
    write_pictures,
)
from tests.reports.cases import NASTY, byte_level, observed

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(SVG + tag))


def texts(svg: str, kind: str) -> list[str]:
    return [mark.text or "" for mark in marks(svg, "text") if kind in mark.attrib["class"].split()]


def test_the_token_that_gained_most_and_its_thought() -> None:
    made = observed(
        load_tokenizer("synthetic"), ["sum 3 +1 ask 4 . <eos>", "sum 5 +4 ask 9 ."], [0.1, 0.2, 0.3, 2.0], "3 4"
    )
    assert most_helped(made) == (0, 4)
    svg = thought_picture(made, "light")
    assert texts(svg, "mono")[:7] == ["sum", "3", "+1", "ask", "4", ".", "<eos>"]  # the first of the two documents
    assert texts(svg, "on-g4") == ["4"]
    assert texts(svg, "mono")[7:10] == ["4", "3", "4"]  # the token, and the thought before it
    seen = made.observations[0]
    without, with_thought = np.exp(-seen.base.nll[3]), np.exp(-seen.talk.nll[0, 3])
    assert f"{without:.1%} without, {with_thought:.1%} with the thought. Gain: 2.00 nats" in svg


def test_a_special_token_is_never_the_one_shown() -> None:
    made = observed(load_tokenizer("synthetic"), ["sum 3 +1 ask 4 . <eos>"], [0, 0, 0, 1, 0, 9.0], "3 4")
    assert most_helped(made) == (0, 4)


@pytest.mark.parametrize(
    "text", [NASTY, "word " * 400, "汉字" * 300, "a\n" * 50], ids=["nasty", "long", "wide", "lines"]
)
def test_any_text_stays_inside(text: str) -> None:
    made = observed(byte_level(), [text], [0.0, 1.0, -1.0])
    svg = thought_picture(made, "dark")
    _, _, width, height = map(float, ET.fromstring(svg).attrib["viewBox"].split())
    for box in marks(svg, "rect"):
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 0.1
        assert y + h <= height + 0.1
    for mark in marks(svg, "text"):
        end = float(mark.attrib["x"]) + float(mark.attrib.get("textLength", 0))
        assert end <= WIDTH
        assert float(mark.attrib["y"]) < height
    assert len(svg) < 60_000
    assert sum(box.attrib["class"] == "chosen" for box in marks(svg, "rect")) == 2  # in the text and in the panel


def test_two_files_with_fixed_colours(tmp_path: Path) -> None:
    made = observed(byte_level(), ["plain text"], [1.0])
    paths = write_pictures(tmp_path / "figures" / "thoughts.svg", made)
    assert [path.name for path in paths] == ["thoughts_light.svg", "thoughts_dark.svg"]
    light, dark = (path.read_text("utf-8") for path in paths)
    for svg, theme in ((light, "light"), (dark, "dark")):
        assert theme_colours(theme) in svg
        assert "prefers-color-scheme" not in svg
        assert "mine" not in svg  # the path of the model
    assert theme_colours(THEMES[0]).count("--") == theme_colours(THEMES[1]).count("--") > 15
    assert "--paper: #ffffff" in light
    assert "--paper: #ffffff" not in dark


def test_columns() -> None:
    assert [columns(text) for text in ("abc", "汉", "e\u0301", "")] == [3, 2, 1, 0]
