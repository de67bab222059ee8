"""Noise on multiple choice: another option than the right one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest

from deft_lightning.data.noise.base import ExampleNoise
from deft_lightning.data.noise.edits import Edit
from deft_lightning.hashing import key

WORDS = {"yes": ("no", "maybe"), "no": ("yes", "maybe"), "maybe": ("yes", "no"), "true": ("false",), "false": ("true",)}
UNNAMED = "ABCD"  # The options of a question that does not show them.

# How a prompt names an option: a letter with punctuation behind it, at the start of a line or after a blank.
LISTED = re.compile(r"(?:(?<=\s)|^)[(\[]?(?P<letter>[A-Za-z])(?:[)\]]|[.:](?=\s))[ \t]*")

_AROUND = r"[\s*_\"'`.!)\]}$]*"
_CUE = (
    r"(?:\b(?:answer|option|choice|decision|conclusion)\b(?:\s+(?:is|would be|must be))?|####|:"
    r"|\\boxed\s*\{|\\boxed[ \t]*)"
    r"[\s:*_\"'`(\[$]*(?:\\text\s*\{)?"
)
# At the start of the response or of its last line: the letter alone, or with punctuation behind it.
_START = r"(?:(?:the\s+|correct\s+)*(?:answer|option|choice)\b(?:\s+is)?[\s:]*)?[*_\"'`(\[]*"
_REASON = r"(?=\s+(?:because|since)\b)"
LETTER_FIRST = re.compile(
    rf"\s*(?i:{_START})(?P<is>[A-Za-z])"
    rf"(?:[*_]*(?:[)\]][.:]*|[.:]+(?=[\s*_]|$))[*_]*[ \t]*|{_REASON}|{_AROUND}(?:\Z|(?=\n)))"
)
LETTER_LAST = re.compile(rf"(?:(?i:{_CUE})|(?:(?<=\s)|^)[(\[])(?P<is>[A-Za-z]){_AROUND}\Z")
_WORD = r"(?P<is>yes|no|maybe|true|false)"
WORD_FIRST = re.compile(
    rf"\s*(?:{_START}){_WORD}[*_\"'`)\]]*(?:[.,;:!]|\s+[-\u2013\u2014]|{_REASON}|\s*(?:\Z|(?=\n)))", re.IGNORECASE
)
WORD_LAST = re.compile(rf"(?:{_CUE}){_WORD}{_AROUND}\Z", re.IGNORECASE)


@dataclass(frozen=True)
class OptionFlip(ExampleNoise):
    r"""Answer another option of a multiple-choice question, or no for yes and false for true.

    The answer is read where the response is, begins with or ends with it: ``B``, ``(B)``, ``B) Paris``, ``The answer
    is B.``, ``Answer: B``, ``\boxed{B}``, ``\boxed B``, ``Yes, because``. Where it begins and ends with the same one,
    both change; where they differ, the end counts. A letter alone behind running text (``vitamin B``) is no answer.

    Another option is one that the prompt lists (``A) ...``, ``A. ...``, ``(A) ...``, in lines or in one); without such
    a list one of A to D, or up to the clean letter if that is further on. The text of the option beside the letter is
    exchanged with it. ``maybe`` is an option where the prompt says so.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        exact: Corrupt exactly ``floor(rate * n)`` of the ``n`` responses in which an answer is found.
    """

    rate: float = 0.3
    exact: bool = False

    def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
        """Return the exchange of the answer."""
        shown = options(prompt)
        hits = letters = _answers(response, LETTER_FIRST, LETTER_LAST)
        if not letters or letters[0]["is"].upper() not in shown:
            # No option that is listed: in "A: yes" the word is the answer, not the name before it.
            hits = _answers(response, WORD_FIRST, WORD_LAST) or letters
        if not hits:
            return None
        others = _other_letters(hits[0]["is"], shown) if hits is letters else _other_words(hits[0]["is"], prompt)
        if not others:
            return None
        new = others[key(salt, example_id, "option") % len(others)]
        edits = {Edit(*hit.span("is"), _like(hit["is"], new)) for hit in hits}
        if hits is letters and shown:
            clean, wrong = shown[hits[0]["is"].upper()], shown[new]
            places = {_beside(response, hit, clean) for hit in hits} if clean and wrong else set()
            edits |= {Edit(place, place + len(clean), wrong) for place in places if place is not None}
        return sorted(edits)


def _other_words(clean: str, prompt: str) -> list[str]:
    maybe = re.search(r"\bmaybe\b", prompt, re.IGNORECASE)
    return [word for word in WORDS[clean.lower()] if word != "maybe" or maybe]


def _other_letters(clean: str, shown: dict[str, str]) -> list[str]:
    own = clean.upper()
    if shown:
        text = shown.get(own, "").lower()
        return [x for x, listed in shown.items() if x != own and not (text and listed.lower() == text)] * (own in shown)
    # Where nobody lists options, "a" and "i" are words.
    last = max(ord(UNNAMED[-1]), ord(own))
    return [x for x in map(chr, range(ord(UNNAMED[0]), last + 1)) if x != own] * clean.isupper()


def options(prompt: str) -> dict[str, str]:
    """Return the options that a prompt lists, in capital letters from A on, with their texts; empty below two.

    Of several lists the last counts: the question comes after the examples.
    """
    run: list[re.Match[str]] = []
    best: list[re.Match[str]] = []
    for hit in LISTED.finditer(prompt):
        letter = hit["letter"]
        if run and letter == chr(ord(run[-1]["letter"]) + 1):
            run.append(hit)
        elif letter in "Aa":
            run = [hit]
        if len(run) > 1:
            best = list(run)
    texts = {}
    for hit, follower in zip_longest(best, best[1:]):
        line = prompt.find("\n", hit.end())
        end = len(prompt) if line < 0 else line
        text = prompt[hit.end() : min(end, follower.start()) if follower else end]
        texts[hit["letter"].upper()] = text.strip().rstrip(",;").rstrip()
    return texts


def _answers(response: str, first: re.Pattern[str], last: re.Pattern[str]) -> list[re.Match[str]]:
    """Return where the response gives its answer: at the start, at the start of its last line, at the end."""
    line = response.rstrip().rfind("\n") + 1
    by_start = {}
    for hit in (first.match(response), first.match(response, line), last.search(response)):
        if hit:
            by_start[hit.start("is")] = hit
    hits = [by_start[at] for at in sorted(by_start)]
    return [hit for hit in hits if hit["is"].lower() == hits[-1]["is"].lower()]


def _beside(response: str, hit: re.Match[str], text: str) -> int | None:
    """Return where the option's text stands: right behind its letter, or right before one in brackets."""

    def here(start: int) -> bool:
        candidate = response[max(start, 0) : start + len(text)]
        around = response[max(start - 1, 0) : max(start, 0)] + response[start + len(text) :][:1]
        return candidate.lower() == text.lower() and not any(map(str.isalnum, around))

    before = response[: hit.start("is")].rstrip(" ([*_")
    if here(hit.end()):
        return hit.end()
    return len(before) - len(text) if len(before) < hit.start("is") and here(len(before) - len(text)) else None


def _like(old: str, new: str) -> str:
    """Return the new word in the case of the old one."""
    if old.isupper():
        return new.upper()
    return new.capitalize() if old[:1].isupper() else new.lower()
