"""Parser errors in one line: which option, what is wrong, what comes close."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deft_lightning.data import known_noise
from deft_lightning.errors import did_you_mean
from deft_lightning.objectives import known_objectives


def one_line(message: str, options: Iterable[str]) -> str:
    """Shorten a jsonargparse error.

    Args:
        message: What it would have printed, over many lines.
        options: Option strings that exist, for close matches.
    """
    text = re.sub(r"^Problem with given class_path.*?:\n", "", message.strip())
    if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        word = found[1].split("=")[0]
        return f"unknown option {word}.{did_you_mean(word, options)}"
    if found := re.search(
        r"[Kk]ey ['\"]([\w.]+)['\"] is not expected|does not accept (?:nested )?key ['\"]([\w.]+)", text
    ):
        word = next(group for group in found.groups() if group)
        return f"unknown option --{word}.{_closest_option(word, options)}"
    key = _key(text)
    for place, known in (("model.objective", known_objectives()), ("data.noise.ops", known_noise())):
        word = _class_name(text)
        if key.startswith(place) and word and word not in known:
            return f"--{place} {word} is unknown.{did_you_mean(word, known)} Known: {', '.join(known)}"
    reason = _reason(text)
    return f"--{key}: {reason}" if key and key not in reason else reason


def _key(text: str) -> str:
    found = re.search(r"(?:Parser key|[Aa]rgument|Option) ['\"]?-*([\w.]+)['\"]?", text)
    return found[1] if found else ""


def _class_name(text: str) -> str:
    patterns = (
        r"Expected a dot import path string: (\S+)",
        r"[Uu]nexpected import path(?: string)?: (\S+)",
        r"[Nn]o module named '([\w.]+)'",
        r"class_path['\"]?: ['\"]?([\w.]+)",
    )
    found = next((hit for pattern in patterns if (hit := re.search(pattern, text))), None)
    return found[1].strip("'\".,") if found else ""


def _closest_option(word: str, options: Iterable[str]) -> str:
    return did_you_mean(f"--{word}", options)


def _reason(text: str) -> str:
    """The innermost complaints of a nested error."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    skip = (
        "Parser key",
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value type",
        "Problem with",
        "Given value:",
    )
    inner = [line for line in lines if not line.startswith(skip)]
    return "; ".join(dict.fromkeys(inner or lines))
