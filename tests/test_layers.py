"""Imports point down: the table of the rooms and who may enter them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deft_lightning"

# Lower rooms first. A room may import any room of a lower level, and nothing else of the package.
LEVEL = {
    "_version": 0, "terminal": -1, "atomic": -1, "ranks": 0, "errors": 0, "outputs": 1, "trust": 1, "crash": 1,
    "logs": 0, "hashing": 0, "registry": 0, "functional": 0,
    "objectives": 1, "ops": 1, "metrics": 1, "optim": 1,
    "models": 2, "figures": 2, "evaluation": 2, "integrations": 2,
    "step": 1, "stepping": 2,
    "data": 3,  # it reads the rows of benchmarks, which evaluation describes
    "resume": 3.5,  # it compares data; the trainer resumes with it
    "module": 4, "callbacks": 4, "strategy": 4, "probe": 4,
    "config_files": 1, "config_sizes": 1, "parser_errors": 1, "trainer_options": 1,
    "trainer": 5, "messages": 5, "after_fit": 6, "cli": 7, "study": 8, "__main__": 9,
}  # fmt: skip
FORBIDDEN = {
    ("data", "objectives"), ("data", "models"), ("data", "figures"), ("objectives", "ops"), ("ops", "objectives"),
    ("callbacks", "module"),
}  # fmt: skip


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("deft_lightning.")}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    for there in imports(path) - {here}:
        assert LEVEL[there] < LEVEL[here], f"{here} (level {LEVEL[here]}) imports {there} (level {LEVEL[there]})"
        assert (here, there) not in FORBIDDEN


def test_functional_needs_torch_alone() -> None:
    tree = ast.parse((PACKAGE / "functional.py").read_text(encoding="utf-8"))
    roots = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    roots |= {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert roots <= {"__future__", "collections", "typing", "torch"}
