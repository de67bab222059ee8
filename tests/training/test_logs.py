"""A log that cannot be written ends no training and costs no checkpoint."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from worlds import SHAPE

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint, Dashboard, GateMonitor
from deft_lightning.callbacks.monitor import writers
from deft_lightning.training.logs import lasting
from deft_lightning.training.trainer import Trainer

LOST, STEPS = 3, 8
Loss = Callable[[Path], Any]


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


def become_a_file(folder: Path) -> None:
    """What a folder without permission is to everybody but root."""
    folder.rename(folder.with_name("moved"))
    folder.write_text("")


def fill_the_disk(folder: Path) -> None:
    for path in (*folder.glob("events*"), *folder.glob("metrics.csv")):
        path.unlink()
        path.symlink_to("/dev/full")  # every write to it is a real ENOSPC


class Lose(Callback):
    """Takes a run's log folder away after a step."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == LOST:
            for logger in trainer.loggers:
                self.loss(Path(logger.log_dir))
        for writer in writers(trainer):
            writer.flush()  # else TensorBoard would fail once a minute


class Remote(Logger):
    """A service that answers a few times."""

    name, version = "remote", 0

    def __init__(self, answers: int, error: Exception) -> None:
        super().__init__()
        self.answers, self.error, self.asked = answers, error, 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.asked += 1
        if self.asked > self.answers:
            raise self.error


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Trainer, list[str]]]:
    """Train for a few steps and return the trainer and what was said of logs."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(8)))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # TensorBoard's thread; the command line's is quiet

    def run(logger: Any, *callbacks: Callback) -> tuple[Trainer, list[str]]:
        trainer = Trainer(
            max_steps=STEPS, logger=logger, callbacks=[*callbacks], accelerator="cpu", log_every_n_steps=1,
            default_root_dir=str(tmp_path), enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        data = InstructionDataModule(str(source), validation_fraction=0.25, tokenizer_size=0, batch_size=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(SFTModule(architecture=SHAPE), data)
        return trainer, [str(warning.message) for warning in caught if " log" in str(warning.message)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("loss", [vanish, become_a_file, fill_the_disk])
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_training_goes_on_without_the_log(kind: Any, loss: Loss, fit: Any, tmp_path: Path) -> None:
    logger = kind(str(tmp_path / "logs"), name="")
    if kind is CSVLogger:
        logger._flush_logs_every_n_steps = 1
    kept = Checkpoint(every_n_train_steps=2, dirpath=str(tmp_path / "kept"))
    trainer, said = fit(logger, Lose(loss), GateMonitor(histograms=False), Dashboard(curve=False), kept)
    assert trainer.global_step == STEPS and (tmp_path / "kept" / f"step={STEPS}.ckpt").exists()
    lines = [line for line in said if "cannot be written any more" in line]
    if kind is CSVLogger and loss is vanish:
        return  # it makes its folder again
    assert len(lines) == 1 and "\n" not in lines[0], said
    assert str(tmp_path / "logs") in lines[0] and "--trainer.default_root_dir" in lines[0]


@pytest.mark.slow
def test_checkpoints_in_the_folder_that_vanishes_are_saved_in_a_new_one(fit: Any, tmp_path: Path) -> None:
    trainer, said = fit(None, Lose(vanish), Checkpoint(every_n_train_steps=2))
    folder = tmp_path / "version_0" / "checkpoints"
    assert trainer.global_step == STEPS and {path.name for path in folder.iterdir()} == {
        f"step={STEPS}.ckpt",
        "last.ckpt",
    }
    assert len([line for line in said if "cannot be written any more" in line]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("error", [ConnectionResetError("gone"), RuntimeError("500")], ids=["connection", "other"])
def test_a_service_that_answers_no_more_is_left(error: Exception, fit: Any) -> None:
    trainer, said = fit(logger := Remote(2, error), GateMonitor(histograms=False))
    assert trainer.global_step == STEPS and len(said) == 1 and str(error) in said[0]
    assert isinstance(logger, Remote) and (logger.asked == 3) == isinstance(error, OSError)


def test_a_logger_that_has_never_worked_is_a_mistake(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="500"):
        fit(Remote(0, RuntimeError("500")), GateMonitor(histograms=False))


def test_a_log_that_cannot_be_opened_ends_a_run_before_it_begins(fit: Any, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(OSError):
        fit(TensorBoardLogger(str(tmp_path / "logs"), name=""))


def test_a_logger_is_made_lasting_once() -> None:
    logger = lasting(Remote(1, RuntimeError()))
    kind = type(logger)
    assert type(lasting(logger)) is kind and isinstance(logger, Remote) and kind.__name__ == "LastingRemote"
