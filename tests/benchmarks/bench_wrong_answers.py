"""How well the audit finds real wrong answers: those that a model has given and a rule has marked.

    python tests/benchmarks/bench_wrong_answers.py [--other DIR]
        [--output docs/evidence/data/bench_wrong_answers.json]

A small model learns a task for a short while. It answers fresh prompts with samples at temperature 1, and a rule marks
the wrong ones: rows of a file with a column `wrong`. ``probe --audit --truth wrong`` then ranks the file with (a) a
model that has learnt the task for longer, from other weights, (b) the model that gave the answers, (c) that model after
three epochs on these answers, (d) a model of something else (``--other``). Told are the AUROC of the ranking and the
share of wrong answers among its first k.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.sources.read import read
from deft_lightning.evaluation import Generation, exact_match
from deft_lightning.objectives import NLL

HELD_OUT = 2000  # prompts that are answered, none of them trained on
SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Task:
    """Where questions come from, what is right, and how long the two models learn."""

    source: str
    rule: Callable[[str], str]
    short: int
    long: int


def result(expression: str) -> str:
    """Value of a sum or difference of two numbers."""
    left, sign, right = expression.split()
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


TASKS = {
    "spelling": Task(
        "reasoning_gym:spell_backward?size=20000&question=metadata.word&max_word_len=7",
        lambda word: word[::-1], 400, 1600,
    ),
    "sums": Task(
        "reasoning_gym:chain_sum?size=20000&max_terms=2&max_digits=2&question=metadata.expression", result, 800, 3200
    ),
}  # fmt: skip


def write_lines_of(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def silent(folder: Path, **options: Any) -> Trainer:
    """Return a quiet trainer."""
    return Trainer(
        accelerator="cpu", devices=1, logger=False, default_root_dir=str(folder), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def learn(source: str, folder: Path, steps: int, seed: int, rate: float = 2e-3, start: str | None = None) -> str:
    """Train on a file, from scratch or a folder; return the folder it is exported to."""
    torch.manual_seed(seed)
    data = InstructionDataModule(
        source, validation_fraction=0, tokenizer_size=0, tokenizer=start, batch_size=64, seed=seed, cache=False
    )
    module = SFTModule(
        NLL(), pretrained=start, architecture=SHAPE,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    )  # fmt: skip
    run = silent(folder, max_steps=steps, gradient_clip_val=1.0)
    run.fit(module, datamodule=data)
    return str(run.export(module, output=str(folder), datamodule=data))


def answers(model: str, prompts: str, folder: Path, temperature: float) -> dict[str, str]:
    """Return what a model says to each prompt, by id; answers that do not end are left out."""
    module = SFTModule(pretrained=model, generation=Generation(max_new_tokens=24, temperature=temperature))
    data = InstructionDataModule(
        prompts, validation_fraction=0, test_source=prompts, tokenizer=model, eval_batch_size=100, cache=False
    )
    found: dict[str, str] = {}
    run = silent(folder)
    for batch in run.predict(module, datamodule=data) or []:
        found |= {record["id"]: record["completions"][0] for record in batch}  # type: ignore[call-overload]
    return {id: text for id, text in found.items() if text.strip()}


def audited(model: str, rows: str, folder: Path, plain: bool = False) -> dict[str, Any]:
    """Return how well ``probe --audit --truth wrong`` finds the wrong rows with a model."""
    data = InstructionDataModule(
        rows,
        validation_fraction=0,
        tokenizer=model,
        batch_size=100,
        cache=False,
        chat_template=PLAIN if plain else None,
    )
    run = silent(folder)
    report = run.probe(
        SFTModule(pretrained=model), data, truth="wrong", audit=str(folder / "audit.jsonl"), output=str(folder)
    )
    order = [json.loads(line)["noisy"] for line in (folder / "audit.jsonl").read_text().splitlines()]
    wrong = sum(order)
    first = {str(k): sum(order[:k]) / k for k in (10, 50, 100, 200, wrong)}
    return {
        "auroc": report["truth"]["auroc"], "precision": first, "scores": report["truth"]["scores"],
        "accuracy": report["means"]["accuracy"],
        "p": report["means"]["p"], "prior": report["prior"]["kind"],
    }  # fmt: skip


def measure(task: Task, other: str | None, folder: Path, scale: float) -> dict[str, Any]:
    """Run one task."""
    questions = sorted({record["question"] for _, record in read(task.source)})
    random.Random(0).shuffle(questions)
    rows = [{"id": f"q{i}", "question": q, "answer": task.rule(q)} for i, q in enumerate(questions)]
    gold = {row["id"]: row for row in rows[:HELD_OUT]}
    prompts, train = (
        write_lines_of(folder / "prompts.jsonl", rows[:HELD_OUT]),
        write_lines_of(folder / "train.jsonl", rows[HELD_OUT:]),
    )
    steps = {"writer": round(task.short * scale), "longer": round(task.long * scale)}
    models = {name: learn(train, folder / name, n, seed) for seed, (name, n) in enumerate(steps.items())}
    said = answers(models["writer"], prompts, folder, 1.0)
    marked = [
        {**gold[id], "answer": text, "wrong": not exact_match(text, gold[id]["answer"])} for id, text in said.items()
    ]
    graded = write_lines_of(folder / "graded.jsonl", marked)
    models["writer, trained on them"] = learn(
        graded, folder / "again", round(3 * len(marked) / 64), 2, 5e-4, models["writer"]
    )
    found: dict[str, Any] = {
        "questions": len(questions), "steps": steps, "answers": len(marked),
        "wrong": sum(row["wrong"] for row in marked), "auditors": {},
    }  # fmt: skip
    for name, model in models.items():
        greedy = answers(model, prompts, folder, 0.0)
        right = sum(exact_match(text, gold[id]["answer"]) for id, text in greedy.items()) / HELD_OUT
        found["auditors"][name] = {"exact_match": right, **audited(model, graded, folder)}
    if other is not None:
        found["auditors"]["of something else"] = audited(other, graded, folder, plain=True)
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS], nargs="+", default=[*TASKS])
    parser.add_argument("--other", help="folder of a small causal model that knows nothing of the task")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the training steps")
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    for name in options.task:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(TASKS[name], options.other, Path(folder), options.scale)
    for name, task in found.items():
        print(f"\n{name}: {task['wrong']} of {task['answers']} answers wrong; steps {task['steps']}")
        for who, row in task["auditors"].items():
            first = "  ".join(f"{k}: {share:.2f}" for k, share in row["precision"].items())
            own = f", solves {row['exact_match']:.2f}" if "exact_match" in row else ""
            print(f"  {who:26} AUROC {row['auroc']:.3f}   wrong among the first {first}   (mean p {row['p']:.2f}{own})")
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
