"""The head with columns of the gradient left out, on real hidden states and on random ones, in turn in one process.

    python tests/benchmarks/bench_columns.py --model FOLDER_OR_HUB_ID --data ROWS.jsonl [--tokens 512 2048]
        [--rounds 5] [--output docs/evidence/data/bench_columns.json]

Hidden states are those of the answers' tokens, of rows with `question` and `answer` behind the model's chat template.
Random ones give flat predictions, of which nothing can be left out. A round runs the three matrix products, the head
as a whole and the head with columns left out, one after the other; times are CPU seconds of the process, and ratios
are to the products of the same round. Errors are distances of dX and dW to float64 gradients of a dense formula, as
shares of their norms; what rounding to bfloat16 costs is the error of float64 factors rounded once, multiplied exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deft_lightning.functional import LossFn
from deft_lightning.objectives import DEFT, NLL
from deft_lightning.ops import ColumnSparsity, linear_loss

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden, weight, targets


def real(model: str, data: Path, count: int) -> Inputs:
    """Return hidden states and targets of the answers of rows, and the weight of the head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    hidden: list[Tensor] = []
    targets: list[Tensor] = []
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            asked = [{"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                states = causal.base_model(torch.tensor([prompt + answer])).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            targets.append(torch.tensor(answer))
            if sum(map(len, targets)) >= count:
                break
    head = causal.get_output_embeddings().weight.detach().clone()
    return torch.cat(hidden)[:count].clone(), head, torch.cat(targets)[:count]


def flat(like: Inputs) -> Inputs:
    """Return random hidden states and weights of the same shapes."""
    hidden, weight, targets = like
    return torch.randn_like(hidden) / hidden.shape[1] ** 0.5, torch.randn_like(weight), targets


def head(inputs: Inputs, objective: LossFn, sparsity: ColumnSparsity | None) -> tuple[float, Tensor, Tensor]:
    """Return the CPU seconds of forward and backward, and both gradients."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    start = time.process_time()
    loss, _ = linear_loss(hidden, weight, inputs[2], objective, ignore_index=None, sparsity=sparsity)
    loss.backward()
    seconds = time.process_time() - start
    assert hidden.grad is not None and weight.grad is not None
    return seconds, hidden.grad, weight.grad


def products(inputs: Inputs) -> float:
    """Return the CPU seconds of the three products alone."""
    hidden, weight, _ = inputs
    start = time.process_time()
    logits = hidden @ weight.T
    _gradients = logits @ weight, logits.T @ hidden
    return time.process_time() - start


def exact(inputs: Inputs, gate: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient by the logits in float64, and both gradients."""
    hidden, weight, targets = inputs[0].double(), inputs[1].double(), inputs[2].unsqueeze(1)
    by_logits = (hidden @ weight.T).softmax(-1)
    likelihood, square = by_logits.gather(1, targets), by_logits.square().sum(-1, keepdim=True)
    by_logits.scatter_add_(1, targets, torch.full_like(likelihood, -1.0)).mul_(gate(likelihood, square))
    return by_logits, by_logits @ weight, by_logits.T @ hidden


def error(found: Tensor, wanted: Tensor) -> float:
    """Return a distance as a share of the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


OBJECTIVES: dict[str, tuple[LossFn, Callable[[Tensor, Tensor], Tensor]]] = {
    "NLL": (NLL(), lambda p, square: torch.ones_like(p)),
    "DEFT": (DEFT(), lambda p, square: p**square),
}


def measure(inputs: Inputs, name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return ratios of every round, the errors, and what the head says of itself."""
    objective, gate = OBJECTIVES[name]
    cast = inputs[0].to(dtype), inputs[1].to(dtype), inputs[2]
    ratios: dict[str, list[float]] = {"whole": [], "columns": []}
    found = {}
    for place in range(rounds + 1):
        sparsity = ColumnSparsity()
        base = products(cast)
        for kind, asked in (("whole", None), ("columns", sparsity)):
            seconds, *gradients = head(cast, objective, asked)
            found[kind] = gradients
            if place:  # the first round warms up
                ratios[kind].append(seconds / base)
    by_logits, by_hidden, by_weight = exact(inputs, gate)
    hidden, weight, _ = (tensor.bfloat16().double() for tensor in inputs)
    rounded = by_logits.bfloat16().double()
    del by_logits
    return {
        "ratios": ratios,
        **sparsity.taken()._asdict(),
        "error": {kind: [error(g, w) for g, w in zip(pair, (by_hidden, by_weight), strict=True)]
                  for kind, pair in found.items()},
        "bfloat16": [error(rounded @ weight, by_hidden), error(rounded.T @ hidden, by_weight)],
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    states = real(args.model, args.data, max(args.tokens))
    shape = f"V={len(states[1])}, D={states[1].shape[1]}"
    where = (
        f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{shape}; {where}\n\n| input | N | dtype | objective | whole | columns left out | kept | bound | dX, dW: "
          "columns left out | rounding to bfloat16 |\n|" + "---|" * 10)  # fmt: skip
    results = []
    for kind, source in (("real", states), ("random", flat(states))):
        for tokens in args.tokens:
            inputs = source[0][:tokens], source[1], source[2][:tokens]
            for dtype in args.dtypes:
                for name in OBJECTIVES:
                    row = measure(inputs, name, getattr(torch, dtype), args.rounds)
                    results.append({"input": kind, "tokens": tokens, "dtype": dtype, "objective": name, **row})
                    spans = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"
                             for r in row["ratios"].values()]  # fmt: skip
                    errors = [
                        ", ".join(f"{e:.2%}" for e in pair) for pair in (row["error"]["columns"], row["bfloat16"])
                    ]
                    cells = [kind, tokens, dtype, name, *spans, f"{row['kept']:.3f}"]
                    cells += [f"{row['bound']:.2%}", *errors]
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"shape": shape, "machine": where, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
