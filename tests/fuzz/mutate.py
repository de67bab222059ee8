"""Changes that nobody foresees, of nested values, JSON files and bytes; the same for the same random generator."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 10**9, -(10**9), 10**20, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ",
    "x", "0", "-1", "1e400", "nan", "\x1b[2J", "\u202etxt", "a\nb", "a\0b", "../../x", "/etc/passwd", "x" * 5000,
    "{{ 7 * 7 }}", "null", [], [[]], [None], ["x"], [1, 2], [1.5], {}, {"": ""}, {"a": 1},
    {"x": None}, {"class_path": "os.system"},
)  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places in a nested value."""
    found = [at] if at else []
    if isinstance(value, dict):
        found += [path for key, inner in value.items() for path in paths(inner, (*at, key))]
    elif isinstance(value, list):
        found += [path for i, inner in enumerate(value[:20]) for path in paths(inner, (*at, i))]
    return found


def mutated(value: Any, draw: random.Random) -> Any:
    """Return a copy in which one to three places hold something odd, are gone, or are there under another name."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = paths(value)
        if not places:
            return draw.choice(ODD)
        *way, last = draw.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        what = draw.choice(("odd", "odd", "odd", "gone", "named", "deep", "twice"))
        if what == "odd":
            holder[last] = copy.deepcopy(draw.choice(ODD))
        elif what == "gone":
            del holder[last]
        elif what == "named" and isinstance(holder, dict):
            holder[draw.choice(("x", "", f"{last}_", str(last).upper()))] = holder.pop(last)
        elif what == "deep":
            for _ in range(50):
                holder[last] = [holder[last]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
    return value


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Return bytes that were flipped, cut, doubled or shuffled."""
    data = bytearray(raw)
    what = draw.choice(("flip", "flip", "cut", "head", "insert", "zeros", "double", "empty"))
    at = draw.randrange(max(len(data), 1))
    if what == "flip":
        for _ in range(draw.choice((1, 1, 5, 50))):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif what == "cut":
        del data[at:]
    elif what == "head":
        del data[: min(at, 64)]
    elif what == "insert":
        data[at:at] = draw.randbytes(draw.randrange(1, 40))
    elif what == "zeros":
        data[at : at + 32] = bytes(len(data[at : at + 32]))
    elif what == "double":
        data.extend(bytes(data))
    else:
        data.clear()
    return bytes(data)


def mutate_json(path: Path, draw: random.Random) -> None:
    """Change a JSON file: its values three times in four, else its bytes."""
    if draw.random() < 0.75:
        changed = mutated(json.loads(path.read_text(encoding="utf-8")), draw)
        path.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
