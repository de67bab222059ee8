"""One optimizer step is one optimizer step: every way to run it against a full batch in float64.

    python tests/benchmarks/bench_gradients.py [--output docs/evidence/data/gradients.json]

The same 12 examples, from 1 to 9 supervised tokens each, in one optimizer step: at once, in micro-batches (the last
window is short), on one process and on two ranks over gloo, padded or packed, through the fused head or the dense one,
with and without LoRA, with tied and untied embeddings, one rank without any supervised token. The reference is a plain
PyTorch loop in float64 over the whole batch with ``token_loss``. Printed is the largest difference of any gradient
before the step, as SGD of rate 1 applies it in float32, in units of the largest entry of any gradient.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    {"accumulate": accumulate, "packing": packing, "head": head, "lora": lora, "tied": tied}
    for accumulate, packing, head, lora, tied in itertools.product(
        (1, 2, 4), (False, True), ("fused", "dense"), (False, True), (False, True)
    )
]
STRATEGIES = ("single", "ddp", "fsdp2")
EXAMPLES = 12


def random_row(seed: int, learnt: int) -> Any:
    import numpy as np

    from deft_lightning.data.examples import Prepared

    length = 6 + seed % 5 + learnt
    ids = np.random.default_rng(seed).integers(6, 60, length)
    labels = np.where(np.arange(length) >= length - learnt, ids, -100)
    return Prepared(f"p{seed}", ids, labels, np.zeros(length, dtype=np.int64))


def examples() -> list[Any]:
    """Every second one of the second half is fully masked."""
    return [random_row(i, 0 if i > 6 and i % 2 else 1 + (3 * i * i) % 9) for i in range(EXAMPLES)]


def rows_for_loader(packing: bool) -> list[Any]:
    """What a loader picks from: examples, or rows of two."""
    found = examples()
    return [[found[i], found[i + 1]] for i in range(0, EXAMPLES, 2)] if packing else found


def module(case: dict[str, Any]) -> Any:
    import torch

    from deft_lightning import SFTModule
    from deft_lightning.models import LoRA

    torch.manual_seed(0)
    shape = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61,
        "initializer_range": 0.2, "tie_word_embeddings": case["tied"],
    }  # fmt: skip
    return SFTModule(
        architecture=shape, head=case["head"], lora=LoRA(r=2) if case["lora"] else None,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )  # fmt: skip


def step(case: dict[str, Any], strategy: str, rank: int, world: int) -> dict[str, Any]:
    """The weights before and after one optimizer step through the trainer."""
    from torch.utils.data import DataLoader

    from deft_lightning import Trainer
    from deft_lightning.data.loading.collate import TrainCollator
    from deft_lightning.data.loading.sampler import ShardedSampler

    trained, content = module(case), rows_for_loader(case["packing"])
    sampler = ShardedSampler(len(content), rank=rank, world=world, seed=0, shuffle=False, even=True)
    # Of 12 examples on two ranks, accumulated 4 times in batches of 2, the last window would be short of one.
    size = -(-len(content) // (world * case["accumulate"]))
    loader = DataLoader(content, size, sampler=sampler, collate_fn=TrainCollator(0, case["packing"]))  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="auto" if world == 1 else strategy, max_steps=1, max_epochs=-1,
        accumulate_grad_batches=case["accumulate"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=None,
    )  # fmt: skip
    before: dict[str, Any] = {}

    def whole() -> dict[str, Any]:
        named = {n: p.detach() for n, p in trained.model.named_parameters() if p.requires_grad}
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in named.items()}

    trained.on_train_start = lambda: before.update(whole())
    trainer.fit(trained, loader)
    assert trainer.global_step == 1
    after = whole()
    return {name: before[name] - after[name] for name in after}


def reference(case: dict[str, Any]) -> dict[str, Any]:
    """The gradient of the mean loss of the whole batch in float64, in plain PyTorch."""
    import torch

    from deft_lightning.functional import token_loss
    from deft_lightning.objectives import DEFT

    built = module(case)
    built.configure_model()
    model = built.model.double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples():
        ids, labels = torch.from_numpy(example.input_ids)[None], torch.from_numpy(example.labels)[None]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total = total + token_loss(logits, labels[:, 1:], DEFT()).sum()
        tokens += int((labels[:, 1:] != -100).sum())
    (total / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worker(strategy: str, folder: Path) -> None:
    """All cases as one process of a strategy; the first rank keeps the gradients."""
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = {json.dumps(case): step(case, strategy, rank, world) for case in CASES}
    if rank == 0:
        torch.save(found, folder / f"{strategy}.pt")


def launch(strategy: str, folder: Path) -> None:
    """Run the ranks of a strategy as real processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [{}] if strategy == "single" else [
        {"LOCAL_RANK": r, "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for r in "01"
    ]  # fmt: skip
    command = [sys.executable, __file__, "--worker", strategy, "--folder", str(folder)]
    processes = [subprocess.Popen(command, env={**shared, **rank}, stdout=subprocess.DEVNULL) for rank in ranks]
    codes = [process.wait(900) for process in processes]
    assert codes == [0] * len(codes), f"{strategy}: {codes}"


def main() -> None:
    """Print a table; with --output, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder)
        return
    sys.path.insert(0, str(ROOT))
    import torch

    rows_: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for strategy in STRATEGIES:
            launch(strategy, folder)
        found = {s: torch.load(folder / f"{s}.pt", weights_only=True) for s in STRATEGIES}
    print("| accumulate | packing | head | LoRA | tied | " + " | ".join(STRATEGIES) + " |")
    print("|---|---|---|---|---|" + "---|" * len(STRATEGIES))
    for case in CASES:
        wanted = reference(case)
        largest = max(float(g.abs().max()) for g in wanted.values())
        line: dict[str, Any] = dict(case)
        for strategy in STRATEGIES:
            got = found[strategy][json.dumps(case)]
            assert got.keys() == wanted.keys()
            line[strategy] = max(float((got[n].double() - wanted[n]).abs().max()) for n in wanted)
        rows_.append({**line, "largest gradient": largest})
        print("| " + " | ".join(str(v) for v in case.values()) + " | "
              + " | ".join(f"{line[s]:.1e}" for s in STRATEGIES) + " |")  # fmt: skip
    worst = max(row[s] for row in rows_ for s in STRATEGIES)
    print(f"\nworst: {worst:.1e}; largest gradient: {max(row['largest gradient'] for row in rows_):.2g}")
    if args.output:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        args.output.write_text(json.dumps({**machine, "worst": worst, "rows": rows_}, indent=1) + "\n")


if __name__ == "__main__":
    main()
