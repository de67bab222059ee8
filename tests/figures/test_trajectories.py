"""Figures of runs are drawn from what TensorBoard's writer wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from deft_lightning.errors import UserError
from deft_lightning.figures import focus_trajectories, read_run, run_figure
from deft_lightning.figures.runs import find_run, labels

LATE = {"focus/mean": [0.5] * 17 + [0.3, 0.2, 0.4], "prob/mean": [0.5] * 17 + [0.9, 0.85, 0.8]}
RISING = {"focus/mean": [0.1, 0.4, 0.7, 0.8], "prob/mean": [0.05, 0.2, 0.4, 0.6]}
STRONG = {"focus/mean": [0.8, 0.85, 0.9, 0.93], "prob/mean": [0.7, 0.75, 0.8, 0.83]}


def line_values(axes: Any) -> list[list[float]]:
    return [np.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.get_lines()]


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [True, False])
def test_run_figure_shows_what_was_logged(
    noisy: bool, tmp_path: Path, log: Callable[..., Path], drawn: list[Any], texts: Callable[[Path], list[str]]
) -> None:
    tags = ["train/nll", "val/nll", "focus/mean", "prob/mean", "gate/mean", "gate/ess"]
    tags += ["nll/noisy", "gate/clean", "gate/noisy"] if noisy else []
    run = log("run", {tag: [(i + 1) / (step + 1) for step in range(5)] for i, tag in enumerate(tags)})
    steps, values = read_run(run)["prob/mean"]
    assert steps == [0, 10, 20, 30, 40] and values == pytest.approx([4, 2, 4 / 3, 1, 0.8])
    png, svg = run_figure(run, tmp_path / "out")
    assert imread(png).shape[:2] == (450, 1500)
    shown = [[line[0] for line in line_values(axes)] for axes in drawn[0].axes]
    assert shown == [[1, 2], [3, 4], [8, 9] if noisy else [5, 6]]
    assert ("noisy labels" in texts(svg)) == noisy == ("effective sample size" not in texts(svg))


@pytest.mark.slow
def test_each_run_is_a_panel_with_its_own_lines(
    tmp_path: Path, log: Callable[..., Path], drawn: list[Any], texts: Callable[[Path], list[str]]
) -> None:
    runs = {"weak": log("a", RISING), "strong": log("b", STRONG)}
    _, svg = focus_trajectories(runs, tmp_path / "out")
    focus_trajectories(runs, tmp_path / "share", progress="share")
    left, right = drawn[0].axes
    assert line_values(left) == [pytest.approx(RISING["focus/mean"]), pytest.approx(RISING["prob/mean"])]
    assert line_values(right) == [pytest.approx(STRONG["focus/mean"]), pytest.approx(STRONG["prob/mean"])]
    assert [axes.get_title("left") for axes in (left, right)] == ["weak", "strong"]
    for axes in (left, right):
        alpha, p = axes.get_lines()
        assert alpha.get_linestyle() == "-" and p.get_linestyle() == "--" and axes.get_ylim() == (0, 1.02)
        assert alpha.get_xdata().tolist() == [0, 10, 20, 30]
    assert {"weak", "strong", "focus alpha", "target probability p", "0.80", "0.60", "0.93", "0.83"} <= set(texts(svg))
    _, svg = focus_trajectories([log("late", LATE, range(1, 21))], tmp_path / "late")
    assert {"0.30", "0.85"} <= set(texts(svg)), "means from step 18 of 20 on"
    assert drawn[1].axes[0].get_lines()[0].get_xdata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, 4, 7, 60])
def test_steps_are_whole_numbers_and_points_at_the_edge_are_not_cut(
    last: int, tmp_path: Path, log: Callable[..., Path], drawn: list[Any]
) -> None:
    """Of a run of three steps matplotlib would mark 0.25 and 0.5; a point at 1 or at step 0 would be half one."""
    values = {tag: [1.0, 0.0] for tag in ("train/nll", "focus/mean", "prob/mean", "gate/mean")}
    run = log("short", values, [0, last])
    run_figure(run, tmp_path / "run.svg")
    focus_trajectories([run], tmp_path / "panels.svg")
    focus_trajectories([run], tmp_path / "together.svg", together=True)
    for figure in drawn:
        for axes in figure.axes:
            assert all(float(tick).is_integer() for tick in axes.get_xticks()), axes.get_xticks()
            lines = [one for one in axes.get_lines() if len(one.get_xdata())]
            assert lines and not any(one.get_clip_on() for one in lines)
    focus_trajectories([run], tmp_path / "share.svg", progress="share")
    assert not all(float(tick).is_integer() for tick in drawn[-1].axes[0].get_xticks()), "a share is no step"


def test_another_focus_is_another_line(tmp_path: Path, log: Callable[..., Path]) -> None:
    """In the picture itself: the dark line of alpha lies where its values say."""
    heights = []
    for name, value in (("low", 0.3), ("high", 0.8)):
        run = log(name, {"focus/mean": [value] * 3, "prob/mean": [0.05] * 3})
        image = imread(focus_trajectories([run], tmp_path / f"{name}.png")[0])[..., :3]
        column = image[:, int(0.6 * image.shape[1])].max(-1)  # black alone: p is drawn in blue
        heights.append(np.flatnonzero(column[: int(0.75 * len(column))] < 0.1).mean() / len(column))
    assert heights[0] - heights[1] > 0.25


def test_runs_of_one_label_are_a_mean_within_its_range(
    tmp_path: Path, log: Callable[..., Path], drawn: list[Any]
) -> None:
    one = log("s0", {"focus/mean": [0.0, 0.2, 0.4], "prob/mean": [0.1, 0.1, 0.1]}, [0, 10, 20])
    two = log("s1", {"focus/mean": [0.2, 0.6], "prob/mean": [0.3, 0.3]}, [5, 20])
    focus_trajectories({"weak": [one, two]}, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    alpha, p = axes.get_lines()
    # Where both have been: from 5 to 20, at the steps of either.
    assert alpha.get_xdata().tolist() == [5, 10, 20]
    assert alpha.get_ydata() == pytest.approx([(0.1 + 0.2) / 2, (0.2 + (0.2 + 0.4 / 3)) / 2, 0.5])
    assert p.get_ydata() == pytest.approx([0.2] * 3)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.1) and band[:, 1].max() == pytest.approx(0.6)


def test_one_panel_for_all_tells_runs_apart_by_marker(
    tmp_path: Path, log: Callable[..., Path], drawn: list[Any]
) -> None:
    runs = [log("weak", RISING), log("strong", STRONG)]
    focus_trajectories(runs, tmp_path / "x.png", together=True)
    (axes,) = drawn[0].axes
    found = axes.get_lines()
    assert [line.get_label() for line in found] == ["weak: alpha", "weak: p", "strong: alpha", "strong: p"]
    assert [line.get_marker() for line in found] == ["o", "o", "s", "s"]
    assert [line.get_linestyle() for line in found] == ["-", "--"] * 2


@pytest.mark.slow
def test_labels_at_the_ends_do_not_cover_each_other(tmp_path: Path, log: Callable[..., Path], drawn: list[Any]) -> None:
    for at, (alpha, p) in enumerate([(0.98, 0.98), (0.5, 0.49), (0.01, 0.02), (1.0, 0.97), (0.0, 1.0)]):
        run = log(f"r{at}", {"focus/mean": [0.5, alpha], "prob/mean": [0.5, p]})
        focus_trajectories([run], tmp_path / "x.png")
        one, two = (text.get_window_extent() for text in drawn[at].axes[0].texts)
        assert one.y0 >= two.y1 or two.y0 >= one.y1, (alpha, p)
        assert (one.y0 >= two.y1) == (alpha >= p)
        box = drawn[at].axes[0].get_window_extent()
        assert box.y0 - 8 < min(one.y0, two.y0) and max(one.y1, two.y1) < box.y1 + 8


def test_a_run_is_found_where_there_is_no_doubt(tmp_path: Path, log: Callable[..., Path]) -> None:
    only = log("logs/version_3", RISING)
    assert find_run(only) == only == find_run(tmp_path / "logs")
    log("logs/version_10", STRONG)
    with pytest.raises(UserError, match=r"holds 2 runs, name one of them: .*version_10 is the last"):
        find_run(tmp_path / "logs")
    with pytest.raises(UserError, match="no TensorBoard event files"):
        run_figure(tmp_path, tmp_path / "x.png")
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert labels(["logs/version_0", "logs/version_1"]) == ["version_0", "version_1"]
    assert labels(["a/version_0", "b/version_0"]) == ["a/version_0", "b/version_0"]
    with pytest.raises(UserError, match="named twice"):
        labels(["a", "./a"])


def test_what_a_run_lacks_is_said(tmp_path: Path, log: Callable[..., Path]) -> None:
    run = log("dft", {"prob/mean": [0.1, 0.2], "gate/mean": [0.3, 0.4]})
    with pytest.raises(UserError, match=r"did not log focus/mean: the objective of the run has no focus index"):
        focus_trajectories([run], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"did not log the scalar prob/mean\. It has: a"):
        run_figure(log("other", {"a": [1.0]}), tmp_path / "x.png")
    early, late = log("early", RISING, [0, 1, 2, 3]), log("late", RISING, [10, 11, 12, 13])
    with pytest.raises(UserError, match="no training steps in common"):
        focus_trajectories({"x": [early, late]}, tmp_path / "x.png")
    for nothing in ({}, [], {"x": []}):
        with pytest.raises(UserError, match="at least one run"):
            focus_trajectories(nothing, tmp_path / "x.png")
    assert not list(tmp_path.glob("*.png"))
