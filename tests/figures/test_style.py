"""The look: apart without colour, the same file every time, and the user's matplotlib left alone."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from deft_lightning.errors import UserError
from deft_lightning.figures import comparison_bars, gate_curves
from deft_lightning.figures.style import COLOURS, bar, files, line, look, panels
from deft_lightning.objectives import DEFT, NLL


def grey(figure: object) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("L")).astype(float)


def test_no_two_styles_are_the_same() -> None:
    lines = [tuple(line(i).values()) for i in range(49)]
    bars = [(bar(i)["edgecolor"], bar(i)["hatch"]) for i in range(49)]
    assert len(set(lines)) == len(set(bars)) == 49


def test_lines_are_told_apart_by_their_dashes_alone() -> None:
    found = []
    for i in range(len(COLOURS)):
        with look():
            figure, (axes,) = panels(1, 4, 0.6)
            axes.set_axis_off()
            axes.plot([0, 1], [0, 0], linewidth=1.6, **line(i) | {"color": "black"})
            found.append(grey(figure).min(0) < 128)
    # Neither is the share of ink the same, nor the number of strokes within a few.
    ink = [row.sum() for row in found]
    strokes = [int(np.diff(row.astype(int)).clip(0).sum()) for row in found]
    for a, b in combinations(range(len(found)), 2):
        assert abs(ink[a] - ink[b]) > 0.1 * max(ink) or abs(strokes[a] - strokes[b]) > 5, (a, b)


def test_bars_are_told_apart_in_grey() -> None:
    patches = []
    for i in range(len(COLOURS)):
        with look():
            figure, (axes,) = panels(1, 2, 2)
            axes.set_axis_off()
            axes.bar(0, 1, **bar(i))
            image = grey(figure)
        middle = image[60:140, 60:140]
        patches.append(middle - middle.mean())  # of the hatch alone, whatever its lightness
    for a, b in combinations(range(1, len(patches)), 2):
        product = (patches[a] * patches[b]).mean() / (patches[a].std() * patches[b].std())
        assert product < 0.8, (a, b)
    assert patches[0].std() == 0 and all(patch.std() > 5 for patch in patches[1:])


def test_a_name_without_a_format_is_two_files(tmp_path: Path) -> None:
    assert files("a/b") == [Path("a/b.png"), Path("a/b.svg")]
    assert files(["x.pdf", Path("version_0.5")]) == [Path("x.pdf"), Path("version_0.5.png"), Path("version_0.5.svg")]
    with pytest.raises(UserError, match="at least one file"):
        files([])
    written = gate_curves([NLL()], [tmp_path / "new" / "a", tmp_path / "b.pdf"])
    assert [path.name for path in written] == ["a.png", "a.svg", "b.pdf"]
    heads = [path.read_bytes()[:5] for path in written]
    assert heads == [b"\x89PNG\r", b"<?xml", b"%PDF-"]


@pytest.mark.slow
def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    table = {"a": {"NLL": [0.2, 0.3], "DEFT": [0.4]}}
    for draw in (lambda path: gate_curves([DEFT()], path), lambda path: comparison_bars(table, path)):
        one, two = draw(tmp_path / "one"), draw(tmp_path / "two")
        assert [a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True)] == [True, True]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x\.png: the figure cannot be written"):
        gate_curves([NLL()], tmp_path / "file" / "x.png")


def test_settings_of_the_user_neither_change_the_figure_nor_are_changed(tmp_path: Path) -> None:
    (plain,) = gate_curves([DEFT()], tmp_path / "plain.svg")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        (other,) = gate_curves([DEFT()], tmp_path / "other.svg")
        assert matplotlib.rcParams["font.size"] == 30 and matplotlib.rcParams["axes.facecolor"] == "black"
    assert plain.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_pyplot_is_not_touched(tmp_path: Path) -> None:
    code = (
        "import sys; from deft_lightning.figures import gate_curves; from deft_lightning.objectives import DEFT;"
        f"gate_curves([DEFT()], {str(tmp_path / 'x')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'deft-lightning\[figures\]'"):
        gate_curves([NLL()], tmp_path / "x.png")
