"""The page itself: nothing in a text can break it, its colours and numbers are right, and a browser shows it."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.reports.checkpoint_page import _selective, checkpoint_page
from quietstar_jax.reports.page import render, write_page
from quietstar_jax.reports.reading import LEVELS, page_data, shade
from quietstar_jax.thoughts.front import Positions, summarize_front
from tests.reports.browser import CHROMIUM, Browser
from tests.reports.cases import NASTY, byte_level, observed

GAINS = [0.0, 0.05, 0.3, 1.0, 2.0, -0.05, -0.3, -1.0, -2.0]
THOUGHT = 'x</script><img src=x onerror="boom()">\n'


@pytest.fixture(scope="module")
def page() -> str:
    return checkpoint_page([observed(byte_level(), [NASTY, "plain text"], GAINS, THOUGHT)], [])


class Elements(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def test_texts_and_thoughts_cannot_leave_their_place(page: str) -> None:
    found = Elements(page)
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 2
    assert "img" not in names
    assert names.count("b") == page.count("</b>")
    assert not any("src" in attributes or "href" in attributes for _, attributes in found.tags)
    assert "runs/&lt;mine&gt;, step 3" in page
    data = json.loads(found.texts[[tag for tag, _ in found.tags].index("script")])
    thought = "".join(data["pieces"][i] for i in data["models"][0]["tokens"][0]["k"][0][3])
    assert thought == THOUGHT.replace("\n", "↵").replace(" ", "·")


def test_every_predicted_token_has_its_colour(page: str) -> None:
    found = Elements(page)
    tokens: list[list] = []
    for (_, attributes), text in zip(found.tags, found.texts, strict=True):
        if "data-i" in attributes:
            tokens.append([attributes, text])
        elif attributes.get("class") == "ws":  # the pale sign of a blank
            tokens[-1][1] += text
    byte_count = len(NASTY.encode()) + len(b"plain text")
    assert len(tokens) == byte_count - 2  # the first of each document is not predicted
    kinds = ["", "g1", "g2", "g3", "g4", "l1", "l2", "l3", "l4"]
    for place, (attributes, _) in enumerate(tokens[: len(NASTY.encode()) - 1]):
        assert attributes["class"] == f"t {kinds[place % 9]}".strip()
    shown = "".join(text for _, text in tokens[: len(NASTY.encode()) - 1])
    assert "</script>" in shown
    assert "↵\n↵\n→⟨C3⟩é⟨E2⟩⟨82⟩€" in shown
    assert "␁" in shown
    assert "⟨U+202E⟩" in shown


@pytest.mark.parametrize(("gain", "kind"), [(0.0199, ""), (0.02, "g1"), (-0.1, "l2"), (0.5, "g3"), (-9.0, "l4")])
def test_shades(gain: float, kind: str) -> None:
    assert shade(gain) == kind


def test_numbers_of_a_token() -> None:
    made = observed(byte_level(), ["abc"], [0.5, -0.25], "ab")
    data = page_data([made], start=0)
    first = data["models"][0]["tokens"][0]
    assert data["pieces"][data["tokens"][0]] == "b"
    assert (first["b"], first["k"][0][:3], first["k"][1][:3]) == (0.0, [-0.5, 0.5, 0.25], [0.0, 0.0, 0.25])
    assert [data["pieces"][i] for i in first["k"][0][3]] == ["a", "b"]
    assert [entry[2] for entry in first["p"]] == [1, 0, 0, 0, 0]
    assert data["levels"] == LEVELS


def test_a_page_of_thousands_of_tokens_stays_small() -> None:
    made = observed(byte_level(), ["many words here " * 250], GAINS, "six tok")
    html = checkpoint_page([made], [])
    assert len(html.encode()) < 400 * 4000


def test_examples_of_help_and_harm() -> None:
    html = checkpoint_page([observed(byte_level(), ["a-<c"], [0.5, -0.25, 0.01])], [])
    assert '<button data-jump="0"><b>+0.50</b><span>… a<b>-</b></span></button>' in html
    assert '<button data-jump="1"><b>−0.25</b><span>… a-<b>&lt;</b></span></button>' in html
    assert 'data-jump="2"' not in html


def test_each_model_of_a_page_says_how_often_it_thinks() -> None:
    always, often = (observed(byte_level(), ["12345"], GAINS, "xyz") for _ in range(2))
    scores = often.observations[0]
    made = np.broadcast_to(np.arange(scores.weight.shape[1]) % 2 == 0, scores.weight.shape)
    half = dataclasses.replace(often, observations=[scores._replace(made=made)])
    share = f"{made[0].mean():.1%}"
    assert "Here it did so at every place of the text" in checkpoint_page([always], [])
    page = checkpoint_page([always, half], [])
    assert f"before 100.0% or {share} of the tokens (chosen by a rule) of the text" in page
    assert "predicted, with 2 thoughts before each" in page
    assert f"predicted, {share} of them with 2 thoughts of their own" in page


def test_words_are_separated_by_spaces_that_belong_to_nobody() -> None:
    from quietstar_jax.data.tokenization import load_tokenizer

    html = checkpoint_page([observed(load_tokenizer("synthetic"), ["sum 3 +1 ask 4 . <eos>"], [2.0], "3 4")], [])
    assert '<span class="t first">sum</span> <span class="t g4" data-i="0" tabindex="-1">3</span> <span' in html
    assert '<span class="t g4 special" data-i="5" tabindex="-1">&lt;eos&gt;</span>' in html
    assert '"pieces":["3","+1",' in html


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "page.html", render("a < b", "<p>x</p>"))
    assert "<title>a &lt; b</title>" in (tmp_path / "new" / "page.html").read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path / "new", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
PANEL = "document.getElementById('panel').textContent"
SHOWN = "Array.from(document.querySelectorAll('.t.shown'), (token) => token.dataset.i).join()"
COUNT = "document.getElementById('count').textContent"
COLOUR = "getComputedStyle(document.querySelector('.t[data-i=\"%d\"]')).backgroundColor"


@needs_browser
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page)
    backgrounds = {}
    for dark in (False, True):
        with Browser(tmp_path / f"profile_{dark}", dark=dark) as browser:
            browser.open(tmp_path / "page.html")
            assert "made this token 7.4 times as likely" in browser.run(PANEL)  # e^2: the most helped is shown first
            assert browser.run(SHOWN) == "4"
            backgrounds[dark] = [browser.run(COLOUR % i) for i in range(9)]

            browser.hover('.t[data-i="8"]')
            assert "made this token 7.4 times less likely" in browser.run(PANEL)
            assert "</script><img" in browser.run(f"{PANEL}.replaceAll('·', ' ')")
            assert re.search(r"greedy.*−2\.00", browser.run(PANEL))

            browser.run("document.querySelector('.t[tabindex=\"0\"]').focus()")
            before = browser.run(PANEL)
            browser.press("ArrowRight")
            assert browser.run("document.activeElement.dataset.i") == "9"
            assert browser.run(PANEL) != before
            browser.press("End")
            assert "plain·tex" in browser.run(PANEL).replace(" ", "·")

            browser.click('.t[data-i="3"]')
            held = browser.run(PANEL)
            browser.hover('.t[data-i="4"]')
            assert browser.run(PANEL) == held
            browser.press("Escape")
            browser.hover('.t[data-i="6"]')
            assert browser.run(PANEL) != held

            browser.click('input[value="sampled"]')
            assert {browser.run(COLOUR % i) for i in range(9)} == {"rgba(0, 0, 0, 0)"}  # they gained nothing
            browser.click("button[data-jump]")
            assert "times as likely" in browser.run(PANEL)
            assert browser.run("document.querySelectorAll('.t.pinned').length") == 1
            assert browser.complaints == []
            assert browser.requested == [(tmp_path / "page.html").as_uri()]
    for dark, found in backgrounds.items():
        assert found[0] == "rgba(0, 0, 0, 0)"
        assert len(set(found)) == 9, (dark, found)
    assert backgrounds[False] != backgrounds[True]


@needs_browser
def test_a_phone_and_the_keyboard_alone(tmp_path: Path) -> None:
    text = "ten words and more fill several lines of a phone, "
    models = [observed(byte_level(), [text * 3], gains, thought) for gains, thought in ((GAINS, "xyz"), ([0.25], "q!"))]
    write_page(tmp_path / "page.html", checkpoint_page(models, []))
    with Browser(tmp_path / "profile", width=360, height=740) as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.documentElement.scrollWidth") == 360
        assert browser.run("new Set(Array.from(document.querySelectorAll('.key i'), (i) => i.offsetTop)).size") == 1

        def place() -> int:
            assert browser.run("document.activeElement.dataset.i") == browser.run(SHOWN)
            return int(browser.run(SHOWN))

        browser.run("document.querySelector('.t.shown').focus()")
        start = place()
        for key, back, least in (("ArrowRight", "ArrowLeft", 1), ("ArrowDown", "ArrowUp", 20)):
            browser.press(key)
            assert place() >= start + least  # a line has more than 20 letters
            browser.press(back)
            assert abs(place() - start) <= 1  # letters of two lines are not exactly below each other

        browser.press("Escape")
        assert browser.run("getComputedStyle(document.getElementById('panel')).display") == "none"
        browser.press("ArrowRight")
        for close in (lambda: browser.click("#close"), lambda: browser.press("Escape")):
            browser.click(f'.t[data-i="{place()}"]')
            assert browser.run("getComputedStyle(document.getElementById('panel')).display") == "block"
            close()
            assert browser.run("getComputedStyle(document.getElementById('panel')).display") == "none"
            assert place() >= start  # the focus is in the text

        browser.run("document.getElementById('find').focus()")
        browser.write("Several")
        assert browser.run(COUNT) == "3 found"
        found = []
        for _ in range(4):
            browser.press("Enter")
            found.append(int(browser.run(SHOWN)))
        first = text.index("several") - 1  # the first letter of the text is not a token that is predicted
        assert found == [first, first + len(text), first + 2 * len(text), first]
        assert browser.run(COUNT) == "1 of 3"
        browser.press("Tab")
        browser.press("Enter")  # on the button for the previous one
        assert browser.run(SHOWN) == str(found[2])
        browser.run("document.getElementById('find').select()")
        browser.write("yz")  # of every thought
        assert browser.run(COUNT) == f"{found[2] + 1} of {3 * len(text) - 1}"

        browser.click("#helped")
        gains = (GAINS * len(text))[: 3 * len(text) - 1]
        left = [i for i, gain in enumerate(gains) if gain > 0.5]
        assert browser.run("document.querySelectorAll('.t.dim').length") == len(gains) - len(left)
        browser.press("Enter")
        assert int(browser.run(SHOWN)) == next((i for i in left if i > found[2]), left[0])
        browser.run("document.getElementById('least').select()")
        browser.write("1.5")
        strong = f"{sum(gain > 1.5 for gain in gains)} found"
        assert browser.run(COUNT) == strong

        assert re.search(r"A: runs/.*greedy\)xyz.*B: runs/.*greedy\)q!", browser.run(PANEL))  # both models
        for model, count in (("1", "0 found"), ("difference", strong), ("0", strong)):
            browser.click(f'input[name="model"][value="{model}"]')
            assert browser.run(COUNT) == count
            assert (browser.run(COLOUR % 4) == browser.run(COLOUR % 2)) == (model == "1")
        assert browser.complaints == []


@needs_browser
def test_the_browser_tells_of_errors(tmp_path: Path) -> None:
    """What the test above relies on."""
    body = (
        '<script>console.error("said")</script><script>throw Error("thrown")</script><img src="http://localhost/x.png">'
    )
    write_page(tmp_path / "page.html", render("broken", body))
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        told = "\n".join(browser.complaints)
    assert all(word in told for word in ("said", "thrown", "Content Security Policy"))


def test_the_comparison_of_policies_on_questions_is_that_of_the_newest_evaluation():
    """The charts of the text come from the page's own measurement, those of the questions from the records."""
    positions = Positions(
        *np.array([[2, 1], [1, 2]], np.float32), *np.array([[0, 1], [1, 0]], bool), np.array([0, 1]),
        {"entropy": np.array([3.0, 1.0])},
    )  # fmt: skip
    text = {"front": summarize_front(positions)}
    newest, older = (summarize_front(positions._replace(answer=np.array(answer))) for answer in ([0, 0], [0, 1]))
    assert newest != older
    records = [{"kind": "evaluation", "answer_front": older}, {"kind": "evaluation", "answer_front": newest}]
    page = _selective(text, [*records, {"kind": "train"}])
    assert page.count("answers right, %") == _selective(text, records[1:]).count("answers right, %") > 0
    assert page == _selective(text, records[1:]) != _selective(text, records[:1])
    assert "answers right" not in _selective(text, [])
    assert _selective({}, records) == ""
