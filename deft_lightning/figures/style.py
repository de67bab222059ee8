"""One look: lines apart by dash as well as colour, bars by hatch, so that figures read in grey and to the colour-blind.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) without the yellow, which white paper swallows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from deft_lightning.atomic import whole_file
from deft_lightning.errors import UserError
from deft_lightning.terminal import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")
Output = str | Path | Sequence[str | Path]

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.6)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (10, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 3)))
HATCHES = ("", "////", "...", "xxxx", "----", "\\\\\\", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHADES = "cividis_r"  # the darker the more, evenly to the eye, in grey too
DEFAULT_SUFFIXES = (".png", ".svg")
DPI = 150
LOOK = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#cccccc",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # a dash pattern shows in it
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "deft_lightning",  # the same figure is the same file
}


@contextmanager
def look() -> Iterator[None]:
    """Draw in our look whatever the user's settings are, and leave them alone.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'deft-lightning[figures]'") from None
    with matplotlib.style.context(LOOK, after_reset=True):
        yield


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws or saves under :func:`look`."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with look():
            return function(*args, **kwargs)

    return inside


def panels(count: int, width: float, height: float, *, most: int = 4, **options: Any) -> tuple[Figure, list[Any]]:
    """Return a figure and its axes, row by row.

    Args:
        count: How many panels.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        most: Panels in a row.
        options: As of ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    columns = min(count, most)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def dress(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Name a panel and its axes."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def count_steps(axes: Any) -> None:
    """Put the marks of an axis of optimizer steps at whole numbers: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))


def legend_beside(figure: Figure, axes: Any, **options: Any) -> None:
    """Put the legend to the right of a figure's only panel, which keeps its size: the figure grows."""
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **options)
    literal(figure)
    needs = legend.get_window_extent()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + needs.width / figure.dpi, max(height, needs.height / figure.dpi))


def line(index: int) -> dict[str, Any]:
    """Return colour and dashes of a line; no two of the first 49 share both."""
    turn = index // len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[(index + turn) % len(DASHES)]}


def bar(index: int) -> dict[str, Any]:
    """Return face, edge and hatch of a bar; no two of the first 49 share both."""
    from matplotlib.colors import to_rgb

    turn = index // len(COLOURS)
    colour = COLOURS[index % len(COLOURS)]
    # Pale faces, lest the points drawn over a bar be lost in it.
    face = tuple(1 - 0.45 * (1 - part) for part in to_rgb(colour))
    return {"facecolor": face, "edgecolor": colour, "hatch": HATCHES[(index + turn) % len(HATCHES)], "linewidth": 1.0}


def files(output: Output) -> list[Path]:
    """Return the files that an output stands for: as PNG and as SVG where no format is named."""
    from matplotlib.backend_bases import FigureCanvasBase

    paths = [Path(output)] if isinstance(output, (str, Path)) else [Path(part) for part in output]
    if not paths:
        raise UserError("a figure needs at least one file to be written to")
    result = []
    for path in paths:
        named = path.suffix.lower().removeprefix(".") in FigureCanvasBase.filetypes
        result += [path] if named else [path.with_name(path.name + suffix) for suffix in DEFAULT_SUFFIXES]
    return result


def literal(figure: Figure) -> None:
    """Take every text as it is: names of runs, columns and files are no formulas, and hide nothing."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if "\\mathdefault" not in text.get_text():  # not the numbers of an axis
            text.set_parse_math(False)
            text.set_text(visible(text.get_text()))


def save(figure: Figure, output: Output) -> list[Path]:
    """Write a figure, drawn under the same :func:`look`, in every format asked for and return the files.

    Raises:
        UserError: A file cannot be written.
    """
    written = files(output)
    literal(figure)
    for path in written:
        try:
            form = path.suffix.lower().removeprefix(".")
            metadata = {"Date": None} if form in ("svg", "svgz") else None
            with whole_file(path) as partial:
                figure.savefig(partial, format=form, dpi=DPI, metadata=metadata)
        except OSError as error:
            raise UserError(f"{path}: the figure cannot be written ({error.strerror or error})") from None
    return written
