"""Multiple choice: the option that a completion chooses, strictly as asked, or by resemblance."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from deft_lightning.annotations import Record
from deft_lightning.answers.locate import boxed
from deft_lightning.answers.numbers import unwrapped
from deft_lightning.evaluation.graders.base import Grader

LINE = 500  # letters of the last line that are looked at
TAIL = 2_000  # letters at the end in which `compat` seeks and compares
_BEFORE = r"(?:(?:so|thus|hence|therefore|final|my|the|correct|right|best)[\s,]+)*"
_CUE = rf"{_BEFORE}(?:answer|option|choice)\b(?:\s+is|\s*:)*"
_AROUND = r"[\s*_\"'`(\[$:]*"


@dataclass(frozen=True)
class Choice(Grader):
    r"""Grade a multiple choice; the row's ``options`` map labels (A, B; yes, no) to texts, ``gold`` is a label.

    ``strict``: the last line that is not empty is the label, as it is asked for: alone, in brackets, in bold or in
    ``\boxed{}``, behind "Answer:" or "The answer is", with the option's text behind it or in its place. Letters count
    in capitals, words in any case.

    ``compat``: the strict answer, else the last "answer is X" of the completion, else the label that it begins with
    ("B) Paris", "Yes, because"), else the option whose text is nearest to the completion: the largest similarity
    ``2 m / (|a| + |b|)``, m letters of a longest common subsequence, the first of equals; of a long completion the last
    2,000 letters are compared. So any text that shares a letter with an option is an answer, as in the official
    evaluation.

    Completions vote by their strict answer.
    """

    names: ClassVar[tuple[str, ...]] = ("strict", "compat")

    def __call__(self, completion: str, gold: str, record: Record) -> dict[str, float]:
        """Return ``strict`` and ``compat``."""
        options = record["options"]
        strict = self.vote(completion, record)
        rules = (said_so, begun_with, nearest)
        compat = strict or next((label for rule in rules if (label := rule(completion, options)) is not None), None)
        return {"strict": float(strict == gold), "compat": float(compat == gold)}

    def vote(self, completion: str, record: Record) -> str | None:
        """Return the label that the last line gives."""
        lines = completion.rstrip()[-LINE:].splitlines()
        line = lines[-1].strip() if lines else ""
        line = unwrapped(boxed(line) or "") if "\\boxed" in line else line
        hit = _patterns(tuple(record["options"].items())).whole.fullmatch(line)
        return None if hit is None else _label(hit, record["options"])


def said_so(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the label behind the last "answer is" or "answer:" among the last 2,000 letters."""
    match = None
    for match in _patterns(tuple(options.items())).cued.finditer(completion[-TAIL:]):  # noqa: B007 - the last one
        pass
    return None if match is None else _label(match, options)


def begun_with(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the label at the start of the completion; behind a letter there has to be a sign or the end of a line."""
    hit = _patterns(tuple(options.items())).begun.match(completion)
    return None if hit is None else _label(hit, options)


def nearest(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the label of the option whose text is most like the completion; None where it is like none."""
    from rapidfuzz.distance import Indel  # here, as no other grader of a run needs it

    tail = completion.strip()[-TAIL:].lower()
    likeness = {label: Indel.normalized_similarity(tail, text.lower()) for label, text in options.items()}
    best = max(likeness, key=likeness.__getitem__)
    return best if tail and likeness[best] > 0 else None


def label_of(answer: object, options: Mapping[str, str]) -> str | None:
    """Return the label that a row's answer means: a label, a number counted from 0, or an option's text."""
    if isinstance(answer, int) and str(answer) in options:  # labels that are numbers
        return str(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return list(options)[answer] if 0 <= answer < len(options) else None
    text = str(answer).strip()
    if text in options:
        return text
    same = [x for x, option in options.items() if text.lower() in (x.lower(), option.strip().lower())]
    return same[0] if same else None


@dataclass(frozen=True)
class _Patterns:
    whole: re.Pattern[str]
    cued: re.Pattern[str]
    begun: re.Pattern[str]


@lru_cache(maxsize=1_000)
def _patterns(options: tuple[tuple[str, str], ...]) -> _Patterns:
    labels = "|".join(_exactly(label) for label, _ in sorted(options, key=lambda pair: -len(pair[0])))
    texts = "|".join(f"(?i:{re.escape(text.strip())})" for _, text in sorted(options, key=lambda pair: -len(pair[1])))
    end = r"[\s*_\"'`)\]$.!]*"
    answer = rf"(?:(?P<label>{labels})(?:{end}|[\s*_)\].:,\-]+(?P<beside>{texts}){end})|(?P<text>{texts}){end})"
    return _Patterns(
        re.compile(rf"(?:(?i:{_CUE}))?{_AROUND}{answer}"),
        re.compile(rf"(?i:\b(?:answer|option|choice)(?:\s+is|\s*:)){_AROUND}(?P<label>{labels})(?![A-Za-z0-9])"),
        re.compile(rf"[\s*_\"'`(\[]{{0,20}}(?P<label>{labels})(?:(?<=[A-Za-z]{{2}})\b|(?=[)\].:,]|\s*\Z|[ \t]*\n))"),
    )


def _exactly(label: str) -> str:
    return re.escape(label) if len(label) == 1 else f"(?i:{re.escape(label)})"


def _label(hit: re.Match[str], options: Mapping[str, str]) -> str | None:
    if hit["label"] is not None:
        label = next((label for label in options if label.lower() == hit["label"].lower()), None)
        beside = hit.groupdict().get("beside")
        # "A. Paris" where B is Paris says two things.
        return label if not beside or (label and options[label].strip().lower() == beside.lower()) else None
    return next((label for label, text in options.items() if text.strip().lower() == hit["text"].lower()), None)
