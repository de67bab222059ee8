"""Bars stand where the numbers say, with every seed in sight."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.errors import UserError
from deft_lightning.figures import comparison_bars
from deft_lightning.figures.bars import read_table

TABLE = {
    "strong": {"NLL": [0.4, 0.5, 0.6], "DEFT": [0.9, 1.0]},
    "weak": {"NLL": [0.8], "DEFT": [0.7, 0.7], "DFT": [0.1]},
}


def test_means_errors_and_seeds(tmp_path: Path, drawn: list[Any], texts: Callable[[Path], list[str]]) -> None:
    _, svg = comparison_bars(TABLE, tmp_path / "x", value="exact match", title="Two priors")
    (axes,) = drawn[0].axes
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == pytest.approx([0.5, 0.95, 0.8, 0.7, 0.1])
    hatches = [patch.get_hatch() for patch in axes.patches]
    assert hatches[0] == hatches[2] and hatches[1] == hatches[3] and len(set(hatches)) == 3
    segments = [part.get_segments()[0][:, 1].tolist() for part in axes.collections]
    # 0.1 / sqrt(3) and 0.0707 / sqrt(2); a single value has no error, equal ones an error of 0.
    assert segments == [
        pytest.approx([0.5 - 0.057735, 0.5 + 0.057735], abs=1e-6), pytest.approx([0.9, 1.0]), pytest.approx([0.7, 0.7]),
    ]  # fmt: skip
    points = [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert points == [[0.4, 0.5, 0.6], [0.9, 1.0], [0.8], [0.7, 0.7], [0.1]]
    for patch, line in zip(axes.patches, [ln for ln in axes.get_lines() if ln.get_marker() == "o"], strict=True):
        x = list(line.get_xdata())
        assert patch.get_x() < min(x) <= max(x) < patch.get_x() + patch.get_width() and len(set(x)) == len(x)
    boxes = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
    assert all(a[1] < b[0] for a, b in pairwise(boxes))
    assert [label for label in texts(svg) if label in ("NLL", "DEFT", "DFT")] == ["NLL", "DEFT", "DFT"]
    assert {"exact match", "Two priors", "strong", "weak"} <= set(texts(svg))


def test_bars_start_at_zero_and_may_go_below(tmp_path: Path, drawn: list[Any]) -> None:
    comparison_bars({"": {"a": [98.0], "b": [99.0]}}, tmp_path / "x.png")
    comparison_bars({"": {"a": [-3.0], "b": [1.0]}}, tmp_path / "x.png")
    assert drawn[0].axes[0].get_ylim()[0] == 0
    assert drawn[1].axes[0].get_ylim()[0] < -3


def test_a_table_comes_from_json(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"a": {"NLL": [1, 0.5], "DEFT": 0.25}}))
    assert read_table(tmp_path / "t.json") == {"a": {"NLL": [1.0, 0.5], "DEFT": [0.25]}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[1]", "must be"), ('{"a": 1}', "must be"), ('{"a": {"b": "1"}}', "b of a"), ("{", "cannot be read as JSON"),
        ('{"a": {"b": [true]}}', "b of a"), ('{"a": {"b": [NaN]}}', "not a number"), ("{}", "no values"),
        ('{"a": {"b": []}}', "no values"), ('{"a": {}}', "no values"),
    ],
)  # fmt: skip
def test_other_json_is_one_line(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=wanted):
        comparison_bars(read_table(tmp_path / "t.json"), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
