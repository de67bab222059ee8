"""Exported folders to a hub: a real client in a process of its own, and a server of this machine that it talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, serving
from huggingface_hub import ModelCard
from worlds import ROOT, fit_command, save_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def command(hub: Hub, folder: Path, *words: str, **more: str) -> tuple[int, str, str]:
    """Run the command line as a user does, against the hub; return status, all that was told, and its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "HF_HOME": str(folder / "hf"),
                   **hub.environment(), **more}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "deft_lightning", *words], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "Traceback" not in told, told[-3000:]
    return done.returncode, told, ([line for line in told.splitlines() if line.startswith("error: ")] or [""])[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    with serving() as hub:
        status, told, _ = command(hub, folder, *fit_command(folder), "--after_fit.export", "false")
    assert status == 0, told
    (path,) = folder.rglob("step=4.ckpt")
    return str(path)


def export(checkpoint: str, output: Path, *more: str) -> list[str]:
    return ["export", "--ckpt_path", checkpoint, "--output", str(output), "--trainer.accelerator", "cpu", *more]


@pytest.mark.parametrize("private", [True, False])
def test_what_arrives_is_what_was_written(private: bool, hub: Hub, checkpoint: str, tmp_path: Path) -> None:
    more = [] if private else ["--private", "false"]
    status, told, _ = command(hub, tmp_path, *export(checkpoint, tmp_path / "out", "--push_to_hub", "lab/mine", *more))
    assert status == 0 and f"pushed: {hub.address}/lab/mine" in told
    assert hub.repos == {"lab/mine": private}
    written = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    assert {path.removeprefix("lab/mine:"): content for path, content in hub.files.items()} == written
    assert "model.safetensors" in written and any(call.startswith("PUT /objects/") for call in hub.calls)
    loaded = ModelCard(hub.files["lab/mine:README.md"].decode())
    assert 'folder = "lab/mine"' in loaded.text and loaded.data.library_name == "transformers"  # type: ignore[attr-defined]


def test_a_second_push_adds_a_commit(hub: Hub, checkpoint: str, tmp_path: Path) -> None:
    hub.repos["ada/mine"], hub.files["ada/mine:notes.txt"] = True, b"mine"
    status, told, _ = command(hub, tmp_path, *export(checkpoint, tmp_path / "out", "--push_to_hub", "ada/mine"))
    assert status == 0 and "ada/mine: exists already; a commit will be added to it" in told
    assert hub.files["ada/mine:notes.txt"] == b"mine" and "ada/mine:model.safetensors" in hub.files


REFUSED = {
    "no owner": ("mine", {}, "name the repository as ORG/NAME"),
    "no name": ("lab/../mine", {}, "Repo id must be in the form"),
    "another's": ("other/mine", {}, "who may write to ada, lab, not to other"),
    "reader": ("readers/mine", {}, "ada may only read in readers"),
    "no token": ("lab/mine", {"HF_TOKEN": ""}, "no hub token found"),
    "wrong token": ("lab/mine", {"HF_TOKEN": "hf_another"}, "the hub refuses: Invalid user token"),
    "offline": ("lab/mine", {"HF_HUB_OFFLINE": "1"}, "the hub cannot be asked: "),
    "nobody": ("lab/mine", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be asked: "),
    "public": ("lab/open", {}, "exists already and is public; set --private false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_written(
    case: str, hub: Hub, checkpoint: str, tmp_path: Path
) -> None:
    name, more, wanted = REFUSED[case]
    hub.repos["lab/open"] = False
    status, told, line = command(hub, tmp_path, *export(checkpoint, tmp_path / "out", "--push_to_hub", name), **more)
    assert status == 2 and wanted in line and "--push_to_hub" in line, told
    assert not (tmp_path / "out").exists() and hub.repos == {"lab/open": False} and TOKEN not in told


def test_a_token_that_may_only_read_is_refused(hub: Hub, checkpoint: str, tmp_path: Path) -> None:
    hub.role = "read"
    status, _, line = command(hub, tmp_path, *export(checkpoint, tmp_path / "out", "--push_to_hub", "lab/mine"))
    assert status == 2 and "the token of ada may only read" in line


def test_a_push_that_fails_keeps_the_folder_and_says_how_to_repeat_it(
    hub: Hub, checkpoint: str, tmp_path: Path
) -> None:
    hub.broken = ("/commit/main",)
    status, _, line = command(hub, tmp_path, *export(checkpoint, tmp_path / "out", "--push_to_hub", "lab/mine"))
    assert status == 2 and "lab/mine: cannot be pushed: " in line and "out of order" in line
    assert line.endswith(f"{tmp_path / 'out'} is kept: hf upload lab/mine {tmp_path / 'out'} --private")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_fit_checks_first_and_pushes_last(hub: Hub, tmp_path: Path) -> None:
    words = [*fit_command(tmp_path), "--after_fit.push_to_hub"]
    status, told, line = command(hub, tmp_path, *words, "other/mine")
    assert status == 2 and "not to other" in line and "--after_fit.push_to_hub other/mine" in line
    assert not (tmp_path / "logs").exists() and "train:" not in told  # not even the data is read

    status, told, _ = command(hub, tmp_path, *words, "lab/mine")
    exported = tmp_path / "logs" / "version_0" / "export"
    assert status == 0 and hub.repos == {"lab/mine": True}
    assert told.index("trained: 4 optimizer steps") < told.index("pushed: ")
    assert hub.files["lab/mine:model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert b"`4`" in hub.files["lab/mine:README.md"]
    assert hub.calls[0] == "GET /api/whoami-v2"

    hub.broken = ("/repos/create",)
    status, told, line = command(hub, tmp_path, *words, "lab/second")
    assert status == 2 and "lab/second: cannot be pushed" in line and "push failed" in line
    checkpoints = tmp_path / "logs" / "version_1" / "checkpoints"
    assert f"training is complete and saved in {checkpoints / 'step=4.ckpt'}" in line
    assert (tmp_path / "logs" / "version_1" / "export" / "model.safetensors").is_file()


def test_a_push_of_nothing_is_refused(hub: Hub, tmp_path: Path) -> None:
    words = ["--after_fit.push_to_hub", "lab/mine", "--after_fit.export", "false"]
    status, _, line = command(hub, tmp_path, *fit_command(tmp_path), *words)
    assert status == 2 and "--after_fit.push_to_hub lab/mine: nothing is exported (--after_fit.export)" in line
    assert not hub.calls


def test_adapters_that_name_a_folder_of_this_machine_are_told(hub: Hub, tmp_path: Path) -> None:
    fit_command(tmp_path)  # writes the rows
    base = save_tiny_llama(tmp_path / "base", spread=0.3)
    words = [
        "fit", "--data.source", str(tmp_path / "rows.jsonl"), "--data.batch_size", "2", "--data.validation_fraction",
        "0", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(tmp_path / "logs"), "--model.pretrained", base, "--model.lora.r", "2",
        "--after_fit.merge", "none", "--after_fit.push_to_hub", "lab/adapters",
    ]  # fmt: skip
    status, told, _ = command(hub, tmp_path, *words)
    assert status == 0 and f"adapter_config.json names the base as the folder {base} of this machine" in told
    named = json.loads(hub.files["lab/adapters:adapter_config.json"])["base_model_name_or_path"]
    assert named == base and str(tmp_path).encode() not in hub.files["lab/adapters:README.md"]
