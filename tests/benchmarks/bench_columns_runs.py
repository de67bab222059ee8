"""Whether runs end alike with columns of the head's gradient left out and without: plain NLL of held-out rows.

    python tests/benchmarks/bench_columns_runs.py [--seeds 0 1 2] [--model FOLDER_OR_HUB_ID --data ROWS.jsonl]
        [--cases quickstart scratch pretrained] [--output docs/evidence/data/bench_columns_runs.json]

Every case is `fit` with `--model.head_sparsity off` and with 2^-11, the tolerance of `auto`, from the same seeds. A
seed decides weights, order and noise. `quickstart` is configs/quickstart.yaml. `scratch` is configs/from_scratch.yaml,
200 steps. `pretrained` needs --model and --data: adapters, 10 steps of 4 rows of at most 128 tokens. What the tolerance
does is to be seen next to what another seed does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2.0**-11
QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false",
         "--trainer.enable_progress_bar", "false", "--after_fit.export", "false"]  # fmt: skip


def words_of(case: str, model: str, data: str) -> list[str]:
    """Return the command line of a case."""
    if case == "quickstart":
        return ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--after_fit.test", "false",
                "--after_fit.compare", "false"]  # fmt: skip
    if case == "scratch":
        return ["--config", str(ROOT / "configs" / "from_scratch.yaml"), "--trainer.max_steps", "200",
                "--trainer.val_check_interval", "200", "--after_fit.test", "false"]  # fmt: skip
    return ["--model.pretrained", model, "--model.lora.r", "16", "--model.dtype", "float32", "--trainer.precision",
            "32-true", "--data.source", f"{data}?limit=200", "--data.validation_fraction", "0.1",
            "--data.max_length", "128", "--data.batch_size", "4", "--trainer.max_steps", "10",
            "--trainer.val_check_interval", "10"]  # fmt: skip


def end_of(words: list[str], seed: int, sparsity: str) -> dict[str, float]:
    """Train; return the last plain NLL of the validation rows, and the mean share of columns that was kept."""
    from deft_lightning.cli.main import DeftCLI

    with tempfile.TemporaryDirectory() as folder:
        more = ["--seed_everything", str(seed), "--model.head_sparsity", sparsity]
        cli = DeftCLI(args=["fit", *words, *QUIET, *more, "--trainer.default_root_dir", folder])
        found = cli.trainer.callback_metrics
        return {"nll": float(found["val/nll"]), "kept": float(found.get("head/kept_columns", 1.0))}


def main() -> None:
    """Run the cases; print a table on standard error, a line for each as it ends, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", default=["quickstart", "scratch"])
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print("| run | off | left out | kept | largest difference | seeds apart |\n|" + "---|" * 6, file=sys.stderr)
    for case in args.cases:
        words = words_of(case, args.model, args.data)
        runs = {
            sparsity: [end_of(words, seed, sparsity) for seed in args.seeds] for sparsity in ("off", str(TOLERANCE))
        }
        off, left_out = runs["off"], runs[str(TOLERANCE)]
        apart = [abs(a["nll"] - b["nll"]) for a, b in zip(off, left_out, strict=True)]
        spread = max(run["nll"] for run in off) - min(run["nll"] for run in off)
        results[case] = {"off": off, "left out": left_out, "largest difference": max(apart), "seeds apart": spread}
        cells = [" ".join(f"{run['nll']:.4f}" for run in found) for found in (off, left_out)]
        kept = statistics.mean(run["kept"] for run in left_out)
        print(f"| {case} | {' | '.join(cells)} | {kept:.2f} | {max(apart):.4f} | {spread:.4f} |", file=sys.stderr)
        if args.output:
            args.output.write_text(json.dumps({"seeds": args.seeds, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
