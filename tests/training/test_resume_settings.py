"""Resuming says what differs from the checkpoint, and refuses in one line what cannot be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from worlds import SHAPE, adam, quiet_trainer, sgd, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data import Noise, ResponseSwap
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.objectives import NLL
from deft_lightning.training.optim import CosineWithWarmup
from deft_lightning.training.resume.settings import WHOLE, content

PLANNED = "model.scheduler: planned over 3 -> 6 optimizer steps; the rate continues at the same step of the new plan"
Log = Callable[[], list[str]]


def multiples(path: Path, times: int = 8) -> str:
    return write_rows(path, ({"question": str(i), "answer": str(times * i)} for i in range(16)))


def fit(
    root: Path, source: str, steps: int = 6, resume: Path | str | None = None, *, model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None, saver: dict[str, Any] | None = None, **options: Any,
) -> tuple[Trainer, SFTModule]:  # fmt: skip
    seed_everything(0, verbose=False)
    own = {"optimizer": adam, "scheduler": CosineWithWarmup, "architecture": SHAPE, **(model or {})}
    loaded = InstructionDataModule(
        source, **{"validation_fraction": 0.0, "tokenizer_size": 0, "batch_size": 4, **(data or {})}
    )
    settings = {"max_steps": steps, "max_epochs": -1, **options}
    trainer = quiet_trainer(root, Checkpoint(**(saver or {})), **settings)
    module = SFTModule(**own)
    trainer.fit(module, loaded, ckpt_path=None if resume is None else str(resume))
    return trainer, module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the checkpoint of three steps on them."""
    root = tmp_path_factory.mktemp("world")
    fit(root, multiples(root / "rows.jsonl"), 3)
    return root


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level("INFO")
    return lambda: [r.message.removeprefix("resuming: ") for r in caplog.records if r.message.startswith("resuming: ")]


def saved(world: Path) -> Path:
    return world / "version_0" / "checkpoints" / "step=3.ckpt"


