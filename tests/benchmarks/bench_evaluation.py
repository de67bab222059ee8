"""What grading and seeded sampling cost, how often a batch changes a completion, and how far the grader is right.

    python tests/benchmarks/bench_evaluation.py --data DIR --model DIR
        [--output docs/evidence/data/bench_evaluation.json]

DIR holds gsm8k_test.jsonl, svamp_test.jsonl and math500_test.jsonl; the model is any small causal language model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))

import torch
from by_hand import DIFFERENT, SAME
from rewrites import LATEX_RIGHT, LATEX_WRONG, NUMBER_RIGHT, NUMBER_WRONG, Graded, rewritten

from deft_lightning.data.examples import Prompt
from deft_lightning.data.loading.collate import PromptCollator
from deft_lightning.evaluation import BENCHMARKS, Generation, complete
from deft_lightning.evaluation.benchmarks import final_answer
from deft_lightning.evaluation.graders.algebra import Algebra
from deft_lightning.evaluation.sampling import gumbel


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def agreement(data: Path) -> dict[str, Any]:
    """Verdicts of the grader against those known by hand and by rule."""
    gsm8k, svamp, math500 = (read_rows(data / f"{name}_test.jsonl") for name in ("gsm8k", "svamp", "math500"))
    golds = [final_answer(row["answer"]).replace(",", "") for row in gsm8k]
    latex = [final_answer(row["answer"]) for row in math500]
    numbers = NUMBER_RIGHT, NUMBER_WRONG
    sets = {
        "gsm8k": rewritten([gold for gold in golds if int(gold) > 0], *numbers)
        + [Graded(gold, row["answer"], True, "official") for gold, row in zip(golds, gsm8k, strict=True)],
        "svamp": rewritten([final_answer(row["Answer"]) for row in svamp], *numbers),
        "math500": rewritten(latex, LATEX_RIGHT, LATEX_WRONG)
        + [Graded(gold, row["solution"], True, "official") for gold, row in zip(latex, math500, strict=True)],
        "by hand": [
            Graded(gold, f"\\boxed{{{said}}}", right, "")
            for pairs, right in ((SAME, True), (DIFFERENT, False))
            for gold, said in pairs
        ],
    }
    found = {}
    for name, graded in sets.items():
        grader = BENCHMARKS[name if name in BENCHMARKS else "math500"].grader
        arguments = [one.completion for one in graded], [one.gold for one in graded], [{}] * len(graded)
        scores, seconds = timed(lambda *lists: list(map(*lists)), grader, *arguments)
        agree = sum((score["correct"] == 1) == one.right for score, one in zip(scores, graded, strict=True))
        found[name] = {
            "graded": len(graded),
            "right by label": sum(one.right for one in graded),
            "agreement": agree / len(graded),
            "milliseconds each": 1000 * seconds / len(graded),
        }
    return found


def hangs() -> dict[str, float]:
    """Seconds until the grader gives up on an answer, and until the next one is graded, with the default limits."""
    made = Algebra()
    assert made.same("x+1", "1+x")
    found = {}
    for answer in ("9^{9^{9^{9}}}", r"\sum_{k=1}^{10^{12}} k!", "(x+1)^{100000}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[answer] = timed(made.same, "5", answer)[1]
        found[f"{answer}, next"] = timed(made.same, "x+1", "1+x")[1]
    made.close()
    return found


def flips(folder: str, data: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """Share of completions that another batch size changes, by dtype; the prompts are padded as they come."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [row["question"][:300] for row in read_rows(data / "gsm8k_test.jsonl")[:count]]
    prompts = [Prompt(str(i), tokenizer(text).input_ids, text, None) for i, text in enumerate(questions)]
    collate = PromptCollator(tokenizer.pad_token_id or 0)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for temperature in (0.0, 1.0):
            settings = Generation(max_new_tokens=new_tokens, temperature=temperature)

            def texts(size: int, model: Any = model, settings: Generation = settings) -> list[str]:
                parts = [prompts[i : i + size] for i in range(0, count, size)]
                made = [complete(model, tokenizer, collate(part), settings, [tokenizer.eos_token_id]) for part in parts]
                return [samples[0].text for part in made for samples in part]

            (alone, slow), (together, fast) = timed(texts, 1), timed(texts, 16)
            changed = sum(a != b for a, b in zip(alone, together, strict=True))
            found[f"{str(dtype).removeprefix('torch.')}, temperature {temperature:g}"] = {
                "completions": count, "changed": changed, "seconds, batch 1": slow, "seconds, batch 16": fast,
            }  # fmt: skip
    return found


def noise() -> dict[str, float]:
    """Milliseconds of the sampling noise for a row and a token."""
    found = {}
    for size in (32_000, 151_936):
        keys = torch.arange(8)
        gumbel(keys, 0, size)
        found[f"vocabulary {size}"] = min(timed(gumbel, keys, 1, size)[1] for _ in range(10)) * 1000 / len(keys)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "agreement": lambda: agreement(options.data),
        "seconds until the grader gives up": hangs,
        "sampling noise, ms a row and token": noise,
        "batch 16 against batch 1": lambda: flips(options.model, options.data, options.prompts, options.new_tokens),
    }
    for name, part in parts.items():
        found[name] = part()
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
