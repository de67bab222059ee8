"""Every text that a user meets, collected for the tests of words and for the measurement of readability.

Messages are read from the source: the strings of calls that raise, warn or tell, with ``{...}`` for what is filled in,
which counts as one word. An alternative (``"a" if x else "b"``) is read both ways.

A sentence ends at ``.``, ``!`` or ``?``, or with its paragraph, item, option or message. A colon or a semicolon does
not end it, and the place in front of an error counts. Left out as no prose: code blocks, tables, headings, formulas.
One word each: a piece of code, what a message fills in, and a list of four or more items behind a colon.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from readability import END, prose, sentences, words

ROOT = Path(__file__).resolve().parents[1]
RAISE = {"UserError", "ValueError", "TypeError", "ArgumentTypeError", "RuntimeError"}
TELL = {"rank_zero_warn", "rank_zero_info", "warn"}
FILLED = "{...}"
MOST_READINGS = 16  # of one message with several alternatives
CODE = re.compile(r"\{%|\$\(|\{ [a-z-]+: ")  # a template, a script of a shell, a style sheet
PROSE = re.compile(r"[A-Za-z][a-z']+ [a-z']+ [a-z'0-9]+")  # three words in a row

VERBS = ["fit", "validate", "test", "predict", "export", "probe", "preview", "score", "figures", "study"]
# Prints the help of every verb, in one process.
HELP = """
import sys
from deft_lightning.cli import run
for verb in sys.argv[1:]:
    sys.argv = ["deft-lightning", verb, "--help"]
    try:
        run()
    except SystemExit:
        print()
