"""What each pair of configs/paper needs, computed: tokens, FLOPs, hours, memory. Nothing is run.

    python tests/benchmarks/paper_cost.py [--mfu 0.4] [--task math=500,400,1.7]
    python tests/benchmarks/paper_cost.py --measure math-qwen2.5-7b [--tokenizer DIR] [--source ROWS]

The first prints the tables of docs/evidence/paper.md from the published shapes of the models and from what is assumed
of the rows: tokens of one, those that are learnt, and how many times as many are computed because a micro-batch is
padded to its longest row. The second counts these three on the rows themselves.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "configs"))

from paper_pairs import PAIRS, written

GIB = 2**30
PEAK = {"H100": 989e12, "A100": 312e12}  # bfloat16 FLOP/s of the data sheets (SXM), dense
ROOM = 72.0  # GiB of the 79 of an 80 GB GPU: the estimate is rough
CHUNK = 1.5  # GiB: logits of a chunk of the fused head, and what stands beside them
ALLOWANCE = 4.0  # GiB: CUDA, NCCL, fragmentation


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind, as its config.json on the hub has it.

    Attributes:
        hub: Where that is.
        layers: num_hidden_layers.
        hidden: hidden_size.
        ffn: intermediate_size.
        heads: num_attention_heads, of 128 each.
        kv_heads: num_key_value_heads.
        vocab: vocab_size.
        tied: tie_word_embeddings.
        bias: Whether query, key and value have one (qwen2).
        positions: max_position_embeddings.
    """

    hub: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    bias: bool
    positions: int

    @property
    def matrices(self) -> int:
        """Entries of the matrices of a layer, each multiplied once a position."""
        return 128 * self.hidden * 2 * (self.heads + self.kv_heads) + 3 * self.hidden * self.ffn

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.matrices + 2 * self.hidden + self.bias * 128 * (self.heads + 2 * self.kv_heads)

    @property
    def root(self) -> int:
        """Parameters beside the layers: embedding, head, last norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.root

    @property
    def cache(self) -> int:
        """Bytes of keys and values a token while generating in bfloat16."""
        return 2 * 2 * 128 * self.kv_heads * self.layers


_QWEN_1B = Shape("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151_936, True, True, 131_072)
_QWEN_7B = Shape("Qwen/Qwen2.5-7B", 28, 3584, 18_944, 28, 4, 152_064, False, True, 131_072)
MODELS = {
    "qwen2.5-math-1.5b": replace(_QWEN_1B, hub="Qwen/Qwen2.5-Math-1.5B", positions=4096),
    "qwen2.5-math-7b": replace(_QWEN_7B, hub="Qwen/Qwen2.5-Math-7B", positions=4096),
    "qwen2.5-1.5b": _QWEN_1B,
    "qwen2.5-7b": _QWEN_7B,
    "llama-3.1-8b": Shape("meta-llama/Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128_256, False, False, 131_072),
    "llama-3.2-3b": Shape("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128_256, True, False, 131_072),
    "deepseek-math-7b": Shape(
        "deepseek-ai/deepseek-math-7b-base", 30, 4096, 11_008, 32, 32, 102_400, False, False, 4096
    ),
}


@dataclass(frozen=True)
class Task:
    """Rows of a task.

    Attributes:
        rows: How many.
        tokens: Of a row, mean, after `max_length`.
        learnt: Of them supervised, mean.
        padding: Computed to real tokens in micro-batches drawn at random.
    """

    rows: int
    tokens: float
    learnt: float
    padding: float


# Rows of math and medical: 256 times the steps that the authors' scripts count. Their lengths are assumptions; those of
# FigFont were counted with --measure.
TASKS = {
    "math": Task(264 * 256, 500, 400, 1.7),
    "medical": Task(91 * 256, 450, 250, 1.4),
    "figfont": Task(40_000, 147, 3.2, 2.46),
}


@dataclass(frozen=True)
class Run:
    """A pair of configs/paper."""

    name: str
    shape: Shape
    task: Task
    config: dict[str, Any]

    @property
    def positions(self) -> float:
        """Positions that are computed in an epoch, padding included."""
        return self.task.rows * self.task.tokens * self.task.padding

    @property
    def flops(self) -> float:
        """Floating-point operations of an epoch.

        A product of a vector with a matrix of n entries is 2 n forward and 4 n backward, and 2 n again where the layer
        is recomputed, which stops short of its last product. Attention looks back on half of a padded row on average: 4
        products of its length with the heads, halved. The head is computed for learnt tokens alone: logits, gradient of
        the hidden state, of the weight.
        """
        shape, task = self.shape, self.task
        attention = 2 * task.tokens * task.padding * 128 * shape.heads
        body = 6 * shape.matrices + 3 * attention
        if self.config["model"].get("gradient_checkpointing"):
            body += 2 * (shape.matrices - shape.hidden * shape.ffn) + attention
        return self.positions * shape.layers * body + task.rows * task.learnt * 6 * shape.vocab * shape.hidden

    def hours(self, gpu: str, mfu: float) -> float:
        """GPU hours at a share of the peak."""
        return self.flops / (PEAK[gpu] * mfu) / 3600

    def memory(self, devices: int) -> float:
        """GiB a GPU at most, under fsdp2 with bf16-mixed.

        Shares of weights, gradients and two Adam moments, all float32. Gathered in bfloat16: the root, two layers. On
        top the largest of three moments: the head's float32 weight gradient beside a chunk of logits; a layer that is
        recomputed, with its gradients in bfloat16 and, being reduced, in float32, and those of the next; the root's
        gradients being reduced, when the activations are gone. Or the step of AdamW, which holds a fifth number a
        parameter and nothing gathered.
        """
        shape, data = self.shape, self.config["data"]
        positions = data["batch_size"] * data["max_length"]
        kept = 2 * shape.layers * shape.hidden * positions
        head = kept + 4 * shape.vocab * shape.hidden + CHUNK * GIB
        # Bytes a position of a layer without recomputation, counted by hand: norms in float32, heads, gated product.
        layer = kept + positions * (32 * shape.hidden + 12 * shape.ffn)
        layer += 2 * shape.vocab * shape.hidden + 2 * 6 * shape.layer
        gathered = 2 * (shape.root + 2 * shape.layer)
        share = shape.parameters / devices
        return max(16 * share + gathered + max(head, layer, 6 * shape.root), 20 * share) / GIB + ALLOWANCE

    @property
    def fewest(self) -> int:
        """Smallest number of 80 GB GPUs, a power of two."""
        return next(n for n in (1, 2, 4, 8, 16, 32) if self.memory(n) <= ROOM)

    @property
    def test_cache(self) -> float:
        """GiB of keys and values of a batch of `test`, in bfloat16, if every sample is as long as it may be."""
        data, generation = self.config["data"], self.config["model"]["generation"]
        rows = data.get("eval_batch_size", data["batch_size"]) * generation.get("samples", 1)
        return rows * min(self.shape.positions, generation["max_new_tokens"] + 512) * self.shape.cache / GIB


def runs(tasks: dict[str, Task]) -> list[Run]:
    """Return every pair, by task and then by model."""
    found = []
    for task in tasks:
        for model, shape in MODELS.items():
            pair = f"{task}-{model}"
            found.append(Run(pair, shape, tasks[task], written(pair)))
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models_table() -> str:
    """Return what the models alone decide."""
    rows = [
        [
            shape.hub, f"{shape.parameters / 1e9:.2f} B", f"{4 * shape.parameters / 1e9:.0f} GB",
            f"{12 * shape.parameters / 1e9:.0f} GB", f"{shape.cache / 1e3:.0f} kB",
        ]
        for shape in MODELS.values()
    ]  # fmt: skip
    header = ["model", "parameters", "export, and rank 0 while building", "checkpoint", "cache of a generated token"]
    return table(header, rows)


def runs_table(tasks: dict[str, Task], mfu: float) -> str:
    """Return what each pair needs."""
    rows = [
        [
            f"`{run.name}`", f"{run.positions / 1e6:.0f} M", f"{run.flops / 1e18:.2f}",
            *(f"{run.hours(gpu, mfu):.2f}" for gpu in PEAK), f"{run.memory(8):.0f} GiB",
            f"{run.fewest} of {run.memory(run.fewest):.0f} GiB", f"{run.test_cache:.0f} GiB",
        ]
        for run in runs(tasks)
    ]  # fmt: skip
    hours = [f"{gpu} hours" for gpu in PEAK]
    return table(
        ["pair", "positions", "10^18 FLOP", *hours, "8 GPUs, each", "fewest of 80 GB", "cache of a test batch"], rows
    )


def measure(pair: str, tokenizer: str | None, source: str | None) -> None:
    """Print what a pair's rows are, as they are trained on."""
    import numpy as np

    from deft_lightning import InstructionDataModule

    settings = written(pair)
    name = tokenizer or settings["model"]["pretrained"]
    options = {**settings["data"], "tokenizer": name, **({"source": source} if source else {})}
    data = InstructionDataModule(**options)
    data.prepare_data()
    data.setup()
    lengths, size, report = data.splits["train"].examples.lengths(), data.batch_size, data.reports["train"]
    drawn = np.stack([np.random.default_rng(seed).permutation(lengths) for seed in range(20)])
    whole = drawn[:, : len(lengths) // size * size].reshape(20, -1, size)
    padding = whole.max(2).sum() * size / whole.sum()
    print(
        f"{report.examples} rows, {lengths.mean():.1f} tokens, {report.supervised / report.examples:.1f} learnt,"
        f" padding {padding:.2f} in micro-batches of {size}; {report.truncated} truncated, {report.dropped} dropped"
    )


def main() -> None:
    """Print both tables, or measure rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--task", action="append", default=[], help="NAME=tokens,learnt,padding of its rows")
    parser.add_argument("--measure", choices=PAIRS, metavar="TASK-MODEL", help="pair whose rows are counted instead")
    parser.add_argument("--tokenizer", help="with --measure: in place of the model's")
    parser.add_argument("--source", help="with --measure: in place of the pair's")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.tokenizer, args.source)
        return
    tasks = dict(TASKS)
    for given in args.task:
        name, _, numbers = given.partition("=")
        tokens, learnt, padding = map(float, numbers.split(","))
        tasks[name] = replace(tasks[name], tokens=tokens, learnt=learnt, padding=padding)
    print(models_table(), runs_table(tasks, args.mfu), sep="\n\n")


if __name__ == "__main__":
    main()
