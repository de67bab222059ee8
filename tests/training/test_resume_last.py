"""``--ckpt_path last``: the newest checkpoint of the newest run, by number and step; a run's config repeats it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_resume_settings import fit, multiples
from worlds import save_tiny_llama

from deft_lightning import Trainer
from deft_lightning.cli.main import run
from deft_lightning.errors import UserError
from deft_lightning.training.resume import last_checkpoint, run_folder

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write a checkpoint as far as the choice reads it; each is dated before the one written last."""
    dates = iter(range(10**9, 0, -1000))

    def write(name: str, step: int | None = None, run: str = "", line: str = "", started: float | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {}
        if run:
            about = {"run": {"id": run, "line": [*line, run], "folder": None, "started": started}}
        held = {"deft_lightning": about, "state_dict": {}}
        torch.save(held if step is None else {**held, "global_step": step}, path)
        date = next(dates)
        os.utime(path, (date, date))
        return path

    return write


def cut_short(path: Path) -> Path:
    date = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, (date, date))
    return path


def chosen(*roots: Path, named: Path | None = None) -> tuple[Path, str]:
    found = last_checkpoint(roots, named)
    assert found is not None
    return found.path, "; ".join(found.said)


def test_the_newest_run_wins_over_a_longer_one_and_the_other_is_named(put: Put, tmp_path: Path) -> None:
    put("version_0/checkpoints/step=3.ckpt", 3, "a")
    longest = put("version_1/checkpoints/step=6.ckpt", 6, "b", line="a")
    newest = put("version_2/checkpoints/step=2.ckpt", 2, "c")
    assert chosen(tmp_path) == (
        newest, f"step 2; another run lies there too, {tmp_path}/version_1 (step 6): name it with --ckpt_path {longest}"
    )  # fmt: skip
    (tmp_path / "version_1" / "config.yaml").touch()
    assert f"name it with --config {tmp_path}/version_1/config.yaml" in chosen(tmp_path)[1]


def test_a_run_and_those_it_goes_back_to_are_one(put: Put, tmp_path: Path) -> None:
    put("version_0/checkpoints/step=3.ckpt", 3, "a")
    newest = put("version_10/checkpoints/step=6.ckpt", 6, "b", line="a")
    assert chosen(tmp_path) == (newest, "step 6")


def test_a_named_run_means_itself_and_what_goes_back_to_it(put: Put, tmp_path: Path) -> None:
    files = [
        put("version_0/checkpoints/step=3.ckpt", 3, "a"), put("version_1/checkpoints/step=6.ckpt", 6, "b", line="a"),
        put("version_2/checkpoints/step=9.ckpt", 9, "c"), put("version_3/checkpoints/step=5.ckpt", 5, "d", line="a"),
    ]  # fmt: skip
    named = [chosen(tmp_path, named=tmp_path / f"version_{n}")[0] for n in range(4)]
    assert named == [files[3], files[1], files[2], files[3]]
    assert last_checkpoint([tmp_path], tmp_path / "version_7") is None


def test_runs_that_share_a_folder_are_told_apart_by_what_they_say(put: Put, tmp_path: Path) -> None:
    put("all/step=100.ckpt", 100, "a", started=10.0)
    newest = put("all/step=5-v1.ckpt", 5, "b", started=20.0)
    put("all/step=4.ckpt", 4, "b", started=20.0)
    assert chosen(tmp_path)[0] == newest
    resumed = put("all/step=101.ckpt", 101, "c", line="a", started=30.0)
    assert chosen(tmp_path)[0] == resumed


def test_checkpoints_that_say_nothing_of_their_run_are_ordered_by_step_then_by_date(put: Put, tmp_path: Path) -> None:
    inside = put("any name.ckpt", 7)
    put("step=5.ckpt", 5)
    assert chosen(tmp_path) == (inside, "step 7"), "the step inside, not the name"
    put("step=4-v1.ckpt", 4)
    again = put("step=7-v1.ckpt", 7)
    assert chosen(tmp_path)[0] == again
    put("other.ckpt", 7)
    later = put("later.ckpt", 8)
    put("later too.ckpt", 8)
    assert chosen(tmp_path)[0] == later


def test_links_stand_for_their_file_and_copies_for_themselves(put: Put, tmp_path: Path) -> None:
    file = put("version_0/checkpoints/step=3.ckpt", 3)
    (file.parent / "last.ckpt").symlink_to(file)
    (file.parent / "gone.ckpt").symlink_to(file.parent / "deleted.ckpt")
    assert chosen(tmp_path)[0] == file
    (file.parent / "last.ckpt").unlink()
    copy = put("version_0/checkpoints/last.ckpt", 5)
    assert chosen(tmp_path)[0] == copy, "with a monitored value the last one is a file of its own"


def test_runs_under_different_folders_are_ordered_by_their_beginning(put: Put, tmp_path: Path) -> None:
    put("x/version_9/checkpoints/step=9.ckpt", 9, "a", started=1.0)
    newest = put("y/version_0/checkpoints/step=1.ckpt", 1, "b", started=2.0)
    path, said = chosen(tmp_path)
    assert path == newest and "x/version_9 (step 9)" in said


