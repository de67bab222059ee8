"""Ctrl-C in a real process: one stops after the step and saves, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds import ROOT, SHAPE

from deft_lightning.cli.main import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_the_step_in_hand_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        sys.executable, "-m", "deft_lightning", "fit", "--config", "configs/from_scratch.yaml",
        "--trainer.default_root_dir", str(tmp_path), "--data.source", "reasoning_gym:spell_backward?size=60",
        "--model.architecture.hidden_size", "32", "--model.architecture.intermediate_size", "64",
        "--model.architecture.num_hidden_layers", "1",
        "--trainer.max_steps", "100000", "--trainer.val_check_interval", "50000", "--data.batch_size", "2",
        "--trainer.log_every_n_steps", "1", "--progress_bar.refresh_rate", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        seen, deadline = "", time.monotonic() + 120
        while "  loss " not in seen and time.monotonic() < deadline:
            seen += process.stdout.read(200)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, rest[-2000:]
    assert "stopping after this step" in rest and "resume with --ckpt_path last" in rest
    (checkpoint,) = tmp_path.rglob("step=*.ckpt")
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step > 0 and not list(tmp_path.rglob("export"))
    monkeypatch.chdir(ROOT)
    run([*command[3:], "--ckpt_path", "last", "--trainer.max_steps", str(step + 2), "--after_fit.test", "false"])
    assert list(tmp_path.rglob(f"step={step + 2}.ckpt"))


def test_the_handler_is_taken_back_after_training(tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    from deft_lightning import InstructionDataModule, SFTModule, Trainer
    from deft_lightning.callbacks import GracefulStop

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(8)))
    stop = GracefulStop()
    seen = []

    class Press(Callback):
        def on_train_batch_start(self, *args: object) -> None:
            seen.append(signal.getsignal(signal.SIGINT))
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(max_steps=50, default_root_dir=str(tmp_path), callbacks=[stop], logger=False, accelerator="cpu")
    trainer.callbacks.append(Press())
    module = SFTModule(architecture=SHAPE)
    trainer.fit(module, InstructionDataModule(str(source), validation_fraction=0.0, tokenizer_size=0, batch_size=2))
    assert stop.stopped and trainer.global_step == 2
    assert seen[0] == stop._handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_is_immediate() -> None:
    from deft_lightning.callbacks import GracefulStop

    stop = GracefulStop()
    stop._module = SimpleNamespace(stop_asked=False)
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGTERM, None)  # schedulers repeat themselves
    assert stop.asked and stop._module.stop_asked
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)
