r"""Completions whose verdict is known by rule: a gold answer in other words is right, a changed one is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class Graded(NamedTuple):
    """A completion, the gold answer of its question, and whether it is right."""

    gold: str
    completion: str
    right: bool
    rule: str


Rules = dict[str, Callable[[str], str]]


def separated(number: str) -> str:
    """An integer with commas between thousands."""
    return f"{int(number.replace(',', '')):,}"


def other_digit(text: str) -> str:
    """The first digit changed to the next one; a text without digits becomes another word."""
    hit = re.search(r"\d", text)
    if hit is None:
        return "\\text{something else}"
    return f"{text[: hit.start()]}{(int(hit[0]) + 1) % 10 or 1}{text[hit.end() :]}"


# --- numbers of word problems: rules take the number without commas --------------------------------------------------

NUMBER_RIGHT: Rules = {
    "hashes": lambda n: f"We add both.\n#### {n}",
    "hashes with commas": lambda n: f"3 and 4 make 7.\n#### {separated(n)}",
    "hashes and currency": lambda n: f"It costs\n#### ${n}",
    "hashes and unit": lambda n: f"So\n#### {n} apples.",
    "box": lambda n: f"There are 12 of 99, so \\boxed{{{n}}}.",
    "box and currency": lambda n: f"\\(\\boxed{{\\${separated(n)}}}\\)",
    "box and unit": lambda n: f"$\\boxed{{{n}\\text{{ dollars}}}}$ is what she pays in 30 days.",
    "box and bare unit": lambda n: f"\\boxed{{{n} miles per hour}}",
    "box and decimals": lambda n: f"\\boxed{{{n}.00}}",
    "box and fraction": lambda n: f"\\boxed{{\\frac{{{2 * int(n)}}}{{2}}}}",
    "box and slash": lambda n: f"\\boxed{{{3 * int(n)}/3}}",
    "box and name": lambda n: f"\\boxed{{x = {n}}}",
    "box and LaTeX comma": lambda n: "\\boxed{" + separated(n).replace(",", "{,}") + "}",
    "second box": lambda n: f"\\boxed{{123456}} is too much: \\boxed{{{n}}}",
    "box in box": lambda n: f"\\boxed{{\\boxed{{{n}}}}}",
    "sentence": lambda n: f"First 5, then 17. The answer is {separated(n)}.",
    "sentence and unit": lambda n: f"She needs 2 hours, and earns ${n} dollars in all!",
    "bold": lambda n: f"Total of 3 days: **{n}**",
    "equation": lambda n: f"1 + 2 + ... = {n}",
    "sum": lambda n: f"\\boxed{{{int(n) - 1} + 1}}",
    "power of ten": lambda n: f"\\boxed{{{10 * int(n)} \\times 10^{{-1}}}}",
}
NUMBER_WRONG: Rules = {
    "one more": lambda n: f"#### {int(n) + 1}",
    "one less in a box": lambda n: f"\\boxed{{{int(n) - 1}}}",
    "ten times": lambda n: f"\\boxed{{{n}0}}",
    "other digit": lambda n: f"The answer is {other_digit(n)}.",
    "negative": lambda n: f"\\boxed{{-{int(n) + 1}}}",
    "half more": lambda n: f"\\boxed{{{n}.5}}",
    "second box": lambda n: f"\\boxed{{{n}}}, no: \\boxed{{{int(n) + 2}}}",
    "hashes after the number": lambda n: f"It is {n}.\n#### {int(n) + 3}",
    "number, then another": lambda n: f"It is {n} of {int(n) + 7}",
    "two answers": lambda n: f"\\boxed{{{n}\\text{{ or }}{int(n) + 1}}}",
    "list": lambda n: f"\\boxed{{{n}, {int(n) + 1}}}",
    "thousands": lambda n: f"\\boxed{{{n}\\text{{ thousand}}}}",
    "variable": lambda n: f"\\boxed{{{n}x}}",
    "nothing": lambda n: "I do not know.",
    "empty": lambda n: "",
    "empty box": lambda n: f"It is {n}: \\boxed{{}} of {int(n) + 4}",
}


# --- LaTeX -----------------------------------------------------------------------------------------------------------


def _slashed(gold: str) -> str:
    return re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"(\1)/(\2)", gold)


LATEX_RIGHT: Rules = {
    "box": lambda g: f"So we get $\\boxed{{{g}}}$.",
    "display": lambda g: f"\\[\n\\boxed{{ {g} }}\n\\]\nas was to be shown for $n = 3$.",
    "dfrac": lambda g: f"\\boxed{{{g.replace(chr(92) + 'frac', chr(92) + 'dfrac')}}}",
    "plain brackets": lambda g: f"\\boxed{{{g.replace(chr(92) + 'left', '').replace(chr(92) + 'right', '')}}}",
    "dollars": lambda g: f"The answer is \\boxed{{${g}$}}",
    "slashes": lambda g: f"\\boxed{{{_slashed(g)}}}",
    "decimals": lambda g: f"\\boxed{{{g}.0}}" if re.fullmatch(r"-?\d+", g) else f"\\boxed{{{g}}}",
    "full stop": lambda g: f"\\boxed{{{g}.}}",
    "second box": lambda g: f"At first $\\boxed{{17.25}}$, then $\\boxed{{{g}}}$.",
}
LATEX_WRONG: Rules = {
    "other digit": lambda g: f"\\boxed{{{other_digit(g)}}}",
    "second box": lambda g: f"$\\boxed{{{g}}}$, or rather $\\boxed{{{other_digit(g)}}}$",
    "no box": lambda g: f"The answer is ${g}$.",
    "open box": lambda g: f"The answer is $\\boxed{{{g}",
    "empty box": lambda g: f"The answer is ${g}$, that is $\\boxed{{}}$",
    "plus 1000": lambda g: f"\\boxed{{1000 + {g}}}" if re.search(r"\d", g) else "\\boxed{1000}",
    "words": lambda g: "\\boxed{\\text{no such thing}}",
}


def rewritten(golds: list[str], right: Rules, wrong: Rules) -> list[Graded]:
    """For every gold answer one completion that is right and one that is wrong, by rules in turn."""
    found = []
    for i, gold in enumerate(golds):
        for rules, verdict in ((right, True), (wrong, False)):
            name = list(rules)[i % len(rules)]
            found.append(Graded(gold, rules[name](gold), verdict, name))
    return found
