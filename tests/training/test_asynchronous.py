"""Checkpoints that are written while training goes on: one at a time, whole or not at all, and never in silence."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from worlds import quiet_trainer, split_data

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.training.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from deft_lightning.training.fsdp2 import FSDP2Strategy

pytestmark = pytest.mark.slow


def test_there_is_one_write_at_a_time_of_a_state_that_training_cannot_change(tmp_path: Path) -> None:
    class Slow(AtomicCheckpointIO):
        writes: ClassVar[list[str]] = []

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: object = None) -> None:
            self.writes.append(f"begin {Path(path).stem}")
            time.sleep(0.3)
            super().save_checkpoint(checkpoint, path, storage_options)
            self.writes.append(f"end {Path(path).stem}")

    background, weight = BackgroundCheckpointIO(Slow()), torch.ones(1000)
    state = {"weight": weight, "tied": weight, "part": weight[:3], "list": [1]}
    for name in "ab":
        background.save_checkpoint(state, tmp_path / f"{name}.ckpt")
        weight += 1  # as the next step does
        state["list"].append(2)  # type: ignore[attr-defined]
    background.teardown()
    assert Slow.writes == ["begin a", "end a", "begin b", "end b"]
    for number, name in enumerate("ab", start=1):
        held = background.load_checkpoint(tmp_path / f"{name}.ckpt")
        assert (held["weight"] == number).all() and held["part"].tolist() == [number] * 3
        assert held["list"] == [1] + [2] * (number - 1)
        assert held["weight"].data_ptr() == held["tied"].data_ptr(), "written once"


def test_a_write_that_fails_in_the_background_ends_the_run_at_its_next_step(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    """A file stands where the folder of the checkpoints was."""

    class Taken(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                (tmp_path / "kept").rmdir() if (tmp_path / "kept").exists() else None
                (tmp_path / "kept").write_text("in the way")

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            time.sleep(0.1)  # the write fails in the meantime

    kept = Checkpoint(every_n_train_steps=2, dirpath=str(tmp_path / "kept"), asynchronous=True)
    trainer = quiet_trainer(tmp_path, kept, Taken(), max_steps=9, max_epochs=-1)
    with pytest.raises(UserError, match="cannot save the checkpoint") as caught:
        trainer.fit(SFTModule(pretrained=pretrained), split_data(source))
    assert "\n" not in str(caught.value) and trainer.global_step in (2, 3)


def test_a_kill_during_a_write_in_the_background_leaves_the_one_before(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys, time, torch
        from pathlib import Path
        from deft_lightning.training.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO

        folder, background = Path(sys.argv[1]), BackgroundCheckpointIO(AtomicCheckpointIO())
        background.save_checkpoint({"value": torch.ones(10)}, folder / "a.ckpt")
        background.save_checkpoint({"value": torch.ones(1 << 26)}, folder / "b.ckpt")
        background.remove_checkpoint(folder / "a.ckpt")
        while not any(path.stat().st_size > 1000 for path in folder.glob(".b.ckpt.*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["a.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["value"].sum() == 10


def test_what_cannot_be_asynchronous_is_refused(tmp_path: Path) -> None:
    kept = Checkpoint(asynchronous=True)
    with pytest.raises(UserError, match=r"asynchronous true: TorchCheckpointIO of --trainer\.plugins"):
        quiet_trainer(tmp_path, kept, plugins=[TorchCheckpointIO()])
    shares = quiet_trainer(tmp_path, kept, strategy=FSDP2Strategy(save_distributed_checkpoint=True))
    with pytest.raises(UserError, match="sharded checkpoint"):
        kept.setup(shares, SFTModule(architecture={}), "fit")
