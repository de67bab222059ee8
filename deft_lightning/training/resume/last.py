"""Which checkpoint ``--ckpt_path last`` means: the newest of the newest run, by run number and step, never by date.

A run is a folder ``version_N``. Where there is none (``--checkpoint.dirpath``, no logger), checkpoints say it:
each holds a number of its run, those of the runs it goes back to, and when its run began.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from deft_lightning.annotations import Checkpoint, Settings
from deft_lightning.errors import UserError
from deft_lightning.models.checkpoint import is_complete
from deft_lightning.models.contents import KEY
from deft_lightning.training.resume.refuse import about, peek

VERSION = re.compile(r"version_(\d+)")
STEP = re.compile(r"step=(\d+)(?:-v(\d+))?")


class Saved(NamedTuple):
    """A checkpoint, as far as its order among others needs it.

    Args:
        path: File or folder.
        step: Optimizer steps behind it; None if neither its content nor its name says so.
        again: Number behind a name that was taken.
        time: When it was written, by its file system.
        run: What it says of its run.
        problem: Why it cannot be used; None if it can.
    """

    path: Path
    step: int | None
    again: int
    time: float
    run: Settings
    problem: str | None

    @property
    def place(self) -> tuple[int, int, float]:
        """Return its place among the checkpoints of a run."""
        return (-1 if self.step is None else self.step, self.again, self.time)

    @property
    def began(self) -> float:
        """Return when its run began, or when it was written if it does not say."""
        began = self.run.get("started")
        return float(began) if isinstance(began, int | float) else self.time


class Run:
    """The checkpoints of one fit, read when they are asked for.

    Args:
        folder: Where it logs, or where its checkpoints lie.
        number: N of ``version_N``, if it has one.
        paths: Its checkpoints.
    """

    def __init__(self, folder: Path, number: int | None, paths: list[Path]) -> None:
        self.folder, self.number, self.paths = folder, number, paths

    @cached_property
    def saved(self) -> list[Saved]:
        """Return its checkpoints, oldest first."""
        return sorted(map(read, self.paths), key=lambda one: one.place)

    @property
    def good(self) -> list[Saved]:
        """Return those that can be used, oldest first."""
        return [one for one in self.saved if one.problem is None]

    @property
    def began(self) -> float:
        """Return when it began."""
        return max((one.began for one in self.good or self.saved), default=0.0)

    @property
    def line(self) -> set[str]:
        """Return itself and the runs it goes back to."""
        return {str(self.folder.resolve())}.union(*(_line(one.run) for one in self.good))

    def damaged(self) -> tuple[list[Saved], list[Saved]]:
        """Return those that cannot be used: those that are newer than all others, and the rest."""
        newest = self.good[-1] if self.good else None

        def newer(one: Saved) -> bool:
            if newest is None:
                return True
            return one.time > newest.time if one.step is None else one.place > newest.place

        # What another program wrote is no run of ours, however new.
        broken = [one for one in self.saved if one.problem is not None]
        first = [one for one in broken if newer(one) and one.problem != FOREIGN]
        return first, [one for one in broken if one not in first]

    def __str__(self) -> str:
        """Return the folder and newest step."""
        step = self.good[-1].step if self.good else None
        return f"{self.folder}" if step is None else f"{self.folder} (step {step})"


class Last(NamedTuple):
    """What ``last`` means.

    Args:
        path: The checkpoint.
        older: The one that would be taken without it, if there is any.
        said: Its step, and what a user should know of the choice.
    """

    path: Path
    older: Path | None
    said: list[str]


FOREIGN = "is not a checkpoint of SFTModule"


def read(path: Path) -> Saved:
    """Read what orders a checkpoint; no tensor of it."""
    named, time = STEP.search(path.name), path.stat().st_mtime
    step, again = (int(named[1]), int(named[2] or 0)) if named else (None, 0)
    held = peek(path) if is_complete(path) else None
    if held is None:
        return Saved(path, step, again, time, {}, "cannot be read: it is damaged or not complete")
    if isinstance(inside := held.get("global_step"), int):
        step = inside
    run = about(held).get("run")
    return Saved(path, step, again, time, run if isinstance(run, dict) else {}, None if KEY in held else FOREIGN)


def line_of(held: Checkpoint, path: str | Path | None) -> list[str]:
    """Return the runs a checkpoint goes back to, its own last; of one that does not say, its folder."""
    run = about(held).get("run")
    return _line(run if isinstance(run, dict) else {}) or [str(_home(Path(str(path)).resolve())[0])]


def _line(run: Settings) -> list[str]:
    line = run.get("line")
    return [one for one in line if isinstance(one, str)] if isinstance(line, list) else []


def _home(path: Path) -> tuple[Path, int | None]:
    """Return the folder of the run a checkpoint lies in, and its number."""
    for parent in path.parents:
        if match := VERSION.fullmatch(parent.name):
            return parent, int(match[1])
    folder = path.parent
    return (folder.parent if folder.name == "checkpoints" else folder), None


def _files(roots: Iterable[Path]) -> Iterator[Path]:
    """Return checkpoints under some folders, each once, under its own name rather than that of a link."""
    by_target: dict[Path, Path] = {}
    for root in roots:
        for path in root.rglob("*.ckpt"):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if not hidden and path.exists() and (path.resolve() not in by_target or not path.is_symlink()):
                by_target[path.resolve()] = path
    yield from sorted(by_target.values())


def runs_under(roots: Iterable[Path]) -> list[Run]:
    """Return the runs whose checkpoints lie under some folders, newest first.

    Numbered runs beside each other are ordered by number; others, which no number orders, by when they began.
    """
    homes: dict[tuple[Path, int | None], list[Path]] = {}
    for path in _files(roots):
        homes.setdefault(_home(path.absolute()), []).append(path)
    families: dict[Any, list[Run]] = {}
    for (folder, number), paths in homes.items():
        if number is not None:
            families.setdefault(folder.parent, []).append(Run(folder, number, paths))
        else:
            families |= {(folder, name): [run] for name, run in _apart(folder, paths).items()}
    for family in families.values():
        family.sort(key=lambda run: run.number or 0, reverse=True)
    return [run for family in sorted(families.values(), key=lambda f: f[0].began, reverse=True) for run in family]


def _apart(folder: Path, paths: list[Path]) -> dict[str, Run]:
    """Tell the runs apart whose checkpoints share a folder."""
    read_once = [read(path) for path in paths]
    runs: dict[str, Run] = {}
    for one in read_once:
        if one.problem is None:
            runs.setdefault(str(one.run.get("id")), Run(folder, None, [])).paths.append(one.path)
    for one in read_once:
        if one.problem is not None:  # it says nothing of its run: that which went on when it was written
            before = [run for run in runs.values() if run.began <= one.time]
            owner = max(before, key=lambda run: run.began, default=None)
            (owner or runs.setdefault("None", Run(folder, None, []))).paths.append(one.path)
            runs = {name: Run(folder, None, run.paths) for name, run in runs.items()}
    return runs


def last_checkpoint(roots: Iterable[Path], named: Path | None = None) -> Last | None:
    """Return the newest checkpoint of the newest run under some folders, or None if there is none.

    Args:
        roots: Where to look.
        named: Folder of a run: then of that run, or of the newest that goes back to it.

    Raises:
        UserError: The newest is damaged; the message names it, and the one before.
    """
    runs = runs_under(roots)
    if named is not None:
        folder = str(named.resolve())
        own = [
            run for run in runs if folder in {str(run.folder.resolve()), *(one.run.get("folder") for one in run.good)}
        ]
        known = {folder, *(str(one.run.get("id")) for run in own for one in run.good if "id" in one.run)}
        runs = [run for run in runs if run in own or known & run.line]
    if not runs:
        return None
    if not any(run.good or run.damaged()[0] for run in runs):
        return None
    newest = next(run for run in runs if run.good or run.damaged()[0])
    newer, older = newest.damaged()
    usable = [one.path for run in runs for one in reversed(run.good)]
    if newer:
        way = f"; the newest before it: --ckpt_path {usable[0]}" if usable else ""
        raise UserError(f"--ckpt_path last: {newer[-1].path} is the newest, and {newer[-1].problem}{way}")
    best = newest.good[-1]
    notes = [] if best.step is None else [f"step {best.step}"]
    notes += [f"skipped {one.path}: {one.problem}" for one in older[-1:]]
    other = next((run for run in runs if run is not newest and run.good and not run.line & newest.line), None)
    if other is not None:
        config = other.folder / "config.yaml"
        way = f"--config {config}" if config.is_file() else f"--ckpt_path {other.good[-1].path}"
        notes.append(f"another run lies there too, {other}: name it with {way}")
    return Last(best.path, usable[1] if len(usable) > 1 else None, notes)


def newest_checkpoint(root: str | Path) -> Path | None:
    """Return the newest checkpoint of the newest run under a folder, or None.

    Raises:
        UserError: The newest is damaged.
    """
    last = last_checkpoint([Path(root)])
    return None if last is None else last.path


def run_folder(config: str | Path) -> Path | None:
    """Return the folder of the run that has written a configuration, or None if none has."""
    path = Path(config).expanduser()
    folder = path.absolute().parent
    ours = VERSION.fullmatch(folder.name) is not None or (folder / "checkpoints").is_dir()
    return folder if path.name == "config.yaml" and path.is_file() and ours else None
