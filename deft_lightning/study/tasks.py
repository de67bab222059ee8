"""The rows of a task: split once, by a hash, into files that every cell reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.sources.read import read
from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform
from deft_lightning.study.files import complete_folder, digest, files_of
from deft_lightning.study.plan import Cell


class Task(NamedTuple):
    """Files of a task; what it is split by is in one of them alone, and a prompt is never there twice."""

    train: Path
    validation: Path
    test: Path


def task_files(
    source: str,
    rows: int,
    held_out: int,
    root: Path,
    split_by: Literal["prompt", "answer"] = "prompt",
    max_characters: int | None = None,
) -> Task:
    """Return the files of a task, written now if they are not there.

    Args:
        source: As for `--data.source`, conversations of one prompt and one answer.
        rows: Training rows, at most.
        held_out: Prompts, or answers, that are held out for validation, and as many for the test.
        root: Where the files go.
        split_by: What is held out: a prompt, or an answer with all prompts that ask for it.
        max_characters: Of a prompt and its answer together; longer ones are left out.

    Raises:
        UserError: There are too few different prompts, or rows of another form.
    """
    about = [source, rows, held_out, *([split_by] if split_by != "prompt" else []), *filter(None, [files_of(source)])]
    if max_characters is not None:
        about.append({"max_characters": max_characters})
    folder = root / "data" / digest(about)
    task = Task(*(folder / f"{name}.jsonl" for name in Task._fields))
    if folder.is_dir():
        return task
    pairs: dict[str, str] = {}
    format = None
    for where, record in read(source):
        format = format or detect_format(record, where, {})
        example = normalise(record, where, format, {})
        if example.response is None or len(example.prompt) != 1:
            raise UserError(f"{where}: a study needs rows of one question and one answer, without a system turn")
        prompt = str(example.prompt[-1]["content"])
        if max_characters is None or len(prompt) + len(example.response) <= max_characters:
            pairs.setdefault(prompt, example.response)
    units: dict[str, list[str]] = {}
    for prompt, answer in pairs.items():
        units.setdefault(prompt if split_by == "prompt" else answer, []).append(prompt)
    if len(units) < 3 * held_out:
        raise UserError(
            f"{source}: {len(units)} different {split_by}s are too few to hold out 2 x {held_out} (held_out)"
        )
    order = sorted(units, key=lambda unit: uniform("study", unit))
    kept = [prompt for unit in order[2 * held_out :] for prompt in units[unit]][:rows]
    # One prompt of each held-out answer.
    parts = (kept, [units[unit][0] for unit in order[:held_out]], [units[u][0] for u in order[held_out : 2 * held_out]])
    with complete_folder(folder) as partial:
        for path, part in zip(task, parts, strict=True):
            lines = (json.dumps({"prompt": prompt, "completion": pairs[prompt]}) + "\n" for prompt in part)
            (partial / path.name).write_text("".join(lines), encoding="utf-8")
    return task


def rows_of(cell: Cell, root: Path) -> Task:
    """Return the files of a cell's task."""
    setting = cell.setting
    return task_files(setting.source, cell.rows, cell.held_out, root, setting.split_by, setting.max_characters)


def base_rows(cell: Cell, root: Path) -> Task | None:
    """Return the files of the task that a cell's base is trained on; None without one."""
    setting = cell.setting
    if setting.base is None:
        return None
    sizes = (cell.base_rows, cell.held_out)
    return task_files(setting.base.source, *sizes, root, setting.split_by, setting.max_characters)


def rows_apart(cell: Cell, root: Path) -> Path | None:
    """Return the file of rows of another kind, on which forgetting is measured; None where it is not."""
    setting = cell.setting
    if setting.forgetting is None:
        return None
    return task_files(setting.forgetting, 1, cell.held_out, root, max_characters=setting.max_characters).test
