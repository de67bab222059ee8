"""Two machines, as two network namespaces: train, lose one of them, resume on both and on the one that is left.

    python tests/two_nodes.py [--strategy fsdp2] [--replicate 2] [--steps 8] [--output FILE]

Needs root and ``ip netns`` (Linux, iproute2). Each namespace has an address of its own on one virtual cable, and
``torchrun`` with two processes runs ``python -m deft_lightning fit`` in it, as on two machines with two devices each.
What is shown, one JSON object at the end:

* the weights of two nodes against those of one process on the same global batches,
* after a SIGKILL of every process of the second node: how long the first one needs to end, and what it says,
* the run resumed on both nodes against the one that was left alone: 0.0,
* the run resumed on the node that is left, against the same: rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("deft-node-0", "deft-node-1")
ADDRESSES = ("10.77.13.1", "10.77.13.2")
CABLES = ("deft-cable-0", "deft-cable-1")
EACH = 2  # processes of a node
BATCH = 8  # examples of an optimizer step
SECONDS = 600.0
Node = subprocess.Popen[bytes]


def ip(*words: str) -> None:
    """Run ``ip`` with these words."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def connect() -> None:
    """Make both namespaces and the cable between them."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", CABLES[0], "type", "veth", "peer", "name", CABLES[1])
    for name, cable, address in zip(NAMES, CABLES, ADDRESSES, strict=True):
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")


def disconnect() -> None:
    """Remove the namespaces with what still runs in them; the cable goes with them."""
    for node, name in enumerate(NAMES):
        if (Path("/run/netns") / name).exists():
            for process in members(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def fit(home: Path, root: Path, steps: int, ranks: int, *more: str) -> list[str]:
    """Return the arguments of a small run of so many ranks that saves every second step."""
    return [
        "-m", "deft_lightning", "fit", "--data.source", str(root / "rows.jsonl"), "--data.tokenizer_size", "0",
        "--data.batch_size", str(BATCH // ranks), "--data.validation_fraction", "0",
        "--model.architecture", json.dumps({
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        }),
        "--model.optimizer.lr", "1e-3", "--model.scheduler", "null", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", str(steps), "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
        "--after_fit.export", "false",
        "--checkpoint.every_n_train_steps", "2", "--checkpoint.dirpath", str(home), *more,
    ]  # fmt: skip


def start(node: int, nodes: int, home: Path, arguments: list[str]) -> Node:
    """Start the ranks of a node, in a process group of their own; their output goes to ``node<N>.log``."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": CABLES[node],
        "DEFT_LIGHTNING_CACHE": str(home.parent / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank", str(node),
        "--nproc-per-node", str(EACH), "--master-addr", ADDRESSES[0], "--master-port", "29517",
    ]  # fmt: skip
    home.mkdir(exist_ok=True)
    with (home / f"node{node}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[node], *torchrun, *arguments],
            env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait(processes: list[Node], home: Path) -> None:
    """Wait for nodes that are to end well."""
    for process in processes:
        if process.wait(SECONDS) != 0:
            logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(home.glob("node*.log")))
            sys.exit(f"a node ended with status {process.returncode}:\n{logs}")


def members(node: int) -> list[int]:
    """Return the processes of a node: torchrun, and the ranks, each of which it starts in a session of its own."""
    listed = subprocess.run(["ip", "netns", "pids", NAMES[node]], check=True, capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def step_of(file: Path) -> int:
    """Return the optimizer step of a checkpoint."""
    return int(file.stem.removeprefix("step="))


def weights(home: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the latest checkpoint of a folder: beside that of a killed run, `last.ckpt` is its own."""
    state: dict[str, Any] = torch.load(max(home.glob("step=*.ckpt"), key=step_of), weights_only=True)
    return dict(state["state_dict"])


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def lose_a_node(root: Path, steps: int, options: list[str]) -> tuple[float, str, int]:
    """Kill the second node once a checkpoint is there; return what the first does then.

    Returns:
        Seconds until the first node has ended, its last line, and the step of the checkpoint that is left.
    """
    home = root / "cut"
    nodes = [start(node, 2, home, fit(home, root, 100 * steps, 2 * EACH, *options)) for node in (0, 1)]
    deadline = time.monotonic() + SECONDS
    while not list(home.glob("step=*.ckpt")):
        if time.monotonic() > deadline or any(node.poll() is not None for node in nodes):
            wait(nodes, home)
        time.sleep(0.05)
    killed = time.monotonic()
    for process in members(1):
        with contextlib.suppress(ProcessLookupError):  # ended with the one that started it
            os.kill(process, signal.SIGKILL)
    code = nodes[0].wait(SECONDS)
    seconds = time.monotonic() - killed
    assert code != 0, "a node that has lost the other one cannot have trained to the end"
    nodes[1].wait()
    left = max(map(step_of, home.glob("step=*.ckpt")))
    said = [line for line in (home / "node0.log").read_text(errors="replace").splitlines() if line.startswith("error:")]
    return seconds, said[-1] if said else "", left


def main() -> None:
    """Run all of it and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="fsdp2", choices=["ddp", "fsdp2"])
    parser.add_argument("--replicate", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    options = ["--trainer.num_nodes", "2", "--trainer.devices", str(EACH), "--trainer.strategy", given.strategy]
    hybrid = ["--trainer.strategy.replicate", str(given.replicate)] if given.strategy == "fsdp2" else []
    root = Path(tempfile.mkdtemp(prefix="two-nodes-"))
    rows = [{"question": f"{i} + {i % 7}", "answer": str(i + i % 7)} for i in range(64)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    disconnect()
    connect()
    try:
        single = root / "single"
        single.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        alone = fit(single, root, given.steps, 1, "--trainer.devices", "1")
        subprocess.run([sys.executable, *alone], env=environment, cwd=single, check=True, capture_output=True)
        both = root / "both"
        wait([start(n, 2, both, fit(both, root, given.steps, 2 * EACH, *options, *hybrid)) for n in (0, 1)], both)
        seconds, said, left = lose_a_node(root, given.steps, [*options, *hybrid])
        told: dict[str, Any] = {
            "strategy": given.strategy, "replicate": given.replicate if hybrid else None, "steps": given.steps,
            "two nodes against one process": furthest(weights(both), weights(single)),
            "seconds until the node that is left has ended": round(seconds, 1), "it says": said,
            "checkpoint left at step": left,
        }  # fmt: skip
        for name, nodes in (("resumed on both nodes", 2), ("resumed on the node that is left", 1)):
            home, aim = root / name.replace(" ", "-"), max(given.steps, left + 2)
            shutil.copytree(root / "cut", home, ignore=shutil.ignore_patterns("*.log", "logs"))
            here = options if nodes == 2 else ["--trainer.devices", str(EACH), "--trainer.strategy", given.strategy]
            groups = hybrid if nodes == 2 else []
            words = fit(home, root, aim, nodes * EACH, *here, *groups, "--ckpt_path", str(home / f"step={left}.ckpt"))
            wait([start(n, nodes, home, words) for n in range(nodes)], home)
            whole = both
            if aim != given.steps:  # the kill came later than planned: a run of as many steps to compare with
                whole = root / f"both-{aim}"
                if not whole.exists():
                    words = fit(whole, root, aim, 2 * EACH, *options, *hybrid)
                    wait([start(n, 2, whole, words) for n in (0, 1)], whole)
            told[name] = furthest(weights(home), weights(whole))
    finally:
        disconnect()
    text = json.dumps(told, indent=2)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
