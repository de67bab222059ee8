"""Kill a verb at random moments, then let it run to its end: as if nothing had been, and nothing left.

    python tests/kill_verbs.py export|study [--kills 20] [--seed 0]

A verb runs once alone, which says how long it takes and what it writes. Then it is started again and again in a
process group of its own, each ended by SIGKILL at a moment drawn from the seed. After each kill what stands under a
final name must be whole; after a last run that is left alone everything must equal what the first one wrote, and no
half-written file, no temporary folder and no process may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_runs import ROOT, environment, left
from safetensors.torch import load_file
from worlds import largest_difference

STUDY = """
regimes:
  strong:
    source: &words reasoning_gym:spell_backward?size=2000&question=metadata.word
    base: {source: *words, steps: 10}
    noise: [0.5]
    headline: [0.5]
    rate: 0.003
    steps: 8
    max_new_tokens: 8
architecture: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
objectives: [NLL, DEFT]
rows: 120
held_out: 20
seeds: 1
headline_seeds: 2
"""


def run(arguments: list[str], root: Path, kill_after: float | None = None, writing: bool = False) -> tuple[float, int]:
    """Run a command line in a group of its own; return its seconds and exit status, -9 if it was killed.

    Args:
        arguments: Of the command line.
        root: Working folder.
        kill_after: Seconds until it is killed; None lets it end.
        writing: Count them from the moment at which something half-written is there.
    """
    begun = time.monotonic()
    temporary = root / "tmp"
    temporary.mkdir(exist_ok=True)
    with (root / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deft_lightning", *arguments], cwd=root, stdout=log, stderr=subprocess.STDOUT,
            env={**environment(root), "TMPDIR": str(temporary)}, start_new_session=True,
        )  # fmt: skip
    while writing and process.poll() is None and not half_written(root):
        time.sleep(0.001)
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for _ in range(200):
            if not left(process.pid):
                break
            time.sleep(0.05)
        assert not left(process.pid), "a process is left"
    return time.monotonic() - begun, code


def exported_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported folder."""
    return load_file(folder / "model.safetensors")


def half_written(root: Path) -> list[str]:
    """What stands under a name that is not final, or in the folder of temporary files."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):  # which passes over what vanishes meanwhile
        found += [Path(folder, name) for name in (*folders, *files) if name.startswith(".")]
    temporary = [path for path in (root / "tmp").iterdir() if not path.name.startswith("torchinductor")]
    return sorted({str(path.relative_to(root)) for path in (*found, *temporary)})


def export(root: Path) -> tuple[list[str], Path, Callable[[Path], Any]]:
    """A checkpoint of some MB, exported."""
    rows = ({"question": f"{i} + 1", "answer": str(i + 1)} for i in range(40))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = '{"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}'
    _, code = run(
        ["fit", "--data.source", "rows.jsonl", "--data.tokenizer_size", "0", "--model.architecture", shape,
         "--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--after_fit.export", "false",
         "--trainer.default_root_dir", str(root / "logs")], root,
    )  # fmt: skip
    assert code == 0, (root / "log").read_text()[-2000:]
    checkpoint = next((root / "logs").rglob("step=1.ckpt"))
    return ["export", "--ckpt_path", str(checkpoint), "--output", str(root / "out")], root / "out", exported_weights


def study_line(root: Path) -> tuple[list[str], Path, Callable[[Path], Any]]:
    """Six short runs."""
    (root / "study.yaml").write_text(STUDY)
    arguments = ["study", "--config", "study.yaml", "--output", str(root / "out"), "--workers", "2"]
    return arguments, root / "out", numbers_in


def numbers_in(folder: Path) -> dict[str, Any]:
    """What a study has found; how long it took and which machine it ran on may differ."""
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("grid", "tuned", "ranking_shared", "ranking_tuned", "margins_shared")}


def distance_of(verb: str, one: Any, other: Any) -> float:
    """Largest difference of a weight; of reports, 0 if they are equal and 1 if not."""
    return largest_difference(one, other) if verb == "export" else float(one != other)


def kill(verb: str, root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Return what became of a verb that was killed so often."""
    draw = random.Random(seed)
    arguments, target, read = {"export": export, "study": study_line}[verb](root)
    seconds, code = run(arguments, root)
    assert code == 0, (root / "log").read_text()[-2000:]
    whole = read(target)
    shutil.rmtree(target)
    done, half, ended = 0, 0, 0
    while done < kills:
        # Every second one while something is being written: an export does so for a moment at its end.
        writing = (done + ended) % 2 == 1
        _, code = run(arguments, root, draw.uniform(0.0, 0.2 if writing else seconds), writing)
        done, ended = done + (code == -signal.SIGKILL), ended + (code == 0)
        assert code in (0, -signal.SIGKILL), (root / "log").read_text()[-2000:]
        half += bool(half_written(root))
        for path in target.rglob("*.json") if verb == "study" else ():
            if not path.name.startswith("."):
                json.loads(path.read_text(encoding="utf-8"))  # each is whole
        # What has come to its end begins again; what a study has not ended goes on.
        if target.exists() and (verb == "export" or code == 0):
            assert distance_of(verb, read(target), whole) == 0.0, "what stands under its final name is not whole"
            shutil.rmtree(target)
    _, code = run(arguments, root)
    assert code == 0, (root / "log").read_text()[-2000:]
    again = read(target)
    return {
        "verb": verb, "seconds of a run": round(seconds, 1), "runs killed": done, "kills that left something": half,
        "runs that ended": ended,
        "largest difference of a weight" if verb == "export" else "reports differ": distance_of(verb, again, whole),
        "left after the last run": half_written(root),
    }  # fmt: skip


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["export", "study"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill(args.verb, Path(folder), args.kills, args.seed), indent=2))


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
