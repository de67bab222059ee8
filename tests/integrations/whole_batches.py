"""Runs in which every optimizer step sees all rows, so that one by hand needs no sampler; and such runs by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY, STEPS, RATE = 31, 6, 0.5
# Tokens in front of an answer, and its own: a mean of means would be wrong.
SHAPES = ((1, 7), (5, 2), (7, 1), (2, 6), (3, 4), (4, 1), (1, 3), (2, 9))


def tiny_model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**shape, **options}))


def token_rows() -> list[dict[str, list[int]]]:
    """Return eight rows of unlike length, padded with nothing."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for asked, answered in SHAPES:
        ids = torch.randint(1, VOCABULARY, (asked + answered,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return rows


def wrong_rows() -> list[dict[str, list[int]]]:
    """Return the same rows, three of them with other answers."""
    generator, rows = torch.Generator().manual_seed(2), token_rows()
    for row, (asked, answered) in list(zip(rows, SHAPES, strict=True))[::3]:
        ids = row["input_ids"][:asked] + torch.randint(1, VOCABULARY, (answered,), generator=generator).tolist()
        row |= {"input_ids": ids, "labels": [-100] * asked + ids[asked:]}
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right, as long as the longest of all rows."""
    longest = max(map(sum, SHAPES))
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    real = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {**batch, "attention_mask": real}


def arguments(folder: Path, batch: int, accumulate: int, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": STEPS, "learning_rate": RATE, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        **{**defaults, **options},
    )  # fmt: skip


def trained(folder: Path, loss: Any, callback: Any, batch: int = 8, accumulate: int = 1, **options: Any) -> Trainer:
    """Train the tiny model with transformers' own trainer."""
    resume, model, rows = (options.pop(name, None) for name in ("resume", "model", "rows"))
    trainer = Trainer(
        model or tiny_model(), arguments(folder, batch, accumulate, **options),
        train_dataset=rows or token_rows(),
        eval_dataset=token_rows()[:3], data_collator=collate, compute_loss_func=loss,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Tokens:
    """The learnt tokens of all rows under a model, in float64, by plain softmax."""

    def __init__(self, model: Any, rows: list[dict[str, list[int]]] | None = None) -> None:
        batch = collate(rows or token_rows())
        self.keep = batch["labels"][:, 1:] != -100
        self.targets = batch["labels"][:, 1:][self.keep]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][self.keep]
        self.log_pi = torch.log_softmax(logits, -1)
        self.log_prob = self.log_pi.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)
        self.row = torch.arange(len(SHAPES)).unsqueeze(1).expand_as(self.keep)[self.keep]
        self.pi, self.prob = self.log_pi.detach().exp(), self.log_prob.detach().exp()
        self.collision = self.pi.square().sum(-1)

    def per_row(self, values: Tensor) -> Tensor:
        return torch.zeros(len(SHAPES), dtype=values.dtype).index_add(0, self.row, values)


def by_hand(
    gate_of: Callable[[int, Tokens], Tensor], steps: int = STEPS
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Descend by hand: each token's gradient is gate x error, over the number of tokens.

    Returns:
        The weights, and of each step mean gate, effective sample size and plain NLL.
    """
    model = tiny_model().double()
    figures = []
    for step in range(steps):
        tokens = Tokens(model)
        gate = gate_of(step, tokens)
        model.zero_grad()
        (-(gate * tokens.log_prob).sum() / len(gate)).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
        figures.append(
            {
                "gate/mean": float(gate.mean()), "gate/ess": float(gate.sum() ** 2 / (len(gate) * gate.square().sum())),
                "nll": float(-tokens.log_prob.detach().mean()), "prob/mean": float(tokens.prob.mean()),
            }
        )  # fmt: skip
    return [weight.detach() for weight in model.parameters()], figures


def unigram(rows: list[dict[str, list[int]]] | None = None) -> Tensor:
    """Return ``log u`` of every token, of how frequent it is among labels; one percent of u is uniform."""
    labels = [label for row in rows or token_rows() for label in row["labels"][1:] if label != -100]
    share = np.bincount(labels, minlength=VOCABULARY) / len(labels)
    return torch.from_numpy(0.99 * share + 0.01 / VOCABULARY).log()


def same(model: Any, weights: list[Tensor], tolerance: float = 5e-5) -> None:
    """Assert that a model in float32 has these weights."""
    for one, other in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(one.detach().double(), other.double(), rtol=0, atol=tolerance)
