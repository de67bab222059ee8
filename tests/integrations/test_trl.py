"""TRL's SFTTrainer: its steps are those by hand, padded, without padding and packed; answers stay apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from gates_by_hand import GateOf, NoiseModel, deft, rescaled
from transformers import DataCollatorWithFlattening
from whole_batches import RATE, STEPS, by_hand, same, tiny_model, token_rows
from worlds import byte_tokenizer, read_events, save_tiny_llama

from deft_lightning.errors import UserError
from deft_lightning.integrations import GateCallback, OneForward, compute_loss_func
from deft_lightning.integrations.loss import segments
from deft_lightning.objectives import DEFT, Contaminated, Objective, Rescaled

pytestmark = pytest.mark.slow
NOISE = Contaminated(answer_chance="least", start=0.2)
CASES: list[tuple[Objective, Callable[[], GateOf]]] = [
    (DEFT(), lambda: deft),
    (Rescaled(decay=0.5), lambda: rescaled(0.5)),
    (NOISE, lambda: NoiseModel(least=True)),
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 8},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding-free": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True},
    "packed": {"per_device_train_batch_size": 8, "packing": True, "max_length": 16},
}


def config(folder: Path, **options: Any) -> Any:
    from trl import SFTConfig

    defaults: dict[str, Any] = {
        "max_steps": STEPS, "learning_rate": RATE, "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "max_length": None,
    }  # fmt: skip
    return SFTConfig(str(folder), **{**defaults, **options})


def sft(folder: Path, loss: Any, base: type[Any] | None = None, **options: Any) -> Any:
    from trl import SFTTrainer

    kind: type[Any] = SFTTrainer if base is None else type("Mixed", (base, SFTTrainer), {})
    extra = {name: options.pop(name) for name in ("peft_config",) if name in options}
    trainer = kind(
        tiny_model(), args=config(folder, **options), train_dataset=Dataset.from_list(token_rows()),
        processing_class=byte_tokenizer(), compute_loss_func=loss, callbacks=[GateCallback()], **extra,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("objective", "gate_of"), CASES, ids=[repr(objective) for objective, _ in CASES])
def test_a_run_is_the_one_by_hand_however_rows_are_laid_out(
    objective: Objective, gate_of: Callable[[], GateOf], layout: str, tmp_path: Path
) -> None:
    weights, figures = by_hand(gate_of())
    trainer = sft(tmp_path, compute_loss_func(objective), **LAYOUTS[layout])
    if layout == "packed":
        assert len(trainer.train_dataset) < 8
    same(trainer.model, weights)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, figure in zip(logged, figures, strict=True):
        assert {name: entry[name] for name in figure} == pytest.approx(figure, rel=1e-4)
        assert "mean_token_accuracy" in entry  # SFTTrainer's own figures are in the same entry


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_forward_pass_trains_alike(layout: str, tmp_path: Path) -> None:
    weights, _ = by_hand(NoiseModel(least=True))
    trainer = sft(tmp_path, compute_loss_func(NOISE), OneForward, **LAYOUTS[layout])
    same(trainer.model, weights)
    assert "mean_token_accuracy" not in trainer.state.log_history[0]


@pytest.mark.parametrize(("base", "passes"), [(None, 2), (OneForward, 1)])
def test_how_often_the_model_runs(base: type[Any] | None, passes: int, tmp_path: Path) -> None:
    from trl import SFTTrainer

    kind: type[Any] = SFTTrainer if base is None else type("Mixed", (base, SFTTrainer), {})
    trainer = kind(
        tiny_model(), args=config(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(token_rows()), processing_class=byte_tokenizer(),
        compute_loss_func=compute_loss_func(DEFT()), callbacks=[GateCallback()],
    )  # fmt: skip
    runs = []
    trainer.model.model.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    assert len(runs) == passes * STEPS


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    from trl import SFTTrainer

    def run(resume: str | None) -> Any:
        options: dict[str, Any] = {
            "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        }  # fmt: skip
        trainer = SFTTrainer(
            tiny_model(), args=config(tmp_path, **options), train_dataset=Dataset.from_list(token_rows()),
            processing_class=byte_tokenizer(), compute_loss_func=compute_loss_func(NOISE), callbacks=[GateCallback()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, cut = run(None), run(str(tmp_path / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_see_the_same_gate(tmp_path: Path) -> None:
    """At the first step they add nothing yet; packed rows are found behind them too."""
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    _, figures = by_hand(NoiseModel(least=True), steps=1)
    trainer = sft(tmp_path, compute_loss_func(NOISE), peft_config=adapter, **{**LAYOUTS["packed"], "max_steps": 2})
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name: first[name] for name in figures[0]} == pytest.approx(figures[0], rel=1e-4)
    assert second["nll"] != first["nll"]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_cuts_answers_is_refused_where_answers_are_judged(strategy: str, tmp_path: Path) -> None:
    cut: dict[str, Any] = {"packing": True, "packing_strategy": strategy, "max_length": 16, "max_steps": 1}
    with pytest.raises(UserError, match=f"judges whole answers, which packing_strategy='{strategy}' cuts into pieces"):
        sft(tmp_path, compute_loss_func(NOISE), **cut)
    tokens_alone = Contaminated(level="token", answer_chance=None)
    assert "noise/estimated_tokens" in sft(tmp_path, compute_loss_func(tokens_alone), **cut).state.log_history[0]
    with pytest.warns(UserWarning, match="noise/estimated is not logged: packing_strategy="):
        assert "noise/estimated" not in sft(tmp_path, compute_loss_func(DEFT()), **cut).state.log_history[0]


def test_examples_of_flat_batches_are_told_apart() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = token_rows()[:3]
    lengths = [len(row["input_ids"]) for row in rows]
    expected = [at for at, length in enumerate(lengths) for _ in range(length)]
    for collator in (DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), DataCollatorWithFlattening()):
        batch = collator(rows)
        labels, positions = (torch.as_tensor(batch[name]) for name in ("labels", "position_ids"))
        assert segments(labels, positions).flatten().tolist() == expected
    padded = DataCollatorForLanguageModeling(pad_token_id=0)(rows)["labels"]
    assert segments(padded, None).tolist() == [[at] * padded.shape[1] for at in range(3)]
    with pytest.raises(UserError, match="do not separate the examples"):
        segments(padded, torch.zeros(3, *padded.shape, dtype=torch.long))


@pytest.mark.parametrize("objective", [DEFT(), NOISE], ids=repr)
def test_a_file_of_rows_a_model_and_a_board(objective: Objective, tmp_path: Path) -> None:
    """As a user has it: names of a folder and a file, TensorBoard, an evaluation, a saved model."""
    from trl import SFTTrainer

    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} plus {i + 1} is", "completion": f" {2 * i + 1}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    options: dict[str, Any] = {
        "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "logging_steps": 5, "report_to": ["tensorboard"], "eval_strategy": "epoch", "save_strategy": "epoch",
        "max_length": 64,
    }  # fmt: skip
    trainer = SFTTrainer(
        save_tiny_llama(tmp_path / "model", spread=0.3), args=config(tmp_path / "run", **options),
        train_dataset=data.select(range(52)), eval_dataset=data.select(range(52, 60)),
        compute_loss_func=compute_loss_func(objective), callbacks=[GateCallback()],
    )  # fmt: skip
    trainer.train()
    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    found = read_events(events)
    for tag in ("gate/mean", "gate/ess", "gate/locked", "nll", "noise/estimated", "mean_token_accuracy"):
        assert [event.step for event in found.Scalars(f"train/{tag}")] == [5, 10], tag
    assert [event.step for event in found.Scalars("eval/nll")] == [7, 14]
    assert ("train/focus/mean" in found.Tags()["scalars"]) == (objective == DEFT())
