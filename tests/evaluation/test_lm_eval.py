"""An exported folder under lm-eval says what `test` says: the same completions, and the same exact match."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, write_rows

from deft_lightning.cli import run as command_line
from deft_lightning.shipped_models import model_path

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[test]'")

GUIDE = (ROOT / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")
SECTION = GUIDE.partition("## lm-eval and vLLM\n")[2].partition("\n## ")[0]
TASK = re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.DOTALL)[0]
EXPORT, LM_EVAL = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)[0].replace("\\\n", " ").splitlines()
WORDS = "cat horse ant zebra otter giraffe ox panther wolf hyena pelican badger eel".split()


def base(folder: Path) -> str:
    """Write the model of the package with what trips another program up, and return where it is.

    Its tokenizer names an end of sequence that no turn ends with; its generation config penalises repetition.
    """
    shutil.copytree(model_path("deft:speller"), folder)
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": "<|system|>"}),
        ("generation_config.json", {"eos_token_id": 2, "repetition_penalty": 4.0}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))
    return str(folder)


def deft(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Run a verb in this process."""
    monkeypatch.setattr("sys.argv", ["deft-lightning", *shlex.split(line)])
    command_line()


def lm_eval(words: list[str]) -> tuple[float, list[str]]:
    """Run lm-eval in a process of its own and return its exact match and the completions in the order of the rows."""
    home = {"HF_HOME": str(Path.cwd() / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env={**os.environ, **home}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = Path("results").rglob("results_*.json")
    (samples,) = Path("results").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    texts = [row["filtered_resps"][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text())["results"]["spelling"]["exact_match,none"], texts


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
def test_lm_eval_says_what_test_says(
    adapters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", [{"question": word, "answer": word[::-1]} for word in WORDS])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "spelling.yaml").write_text(TASK)
    lora = "--model.lora.r 2 --model.objective NLL" if adapters else ""
    deft(
        monkeypatch,
        f"fit --model.pretrained {model} --data.source rows.jsonl --data.validation_fraction 0 --data.batch_size 4"
        f" --model.optimizer.lr 1e-3 --trainer.max_steps 6 --trainer.accelerator cpu --trainer.devices 1 {lora}",
    )
    deft(monkeypatch, EXPORT.partition(" -m deft_lightning ")[2])
    asked = "--config logs/version_0/config.yaml --ckpt_path last --data.test_source rows.jsonl"
    asked += " --model.generation.max_new_tokens 16 --data.eval_batch_size 5"
    deft(monkeypatch, f"predict {asked} --predictions.output ours.jsonl")
    ours: list[dict[str, Any]] = [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    capsys.readouterr()
    deft(monkeypatch, f"test {asked}")
    score = float(re.findall(r"test/exact_match +│ +([\d.]+)", capsys.readouterr().out)[0])

    words = [str(Path(sys.executable).with_name("lm-eval")), *shlex.split(LM_EVAL)[1:]]
    theirs, texts = lm_eval(words)
    assert texts == [row["completions"][0] for row in ours]
    assert theirs == pytest.approx(score) and 0 < theirs < 1
