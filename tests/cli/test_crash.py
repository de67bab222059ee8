"""How runs end that do not end well: one line, the status, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from worlds import ROOT, fit_command

from deft_lightning import callbacks
from deft_lightning.__main__ import main
from deft_lightning.atomic import check_output_file
from deft_lightning.cli.crash import ended, explain
from deft_lightning.errors import UserError
from deft_lightning.ranks import RANKS


def end(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the command line in this process; return status and the one line of its error."""
    monkeypatch.setattr("sys.argv", ["deft_lightning", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return int(stop.value.code or 0), line


class Fail(Callback):
    """Fails in one hook, as a user's own callback may."""

    def __init__(self, hook: str, error: str = "RuntimeError") -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            if hook != "on_train_batch_end" or args[0].global_step == 3:
                raise {"RuntimeError": RuntimeError("the sky\x1b[2J fell"), "memory": MemoryError()}[error]

        setattr(self, hook, fail)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_fit_end", "teardown"])
def test_an_unexpected_error_goes_to_a_file_and_names_the_checkpoint(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "Fail", Fail, raising=False)
    own = ["--trainer.callbacks+=tests_fail.Fail", f"--trainer.callbacks.hook={hook}"]
    monkeypatch.setitem(sys.modules, "tests_fail", sys.modules[__name__])
    monkeypatch.setattr(Fail, "__module__", "tests_fail")
    status, line = end(fit_command(tmp_path, *own), monkeypatch, capsys)
    assert status == 1 and "unexpected RuntimeError: the sky\\x1b[2J fell" in line
    (file,) = (tmp_path / "logs" / "version_0").glob("crash-*.txt")
    assert str(file) in line
    step = 2 if hook == "on_train_batch_end" else 4
    assert str(tmp_path / "logs" / "version_0" / "checkpoints" / f"step={step}.ckpt") in line
    told = file.read_text()
    assert "Traceback" in told and f"torch {torch.__version__}" in told and "hidden_size: 16" in told
    assert "\x1b" not in told


@pytest.mark.slow
def test_what_fails_after_training_leaves_the_checkpoint_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exporter = import_module("deft_lightning.training.verbs.export")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "model.safetensors"))

    monkeypatch.setattr(exporter, "save_hugging_face", full)
    status, line = end(fit_command(tmp_path), monkeypatch, capsys)
    checkpoint = tmp_path / "logs" / "version_0" / "checkpoints" / "step=4.ckpt"
    assert status == 2 and f"{tmp_path / 'model.safetensors'}: the disk is full; export failed" in line
    command = line.partition("repeat it with python -m deft_lightning ")[2].split()
    assert command[:3] == ["export", "--ckpt_path", str(checkpoint)]
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["deft_lightning", *command])
    main()
    assert (tmp_path / "logs" / "version_0" / "export" / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), "--data.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "2.00 GiB"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            "8 by",
        ),
        (OSError(12, "Cannot allocate memory"), "--model.gradient_checkpointing"),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "--data.num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "--data.num_workers"),
        (BrokenProcessPool("terminated abruptly"), "--data.num_proc"),
        (OSError(28, "No space left on device", "there"), "there: the disk is full"),
        (UserError("mine"), "mine"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_known_causes_are_told_with_the_way_out(error: BaseException, wanted: str) -> None:
    line = explain(error)
    assert line is not None and wanted in line and "\n" not in line


def test_other_errors_are_not_taken_for_known_ones() -> None:
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(KeyError("momentum")) is None and explain(RuntimeError("Connection reset by peer")) is None


@pytest.mark.slow
def test_a_killed_loader_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deft_lightning.data.loading.collate.TrainCollator.__call__", _killed)
    status, line = end(fit_command(tmp_path, "--data.num_workers", "1"), monkeypatch, capsys)
    assert status == 2 and "a loader process died" in line and "--data.num_workers" in line


def _killed(*args: Any) -> None:
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_interrupts_are_quiet_and_closed_pipes_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, ended():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    script = "from deft_lightning.cli.crash import ended\nwith ended():\n    [print('x' * 1000) for _ in range(1000)]\n"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


def test_a_crash_file_finds_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop, ended():
        raise KeyError("what")
    (file,) = tmp_path.glob("crash-*.txt")
    assert stop.value.code == 1 and str(file) in capsys.readouterr().err
    monkeypatch.setenv("DEFT_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(SystemExit), ended():
        raise KeyError("what")
    assert "Traceback" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "more" / "out"):
        with pytest.raises(UserError, match=r"--output .*cannot be written"):
            check_output_file(path, "--output")
    with pytest.raises(UserError, match="is a folder"):
        check_output_file(tmp_path, "--output")
    check_output_file(tmp_path / "new" / "out", "--output")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_single_process_speaks_for_itself() -> None:
    assert RANKS.may_tell(lost=False) and RANKS.may_tell(lost=False)