def error(*args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what differs ---------------------------------------------------------------------------------------------------


def test_nothing_is_said_where_nothing_differs_even_of_a_file_that_has_moved(
    world: Path, tmp_path: Path, said: Log
) -> None:
    moved = str(tmp_path / "moved.jsonl")
    shutil.copy(world / "rows.jsonl", moved)
    fit(tmp_path, moved, 6, saved(world), model={"scheduler": lambda o: CosineWithWarmup(o, total_steps=3)})
    assert said() == []


TEMPLATE = "data.chat_template: another template than the checkpoint was trained with"
DIFFERENT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "seed": ({"data": {"seed": 9}}, ["data.seed: 0 -> 9"]),
    "packing": (
        {"data": {"packing": True, "max_length": 64}}, ["data.max_length: 1024 -> 64", "data.packing: False -> True"]
    ),
    "noise": (
        {"data": {"noise": Noise(ops=[ResponseSwap(0.5)])}},
        ["data.noise.ops: [] -> ['ResponseSwap(rate=0.5, bucket_by_length=True, exact=False)']"],
    ),
    "objective": ({"model": {"objective": NLL()}}, ["model.objective: DEFT() -> NLL()"]),
    "batches": (
        {"data": {"batch_size": 2}, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        [
            "trainer.accumulate_grad_batches: 1 -> 2", "trainer.gradient_clip_val: 1.0 -> 0.5",
            "data.batch_size: 4 -> 2",
        ],
    ),
    "supervise": ({"data": {"supervise": "all"}}, ["data.supervise: assistant -> all"]),
    "precision": ({"precision": "bf16-mixed"}, ["trainer.precision: 32-true -> bf16-mixed"]),
    "strategy": ({"strategy": "ddp", "devices": 1}, ["trainer.strategy: auto -> ddp"]),
    "template": (
        {"data": {"chat_template": "chatml"}}, [TEMPLATE]
    ),
    "model": (
        {"model": {"architecture": {**SHAPE, "attention_dropout": 0.5}}},
        ["model: attention_dropout is 0.0 in the checkpoint's model -> 0.5"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_said_in_one_line_each(name: str, world: Path, tmp_path: Path, said: Log) -> None:
    options, lines = DIFFERENT[name]
    fit(tmp_path, str(world / "rows.jsonl"), 6, saved(world), **options)
    assert said() == [*lines, PLANNED] if name != "model" else [PLANNED, *lines]


def test_other_rows_under_the_same_name_are_said_and_so_is_the_seed(world: Path, tmp_path: Path, said: Log) -> None:
    source = multiples(tmp_path / "rows.jsonl", times=7)
    fit(tmp_path, source, 6, saved(world))
    assert said() == [
        "data.source: other content than the checkpoint was trained on (16 -> 16 training examples)",
        PLANNED,
    ]


def audit(path: Path, source: str, *rows: int) -> str:
    """Write an audit that names rows of multiples by their place."""
    return write_rows(path, ({"file": source, "row": row, "prompt": str(row - 1), "weight": 0.5} for row in rows))


@pytest.mark.slow
def test_another_audit_is_said_and_the_same_one_elsewhere_is_not(world: Path, tmp_path: Path, said: Log) -> None:
    source = str(world / "rows.jsonl")
    two, same, four = (
        audit(tmp_path / f"{name}.jsonl", source, *rows)
        for name, rows in (("two", (1, 2)), ("same", (1, 2)), ("four", (1, 2, 3, 4)))
    )
    fit(tmp_path / "first", source, 3, data={"exclude": two})
    (mine,) = (tmp_path / "first").rglob("step=3.ckpt")
    other = "other content than the checkpoint was trained on"
    cases: list[tuple[Path, dict[str, Any], list[str]]] = [
        (mine, {"exclude": same}, []),
        (mine, {"exclude": four}, [f"data.exclude: {other} (14 -> 12 training examples)"]),
        (mine, {}, [f"data.exclude: {other} (14 -> 16 training examples)"]),
        (mine, {"exclude": two, "exclude_top": 1}, ["data.exclude_top: None -> 1"]),
        (mine, {"exclude": two, "weights_from": four}, [f"data.weights_from: {other}"]),
        (saved(world), {"exclude": two}, [f"data.exclude: {other} (16 -> 14 training examples)"]),
    ]
    for number, (checkpoint, data, lines) in enumerate(cases):
        before = len(said())
        fit(tmp_path / str(number), source, 6, checkpoint, data=data)
        assert said()[before:] == [*lines, PLANNED], data


def test_what_is_asked_of_the_optimizer_wins_over_its_state(world: Path, tmp_path: Path, said: Log) -> None:
    def other(groups: Any) -> torch.optim.Optimizer:
        return adam(groups, lr=2e-3, weight_decay=0.3, betas=(0.8, 0.9))

    trainer, _ = fit(tmp_path, str(world / "rows.jsonl"), 6, saved(world), model={"optimizer": other})
    groups = trainer.optimizers[0].param_groups
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.3, (0.8, 0.9)), (0.0, (0.8, 0.9))]
    assert said()[:3] == [
        "model.optimizer.lr: 0.001 -> 0.002",
        "model.optimizer.betas: [0.9, 0.999] -> [0.8, 0.9]",
        "model.optimizer.weight_decay: 0.01 -> 0.3",
    ]


def test_a_schedule_of_torch_keeps_what_it_began_with_and_says_so(world: Path, tmp_path: Path, said: Log) -> None:
    def every(size: int) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=size)

    fit(tmp_path / "first", str(world / "rows.jsonl"), 3, model={"scheduler": every(2)})
    first = tmp_path / "first" / "version_0" / "checkpoints" / "step=3.ckpt"
    options = {"scheduler": every(4), "optimizer": lambda groups: adam(groups, lr=1e-2)}
    trainer, _ = fit(tmp_path / "second", str(world / "rows.jsonl"), 4, first, model=options)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)
    assert said() == [
        "model.optimizer.lr: 0.001 -> 0.01; the schedule keeps the former",
        "model.scheduler.step_size: 2 -> 4; the schedule keeps the former",
    ]


