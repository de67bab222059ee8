"""docs/guides/trl.md is true: its code runs, as it is but for the model and its device, and its names are logged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, save_tiny_llama

from deft_lightning.objectives import known_objectives

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "guides" / "trl.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-0.5B"


def on_cpu(code: str) -> str:
    return code.replace("logging_steps=5", "logging_steps=5, use_cpu=True")


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i} plus {i + 1} is", "completion": f" {2 * i + 1}"} for i in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert MODEL in blocks[0] and len(blocks) == 5
    scope: dict[str, Any] = {"__name__": "page"}
    model, logged = save_tiny_llama(tmp_path / "model", spread=0.3), set[str]()
    for block in blocks:
        exec(compile(on_cpu(block).replace(MODEL, model), "docs/guides/trl.md", "exec"), scope)
        logged |= {name for entry in scope["trainer"].state.log_history for name in entry}
    named = set(re.findall(r"`([\w/]+)`", "".join(line.split("|")[1] for line in PAGE.splitlines() if "|" in line)))
    tags = {name for name in named if "/" in name or name.endswith("nll")} - {"objective/scale"}
    assert len(tags) == 9 and tags <= logged
    assert list(tmp_path.glob("run/**/events.out.tfevents.*"))


def test_every_objective_is_in_its_table() -> None:
    names = [name for name, cls in known_objectives().items() if cls.__module__.startswith("deft_lightning.")]
    assert all(f"`{name}" in PAGE for name in names)