def test_a_damaged_newest_is_an_error_that_names_the_one_before(put: Put, tmp_path: Path) -> None:
    good = put("version_0/checkpoints/step=3.ckpt", 3, "a")
    damaged = cut_short(put("version_0/checkpoints/step=6.ckpt", 6, "a"))
    with pytest.raises(UserError, match=rf"{damaged} is the newest, and .* damaged.*: --ckpt_path {good}"):
        last_checkpoint([tmp_path])
    damaged.unlink()
    alone = cut_short(put("version_1/checkpoints/step=1.ckpt", 1, "b"))
    with pytest.raises(UserError, match=rf"{alone} is the newest, and .*: --ckpt_path {good}"):
        last_checkpoint([tmp_path])
    alone.unlink()
    older = cut_short(put("version_0/checkpoints/step=1.ckpt", 1, "a"))
    path, said = chosen(tmp_path)
    assert path == good and f"skipped {older}: cannot be read" in said


def test_files_of_other_programs_are_no_runs(put: Put, tmp_path: Path) -> None:
    torch.save({"weights": 1}, tmp_path / "theirs.ckpt")
    good = put("version_0/checkpoints/step=3.ckpt", 3)
    torch.save({"weights": 1}, tmp_path / "version_0" / "checkpoints" / "step=9.ckpt")
    path, said = chosen(tmp_path)
    assert path == good and "step=9.ckpt: is not a checkpoint of SFTModule" in said


def test_only_a_config_that_a_run_has_written_names_it(tmp_path: Path) -> None:
    for name in ("version_3/config.yaml", "version_3/mine.yaml", "configs/config.yaml", "w/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "w" / "checkpoints").mkdir()
    assert run_folder(tmp_path / "version_3" / "config.yaml") == tmp_path / "version_3"
    assert run_folder(tmp_path / "w" / "config.yaml") == tmp_path / "w"
    for name in ("version_3/mine.yaml", "configs/config.yaml", "missing/config.yaml"):
        assert run_folder(tmp_path / name) is None


@pytest.mark.slow
def test_last_is_resumed_from_python_wherever_checkpoints_lie(tmp_path: Path) -> None:
    source, apart = multiples(tmp_path / "rows.jsonl"), {"dirpath": str(tmp_path / "apart")}
    with pytest.raises(UserError, match=r"--ckpt_path last: no checkpoint under"):
        fit(tmp_path / "runs", source, 1, "last")
    fit(tmp_path / "runs", source, 1, saver=apart)
    trainer, _ = fit(tmp_path / "runs", source, 3, "last", saver=apart)
    assert trainer.global_step == 3
    held = torch.load(tmp_path / "apart" / "step=3.ckpt", weights_only=True)["deft_lightning"]["run"]
    assert len(held["line"]) == 2 and held["line"][-1] == held["id"]
    assert trainer.last_checkpoint() == tmp_path / "apart" / "step=3.ckpt", "its own, whatever lies there"
    fit(tmp_path / "runs", source, 4, "last", saver={**apart, "save_weights_only": True})
    with pytest.raises(UserError, match=r"step=4\.ckpt: holds weights only"):
        fit(tmp_path / "runs", source, 6, "last", saver=apart)


def test_a_last_one_that_has_changed_on_the_way_names_the_one_before(tmp_path: Path) -> None:
    source, saver = multiples(tmp_path / "rows.jsonl"), {"save_top_k": -1, "every_n_train_steps": 1}
    fit(tmp_path, source, 2, saver=saver)
    newest, older = (tmp_path / "version_0" / "checkpoints" / f"step={step}.ckpt" for step in (2, 1))
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    newest.write_bytes(raw)
    wanted = rf"{newest}: is damaged.*; the newest before it: --ckpt_path {older}"
    with pytest.raises(UserError, match=wanted):
        fit(tmp_path, source, 4, "last")
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", logger=False)
    with pytest.raises(UserError, match=wanted):
        trainer.export(ckpt_path="last", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- the command line -----------------------------------------------------------------------------------------------


def final_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "checkpoints" / f"step={step}.ckpt", weights_only=True)["state_dict"])


@pytest.mark.slow
def test_a_resumed_runs_config_repeats_it_and_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    model, root = save_tiny_llama(tmp_path / "model", 0.3), tmp_path / "runs"
    arguments = [
        "--data.source", multiples(tmp_path / "rows.jsonl"), "--data.validation_fraction", "0",
        "--data.batch_size", "4", "--model.pretrained", model, "--model.optimizer.lr", "0.01",
        "--after_fit.export", "false",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(root),
    ]  # fmt: skip
    run(["fit", *arguments, "--trainer.max_steps", "2"])
    run(["fit", *arguments, "--trainer.max_steps", "4", "--ckpt_path", "last"])
    first = root / "version_0" / "checkpoints" / "step=2.ckpt"
    assert yaml.safe_load((root / "version_1" / "config.yaml").read_text())["ckpt_path"] == str(first.resolve())
    for path in (first, first.parent / "last.ckpt"):  # as a clock that was wrong dates them
        os.utime(path, (2e9, 2e9), follow_symlinks=False)
    run(["fit", "--config", str(root / "version_1" / "config.yaml")])
    one, two = (final_weights(root / f"version_{n}", 4) for n in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) == 0.0
    caplog.clear()
    config = str(root / "version_0" / "config.yaml")
    run(["export", "--config", config, "--ckpt_path", "last", "--output", str(tmp_path / "out")])
    assert f"--ckpt_path last: {root}/version_2/checkpoints/step=4.ckpt; step 4" in caplog.text
    assert list((tmp_path / "out").glob("*.safetensors"))
    caplog.clear()
    with pytest.raises(SystemExit) as stop:
        run(["fit", *arguments, "--trainer.max_steps", "6", "--ckpt_path", "last", "--model.optimizer", "SGD",
             "--model.optimizer.lr", "0.1"])  # fmt: skip
    assert stop.value.code == 2 and not (root / "version_3").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--model.optimizer SGD" in lines[0] and "trained with AdamW" in lines[0]
