"""Exact parsing of numbers as people and models write them.

| read | not read |
|---|---|
| `18`, `-3`, `+7`, `007`, `1,234.50`, `1 000` (narrow spaces too), `.5` | `12,5`, `10:30`, `1,2345`, `1.2.3` |
| `1/2`, `-3/4`, `2 1/2`, `½`, `\\frac{1}{2}`, `2\\frac{1}{2}` | `1/0`, `3/4/2025`, `x/2` |
| `1e-3`, `1.5E6`, `2 × 10^3`, `2\\times10^{-3}` | exponents beyond 400 |
| `$5`, `-$5`, `$-5`, `5 €`, `20 %`, `20\\%` | `(2, 5)`, `3\\sqrt{2}`, `x^2+1`, `five`, other digits than 0 .. 9 |

A currency or percent sign is a unit: `20 %` is 20, as question sets that ask for a percentage write it.
"""  # fmt: skip

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LARGEST_EXPONENT = 400
MOST_DIGITS = 4000
MINUS_SIGNS = "\N{MINUS SIGN}\N{EN DASH}-"  # `-` is last: elsewhere in brackets it would be a range
SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"

_INTEGER = rf"(?:[0-9]{{1,3}}(?:(?:,[0-9]{{3}})+|(?:[{SPACES}][0-9]{{3}})+)(?![0-9])|[0-9]+)"
_CURRENCY = r"(?:\\?[$]|US[$]|[€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|CNY|INR|CHF)\b)"
_SIGN = rf"[+{MINUS_SIGNS}]"
NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]}}])(?P<sign>{_SIGN})\s?)?
    (?:{_CURRENCY}\s?(?P<inner>{_SIGN})?)?
    (?:
        (?:(?P<whole>[0-9]+)(?:[{SPACES}]|(?=[{VULGAR}\\])))?
        (?: (?P<vulgar>[{VULGAR}])
          | (?P<above>[0-9]+)/(?P<below>[0-9]+)
          | \\[dt]?frac\{{(?P<upper_sign>{_SIGN})?(?P<upper>[0-9]+)\}}\{{(?P<lower>[0-9]+)\}}
          | \\[dt]?frac(?P<upper1>[0-9])(?P<lower1>[0-9]) )
      | (?P<decimal>{_INTEGER}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
        (?: [eE](?P<exponent>[-+{MINUS_SIGNS}]?[0-9]+)
          | \s?(?:×|\\times|\\cdot|·)\s?10\^\{{?(?P<power>[{MINUS_SIGNS}]?[0-9]+)\}}? )?
    )
    (?:\s?(?:\\?%|{_CURRENCY}))?
    """,
    re.VERBOSE | re.ASCII,
)
# In a text: not part of a name, an expression, a time, a date or a list of coordinates.
_BEFORE = r"(?<![\w^\\{√_*+])(?<![^\W\d_])(?<![0-9][.,:/])"
_AFTER = r"(?![0-9]|[.,:/^][0-9]|[*^√_{]|[+][\w\\]|\\(?!text|mathrm|quad)[A-Za-z])"
_COORDINATES = rf"\(\s*{_SIGN}?[0-9.]+(?:\s*,\s+{_SIGN}?[0-9.]+)+\s*\)"
IN_TEXT = re.compile(f"{_COORDINATES}|{_BEFORE}(?P<number>{NUMBER.pattern}){_AFTER}", re.VERBOSE)


def parse_number(text: str) -> Fraction | None:
    """Parses a text that is exactly one number; returns None for any other text."""
    text = _without_markup(text).strip()
    if len(text) > 2 and text[0] == text[-1] == "$":  # mathematics in LaTeX
        text = text[1:-1].strip()
    found = NUMBER.fullmatch(text.removesuffix(".") if not text.endswith("..") else text)
    return None if found is None else _value(found)


def find_number(text: str) -> Fraction | None:
    """Returns the first complete number in a text, in any of the forms of `parse_number`; None if there is none."""
    for found in IN_TEXT.finditer(_without_markup(text)):
        if found["number"] is not None and (value := _value(found)) is not None:
            return value
    return None


def _without_markup(text: str) -> str:
    """Removes the LaTeX and Markdown markup that only changes how a number looks."""
    text = text.replace(r"\!", "").replace("{,}", ",").replace(r"\,", " ").replace(r"\(", " ").replace(r"\)", " ")
    text = re.sub(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 ", text)
    text = re.sub(r"\\sqrt\s*", "√", text)
    return re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", " ", text)  # bold letters of Markdown


def _value(found: re.Match[str]) -> Fraction | None:
    """The value of a match of `NUMBER`; None if it has none (a denominator of 0), is ambiguous or is too large."""
    if len(found.group()) > MOST_DIGITS:
        return None
    part = found.groupdict()
    signs = [part[name] for name in ("sign", "inner", "upper_sign") if part[name]]
    if len(signs) > 1:
        return None
    if part["decimal"]:
        exponent = _exponent(part["exponent"] or part["power"] or "0")
        if abs(exponent) > LARGEST_EXPONENT:
            return None
        size = Fraction(re.sub(rf"[,{SPACES}]", "", part["decimal"])) * Fraction(10) ** exponent
    else:
        above = part["above"] or part["upper"] or part["upper1"]
        below = part["below"] or part["lower"] or part["lower1"]
        if below is not None and int(below) == 0:
            return None
        share = _vulgar(part["vulgar"]) if above is None else Fraction(int(above), int(below))
        if part["whole"] and (share >= 1 or (above or "1").startswith("0") or part["upper_sign"]):
            return None  # `1 000/3` and `2 7/3` can be read in two ways
        size = share + int(part["whole"] or 0)
    return -size if signs and signs[0] in MINUS_SIGNS else size


def _exponent(text: str) -> int:
    digits = text.lstrip(MINUS_SIGNS + "+")
    size = int(digits) if len(digits) < 10 else LARGEST_EXPONENT + 1
    return -size if text[0] in MINUS_SIGNS else size


def _vulgar(sign: str) -> Fraction:
    above, _, below = unicodedata.normalize("NFKC", sign).partition("\N{FRACTION SLASH}")
    return Fraction(int(above), int(below))
