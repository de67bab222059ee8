"""What jsonargparse complains about over many lines, as one complaint about the innermost option."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from textwrap import dedent

PLAIN = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list [A, B]",
    "tuple": "a list [A, B]", "dict": "options as {NAME: VALUE}",
}  # fmt: skip
CALLABLE = r"(?:Type .{0,400}? expects a function or a callable class:\s+)?"  # of optimizers and schedulers
KEY = re.compile(CALLABLE + r"""Parser key ["']([\w.]+)["'](?: element \d+)?:?\s*""")
CLASS = re.compile(r"(?:Expected a dot import path string|[Uu]nexpected import path(?: string| format)?): (\S+)")
NO_PATH = re.compile(r"\s*- Expected a path but .*? either not accessible or invalid\n\s*- ", re.DOTALL)


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong with one option.

    Attributes:
        key: The option, with dots, without dashes.
        kind: `type` (the value is of another type), `choice` (it is none of a few), `class` (there is no such class),
            `option` (the class has no such option), `missing` (it needs one that is not there), or `text`.
        what: Names of types, choices, the class, or the option; of `text` the sentence.
        value: What was given.
        owner: Class path of the class concerned.
    """

    key: str
    kind: str
    what: tuple[str, ...]
    value: str | None = None
    owner: str = ""


def complaint(message: str) -> Complaint:
    """Return the complaint of a jsonargparse error.

    Args:
        message: Its text.
    """
    if asked := re.match(r"--([\w.]+)\.help: ", message):
        return replace(complaint(message[asked.end() :]), key=asked[1])
    complaints = _read(message, "", "")
    return _best(complaints) if complaints else Complaint("", "text", (" ".join(message.split()),))


def plainly(problem: Complaint) -> str:
    """Return what is wrong with a value, in plain words.

    Args:
        problem: Of the kind `type` or `choice`.
    """
    value = "this" if problem.value is None else shown(problem.value)
    if "float" in problem.what and re.fullmatch(r"[-+]?\.?(?:inf|infinity|nan)", problem.value or "", re.IGNORECASE):
        return f"{value} is not a finite number"
    if problem.kind == "choice":
        return f"{value} is not one of {', '.join(problem.what)}"
    names = [name for name in dict.fromkeys(problem.what) if not (name == "int" and "float" in problem.what)]
    wanted = [
        PLAIN.get(name, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
        for name in names
        if name not in ("NoneType", "Iterable", "Tensor")
    ]
    return f"{value} is not {' or '.join(dict.fromkeys(wanted)) or 'a value that fits'}"


def shown(value: str) -> str:
    """Return a value as it is shown in a message: quoted if it is a text, and not too long."""
    value = value if len(value) <= 80 else f"{value[:77]}..."
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return f"'{value}'"
    return value


def _read(text: str, key: str, owner: str) -> list[Complaint]:
    """Return all complaints of a nested text, each with its whole key."""
    text = dedent(text).strip("\n")
    if match := KEY.match(text):
        inner = match[1]
        full_key = inner if not key or inner == key or inner.startswith(f"{key}.") else f"{key}.{inner}"
        return _read(text[match.end() :], full_key, owner)
    if match := NO_PATH.match(text):
        return _read(text[match.end() :], key, owner)
    text = text.strip()
    if text.startswith("Does not validate against any of the Union subtypes"):
        return _union(text, key, owner)
    if match := re.match(r"Problem with given class_path '([\w.]+)':\n", text):
        return _read(text[match.end() :], key, match[1])
    if match := re.match(r"Unable to load config .*?\n\s*- (?=Parser key|the key)", text, re.DOTALL):
        return _read(text[match.end() :], key, owner)
    if match := re.match(r"Unable to load config (['\"])(.*)\1$", text, re.DOTALL):
        return [Complaint(key, "text", (f"{shown(match[2])} is neither a file nor options as {{NAME: VALUE}}",))]
    return [_leaf(text, key, owner)]


def _union(text: str, key: str, owner: str) -> list[Complaint]:
    """Return the complaints of all the types that a value could have had."""
    body = text[: text.rfind("Given value type:")].partition("Errors:\n")[2]
    value = re.sub(r"\. Got value: Namespace\(.*", "", text.rpartition("Given value: ")[2], flags=re.DOTALL)
    lines = body.splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    entries: list[list[str]] = []
    for line in lines:
        if line[indent:].startswith("- ") and not line[:indent].strip():
            entries.append([" " * (indent + 2) + line[indent + 2 :]])
        elif entries:
            entries[-1].append(line)
    complaints = [problem for entry in entries for problem in _read(_flush(entry), key, owner)]
    return [replace(problem, value=problem.value or value) if problem.key == key else problem for problem in complaints]


def _flush(entry: list[str]) -> str:
    """Return the lines of an entry, of which all but the first may be indented less or more."""
    first, *rest = entry
    return "\n".join([first.strip(), dedent("\n".join(rest))]) if rest else first.strip()


def _leaf(text: str, key: str, owner: str) -> Complaint:
    """Return the complaint of a text that holds no other."""
    given = re.search(r"\.? Got value: (.*?)(?:\n\s*Subclass types expect.*)?$", text, re.DOTALL)
    if outer := re.search(r"\. Got value: Namespace\(class_path='([\w.]+)'.*$", text, re.DOTALL):
        text, owner = text[: outer.start()], owner or outer[1]
        given = re.search(r"\. Got value: (.*)$", text, re.DOTALL)
    text = re.sub(f"^{CALLABLE}", "", text)
    value = given[1] if given else None
    problem = Complaint(key, "text", (" ".join(text.split()),), value, owner)
    if match := re.match(r"Option '([\w.]+)' is not accepted", text):
        return replace(problem, key=f"{key}.{match[1]}", kind="option", what=(match[1],))
    if match := re.match(r"the following arguments are required: ([\w., -]+)", text):
        return replace(problem, kind="missing", what=tuple(match[1].split(", ")))
    if match := CLASS.search(text):
        return replace(problem, kind="class", what=(match[1].strip("'\".,"),))
    if match := re.match(r"Expected an? (?:typing\.)?Literal\[(.*?)\]", text):
        choices = tuple(str(choice) for choice in ast.literal_eval(f"[{match[1]}]"))
        return replace(problem, kind="choice", what=choices)
    if match := re.match(r"Expected a tuple with (\d+) elements", text):
        return replace(problem, what=(f"{shown(value or '')} is not a list of {match[1]} values",))
    if match := re.match(r"Expected (?:an? )?(?:<class '([\w.]+)'>|(list|dict|tuple|set)\b)", text):
        return replace(problem, kind="type", what=((match[1] or match[2]).rsplit(".", 1)[-1],))
    if text.startswith("Not of type timedelta"):
        return replace(problem, kind="type", what=("time as DD:HH:MM:SS",))
    if match := re.match(r"Not a valid subclass of (\w+)", text):
        return replace(problem, kind="type", what=(match[1],))
    if match := re.match(r"Expected an import path or a subclass spec, but got (.*)", text):
        return replace(problem, kind="type", what=("class",), value=value or match[1])
    return problem


def _best(complaints: list[Complaint]) -> Complaint:
    """Return the one that helps: the innermost, and of the types that were tried the likeliest."""
    depth = max(problem.key.count(".") for problem in complaints)
    complaints = [problem for problem in complaints if problem.key.count(".") == depth]
    kinds = {
        kind: [problem for problem in complaints if problem.kind == kind]
        for kind in ("missing", "choice", "class", "type", "option", "text")
    }
    types = _named(kinds["type"])
    if kinds["missing"]:
        return kinds["missing"][0]
    if kinds["choice"]:
        first, beside = kinds["choice"][0], ("true", "false") if "bool" in types else ()
        choices = [*beside, *(choice for problem in kinds["choice"] for choice in problem.what)]
        return replace(first, what=tuple(dict.fromkeys(choices)))
    if kinds["class"] and not types & {"float", "int"}:  # a number that may be a tensor as well is meant as a number
        return kinds["class"][0]
    if types - {"NoneType"} and not (kinds["option"] and types <= {"NoneType", "bool", "Iterable"}):
        first = kinds["type"][0]
        return replace(first, what=tuple(name for problem in kinds["type"] for name in problem.what))
    return next(iter([*kinds["option"], *kinds["text"], *complaints]))


def _named(complaints: Iterable[Complaint]) -> set[str]:
    return {name for problem in complaints for name in problem.what}
