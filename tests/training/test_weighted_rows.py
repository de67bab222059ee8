"""From rows with weights to TensorBoard: rows, turns, label noise, packing, the cache and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import SHAPE, adam, constant, largest_difference, quiet_trainer, read_events, weights, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.cli.main import run
from deft_lightning.data import Noise, ResponseSwap, TokenReplace
from deft_lightning.errors import UserError

pytestmark = pytest.mark.slow

OF_ROWS = [0.25, 1.0, 3.0, 0.5, 2.0, 1.0]


def rows(weighted: bool = True) -> list[dict[str, Any]]:
    """Two turns each, of which the first counts nothing; the row and the second turn have a weight."""
    found = []
    for i, weight in enumerate(OF_ROWS):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "wrong " * (1 + i)},
            {"role": "user", "content": "again"}, {"role": "assistant", "content": "right " * (1 + i * i % 7)},
        ]  # fmt: skip
        if weighted:
            turns[1]["weight"], turns[3]["weight"] = 0, 0.5 if i % 2 else 1
        found.append({"id": f"r{i}", "messages": turns, **({"weight": weight} if weighted else {})})
    return found


def data(source: str, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(
        source, **{"validation_fraction": 0.0, "tokenizer_size": 0, "batch_size": 2, "max_length": 128, **options}
    )


def test_weights_of_rows_and_turns_reach_tensorboard(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows())
    plain = data(write_rows(tmp_path / "plain.jsonl", rows(weighted=False)), supervise="last")
    plain.prepare_data()
    plain.setup("fit")
    examples = [plain.example("train", at) for at in range(len(OF_ROWS))]
    learnt = {one.id: int((one.labels != -100).sum()) for one in examples}
    total = sum(learnt.values())
    wanted = sum(learnt[f"r{i}"] * w * (0.5 if i % 2 else 1) for i, w in enumerate(OF_ROWS)) / total
    run([
        "fit", "--data.source", source, "--data.batch_size", "6", "--data.tokenizer_size", "0",
        "--data.validation_fraction", "0", "--data.max_length", "128", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(tmp_path / "run"), "--after_fit.export", "false", "--after_fit.test",
        "false", *(word for name, size in SHAPE.items() for word in (f"--model.architecture.{name}", str(size))),
    ])  # fmt: skip
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    logged = read_events(events.parent)
    assert [event.value for event in logged.Scalars("train/weight")] == pytest.approx([wanted, wanted], rel=1e-5)
    assert [event.value for event in logged.Scalars("train/tokens")] == [total, 2 * total], (
        "of weight 0 none is counted"
    )


def fit(
    root: Path, loaded: InstructionDataModule, steps: int, total: int, resume: str | None = None, **options: Any
) -> Any:
    torch.manual_seed(0)
    module = SFTModule(architecture=SHAPE, optimizer=lambda p: adam(p, lr=1e-2), scheduler=constant)
    checkpoint = Checkpoint(dirpath=str(root))
    trainer = quiet_trainer(root, checkpoint, max_steps=steps, max_epochs=-1, **options)
    trainer.fit(module, loaded, ckpt_path=resume)
    assert trainer.global_step == steps
    return weights(module.model), str(checkpoint.last_model_path)


def test_a_turn_of_weight_0_trains_what_a_masked_one_does_to_the_bit(tmp_path: Path) -> None:
    zero = rows(weighted=False)
    for row in zero:
        row["messages"][1]["weight"] = 0
    source = write_rows(tmp_path / "zero.jsonl", zero)
    plain = write_rows(tmp_path / "plain.jsonl", rows(weighted=False))
    one, _ = fit(tmp_path / "one", masked := data(source), 6, 6)
    other, _ = fit(tmp_path / "other", data(plain, supervise="last"), 6, 6)
    assert largest_difference(one, other) == 0.0
    assert all("token_weight" not in batch for batch in masked.train_dataloader())
    both, _ = fit(tmp_path / "both", data(plain), 6, 6)
    assert largest_difference(one, both) > 1e-4


@pytest.mark.parametrize("packing", [False, True])
def test_a_noisy_weighted_run_goes_on_to_the_bit_in_the_middle_of_an_epoch(packing: bool, tmp_path: Path) -> None:
    many = [{**row, "id": f"{copy}{row['id']}"} for copy in range(4) for row in rows()]
    for i, row in enumerate(many):  # no two responses alike: one can be swapped for another
        row["messages"] = [*row["messages"][:-1], {**row["messages"][-1], "content": f"right {i}"}]
    source = write_rows(tmp_path / "rows.jsonl", many)
    options: dict[str, Any] = {"packing": packing, "noise": Noise(ops=[ResponseSwap(0.5), TokenReplace(0.2)])}
    whole, _ = fit(tmp_path / "whole", loaded := data(source, **options), 10, 10, accumulate_grad_batches=2)
    _, last = fit(tmp_path / "cut", data(source, **options), 4, 10, accumulate_grad_batches=2)
    resumed, _ = fit(tmp_path / "resumed", data(source, **options), 10, 10, last, accumulate_grad_batches=2)
    assert largest_difference(whole, resumed) == 0.0
    batches = list(loaded.train_dataloader())
    assert all("token_weight" in batch for batch in batches)
    swapped = [batch for batch in batches if bool(batch["is_noisy"].any())]
    assert swapped and json.dumps(loaded.reports["train"].weighted)
    counted = {float(w) for batch in batches for w in batch["token_weight"].flatten()}
    assert counted == {0.0, *(w * (0.5 if i % 2 else 1) for i, w in enumerate(OF_ROWS))}, "noise keeps the weights"


@pytest.mark.parametrize("weight", [1e30, 1e-30])
def test_products_of_weights_beyond_float32_are_one_line_or_masked(weight: float, tmp_path: Path) -> None:
    odd = rows()
    odd[2]["weight"] = odd[2]["messages"][3]["weight"] = weight
    loaded = data(write_rows(tmp_path / "rows.jsonl", odd))
    if weight > 1:
        with pytest.raises(UserError, match="r2: weights must be finite in float32") as refused:
            loaded.prepare_data()
        assert "\n" not in str(refused.value)
    else:
        loaded.prepare_data()
        loaded.setup("fit")
        assert loaded.size("train") == 5 and loaded.reports["train"].dropped == 1
