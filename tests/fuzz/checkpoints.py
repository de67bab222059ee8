"""Checkpoints that are not what a run has written."""

from __future__ import annotations

import pickletools
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mutate import mutated, mutated_bytes

KINDS = ("values", "values", "values", "values", "weights", "pickle", "members", "bytes")


def cases(seed: int, count: int, good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and files.

    Args:
        seed: Of all changes.
        count: How many.
        good: A checkpoint that is in order.
        folder: Where to write.
    """
    held = torch.load(good, map_location="cpu", weights_only=True)
    plain = {name: value for name, value in held.items() if name not in ("state_dict", "optimizer_states")}
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        kind, path = draw.choice(KINDS), folder / f"{number}.ckpt"
        if kind == "values":
            odd = mutated(plain, draw)
            torch.save({**held, **odd} if isinstance(odd, dict) and draw.random() < 0.7 else _with(held, odd), path)
        elif kind == "weights":
            torch.save({**held, "state_dict": _weights(held["state_dict"], draw)}, path)
        elif kind == "bytes":
            path.write_bytes(mutated_bytes(good.read_bytes(), draw))
        else:
            _rewrite(good, path, draw, kind)
        yield f"{number}-{kind}", path


def _with(held: dict[str, Any], odd: Any) -> Any:
    """The weights beside what is left of the rest: keys that are gone stay gone."""
    kept = {name: held[name] for name in ("state_dict", "optimizer_states")}
    return {**kept, **odd} if isinstance(odd, dict) else odd


def _weights(state: dict[str, torch.Tensor], draw: random.Random) -> Any:
    changed: dict[Any, Any] = dict(state)
    name = draw.choice(list(changed))
    odd: list[Any] = [
        None, "x", 1, torch.zeros(0), torch.zeros(3), changed[name].double(), changed[name].to(torch.int8),
        changed[name].flatten(), torch.zeros(1).expand(1 << 40), changed[name].to_sparse(), [changed[name]],
    ]  # fmt: skip
    if draw.random() < 0.3:
        changed[draw.choice(("x", 7, "model.", "optimizer.x"))] = changed.pop(name)
    else:
        changed[name] = draw.choice(odd)
    return changed


def _rewrite(good: Path, path: Path, draw: random.Random, kind: str) -> None:
    """Another archive, whose members have right checksums and wrong contents."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        names = [member.filename for member in old.infolist()]
        lost = draw.choice(names) if kind == "members" else None
        for name in names:
            content = old.read(name)
            if name == lost:
                if draw.random() < 0.5:
                    continue
                content = mutated_bytes(content, draw)
            if kind == "pickle" and name.endswith("data.pkl"):
                content = _pickle(content, draw)
            new.writestr(name, content)


def _pickle(content: bytes, draw: random.Random) -> bytes:
    """A pickle with one instruction or some bytes changed."""
    starts = [place for _, _, place in pickletools.genops(content) if place is not None]
    at = draw.choice(starts)
    changed = bytearray(content)
    changed[at] = draw.choice(b"RcioNK}]()tbs\x93\x81\x85.")
    return bytes(changed) if draw.random() < 0.7 else mutated_bytes(content, draw)