"""
LISTED = re.compile(r":\s(?:[^,;:]{1,60},\s){3,}[^;:]*?(?=[.;]\s|[.;]?$)")


NO_LONGER = "(?!longer|more|less|better|worse|slower|faster)"
EACH = (
    "nats|bits|bytes|tokens|rows|examples|samples|objects?|lines?|process(?:es)?|times|ms|values?|panels?|micro-batches"
)
# What is not said, and what is said in its place.
GLOSSARY = {
    r"\b(go|goes|going|went|gone) on\b": "resume, continue",
    r"\banew\b": "again, start over",
    r"\bwant of\b": "lack of",
    r"(?<![Tt]here )\b(is|are|was|were) no " + NO_LONGER: "is not a",
    r"\b(told|tells)\b": "say, report, separate",
    r"\bhas to\b": "must",
    r"\bblanks?\b": "spaces",
    r"\bmisspelt\b": "typo",
    r"\bweigh(s|ed|ing)?\b": "weight",
    r"\bwhole or not\b": "atomic",
    r"\bfolders? of shares\b": "sharded checkpoint",
    r"\bthe standard value\b|\bpreset\b": "default",
    r"\bsave ?point": "checkpoint",
    r"\b(that|those) of\b|\bthe one (that|in|of|from)\b": "the noun itself",
    r"\b[Ww]hat is\b": "the noun itself",
    rf"\b({EACH}) an? (?!source\b|`)[a-z]+": "per",
}


@dataclass(frozen=True)
class Said:
    """A text, where it stands, and its kind: ``error``, ``line`` (a warning or an information) or ``text``."""

    kind: str
    place: str
    text: str


def readings(node: ast.expr) -> list[str]:
    """Return the texts that an expression may become, with ``{...}`` for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [FILLED]
    if isinstance(node, ast.JoinedStr):
        parts = [readings(value.value if isinstance(value, ast.FormattedValue) else value) for value in node.values]
        return ["".join(found) for found in itertools.islice(itertools.product(*parts), MOST_READINGS)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pairs = itertools.product(readings(node.left), readings(node.right))
        return [left + right for left, right in itertools.islice(pairs, MOST_READINGS)]
    if isinstance(node, ast.IfExp):
        return [*readings(node.body), *readings(node.orelse)]
    return [FILLED]


def _texts(node: ast.expr) -> bool:
    """Return whether an expression is a text of its own: a string, a joined one, or a sum of such."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _texts(node.left) or _texts(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _walk(node: ast.AST, kind: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield the outermost texts below a node, docstrings left out, with the kind of call that they are in."""
    if isinstance(node, ast.expr) and _texts(node):
        yield kind, node
        for inner in ast.walk(node):
            if isinstance(inner, ast.FormattedValue):
                yield from _walk(inner.value, kind)
        return
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        kind = "error" if name in RAISE else "line" if name in TELL else kind
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        yield from _walk(child, kind)


def messages(package: Path = ROOT / "deft_lightning") -> list[Said]:
    """Return every text of the source that is prose: what is raised, warned or told, headers, captions and labels."""
    found: dict[Said, None] = {}
    for path in sorted(package.rglob("*.py")):
        for kind, node in _walk(ast.parse(path.read_text(encoding="utf-8")), "text"):
            for text in readings(node):
                if kind != "text" or (PROSE.search(text) and not CODE.search(text)):
                    found[Said(kind, f"{path.relative_to(package.parent)}:{node.lineno}", text)] = None
    return list(found)


def options(shown: str) -> list[str]:
    """Return the texts of a printed help: paragraphs in front of the options, headings, and what each option says."""
    found: list[str] = []
    current = ""
    for line in shown.split("\n"):
        option = re.match(
            r"^ {2}(?:-\w, )?--[\w.]+(?: \S+)*? {2,}(\S.*)$|^ {2}(?:-\w, )?--[\w.]+.*$|^ {2,4}\w+ {2,}(.*)$", line
        )
        if option or not line.strip():
            found.append(current)
            current = (option[1] or option[2] or "") if option else ""
        else:
            current += " " + line.strip()
    found = [" ".join(text.split()) for text in [*found, current]]
    return [text for text in found if text and not text.startswith("usage:")]


def comments(folder: Path = ROOT / "configs") -> list[str]:
    """Return the comments of the configurations: a block of whole lines is one text, so is what follows a setting."""
    found: list[str] = []
    for path in sorted(folder.rglob("*.yaml")):
        block = ""
        for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
            whole = re.match(r"^\s*#\s?(.*)$", line)
            if whole:
                block += " " + whole[1].strip()
                continue
            found.append(block)
            block = ""
            behind = re.search(r"\s#\s(.*)$", line)
            found.append(behind[1] if behind else "")
    return [text.strip() for text in found if text.strip()]


def plain(text: str) -> list[str]:
    """Return the sentences of a message, an option or a comment."""
    text = " ".join(text.replace(FILLED, "X").split())
    return [part for part in END.split(LISTED.sub(": list", prose(text))) if words(part)]


def statements(package: Path) -> tuple[int, int]:
    """Return how many docstrings there are, and how many begin with a full statement: a paragraph that ends as one."""
    found = full = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text:
                    found += 1
                    full += text.split("\n\n")[0].rstrip().endswith((".", ":"))
    return found, full


def kinds(tree: Path) -> dict[str, list[str]]:
    """Return the sentences of every kind of text in a checkout."""
    found = {"README": sentences((tree / "README.md").read_text(encoding="utf-8"))}
    for name in ("guides", "concepts", "tutorials", "evidence"):
        pages = sorted((tree / "docs" / name).glob("*.md"))
        found[name] = [part for page in pages for part in sentences(page.read_text(encoding="utf-8"))]
    env = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "120"}
    command = [sys.executable, "-c", HELP, *VERBS]
    shown = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tree, check=True).stdout
    found["help"] = [part for text in dict.fromkeys(options(shown)) for part in plain(text)]
    said = messages(tree / "deft_lightning")
    for name, kind in (("errors", "error"), ("warnings and lines", "line"), ("other texts", "text")):
        found[name] = [part for message in said if message.kind == kind for part in plain(message.text)]
    found["comments of configurations"] = [part for text in comments(tree / "configs") for part in plain(text)]
    return found


def against(text: str) -> list[str]:
    """Return each phrase of a text that the glossary knows a better word for, with that word."""
    return [f"{found[0]!r}: {better}" for wrong, better in GLOSSARY.items() for found in re.finditer(wrong, text)]
