"""Tasks that reasoning_gym generates on the spot: no file, no network."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

from deft_lightning.data.sources.rows import Located
from deft_lightning.deferred import deferred
from deft_lightning.errors import UserError, did_you_mean


def read_task(source: str) -> Located:
    """Return questions and answers of a reasoning_gym task.

    Options go to the task, but for ``question`` and ``answer``: they name another field of its rows to take instead,
    for example ``metadata.word``.
    """
    import yaml

    with deferred():
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    task, _, query = source.removeprefix("reasoning_gym:").partition("?")
    if task not in DATASETS:
        raise UserError(f"{source}: reasoning_gym has no task {task!r}.{did_you_mean(task, DATASETS)} (--data.source)")
    try:
        options = {key: yaml.safe_load(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: an option has an invalid value: {error} (--data.source)") from None
    fields = {name: str(options.pop(name)).split(".") for name in ("question", "answer") if name in options}
    try:
        dataset = reasoning_gym.create_dataset(task, **{"size": 1000, "seed": 0, **options})
        size = len(dataset)
    except Exception as error:  # whatever the task's own code meets
        raise UserError(f"{source}: {task} refuses these options: {error} (--data.source)") from None
    for number in range(size):
        try:
            record = dataset[number]
        except Exception as error:
            raise UserError(f"{source}: {task} refuses these options: {error} (--data.source)") from None
        for name, path in fields.items():
            value: Any = record
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            record[name] = value
        yield f"{source}, row {number + 1}", record
