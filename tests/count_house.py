"""Count what the layout of the package is judged by.

    python tests/count_house.py [TREE ...]

For each tree (default: this one): files by folder; the largest file and class; rooms and arrows between them (a room is
a folder of the package, or a file of its own at the top; ``data`` counts by its folders); uses of ``Any`` and
``getattr``; private names of Lightning's objects and files that touch them; helper functions that several test files
define under one name.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from pathlib import Path

# Objects of Lightning under the names that this package has for them.
OWNERS = {
    "trainer", "strategy", "fit_loop", "epoch_loop", "logger", "connector", "_checkpoint_connector", "pl_module",
    "lightning_module", "loop", "module", "cli",
}  # fmt: skip


def trees(folder: Path) -> dict[Path, ast.Module]:
    """Syntax tree of every file below a folder."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}


def room(parts: tuple[str, ...]) -> str:
    """Room of a dotted name below the package."""
    if not parts:
        return "top"
    return "/".join(parts[:2]) if parts[0] == "data" and len(parts) > 2 else parts[0]


def arrows(package: Path, files: dict[Path, ast.Module]) -> tuple[int, int]:
    """Rooms, and pairs of rooms of which one imports the other."""
    dotted = {path: path.relative_to(package).with_suffix("").parts for path in files}
    known = {".".join(parts).removesuffix(".__init__") for parts in dotted.values()}
    pairs = set()
    for path, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
                base = (node.module or "").split(".")[1:]
                for alias in node.names:
                    name = [*base, alias.name] if ".".join([*base, alias.name]) in known else base
                    pairs.add((room(dotted[path]), room(tuple(name))))
    return len({room(parts) for parts in dotted.values()}), len({pair for pair in pairs if pair[0] != pair[1]})


def private(files: dict[Path, ast.Module]) -> tuple[set[str], set[Path]]:
    """Private names that are read from, written to or overridden in objects of Lightning; and the files."""
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loops import _FitLoop
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    kinds = (LightningDataModule, LightningModule, Trainer, LightningCLI, _FitLoop, ModelParallelStrategy)
    theirs = {
        name
        for kind in (*kinds, _CheckpointConnector)
        for cls in kind.__mro__
        if cls.__module__.startswith("lightning")
        for name in vars(cls)
        if name[0] == "_" and name[:2] != "__"
    }
    names, where = set(), set()
    for path, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in theirs:
                names.add(node.name)
                where.add(path)
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            owner = node.value
            last = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if last in OWNERS or node.attr in theirs:
                names.add(node.attr)
                where.add(path)
    return names, where


def main() -> None:
    """Print the counts of each tree."""
    for tree in map(Path, sys.argv[1:] or [Path(__file__).resolve().parents[1]]):
        package = tree / "deft_lightning"
        files, tests = trees(package), trees(tree / "tests")
        sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
        classes = {
            f"{path.relative_to(package)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
            for path, parsed in files.items()
            for node in ast.walk(parsed)
            if isinstance(node, ast.ClassDef)
        }
        names = Counter(node.id for parsed in files.values() for node in ast.walk(parsed) if isinstance(node, ast.Name))
        defined: dict[str, set[Path]] = defaultdict(set)
        for path, parsed in tests.items():
            for item in parsed.body:
                if isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.lower().startswith("test"):
                    defined[item.name].add(path)
        folders = Counter(str(path.parent.relative_to(package)) for path in files)
        largest, widest = max(sizes, key=lambda path: sizes[path]), max(classes, key=lambda name: classes[name])
        touched, where = private(files)
        rooms, pairs = arrows(package, files)
        print(f"{tree}")
        print(f"  files: {len(files)}; by folder: {', '.join(f'{name} {n}' for name, n in sorted(folders.items()))}")
        print(f"  lines: {sum(sizes.values())}; above 200: {sum(n > 200 for n in sizes.values())},"
              f" above 300: {sum(n > 300 for n in sizes.values())}")  # fmt: skip
        print(f"  largest file: {largest.relative_to(package)} {sizes[largest]}; class: {widest} {classes[widest]}")
        print(f"  rooms {rooms}, arrows {pairs}; Any {names['Any']}, getattr {names['getattr']}")
        print(f"  private names of Lightning: {len(touched)} in {len(where)} files")
        print(f"  helpers of tests defined in several files: {sum(len(paths) > 1 for paths in defined.values())}")


if __name__ == "__main__":
    main()
