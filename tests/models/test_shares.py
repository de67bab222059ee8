"""Folders of shares: resumed bit for bit, never unpickled as they are, and refused where they do not fit together."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from deft_lightning.errors import UserError
from deft_lightning.models import load_checkpoint, model_from_checkpoint
from deft_lightning.models.seal import DIGESTS
from deft_lightning.models.shares import METADATA, read_metadata, read_weights

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("shares_worker.py")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the loads of a real rank, and a folder that it saved."""
    root = tmp_path_factory.mktemp("shares")
    env = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(root)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_resume_from_shares_is_bit_exact(told: dict[str, Any]) -> None:
    assert told["difference after a resume"] == 0.0


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("code in an entry of a share", "not a plain value"),
        ("code in .metadata", "which is not part of a checkpoint's metadata"),
        ("code in meta.pt", "which is not a plain value, and loading it would run code"),
        ("a flipped bit in a share", r"is damaged: __0_0\.distcp has changed"),
    ],
)
def test_a_rank_refuses_it_in_one_line_and_no_code_runs(attack: str, why: str, told: dict[str, Any]) -> None:
    line = told[attack]
    assert line.startswith("UserError: ") and "--ckpt_path" in line and "\n" not in line
    assert re.search(why, line), line
    assert told[f"{attack}: code ran"] == "False"


def test_a_folder_is_exported_without_ranks(told: dict[str, Any]) -> None:
    checkpoint = load_checkpoint(told["kept"])
    model, _, _ = model_from_checkpoint(checkpoint)
    assert all(
        torch.equal(model.state_dict()[n.removeprefix("model.")], v) for n, v in checkpoint["state_dict"].items()
    )


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


Change = Callable[[metadata.Metadata, Path], Any]


def first_place(found: metadata.Metadata, **values: Any) -> None:
    place = next(iter(found.storage_data.values()))
    for name, value in values.items():
        setattr(place, name, value)


def grow(found: metadata.Metadata, size: tuple[int, ...]) -> None:
    entry = next(e for e in found.state_dict_metadata.values() if isinstance(e, metadata.TensorStorageMetadata))
    entry.size = torch.Size(size)


ODD: dict[str, tuple[Change, str]] = {
    "code in the planner's data": (lambda m, p: setattr(m, "planner_data", Touch(p)), "Path.touch"),
    "code for a size": (lambda m, p: grow_any(m, Touch(p)), "Path.touch"),
    "a share above the folder": (lambda m, p: first_place(m, relative_path="../outside"), "not in the folder"),
    "a share by an absolute name": (lambda m, p: first_place(m, relative_path="/etc/passwd"), "not in the folder"),
    "a place behind the end": (lambda m, p: first_place(m, offset=1 << 40), "cut short"),
    "a place before the start": (lambda m, p: first_place(m, offset=-5), "an offset is not a number"),
    "a place of text": (lambda m, p: first_place(m, length="9"), "an offset is not a number"),
    "a transform": (lambda m, p: first_place(m, transform_descriptors=["zstd"]), "compressed"),
    "a size beyond all memory": (lambda m, p: grow(m, (1 << 40, 1 << 20)), "more than all its files"),
    "no list of places": (lambda m, p: setattr(m, "storage_data", None), "lists nothing"),
}


def grow_any(found: metadata.Metadata, value: Any) -> None:
    entry = next(e for e in found.state_dict_metadata.values() if isinstance(e, metadata.TensorStorageMetadata))
    entry.size = value


@pytest.mark.parametrize(("change", "why"), ODD.values(), ids=ODD)
def test_metadata_that_does_not_fit_its_files_is_refused(
    change: Change, why: str, told: dict[str, Any], tmp_path: Path
) -> None:
    folder, marker = tmp_path / "theirs.ckpt", tmp_path / "marker"
    shutil.copytree(told["kept"], folder)
    (folder / DIGESTS).unlink()
    found = read_metadata(folder)
    change(found, marker)
    (folder / METADATA).write_bytes(pickle.dumps(found))
    for read in (read_metadata, read_weights, load_checkpoint):
        with pytest.raises(UserError, match=why) as caught:
            read(folder)  # type: ignore[operator]
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"", b"nonsense", pickle.dumps({"a": 1}), pickle.dumps(None), b"cos\nsystem\n(S'touch marker'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"\x80\x04" + b"(" * 100_000,
        # Numbers for which the unpickler in C sets memory aside: 34 GB, 8 GB, 8 GB.
        b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x8e" + (1 << 33).to_bytes(8, "little") + b"x.",
        # Attributes of a class, which stay: torch.Size would have another meaning from then on.
        b"ctorch\nSize\n(N}S'numel'\nI1\nstb.", b"ctorch.serialization\n_get_layout\n}S'a'\nI1\nsb.",
    ],
)  # fmt: skip
def test_what_is_no_metadata_is_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(text)
    with pytest.raises(UserError, match=r"\.metadata: cannot be read") as caught:
        read_metadata(tmp_path)
    assert "\n" not in str(caught.value) and not Path("marker").exists()


def test_a_link_that_leads_out_of_the_folder_is_no_share(told: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "theirs.ckpt"
    shutil.copytree(told["kept"], folder)
    (folder / DIGESTS).unlink()
    (folder / "__0_0.distcp").rename(tmp_path / "outside")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="not in the folder"):
        load_checkpoint(folder)
