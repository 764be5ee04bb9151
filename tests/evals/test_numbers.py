# ruff: noqa: E501  (tables of texts)
"""Numbers in every spelling, alone and inside texts."""

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar_jax.evals.numbers import SPACES, VULGAR, find_number, parse_number
from tests.material import material

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18), ("-3", -3), ("+7", 7), ("007.0", 7), ("1,234.50", Fraction(2469, 2)), ("2,125,000", 2125000),
        ("1 000", 1000), ("1\u202f000\u00a0000", 10**6), (".5", HALF), ("-.50", -HALF), ("\u22121,000.5", Fraction(-2001, 2)),
        ("1/2", HALF), ("-3/4", Fraction(-3, 4)), ("2 1/2", Fraction(5, 2)), ("-2 1/2", Fraction(-5, 2)), ("½", HALF),
        ("2½", Fraction(5, 2)), (r"\frac{1}{2}", HALF), (r"\dfrac{-3}{4}", Fraction(-3, 4)), (r"\frac12", HALF),
        (r"3\frac{1}{2}", Fraction(7, 2)), ("1e-3", Fraction(1, 1000)), ("1.5E6", 1500000), ("2 × 10^3", 2000),
        (r"2\times10^{-3}", Fraction(1, 500)), ("$5", 5), ("-$5", -5), ("$-5", -5), (r"\$5", 5), ("5 €", 5), ("USD 5", 5),
        ("20 %", 20), (r"20\%", 20), (r"$\frac{1}{2}$", HALF), (r"\boxed{\frac{1}{2}}", HALF), ("1{,}000", 1000),
        (r"10,\!000", 10000), ("5.", 5), ("-0", 0), (str(10**400), 10**400),
    ],
)  # fmt: skip
def test_a_number_in_every_spelling(text, number):
    assert parse_number(text) == number
    assert find_number(f"It is {text}") == number


@pytest.mark.parametrize(
    "text",
    ["", ".", "12,5", "10:30", "1,2345", "1,000,00", "1.2.3", "1/0", "3/4/2025", "x/2", "1e999", "1e-9999999999", "(2, 5)",
     r"3\sqrt{2}", r"\sqrt{2}", "x^2+1", "2x", "five", "A-5", "--5", "$$5", "5 5", "5 apples", "1_000", "0x10", "5..", r"3\pi",
     "\u0663", "\uff11\uff12", "2 7/3", "1 000/3", "9" * 5000, "-$-5", "1 2/", "50%%", "²", "Ⅷ", "nan", "inf"],
)  # fmt: skip
def test_what_is_no_number_alone(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1, 2 and 3", 1), (" $1,234.50 a day", Fraction(2469, 2)), ("it is 007.0.", 7), ("It is.5", 5), ("...5", 5), ("5-3", 5),
        ("A-5 is it", 5), ("5km", 5), ("the 18th", 18), ("v1.5, then 7", 7), ("costs $18.", 18), ("x = -5", -5), ("**18**", 18),
        ("$18**.", 18), (r"\(5\)", 5), ("3 1/2 cups", Fraction(7, 2)), ("\u06635 or 6", 6), ("5\n6", 5), ("half of 1/2", HALF),
        ("1 000 men", 1000), ("at 10:30 in room 7", 7), ("10,20", None), ("12,5", None), ("(2, 5)", None), ("x^2+1", None),
        (r"3\sqrt{2}", None), ("1/0", None), ("none", None), ("(5)", 5), ("3/4/2025", None), (r"5\text{ km}", 5),
    ],
)  # fmt: skip
def test_the_first_whole_number_of_a_text(text, number):
    assert find_number(text) == number


def grouped(digits: str, separator: str) -> str:
    return re.sub(r"(?<=\d)(?=(\d{3})+$)", separator, digits)


@st.composite
def spelled(draw):
    """A number and one of its spellings."""
    sign, minus = draw(st.sampled_from([(1, ""), (1, "+"), (-1, "-"), (-1, "\u2212")]))
    form = draw(st.sampled_from(["decimal", "scientific", "fraction", "latex", "mixed", "vulgar"]))
    whole = draw(st.integers(0, 10**9))
    if form == "decimal":
        fraction = draw(st.from_regex(r"(\.[0-9]{1,6})?", fullmatch=True))
        digits = grouped(str(whole), draw(st.sampled_from(["", ",", *SPACES])))
        before, after = draw(
            st.sampled_from([("", ""), ("$", ""), ("$ ", ""), ("", " €"), ("", "%"), ("", r"\%"), ("€", "")])
        )
        return sign * Fraction(str(whole) + fraction), minus + before + digits + fraction + after
    if form == "scientific":
        power = draw(st.integers(-30, 30))
        written = draw(st.sampled_from(["e{}", "E{}", " × 10^{}", r" \times 10^{{{}}}"])).format(power)
        return sign * Fraction(whole) * Fraction(10) ** power, f"{minus}{whole}{written}"
    if form == "vulgar":
        place = draw(st.integers(0, len(VULGAR) - 1))
        value = parse_number(VULGAR[place])
        return sign * (whole + value), f"{minus}{whole}{VULGAR[place]}"
    below = draw(st.integers(2, 10**4))
    if form == "mixed":
        above = draw(st.integers(1, below - 1))
        text = draw(st.sampled_from([f"{whole} {above}/{below}", rf"{whole}\frac{{{above}}}{{{below}}}"]))
        return sign * (whole + Fraction(above, below)), minus + text
    return sign * Fraction(whole, below), minus + (
        f"{whole}/{below}" if form == "fraction" else rf"\frac{{{whole}}}{{{below}}}"
    )


@given(spelled())
def test_every_spelling_is_read_as_its_number(pair):
    number, text = pair
    assert parse_number(text) == number
    assert find_number(f"The answer is {text}.") == number


@given(spelled(), spelled())
def test_numbers_are_equal_only_where_they_are(one, other):
    assert (parse_number(one[1]) == parse_number(other[1])) == (one[0] == other[0])


@given(st.text(alphabet="0123456789,.:/-+ e$%()^{}\\fracx\u2212\u202f½×", max_size=12))
def test_any_text_is_read_or_refused(text):
    number, found = parse_number(text), find_number(text)
    assert number is None or found is None or number == found or not text.isprintable() or text.startswith("$")


def test_plain_numbers_of_gsm8k_are_read_as_before():
    pattern = re.compile(r"-?\d[\d,]*(\.\d+)?")
    count = 0
    for name in ("train", "test"):
        for line in material(f"data/gsm8k/{name}.jsonl").read_text("utf-8").splitlines():
            answer = json.loads(line)["answer"].rsplit("####", 1)[-1].strip()
            expected = Fraction(pattern.fullmatch(answer).group().replace(",", ""))
            assert parse_number(answer) == find_number(f" ${answer}.") == expected, answer
            count += 1
    assert count == 8792
