"""The rows of a task: split once, by a hash of the prompt, into files that every cell reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from deft_lightning.data.records import detect_format, normalise
from deft_lightning.data.sources import read
from deft_lightning.errors import UserError
from deft_lightning.hashing import uniform
from deft_lightning.study.files import complete_folder
from deft_lightning.study.plan import digest


class Task(NamedTuple):
    """Files of a task; no prompt is in two of them, or twice in one."""

    train: Path
    validation: Path
    test: Path


def task_files(source: str, rows: int, held_out: int, root: Path) -> Task:
    """Return the files of a task, written now if they are not there.

    Args:
        source: As for `--data.source`, conversations of one prompt and one answer.
        rows: Training rows, at most.
        held_out: Validation rows, and as many test rows.
        root: Where the files go.

    Raises:
        UserError: There are too few different prompts.
    """
    folder = root / "data" / digest([source, rows, held_out])
    found = Task(*(folder / f"{name}.jsonl" for name in Task._fields))
    if folder.is_dir():
        return found
    pairs: dict[str, str] = {}
    format = None
    for where, record in read(source):
        format = format or detect_format(record, where, {})
        example = normalise(record, where, format, {})
        if example.response is None or not example.prompt:
            raise UserError(f"{where}: a study needs rows with a prompt and an answer")
        pairs.setdefault(str(example.prompt[-1]["content"]), example.response)
    if len(pairs) < 3 * held_out:
        raise UserError(f"{source}: {len(pairs)} different prompts are too few to hold out 2 x {held_out} (held_out)")
    order = sorted(pairs, key=lambda prompt: uniform("study", prompt))
    parts = (order[2 * held_out : 2 * held_out + rows], order[:held_out], order[held_out : 2 * held_out])
    with complete_folder(folder) as partial:
        for path, part in zip(found, parts, strict=True):
            lines = (json.dumps({"prompt": prompt, "completion": pairs[prompt]}) + "\n" for prompt in part)
            (partial / path.name).write_text("".join(lines), encoding="utf-8")
    return found
