"""What figures hold, caught on the way to their files."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from deft_lightning.figures import bars, curves, scatter, style, trajectories

Log = Mapping[str, Sequence[float]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures in the order in which they are saved."""
    kept: list[Any] = []

    def save(figure: Any, output: style.Output) -> list[Path]:
        kept.append(figure)
        return style.save(figure, output)

    for module in (bars, curves, scatter, trajectories):
        monkeypatch.setattr(module, "save", save)
    return kept


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Path]:
    """Write a run with TensorBoard's own writer: the values of each tag, ten steps apart or at the steps given."""

    def write(name: str, values: Log, steps: Sequence[int] | None = None) -> Path:
        writer = SummaryWriter(str(tmp_path / name))
        for tag, row in values.items():
            for at, value in zip(steps or range(0, 10 * len(row), 10), row, strict=True):
                writer.add_scalar(tag, value, at)
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture
def texts() -> Callable[[Path], list[str]]:
    """Read the texts of an SVG."""

    def read(path: Path) -> list[str]:
        found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
        return ["".join(element.itertext()).strip() for element in found]

    return read
