"""Plain numbers and words, which are compared without computer algebra."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 120  # letters of a plain number
LARGEST = 400  # size of an exponent of ten

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_NOTHING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\\ |\\?\$|\\displaystyle|(?<=\d)\{,\}(?=\d{3})")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_OVER = r"\\[dt]?frac\s*(?:\{\s*(?P<a>-?\d+)\s*\}\s*\{\s*(?P<b>\d+)\s*\}|(?P<c>\d)\s*(?P<d>\d))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+\u2212])?\s*(?:[€£¥]\s*)?(?P<minus>[-\u2212])?(?:"
    rf"(?:(?P<whole>\d+)\s*)?{_OVER}"
    rf"|(?P<mixed>\d+)\s+(?P<e>\d+)\s*/\s*(?P<f>\d+)"
    rf"|(?P<top>{_DECIMAL})(?:\s*/\s*(?P<under>{_DECIMAL})"
    r"|[eE](?P<sci>[-+]?\d{1,4})|\s*(?:\\times|\\cdot|\*|\u00d7|x)\s*10\s*\^\s*(?:\{\s*(?P<ten>[-+\u2212]?\d{1,4})\s*\}|(?P<one>\d)))?"
    r")"
)
# What may stand behind a number: percent, degrees, a unit. A letter alone may be a variable.
_PERCENT = re.compile(r"\s*(?:\\?%|percent\b|per cent\b|pct\b)", re.IGNORECASE)
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°)\s*")
_UNIT = re.compile(r"\s*(?:[A-Za-z]{2,}\.?(?:\s*\^\s*\{?[23]\}?)?(?:\s*/\s*[A-Za-z]+|\s+(?=[A-Za-z])|(?![A-Za-z])))+")
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*(?P<word>{'|'.join(_SCALES)})\b", re.IGNORECASE)
# Words that change what a number is worth, or say that it is not all.
_NO_UNITS = re.compile(
    rf"\b(?:{'|'.join(_SCALES)}|pi|sqrt|sin|cos|tan|log|ln|exp|or|and|to|not|mod|base|over|"
    r"dozens|squared|cubed|times|plus|minus|half|halves|thirds?|quarters?|factorial|inf|infinity|am|pm)\b",
    re.IGNORECASE,
)


class Plain(NamedTuple):
    """A number and whether a percent sign stands behind it."""

    value: Fraction
    percent: bool


def unwrapped(text: str) -> str:
    r"""Return a text without dollar signs, fine spacing and the commands around words: ``\text{ cm}`` is `` cm``."""
    return _NOTHING.sub("", _WRAPPED.sub(r" \1 ", text)).strip()


def plain(text: str) -> Plain | None:
    r"""Return the number that a text is: ``1,234.5``, ``-3/4``, ``\frac{3}{4}``, ``1 1/2``, ``2.5e3``, ``18 dollars``.

    ``2 million`` is one as well. Currency, degrees, a percent sign, a unit of at least two letters and a full stop
    around it do not matter; words that change the value (``3 squared``) or say that there is more (``5 or 6``) make it
    no plain number.

    Returns:
        The exact value; None for anything else, and where more than 120 letters or an exponent above 400 say it.
    """
    if len(text) > 4 * LONGEST:
        return None
    text = unwrapped(text)
    hit = _NUMBER.match(text) if len(text) <= LONGEST else None
    if hit is None:
        return None
    scale = _SCALE.match(text, hit.end())
    rest = text[scale.end() if scale else hit.end() :]
    percent = _PERCENT.match(rest)
    behind = percent or _DEGREES.match(rest)
    rest = rest[behind.end() :] if behind else rest
    unit = _UNIT.match(rest)
    if unit and not _NO_UNITS.search(rest):
        rest = rest[unit.end() :]
    if rest.strip(" ."):
        return None
    value = _value(hit)
    if value is None:
        return None
    return Plain(value * _SCALES[scale["word"].lower()] if scale else value, percent is not None)


def _value(hit: re.Match[str]) -> Fraction | None:
    def whole(digits: str) -> Fraction:
        return Fraction(digits.replace(",", "").replace("\u2212", "-"))

    try:
        if hit["a"] or hit["c"]:
            part = whole(hit["a"] or hit["c"]) / whole(hit["b"] or hit["d"])
            value = whole(hit["whole"] or "0") + part
        elif hit["mixed"]:
            value = whole(hit["mixed"]) + whole(hit["e"]) / whole(hit["f"])
        else:
            value = whole(hit["top"].rstrip("."))
            if hit["under"]:
                value /= whole(hit["under"].rstrip("."))
            power = int((hit["sci"] or hit["ten"] or hit["one"] or "0").replace("\u2212", "-"))
            if abs(power) > LARGEST:
                return None
            value *= Fraction(10) ** power
    except (ZeroDivisionError, ValueError):  # 1/0; more digits than Python reads
        return None
    negative = (hit["sign"] in ("-", "\u2212")) != bool(hit["minus"])
    return -value if negative else value


def same_number(gold: Plain, answer: Plain, tolerance: float = 0.0) -> bool:
    """Return whether two plain numbers are the same.

    They may differ by 5e-6 times the gold value, at most 5e-6 (what rounding to six decimals does), and by
    ``tolerance``. Where one has a percent sign, 50 % is 50 and is 0.5.

    Args:
        gold: The right number.
        answer: The model's.
        tolerance: Absolute difference that the benchmark allows.
    """
    slack = max(Fraction(5, 10**6) * min(abs(gold.value), Fraction(1)), Fraction(tolerance))
    readings = [answer.value] if gold.percent == answer.percent else [answer.value, _hundredth(gold, answer)]
    return any(abs(reading - gold.value) <= slack for reading in readings)


def _hundredth(gold: Plain, answer: Plain) -> Fraction:
    return answer.value / 100 if answer.percent else answer.value * 100


def same_words(gold: str, answer: str) -> bool:
    r"""Return whether two texts are the same up to blanks, LaTeX commands around words, brackets, a full stop.

    Case does not matter in words of letters alone; it does in one letter, which may be a variable.
    """
    return bool(words(gold)) and words(gold) == words(answer)


def words(text: str) -> str:
    """Return the form in which :func:`same_words` compares."""
    text = "".join(re.sub(r"\\[dt]frac", r"\\frac", unwrapped(text)).split()).rstrip(".")
    while len(text) > 2 and text[0] == "(" and text[-1] == ")" and text[1:-1].isalpha():
        text = text[1:-1]
    return text.lower() if len(text) > 1 and text.isalpha() else text
