"""What README and docs tell to type: the commands and the code of their blocks, as they are written."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, kind: str) -> list[str]:
    """Return the blocks of a language on a page, such as ``bash``."""
    return re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the words behind ``python -m deft_lightning`` of every command on a page, comments left out."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place in range(len(words) - 2):
                if words[place : place + 3] == ["python", "-m", "deft_lightning"]:
                    found.append(words[place + 3 :])
    return found


def read(page: str) -> str:
    """Return the text of a page, named from the root of the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def command(page: str, *words: str) -> list[str]:
    """Return the first command of a page that has all these words.

    Raises:
        LookupError: If the page has none.
    """
    for found in commands(read(page)):
        if set(words) <= set(found):
            return found
    raise LookupError(f"{page} has no command with {' and '.join(words)}")


def code_lines(code: str) -> int:
    """Return how many lines a module has without comments, docstrings and what is blank."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return len([line for line in ast.unparse(tree).splitlines() if line.strip()])
