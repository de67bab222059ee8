"""The paper's 21 pairs of model and task: the files that make one, and which pairs the authors have a script for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper"
TASKS = ("math", "medical", "figfont")
MODELS = (
    "qwen2.5-math-1.5b", "qwen2.5-math-7b", "qwen2.5-1.5b", "qwen2.5-7b", "llama-3.1-8b", "llama-3.2-3b",
    "deepseek-math-7b",
)  # fmt: skip
PAIRS = [f"{task}-{model}" for task in TASKS for model in MODELS]
AUTHORS = {
    "math-qwen2.5-math-1.5b", "math-qwen2.5-math-7b", "math-llama-3.1-8b", "math-deepseek-math-7b",
    "medical-qwen2.5-math-7b", "medical-qwen2.5-1.5b", "medical-llama-3.1-8b", "medical-llama-3.2-3b",
    "figfont-qwen2.5-1.5b", "figfont-qwen2.5-7b", "figfont-llama-3.1-8b", "figfont-llama-3.2-3b",
}  # fmt: skip


def parts(pair: str) -> tuple[str, str]:
    """Return the task and the model that a pair's name says."""
    task, _, model = pair.partition("-")
    return task, model


def layers(pair: str) -> list[Path]:
    """Return the files of a pair, in the order of their ``--config``."""
    task, model = parts(pair)
    family = next(name for name in ("qwen", "llama", "deepseek") if model.startswith(name))
    extra = PAPER / "pair" / f"{task}-{family}.yaml"
    return [PAPER / "model" / f"{model}.yaml", PAPER / "task" / f"{task}.yaml", *([extra] if extra.exists() else [])]


def options(pair: str) -> list[str]:
    """Return the options that name the files of a pair."""
    return [word for path in layers(pair) for word in ("--config", str(path))]


def written(pair: str) -> dict[str, Any]:
    """Return what the files of a pair state, one laid over the other."""
    merged: dict[str, Any] = {}
    for path in layers(pair):
        _lay(merged, yaml.safe_load(path.read_text(encoding="utf-8")))
    return merged


def _lay(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay(below[key], value)
        else:
            below[key] = value


def pairs_table() -> str:
    """Return the table of docs/evidence/paper.md."""
    lines = ["| model | " + " | ".join(TASKS) + " |", "| --- " * (1 + len(TASKS)) + "|"]
    for model in MODELS:
        cells = []
        for task in TASKS:
            extra = [f"with `pair/{path.stem}`" for path in layers(f"{task}-{model}")[2:]]
            cells.append(", ".join([*(["authors"] if f"{task}-{model}" in AUTHORS else []), *extra]) or "-")
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(pairs_table())