def test_a_checkpoint_from_before_settings_were_kept_is_resumed_and_that_is_said(
    world: Path, tmp_path: Path, said: Log
) -> None:
    held = torch.load(saved(world), weights_only=True)
    assert held["deft_lightning"].pop("settings")["data.seed"] == 0
    del held["deft_lightning"]["run"]
    torch.save(held, tmp_path / "old.ckpt")
    trainer, _ = fit(tmp_path, str(world / "rows.jsonl"), 6, tmp_path / "old.ckpt", data={"seed": 5})
    (line,) = said()
    assert trainer.global_step == 6 and "old.ckpt is older than saved settings" in line
    assert "the state of another optimizer" in error(
        tmp_path, str(world / "rows.jsonl"), 6, tmp_path / "old.ckpt", model={"optimizer": sgd}
    )


def test_letters_of_a_stranger_in_settings_are_shown_and_cut(world: Path, tmp_path: Path, said: Log) -> None:
    held = torch.load(saved(world), weights_only=True)
    settings = held["deft_lightning"]["settings"]
    settings |= {"data.keep": "\x1b[2J\n" + "x" * 500, "data.seed": torch.zeros(3), "model.optimizer": 3}
    torch.save(held, tmp_path / "odd.ckpt")
    fit(tmp_path, str(world / "rows.jsonl"), 6, tmp_path / "odd.ckpt")
    (seed, keep, planned) = sorted(said(), key=lambda line: ("planned" in line, "keep" in line))
    assert planned == PLANNED and seed == "data.seed: tensor([0., 0., 0.]) -> 0"
    assert "\\x1b[2J" in keep and "\x1b" not in keep and len(keep) < 120 and "\n" not in keep


def test_the_same_content_is_known_under_any_name_and_other_content_is_not(tmp_path: Path) -> None:
    one, two = Path(multiples(tmp_path / "a" / "one.jsonl")), Path(multiples(tmp_path / "b" / "two.jsonl"))
    assert content(str(one)) == content(str(two)) == content(str(tmp_path / "a")) == content(str(tmp_path / "a" / "*"))
    assert content(f"{one}?limit=3") not in (content(str(one)), content(f"{one}?limit=4"))
    assert content("org/name?split=test") == "org/name?split=test"
    two.write_text(two.read_text().replace("8", "9", 1))
    assert content(str(one)) != content(str(two))
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(WHOLE + 1)
    before = content(str(large))
    with large.open("r+b") as file:
        file.seek(WHOLE)
        file.write(b"x")
    assert content(str(large)) != before


# --- what is refused ------------------------------------------------------------------------------------------------


