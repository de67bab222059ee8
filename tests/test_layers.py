"""The house: which floor each room is on, that imports point down, and how large a file and a class may be."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deft_lightning"

# Lowest floor first. A file imports files of its own room and of the floors below, and nothing of a room beside it.
FLOORS = [
    # Ground: what everybody stands on. Its files are one room; that they make no circle is tested below.
    {"ground"},
    {"objectives", "ops", "metrics"},
    {"models", "evaluation", "figures", "integrations"},
    # The trip of a row.
    {"data"},  # its loose files: see OF_DATA
    {"data/sources"},
    {"data/records"},
    {"data/noise"},
    {"data/encoding"},
    {"data/prepared"},
    {"data/settings"},
    {"data/loading"},
    {"data/module", "callbacks"},
    {"probe"},
    {"training"},
    {"cli"},
    {"study"},
    {"addresses"},
]
GROUND = {
    "_lightning", "_version", "annotations", "answers", "atomic", "config_sizes", "deferred", "errors", "functional",
    "hashing", "progress", "ranks", "registry", "shipped_models", "terminal", "tokens", "trust",
}  # fmt: skip
# Names that users and saved configs have for what lies in rooms.
ADDRESSES = {"__init__", "__main__", "module", "optim", "strategy", "trainer"}
# The files of data that are in none of its rooms, by floor: states of a row below all rooms, the module above them.
OF_DATA = {"examples": "data", "lazy": "data", "protocols": "data", "settings": "data/settings"}
TOP_OF_DATA = {"__init__", "announce", "benchmarks", "module", "preview", "splits"}

# Imports that point up, within a function, each with the reason.
LAZY = {
    ("functional", "ops.dense"): "dense logits take the row kernel of the fused head; it loads with the first of them"
}

FILE, CLASS = 300, 200  # lines
# Larger ones, each with the reason.
LARGE_FILES = {
    "data.module": "37 options of the command line: their signature and docstring are a third",
    "training.module": "17 options likewise, and every hook of Lightning",
}
LARGE_CLASSES = {
    "data.module.InstructionDataModule": "37 options of the command line: signature and docstring are half",
    "training.module.SFTModule": "16 options likewise, and every hook of Lightning, each a line or a few to a part",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name below the package; that of a package is its folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def room_of(path: Path) -> str:
    """Room of a file."""
    first, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    if first in GROUND:
        return "ground"
    if not rest:
        assert first in ADDRESSES, f"{path}: a file outside of every room (GROUND or ADDRESSES in {__file__})"
        return "addresses"
    if first != "data":
        return first
    if len(rest) > 1:
        return f"data/{rest[0]}"
    assert rest[0] in OF_DATA or rest[0] in TOP_OF_DATA, f"{path}: on no floor (OF_DATA in {__file__})"
    return OF_DATA.get(rest[0], "data/module")


def imports(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("deft_lightning"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full.removeprefix("deft_lightning.") in MODULES else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("deft_lightning")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
    found = {name.removeprefix("deft_lightning").removeprefix(".") or "__init__" for name in names}
    return {MODULES[name] for name in found} - {path}


FLOOR = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = room_of(path)
    for other in imports(path):
        there = room_of(other)
        if name_of(other) == "data" and here not in ("data/module", "addresses"):
            # The package itself gathers public names: who is above it may use them.
            assert FLOOR[here] > FLOOR["data/module"], f"{name_of(path)} imports the whole of data"
            continue
        if (name_of(path), name_of(other)) in LAZY:
            continue
        assert there == here or FLOOR[there] < FLOOR[here], (
            f"{name_of(path)} ({here}, floor {FLOOR[here]}) imports {name_of(other)} ({there}, floor {FLOOR[there]})"
        )


@pytest.mark.slow
def test_no_circle_of_files() -> None:
    """Not even one that an import within a function closes."""
    try:
        list(
            TopologicalSorter({name_of(path): {name_of(one) for one in imports(path)} for path in FILES}).static_order()
        )
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_functional_needs_torch_alone() -> None:
    for name in ("functional", "tokens"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        own = [module for module in froms if module.startswith("deft_lightning")]
        lazy = [f"deft_lightning.{there}" for here, there in LAZY if here == name]
        assert own == (["deft_lightning.tokens"] if name == "functional" else []) + lazy
        at_once = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not set(lazy) & set(at_once)
        roots = {module.split(".")[0] for module in froms} - {"deft_lightning"}
        roots |= {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        assert roots <= {"__future__", "collections", "sys", "typing", "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_classes_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= FILE or name_of(path) in LARGE_FILES, f"{name_of(path)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            name = f"{name_of(path)}.{node.name}"
            assert size <= CLASS or name in LARGE_CLASSES, f"{name} has {size} lines"


def test_the_exceptions_are_still_needed() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert all(sizes.get(name, 0) > FILE for name in LARGE_FILES)
    classes = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert all(classes.get(name, 0) > CLASS for name in LARGE_CLASSES)


def test_no_class_has_a_base_that_knows_its_subclass() -> None:
    """A base whose annotations name what only a subclass gives is a class in two files."""
    guilty = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base) for base in node.bases}
            if not any(base.endswith(("LightningModule", "LightningDataModule")) for base in bases):
                continue
            abstract = [
                item.name
                for item in node.body
                if isinstance(item, ast.FunctionDef) and "abstractmethod" in map(ast.unparse, item.decorator_list)
            ]
            guilty += [f"{name}.{node.name} wants {item}" for item in abstract]
    assert not guilty
