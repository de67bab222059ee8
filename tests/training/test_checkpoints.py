"""Checkpoints: there whole, or as they were before."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import kill_and_go_on

from deft_lightning import Trainer
from deft_lightning.atomic import partial_name
from deft_lightning.errors import UserError
from deft_lightning.training.checkpoint_io import AtomicCheckpointIO
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.resume import newest_checkpoint

pytestmark = pytest.mark.slow


def test_a_save_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    for value in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["value"] == value
    assert [found.name for found in path.parent.iterdir()] == ["a.ckpt"]


def test_what_a_dead_process_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from deft_lightning.atomic import partial_name
        for name in ("a.ckpt", "b.ckpt"):  # a file, and a folder of shares
            partial = partial_name(Path({str(tmp_path)!r}) / name)
            partial.write_text("half") if name == "a.ckpt" else (partial.mkdir(), (partial / "x").touch())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert len(list(tmp_path.iterdir())) == 2
    mine, other = partial_name(tmp_path / "c.ckpt"), tmp_path / ".d.ckpt.elsewhere.1-2"
    mine.touch(), other.touch()
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "e.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name, "e.ckpt"}


class Stubborn:
    """Cannot be pickled once half of the file is written."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_previous_one_as_it_was(tmp_path: Path) -> None:
    path, io = tmp_path / "a.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"value": torch.ones(1000)}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="the disk is full; earlier ones are intact") as caught:
        io.save_checkpoint({"value": torch.zeros(1000), "more": Stubborn()}, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits of a process are tested on Linux")
def test_a_run_on_a_full_disk_ends_with_one_line_and_an_intact_checkpoint(tmp_path: Path) -> None:
    """A real process whose files may not grow: the second, larger checkpoint does not fit."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from deft_lightning.training.checkpoint_io import AtomicCheckpointIO
        from deft_lightning.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        io = AtomicCheckpointIO()
        io.save_checkpoint({"value": torch.ones(1000)}, sys.argv[1])
        try:
            io.save_checkpoint({"value": torch.ones(1 << 20)}, sys.argv[1])
        except UserError as error:
            print(error)
        """
    )
    path = tmp_path / "a.ckpt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot save the checkpoint" in done.stdout and len(done.stdout.splitlines()) == 1
    assert torch.load(path, weights_only=True)["value"].sum() == 1000
    assert [found.name for found in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_trainer_saves_that_way_unless_told_otherwise() -> None:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    options: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    assert isinstance(Trainer(**options).strategy.checkpoint_io, AtomicCheckpointIO)
    own = TorchCheckpointIO()
    assert Trainer(**options, plugins=[own]).strategy.checkpoint_io is own


def test_the_newest_checkpoint_may_be_a_folder_of_shares_and_must_be_complete(tmp_path: Path) -> None:
    file, folder, half = (tmp_path / name for name in ("a.ckpt", "b.ckpt", "c.ckpt"))
    torch.save({"deft_lightning": {}, "global_step": 1}, file)
    assert newest_checkpoint(tmp_path) == file
    folder.mkdir()
    (folder / ".metadata").touch()
    torch.save({"deft_lightning": {}, "global_step": 2}, folder / "meta.pt")
    os.utime(folder, (1, 1))
    assert newest_checkpoint(tmp_path) == folder
    (tmp_path / ".d.ckpt").mkdir()
    assert newest_checkpoint(tmp_path) == folder, "what is being written does not count"
    half.mkdir()
    with pytest.raises(UserError, match=rf"{half} is the newest, and cannot be read.*before it: --ckpt_path {folder}"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_sizes_that_were_never_tested_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="fsdp2"):
        FSDP2Strategy(**options)


@pytest.mark.skipif(sys.platform != "linux", reason="process groups are looked up in /proc")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_is_killed_twice_ends_as_one_that_was_left_alone(asynchronous: bool, tmp_path: Path) -> None:
    found = kill_and_go_on(tmp_path, 2, 200, "auto", seed=3, longest=12.0, asynchronous=asynchronous)
    assert found["kills"] >= 1 and found["largest difference of a weight"] == 0.0
