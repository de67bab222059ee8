"""The first line of a function's docstring is a statement: it begins with what the function does."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from worlds import ROOT

# Words that begin a noun phrase or a clause: "Whether it fits." says of what, not what happens.
NO_VERB = set(
    "A All An Each Every Examples How It Its Itself Itself. Loss Mean Names Number Of One Probability Rows Statistics"
    " That The Those Tokens Values What When Where Whether Which Who Yes. No.".split()
)


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield place and docstring of every function of the package."""
    for path in sorted((ROOT / "deft_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text


def test_they_begin_with_a_verb_and_end_as_sentences() -> None:
    found = list(docstrings())
    assert len(found) > 1500
    assert [place for place, text in found if text.split()[0] in NO_VERB] == []
    assert [place for place, text in found if not text.split("\n\n")[0].rstrip().endswith((".", ":"))] == []