def annealing(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "optimizer": ({"model": {"optimizer": sgd}}, ["--model.optimizer SGD", "trained with AdamW"]),
    "another Adam": ({"model": {"optimizer": lambda g: torch.optim.Adam(g)}}, ["--model.optimizer Adam:", "AdamW"]),
    "scheduler": (
        {"model": {"scheduler": annealing}}, ["--model.scheduler CosineAnnealingLR", "trained with CosineWithWarmup"]
    ),
    "max_steps": ({"steps": 2}, ["--trainer.max_steps 2", "at step 3", "more than 3"]),
    "adapters": ({"model": {"lora": LoRA(r=2)}}, ["--model.lora:", "no adapters", "leave --model.lora out"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_one_line_before_any_work(name: str, world: Path, tmp_path: Path) -> None:
    options, wanted = REFUSED[name]
    missing = str(tmp_path / "rows that would be read next.jsonl")
    line = error(tmp_path, missing, resume=saved(world), **options)
    assert str(saved(world)) in line and all(part in line for part in wanted), line


def test_a_folder_of_shares_is_resumed_by_the_strategy_that_shares_alone(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shares.ckpt"
    folder.mkdir()
    for name in (".metadata", "meta.pt"):  # without them it is no checkpoint, which is another line
        (folder / name).touch()
    line = error(tmp_path, str(tmp_path / "missing.jsonl"), 6, folder)
    assert str(folder) in line and "--trainer.strategy fsdp2" in line


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        (LoRA(r=2), LoRA(r=4), ["--model.lora.r 4", "trained with 2"]),
        (LoRA(r=2), LoRA(r=2, alpha=8), ["--model.lora.alpha 8", "trained with 4"]),
        (LoRA(r=2), None, ["asks for none", "set --model.lora as it was", "'r': 2"]),
    ],
)
def test_other_adapters_are_refused(
    before: LoRA, now: LoRA | None, wanted: list[str], world: Path, tmp_path: Path
) -> None:
    path, source = tmp_path / "adapted.ckpt", str(world / "rows.jsonl")
    held = torch.load(saved(world), weights_only=True)
    held["deft_lightning"]["lora"] = before.settings()
    torch.save(held, path)
    line = error(tmp_path, source, 6, path, model={"lora": now})
    assert all(part in line for part in wanted), line


def test_the_same_adapters_under_another_dropout_are_resumed(world: Path, tmp_path: Path, said: Log) -> None:
    source = str(world / "rows.jsonl")
    fit(tmp_path / "a", source, 1, model={"lora": LoRA(r=2)})
    path = tmp_path / "a" / "version_0" / "checkpoints" / "step=1.ckpt"
    trainer, _ = fit(tmp_path / "b", source, 2, path, model={"lora": LoRA(r=2, alpha=4, dropout=0.1)})
    assert trainer.global_step == 2 and "model.lora.dropout: 0.0 -> 0.1" in said()


def test_weights_alone_are_not_resumed_but_validated(world: Path, tmp_path: Path) -> None:
    source = str(world / "rows.jsonl")
    fit(tmp_path, source, 1, saver={"save_weights_only": True})
    path = tmp_path / "version_0" / "checkpoints" / "step=1.ckpt"
    line = error(tmp_path, source, 6, path)
    assert str(path) in line and "--checkpoint.save_weights_only" in line and "--model.pretrained" in line
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", logger=False, enable_progress_bar=False)
    data = InstructionDataModule(source, validation_source=source, tokenizer_size=0, batch_size=4)
    assert trainer.validate(SFTModule(architecture=SHAPE), data, ckpt_path=str(path), verbose=False)


@pytest.mark.slow
def test_epochs_that_are_behind_a_checkpoint_are_counted_and_no_others(world: Path, tmp_path: Path, said: Log) -> None:
    source, epochs = str(world / "rows.jsonl"), {"steps": -1, "max_epochs": 2}
    fit(tmp_path / "two", source, **epochs)
    (path,) = (tmp_path / "two" / "version_0" / "checkpoints").glob("step=8.ckpt")
    assert "--trainer.max_epochs 1" in error(tmp_path, source, -1, path, max_epochs=1)
    trainer, _ = fit(tmp_path / "more", source, -1, path, max_epochs=3)
    assert trainer.global_step == 12
    again, _ = fit(tmp_path / "same", source, 8, path)
    assert again.global_step == 8 and "nothing is left to train: the checkpoint is at step 8 of 8" in said()


# --- states that do not fit -----------------------------------------------------------------------------------------


def spoil(held: dict[str, Any], name: str) -> None:
    fit_loop, state = held["loops"]["fit_loop"], held["optimizer_states"][0]
    if name == "no loops":
        held["loops"] = {"fit_loop": 3}
    elif name == "no progress":
        fit_loop["epoch_progress"] = {"current": {}}
    elif name == "progress of letters":
        fit_loop["epoch_loop.batch_progress"]["current"]["ready"] = {"x": 1}
    elif name == "place in the data":
        fit_loop["state_dict"] = {"combined_loader": [1, "x", None]}
    elif name == "callbacks of letters":
        held["callbacks"] = {key: "x" for key in held["callbacks"]}
    elif name == "a callback's keys":
        held["callbacks"] = {key: {"dirpath": 3} for key in held["callbacks"]}
    elif name == "a group more":
        state["param_groups"].append(dict(state["param_groups"][0]))
    elif name == "a parameter less":
        state["param_groups"][0]["params"].pop()
    elif name == "groups of letters":
        state["param_groups"] = "ab"
    elif name == "no state":
        del state["state"]
    elif name == "moments of another shape":
        state["state"][0]["exp_avg"] = torch.zeros(3, 3, 3)
    elif name == "a schedule of letters":
        held["lr_schedulers"] = ["x"]
    elif name == "a schedule's step":
        held["lr_schedulers"] = [{"last_epoch": "x"}]
    elif name == "gates of letters":
        held["deft_lightning"]["training"] = 3


SPOILT = [
    "no loops", "no progress", "progress of letters", "place in the data", "callbacks of letters", "a callback's keys",
    "a group more", "a parameter less", "groups of letters", "no state", "moments of another shape",
    "a schedule of letters", "a schedule's step", "gates of letters",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILT)
def test_a_state_that_does_not_fit_is_one_line_that_names_the_file(name: str, world: Path, tmp_path: Path) -> None:
    held = torch.load(saved(world), weights_only=True)
    spoil(held, name)
    torch.save(held, tmp_path / "spoilt.ckpt")
    line = error(tmp_path, str(world / "rows.jsonl"), 6, tmp_path / "spoilt.ckpt")
    assert str(tmp_path / "spoilt.ckpt") in line, line


def test_a_mistake_of_ours_in_training_is_no_matter_of_the_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Any, *args: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(SFTModule, "on_train_batch_end", wrong)
    with pytest.raises(KeyError, match="ours"):
        fit(tmp_path, str(world / "rows.jsonl"), 6, saved(world))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["../../theirs.txt", "theirs.txt", "file:///theirs.txt"])
def test_a_checkpoint_cannot_name_a_file_that_saving_then_deletes(where: str, world: Path, tmp_path: Path) -> None:
    """Lightning deletes the former best checkpoint, whose name it has from the file it resumed."""
    theirs, folder = tmp_path / "theirs.txt", tmp_path / "run" / "checkpoints"
    theirs.write_text("kept")
    held = torch.load(saved(world), weights_only=True)
    (state,) = (state for name, state in held["callbacks"].items() if "Checkpoint" in name)
    name = {"t": str(theirs), ".": f"{folder}/{where}", "f": f"file://{theirs}"}[where[0]]
    for stated in (str(folder), str(tmp_path), None):
        state |= {
            "dirpath": stated,
            "best_model_path": name,
            "last_model_path": name,
            "best_k_models": {name: 1.0},
        }
        torch.save(held, tmp_path / "stranger.ckpt")
        fit(
            tmp_path / "run",
            str(world / "rows.jsonl"),
            6,
            tmp_path / "stranger.ckpt",
            saver={"every_n_train_steps": 1, "dirpath": str(folder)},
        )
        assert theirs.read_text() == "kept"
    if where == "theirs.txt":  # beside the checkpoints of this run, but none
        state["dirpath"] = str(tmp_path)
        torch.save(held, tmp_path / "stranger.ckpt")
        saver = {"every_n_train_steps": 1, "dirpath": str(tmp_path)}
        fit(tmp_path / "run", str(world / "rows.jsonl"), 6, tmp_path / "stranger.ckpt", saver=saver)
        assert theirs.read_text() == "kept"
