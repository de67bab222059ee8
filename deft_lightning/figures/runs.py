"""What runs logged, read from their TensorBoard files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deft_lightning.errors import UserError, did_you_mean

Scalars = dict[str, tuple[list[int], list[float]]]
EVENTS = "events.out.tfevents.*"


def find_run(path: str | Path) -> Path:
    """Return the folder with the event files of a run.

    Args:
        path: The folder itself, or one with a single run in a folder below, such as ``logs`` with ``version_0`` alone.

    Raises:
        UserError: There is no run, or there are several and none is named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; a run is a folder with TensorBoard event files")
    if any(folder.glob(EVENTS)):
        return folder
    below = sorted({file.parent for file in folder.glob(f"*/{EVENTS}")}, key=lambda run: (_number(run), run.name))
    if not below:
        raise UserError(f"{path}: has no TensorBoard event files")
    if len(below) > 1:
        raise UserError(f"{path}: holds {len(below)} runs, name one of them: {below[-1]} is the last")
    return below[0]


def _number(run: Path) -> int:
    tail = run.name.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else -1


def read_run(run: str | Path) -> Scalars:
    """Return steps and values of every scalar a run logged.

    Args:
        run: As in :func:`find_run`.

    Raises:
        UserError: There is no run.
    """
    folder = find_run(run)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # All scalars, and of what is not read here as little as may be.
    guide = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    events = EventAccumulator(str(folder), size_guidance=guide)
    events.Reload()
    return {
        tag: ([event.step for event in points], [event.value for event in points])
        for tag in events.Tags()["scalars"]
        if (points := events.Scalars(tag))
    }


def scalar(run: str | Path, tag: str, scalars: Scalars | None = None) -> tuple[list[int], list[float]]:
    """Return steps and values of one scalar.

    Args:
        run: As in :func:`find_run`.
        tag: Its name.
        scalars: What the run logged, if it has been read.

    Raises:
        UserError: There is no run, or it did not log the scalar.
    """
    logged = read_run(run) if scalars is None else scalars
    if tag not in logged:
        if tag == "focus/mean" and "prob/mean" in logged:
            raise UserError(f"{run}: did not log {tag}: the objective of the run has no focus index")
        hint = did_you_mean(tag, logged) or f" It has: {', '.join(sorted(logged)) or 'none'}"
        raise UserError(f"{run}: did not log the scalar {tag}.{hint}")
    return logged[tag]


def labels(runs: Sequence[str | Path]) -> list[str]:
    """Return for each run the shortest end of its path that no other one has.

    Raises:
        UserError: A run is named twice.
    """
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    if len(set(parts)) < len(parts):
        twice = next(run for at, run in enumerate(runs) if parts[at] in parts[:at])
        raise UserError(f"{twice}: is named twice")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
