"""Every file that the package writes is there whole or not at all: through `atomic`, or with a reason why not."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deft_lightning"
WRITERS = {
    "write_text", "write_bytes", "savefig", "save_pretrained", "new_file", "write_table", "ParquetWriter", "to_csv",
    "to_json", "to_parquet", "tofile", "memmap", "save_file",
}  # fmt: skip
QUALIFIED = {
    "np.save", "np.savez", "np.savez_compressed", "numpy.save", "json.dump", "yaml.dump", "torch.save", "pickle.dump",
    "dcp.save",
}  # fmt: skip
WHOLE = {"whole_file", "whole_folder", "complete_folder"}

IN_A_FOLDER = "writes into a folder that its caller lets appear once it is complete"
# file::function -> why what it writes needs no help of `atomic`
REASONS = {
    "atomic.py::*": "it is what the others go through",
    "terminal.py::_guard": "the null device",
    "cli/crash.py::_write": "the report of a crash: a name of its own, and writing is perhaps what has failed",
    "evaluation/command.py::_write": "a pipe or a device, which cannot be replaced",
    "callbacks/predictions.py::on_predict_start": "the part of a rank, in a folder that is removed at the end",
    "callbacks/predictions.py::write_on_batch_end": "appends a batch to the part of a rank",
    "callbacks/predictions.py::on_predict_end": "merges the parts in their folder; the file then replaces the old one",
    "models/checkpoint.py::describe": "a temporary folder",
    "models/checkpoint.py::tokenizer_from_checkpoint": "a temporary folder",
    "models/seal.py::write_digests": IN_A_FOLDER,
    "models/shares.py::load_bytes": "memory",
    "data/sources/given.py::content": "memory",
    "data/prepared/*": IN_A_FOLDER,
}
# Written by others, and never through here: TensorBoard's event files, which grow while a run goes on.


def mode_of(call: ast.Call, at: int) -> str:
    given = call.args[at : at + 1] or [word.value for word in call.keywords if word.arg == "mode"]
    return given[0].value if given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else "r"


def writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if isinstance(call.func, ast.Name):
        return name == "open" and bool(set("wax+") & set(mode_of(call, 1)))
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "open" and name != "os.open":
        return bool(set("wax+") & set(mode_of(call, 0)))
    return call.func.attr in WRITERS or name in QUALIFIED


def unprotected(path: Path) -> Iterator[tuple[str, int]]:
    """Functions that write outside of a block of `atomic`, and the lines where they do."""

    def walk(node: ast.AST, function: str, safe: bool) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.FunctionDef):
            function, safe = node.name, False
        if isinstance(node, ast.With):
            for item in node.items:
                yield from walk(item, function, safe)
                called = item.context_expr
                safe = safe or (isinstance(called, ast.Call) and ast.unparse(called.func) in WHOLE)
            for child in node.body:
                yield from walk(child, function, safe)
            return
        if isinstance(node, ast.Call) and writes(node) and not safe:
            yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, safe)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "<module>", False)


def found() -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for function, line in unprotected(path):
            wide = next((key for key in (f"{name}::*", f"{Path(name).parent}/*") if key in REASONS), None)
            key = wide or f"{name}::{function}"
            places.setdefault(key, []).append(line)
    return places


def test_whatever_writes_goes_through_atomic_or_has_a_reason() -> None:
    places = found()
    unexplained = {key: lines for key, lines in places.items() if key not in REASONS}
    assert not unexplained, "write inside `with whole_file(path) as partial:`, or add a reason to REASONS"


@pytest.mark.slow
def test_no_reason_is_left_over() -> None:
    gone = set(REASONS) - set(found()) - {"atomic.py::*"}
    assert not gone


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(p):\n    p.write_text('x')\n", [2]),
        ("def f(p):\n    with open(p, 'w') as file:\n        file.write('x')\n", [2]),
        ("def f(p):\n    with p.open(mode='ab') as file:\n        pass\n", [2]),
        ("def f(p):\n    with whole_file(p) as q, q.open('w') as file:\n        file.write('x')\n", []),
        ("def f(p):\n    with whole_file(p) as q:\n        q.write_text('x')\n    p.write_text('y')\n", [4]),
        ("def f(p):\n    with whole_folder(p) as q:\n        def g(): q.write_text('x')\n", [3]),
        ("def f(p):\n    np.save(p, 1)\n    open(p).read()\n    p.open('rb')\n", [2]),
    ],
)
def test_the_check_itself_sees_what_it_should(source: str, lines: list[int], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(source)
    assert [line for _, line in unprotected(tmp_path / "x.py")] == lines


# --- what is left when writing fails half-way -------------------------------------------------------------------------


def figure(path: Path) -> None:
    from matplotlib.figure import Figure

    from deft_lightning.figures.style import save

    save(Figure(), path)


def tokens(path: Path) -> None:
    import numpy as np

    from deft_lightning.figures.tokens import TokenSample

    one = np.zeros(1, dtype=np.float32)
    TokenSample(**{name: one for name in TokenSample.__dataclass_fields__}).save(path)


def skipped_rows(path: Path) -> None:
    from deft_lightning.data.sources.rows import BadRows

    BadRows().write(path)


def config(path: Path) -> None:
    from deft_lightning.cli.parser import DeftParser

    parser = DeftParser()
    parser.add_argument("--x", type=int, default=1)
    parser.save(parser.parse_args([]), path, overwrite=True)


@pytest.mark.parametrize("write", [figure, tokens, skipped_rows, config])
def test_a_full_disk_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "output.png"
    write(target)
    before = target.read_bytes()
    assert before and [path.name for path in tmp_path.iterdir()] == ["output.png"]
    with (
        mock.patch("pathlib.Path.replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(Exception, match=r"No space left|cannot be written"),
    ):
        write(target)
    assert target.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["output.png"]
