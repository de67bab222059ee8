"""One recipe: a trainer from Python trains, logs and keeps what the command line does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from worlds import read_events, split_data

from deft_lightning import SFTModule, Trainer
from deft_lightning.callbacks import (
    Checkpoint,
    Dashboard,
    EntropyMonitor,
    GateMonitor,
    GracefulStop,
    MetricCheck,
    NoiseMonitor,
    RankWatch,
    SFTProgressBar,
)
from deft_lightning.cli.main import run
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.objectives import Tsallis

pytestmark = pytest.mark.slow

RECIPE = (
    Checkpoint, Dashboard, EntropyMonitor, GateMonitor, GracefulStop, MetricCheck, NoiseMonitor, RankWatch,
    SFTProgressBar,
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def quiet(**options: Any) -> Trainer:
    """A trainer of the recipe, but for what it shows."""
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


def tags(folder: Path) -> dict[str, set[str]]:
    kinds = read_events(folder).Tags()
    return {kind: set(found) for kind, found in kinds.items() if isinstance(found, list)}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob("step=*.ckpt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_twenty_steps_of_fit_and_of_python_are_the_same(
    pretrained: str, source: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        ["fit", "--model.pretrained", pretrained, "--model.objective", "Tsallis", "--model.objective.q", "0.3",
         "--data.source", source, "--data.batch_size", "4", "--data.validation_fraction", "0.2",
         "--data.noise.ops+=TokenReplace", "--data.noise.ops.rates", "[0.5, 0.2]", "--trainer.max_steps", "20",
         "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "cli", "--after_fit.export", "false",
         "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip
    pl.seed_everything(0)
    module = SFTModule(objective=Tsallis(q=0.3), pretrained=pretrained)
    trainer = quiet(max_steps=20)
    trainer.fit(module, split_data(source, noise=Noise(ops=[TokenReplace(rates=[0.5, 0.2])])))
    by_cli, by_python = here / "cli" / "version_0", here / "logs" / "version_0"
    one, other = weights_in(by_cli), weights_in(by_python)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert tags(by_cli) == tags(by_python)
    assert {"gate/mean", "noise/auroc_gate", "train/grad_norm", "val/nll"} <= tags(by_python)["scalars"]
    assert "gate/hist" in tags(by_python)["histograms"]


def test_the_settings_are_those_of_the_command_line(here: Path) -> None:
    trainer = quiet()
    assert (trainer.gradient_clip_val, trainer.log_every_n_steps, trainer.max_epochs) == (1.0, 10, 1)
    assert Path(trainer.default_root_dir).name == "logs"
    own = quiet(gradient_clip_val=None, log_every_n_steps=3, default_root_dir="elsewhere")
    assert (own.gradient_clip_val, own.log_every_n_steps) == (None, 3)
    assert Path(own.default_root_dir).name == "elsewhere"


def test_each_callback_is_there_once(here: Path) -> None:
    found = [type(callback) for callback in Trainer(accelerator="cpu").callbacks]  # type: ignore[attr-defined]
    assert {kind: found.count(kind) for kind in RECIPE} == dict.fromkeys(RECIPE, 1)


@pytest.mark.parametrize(
    ("options", "absent", "present"),
    [
        ({"monitors": False}, (Dashboard, EntropyMonitor, GateMonitor, NoiseMonitor), (Checkpoint, GracefulStop)),
        ({"enable_checkpointing": False}, (ModelCheckpoint,), (GateMonitor,)),
        ({"enable_progress_bar": False}, (ProgressBar,), (GateMonitor,)),
        ({"callbacks": RichProgressBar()}, (SFTProgressBar,), (RichProgressBar, Checkpoint)),
        ({"callbacks": [ModelCheckpoint()]}, (Checkpoint,), (ModelCheckpoint, GateMonitor)),
    ],
)
def test_what_is_given_or_turned_off_is_not_added(
    options: dict[str, Any], absent: tuple[type, ...], present: tuple[type, ...], here: Path
) -> None:
    found: list[Any] = Trainer(accelerator="cpu", **options).callbacks  # type: ignore[attr-defined]
    assert not any(isinstance(callback, absent) for callback in found)
    assert all(sum(isinstance(callback, kind) for callback in found) == 1 for kind in present)


def test_ones_own_monitor_takes_the_place_of_the_recipes(here: Path) -> None:
    own = GateMonitor(bins=10)
    found: list[Any] = Trainer(accelerator="cpu", callbacks=[own, EarlyStopping("val/nll")]).callbacks  # type: ignore[attr-defined]
    assert [callback for callback in found if isinstance(callback, GateMonitor)] == [own]


def test_the_command_line_adds_nothing_twice(
    pretrained: str, source: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kwargs: seen.extend(self.callbacks))
    run(
        ["fit", "--model.pretrained", pretrained, "--data.source", source, "--trainer.accelerator", "cpu",
         "--after_fit.export", "false"]
    )  # fmt: skip
    kinds = [type(callback) for callback in seen]
    assert {kind: kinds.count(kind) for kind in RECIPE} == dict.fromkeys(RECIPE, 1)


def test_lightnings_own_trainer_trains_the_module_too(pretrained: str, source: str, here: Path) -> None:
    module = SFTModule(pretrained=pretrained)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, use_distributed_sampler=False,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, split_data(source))
    assert trainer.global_step == 3 and trainer.callback_metrics["train/nll"] > 0


# --- the folder of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "elsewhere", "several", "none"])
def test_whatever_the_logger_a_run_has_a_folder_of_its_own(kind: str, pretrained: str, source: str, here: Path) -> None:
    tensorboard, csv = (f"lightning.pytorch.loggers.{name}Logger" for name in ("TensorBoard", "CSV"))
    other: dict[str, Any] = {"init_args": {"save_dir": "other"}}
    loggers: dict[str, Any] = {
        "tensorboard": "true", "csv": csv, "none": "false", "elsewhere": {"class_path": tensorboard, **other},
        "several": [{"class_path": tensorboard, **other}, {"class_path": csv, **other}],
    }  # fmt: skip
    logger = loggers[kind] if isinstance(loggers[kind], str) else json.dumps(loggers[kind])
    extra = ["--trainer.logger.save_dir", "other"] if kind == "csv" else []
    for number in (0, 1):
        run(
            ["fit", "--model.pretrained", pretrained, "--data.source", source, "--trainer.accelerator", "cpu",
             "--trainer.max_steps", "2", "--trainer.default_root_dir", "runs", "--trainer.logger", logger, *extra,
             "--trainer.enable_progress_bar", "false"]
        )  # fmt: skip
        folder = here / "runs" / f"version_{number}"
        assert (folder / "config.yaml").is_file() and (folder / "export" / "model.safetensors").is_file()
        assert (folder / "checkpoints" / "step=2.ckpt").is_file() and (folder / "checkpoints" / "last.ckpt").exists()
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["version_0", "version_1"]
    assert not (here / "config.yaml").exists() and not (here / "checkpoints").exists()


def test_from_python_too(pretrained: str, source: str, here: Path) -> None:
    for number, logger in enumerate((False, CSVLogger("other"), [TensorBoardLogger("other"), CSVLogger("other")])):
        trainer = quiet(max_steps=1, logger=logger)
        trainer.fit(SFTModule(pretrained=pretrained), split_data(source))
        assert Path(str(trainer.log_dir)).name == f"version_{number}"
        assert (here / "logs" / f"version_{number}" / "checkpoints" / "step=1.ckpt").is_file()


def test_a_trial_run_keeps_nothing(pretrained: str, source: str, here: Path) -> None:
    trainer = quiet(fast_dev_run=True)
    trainer.fit(SFTModule(pretrained=pretrained), split_data(source))
    assert trainer.log_dir is None and not list(here.rglob("*.ckpt"))


# --- hyper-parameters -----------------------------------------------------------------------------------------------


def test_every_logger_gets_the_resolved_settings(pretrained: str, source: str, here: Path) -> None:
    import yaml

    loggers = [TensorBoardLogger("tb", default_hp_metric=False), CSVLogger("csv")]
    module = SFTModule(objective=Tsallis(q=0.3), pretrained=pretrained)
    quiet(max_steps=1, logger=loggers).fit(module, split_data(source))
    for folder in ("tb", "csv"):
        (file,) = (here / folder).rglob("hparams.yaml")
        written = yaml.safe_load(file.read_text())
        others = {name: written.pop(name) for name in ("data", "trainer", "seed_everything")}
        assert written == json.loads(json.dumps(dict(module.hparams)))
        assert others["data"]["batch_size"] == 4 and others["data"]["source"] == source
        assert others["trainer"]["max_steps"] == 1
    assert written["objective"] == "Tsallis(q=0.3)" and written["pretrained"] == pretrained
    assert written["optimizer"]["class"] == "torch.optim.adamw.AdamW" and written["optimizer"]["lr"] == 5e-5
    assert written["scheduler"]["warmup"] == 0.1
    assert len(json.dumps(written)) < 4000


def test_a_time_limit_alone_needs_a_rate_without_a_plan(pretrained: str, source: str, here: Path) -> None:
    from deft_lightning.errors import UserError

    with pytest.raises(UserError, match=r"the schedule needs an end: set .*--model\.scheduler null") as caught:
        quiet(max_time="00:00:00:05").fit(SFTModule(pretrained=pretrained), split_data(source))
    assert "\n" not in str(caught.value)
    trainer = quiet(max_time="00:00:00:02")
    trainer.fit(SFTModule(pretrained=pretrained, scheduler=None), split_data(source))
    (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    assert trainer.global_step > 1 and timer.time_remaining() <= 0 and trainer.current_epoch >= 0
    assert next((here / "logs").rglob("step=*.ckpt")).is_file(), "it is saved where it stops"
