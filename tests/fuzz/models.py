"""Model folders that are not what a hub would hold."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from mutate import mutate_json, mutated_bytes

FILES = (
    "config.json", "config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer_config.json",
    "generation_config.json", "model.safetensors", "chat_template.jinja",
)  # fmt: skip


def cases(seed: int, count: int, good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and model folders.

    Args:
        seed: Of all changes.
        count: How many.
        good: A model folder that is in order.
        folder: Where to write.
    """
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        name = draw.choice(FILES)
        target = folder / str(number)
        shutil.copytree(good, target)
        path = target / name
        if not path.exists() or draw.random() < 0.05:
            path.unlink(missing_ok=True)
            what = "gone"
        elif path.suffix == ".json":
            mutate_json(path, draw)
            what = "changed"
        else:
            path.write_bytes(mutated_bytes(path.read_bytes(), draw))
            what = "changed"
        yield f"{number}-{name}-{what}", target
