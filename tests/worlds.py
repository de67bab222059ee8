"""The small worlds that tests run in: rows on disk, a tiny model, optimizers that hardly do anything, a silent trainer.

Every test file may import from here: the folder of tests is on the path, also in the processes that tests start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from deft_lightning import InstructionDataModule, Trainer
from deft_lightning.callbacks import Checkpoint, SFTProgressBar
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Prepared
from deft_lightning.functional import TokenContext
from deft_lightning.objectives import Contaminated, Objective, RunState

ROOT = Path(__file__).resolve().parents[1]
# An architecture that is built in no time and takes a step in a few milliseconds.
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Answers of very different lengths, so that a mean of means is not the mean over tokens.
UNEVEN = [
    {"id": f"r{i}", "question": q, "answer": a}
    for i, (q, a) in enumerate(
        [("1+1?", "2"), ("Name three colours.", "red, green and blue"), ("Hi", "Hello! How are you?"), ("x", "y"),
         ("Spell cat", "c a t"), ("Yes or no", "no"), ("Count", "one two three four five"), ("?", "!!")]
    )
]  # fmt: skip


# --- rows -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[object]) -> str:
    """Write rows as JSON, one a line, in folders that are made where they lack; return where they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int = 48) -> list[dict[str, str]]:
    """Return rows of question and answer of which no two are alike."""
    return [{"question": f"{i} + {i}", "answer": f"that is {2 * i}"} for i in range(count)]


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    """Return a row of messages, of pairs of role and content."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def split_data(source: str, **options: Any) -> InstructionDataModule:
    """Return a data module of batches of four that holds back a fifth of its rows, unless ``options`` say otherwise."""
    return InstructionDataModule(source, **{"batch_size": 4, "validation_fraction": 0.2, **options})


def random_example(seed: int, length: int, learnt: int) -> Prepared:
    """Return an example of random tokens of which the last ``learnt`` are supervised."""
    ids = np.random.default_rng(seed).integers(6, 262, length)
    labels = np.where(np.arange(length) >= length - learnt, ids, -100)
    return Prepared(f"p{seed}", ids, labels, np.zeros(length, dtype=np.int64))


def random_context(count: int, seed: int = 0) -> TokenContext:
    """Return what any objective may ask of tokens: random chance, answers of one to six tokens, three sources.

    The tokens of an answer stand together and are of one source; the third source has no place (-1).
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=generator)
    example = torch.repeat_interleave(torch.arange(count), lengths)[:count]
    chance = -9 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.01
    return TokenContext(chance=chance[0], answer_chance=chance[1], example=example, source=example % 3 - 1)


def noise_models() -> list[Objective]:
    """Return Contaminated in each of its kinds, at rates that a run may have come to."""
    kinds = [
        Contaminated(),
        Contaminated(level="token"),
        Contaminated(level="answer"),
        Contaminated(answer_chance="least", opening=0.5),
    ]
    return [kind.at(RunState(0.3, rates=(0.3, 0.0 if kind.level == "answer" else 0.2))) for kind in kinds]


# --- models ---------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte."""
    return build_tokenizer(["hello"], 0)


def tiny_llama(spread: float, seed: int = 0, **shape: Any) -> tuple[Any, Any]:
    """Return a Llama with random weights, small enough for a test, and a tokenizer of bytes.

    Args:
        spread: Standard deviation of the weights: the larger, the surer is the model, of anything.
        seed: Of the weights.
        shape: Options of the config that differ from two layers of 16, two heads and 128 positions.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    options = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 128, **shape,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=spread, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def save_tiny_llama(folder: Path, spread: float, **shape: Any) -> str:
    """Write both as a Hugging Face folder and return its path."""
    for part in tiny_llama(spread, **shape):
        part.save_pretrained(folder)
    return str(folder)


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor without a graph, of all ranks where each has a share; then every rank has to ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights that are trained, whole."""
    return {name: whole_tensor(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two modules have the same parameters and buffers, to the bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a weight; infinite where names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- training -------------------------------------------------------------------------------------------------------


def still(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return gradient descent at a rate of 0.1."""
    return torch.optim.SGD(parameters, lr=0.1)


def unit_sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return gradient descent of which a step is the gradient."""
    return torch.optim.SGD(parameters, lr=1.0)


def adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Return AdamW at a rate of 1e-3, unless ``options`` say otherwise."""
    return torch.optim.AdamW(parameters, **{"lr": 1e-3, **options})


def constant(optimizer: torch.optim.Optimizer) -> Any:
    """Return a schedule that leaves the rate as it is."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def quiet_trainer(root: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Return a trainer of one process that shows nothing, logs every step to nobody, and else is the recipe.

    Args:
        root: Folder of its runs.
        callbacks: Beside those of the recipe.
        options: Of the trainer; they win.
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": str(root),
        "callbacks": list(callbacks),
    }  # fmt: skip
    return Trainer(**{**defaults, **options})


def bare_trainer(root: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Return a quiet trainer of one epoch without the recipe: what is not given is not there."""
    defaults: dict[str, Any] = {
        "monitors": False, "gradient_clip_val": None, "max_epochs": 1,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, SFTProgressBar) for callback in callbacks),
    }  # fmt: skip
    return quiet_trainer(root, *callbacks, **{**defaults, **options})


def fit_command(root: Path, *more: str) -> list[str]:
    """Write rows to ``root``; return the words of a ``fit`` of four steps on them that saves every second."""
    source = write_rows(root / "rows.jsonl", ({"question": str(i), "answer": str(i)} for i in range(8)))
    return [
        "fit", "--data.source", source, "--data.batch_size", "2", "--data.tokenizer_size", "0",
        "--data.validation_fraction", "0", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.max_steps", "4", "--checkpoint.every_n_train_steps", "2", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(root / "logs"), "--model.architecture.hidden_size", "16",
        "--model.architecture.intermediate_size", "16", "--model.architecture.num_hidden_layers", "1",
        "--model.architecture.num_attention_heads", "2", *more,
    ]  # fmt: skip


def read_events(folder: Path | str | None) -> EventAccumulator:
    """Read all that TensorBoard's files in a folder hold."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()
