"""A checkpoint in which a single bit has changed is not used; nor one that is malformed."""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, VOCAB

from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import describe, from_architecture, load_checkpoint, model_from_checkpoint, read_checkpoint
from deft_lightning.models.contents import is_inside, problem
from deft_lightning.models.seal import DIGESTS, check_folder, file_digest, write_digests
from deft_lightning.training.checkpoint_io import AtomicCheckpointIO
from deft_lightning.training.resume.refuse import peek


def whole() -> dict[str, Any]:
    """A checkpoint as one of a run is, without an optimizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["hello"], 0)
    model = from_architecture({**LLAMA, "vocab_size": max(VOCAB, len(tokenizer))}, tokenizer, "float32")
    return {
        "epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {},
        "state_dict": {f"model.{name}": value.clone() for name, value in model.state_dict().items()},
        "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": [],
        "deft_lightning": {
            **describe(model, tokenizer, None, [1]), "objective": "DEFT()", "tokens_seen": 5, "training": [1.0, 1.0],
            "gates": [0.0, 0.0],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(whole(), path)
    return path


def test_what_is_saved_is_read_as_it_was_by_this_package_and_by_torch(saved: Path) -> None:
    for found in (
        load_checkpoint(saved),
        torch.load(saved, weights_only=True),
        AtomicCheckpointIO().load_checkpoint(saved),
    ):
        assert all(torch.equal(found["state_dict"][name], value) for name, value in whole()["state_dict"].items())
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"deft_lightning sha256 ")


@pytest.mark.slow
def test_a_flip_of_any_of_200_bits_is_refused_by_what_fit_and_what_export_reads(saved: Path, tmp_path: Path) -> None:
    raw, draw, flipped = saved.read_bytes(), random.Random(12), tmp_path / "flipped.ckpt"
    places = [draw.randrange(len(raw)) for _ in range(150)] + [len(raw) - 1 - i for i in range(0, 120, 3)]
    places += [draw.randrange(4096) for _ in range(10)]
    assert len(places) == 200
    for at in places:
        changed = bytearray(raw)
        changed[at] ^= 1 << draw.randrange(8)
        flipped.write_bytes(changed)
        for read in (load_checkpoint, AtomicCheckpointIO().load_checkpoint):
            with pytest.raises(UserError) as caught:
                read(flipped)
            assert str(flipped) in str(caught.value) and "--ckpt_path" in str(caught.value)


def test_the_damaged_member_is_named(saved: Path, tmp_path: Path) -> None:
    raw, flipped = bytearray(saved.read_bytes()), tmp_path / "flipped.ckpt"
    with zipfile.ZipFile(saved) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/1"))
    raw[member.header_offset + 300] ^= 0x40
    flipped.write_bytes(raw)
    with pytest.raises(UserError, match=r"flipped\.ckpt: is damaged: its member archive/data/1 has changed"):
        load_checkpoint(flipped)


@pytest.mark.parametrize("length", [0, 10, 100, 5000, -1, -22, -86, -108, -109])
def test_a_file_cut_short_is_refused(length: int, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut\.ckpt"):
        load_checkpoint(tmp_path / "cut.ckpt")


def test_of_an_archive_that_others_wrote_the_members_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save(whole(), path)
    assert load_checkpoint(path)["global_step"] == 3
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = next(m for m in archive.infolist() if m.filename.endswith("data/0")).header_offset + 300
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="has changed"):
        load_checkpoint(path)


def test_a_compressed_archive_is_refused_as_it_could_unpack_to_any_size(tmp_path: Path) -> None:
    torch.save({**whole(), "zeros": torch.zeros(1 << 20)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as old,
        zipfile.ZipFile(tmp_path / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(UserError, match=r"small\.ckpt: is refused: it is compressed"):
        load_checkpoint(tmp_path / "small.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_what_is_compressed_is_not_unpacked_to_find_out(tmp_path: Path, how: int) -> None:
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(bomb, "w", how, compresslevel=9) as archive, archive.open("archive/data.pkl", "w") as member:
        for _ in range(48):
            member.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 14
    tracemalloc.start()
    with pytest.raises(UserError, match="could unpack to any size"):
        load_checkpoint(bomb)
    assert peek(bomb) is None and tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_members_that_lie_over_each_other_are_not_read_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "same.ckpt"
    torch.save({"a": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path) as archive:
        place, largest = archive.start_dir, max(archive.infolist(), key=lambda member: member.file_size)
    raw = path.read_bytes()
    at = raw.rindex(largest.filename.encode()) - 46
    entry = raw[at : at + 46 + len(largest.filename) + int.from_bytes(raw[at + 30 : at + 32], "little")]
    listed = entry * 5000
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 5000, 5000, len(listed), place, 0)
    path.write_bytes(raw[:place] + listed + end)
    begin = time.process_time()
    with pytest.raises(UserError, match=r"same\.ckpt: is refused: its members overlap"):
        load_checkpoint(path)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "files", [{"tokenizer.json": "\ud800"}, {"tokenizer.json": "{}", "a": "x", "a/b": "y"}, {"tokenizer.json": "{"}]
)
def test_a_tokenizer_that_cannot_be_written_is_one_line(files: dict[str, str]) -> None:
    held = whole()
    held["deft_lightning"]["tokenizer"] = files
    with pytest.raises(UserError, match="--ckpt_path: the checkpoint's tokenizer cannot be loaded"):
        model_from_checkpoint(held)


def test_what_was_verified_is_verified_again_once_it_has_changed(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    shutil.copyfile(saved, path)
    load_checkpoint(path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path)


# --- malformed: valid archives whose content is not what it should be -------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def without(*path: str) -> Change:
    def change(held: dict[str, Any]) -> None:
        for key in path[:-1]:
            held = held[key]
        del held[path[-1]]

    return change


def setting(value: Any, *path: str) -> Change:
    def change(held: dict[str, Any]) -> None:
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value

    return change


OWN = "deft_lightning"
MALFORMED: dict[str, Change] = {
    "no state_dict": without("state_dict"),
    "no part of this package": without(OWN),
    "a list for this package's part": setting([1], OWN),
    "no config": without(OWN, "config"),
    "config no JSON": setting("{", OWN, "config"),
    "config a list": setting("[1]", OWN, "config"),
    "config without model_type": setting("{}", OWN, "config"),
    "config of deep JSON": setting("[" * 100_000, OWN, "config"),
    "unknown model_type": setting('{"model_type": "nonsense"}', OWN, "config"),
    "config of another size": setting('{"model_type": "llama", "hidden_size": 8, "vocab_size": 9}', OWN, "config"),
    "heads that do not divide": setting('{"model_type": "llama", "hidden_size": "x"}', OWN, "config"),
    "generation_config a number": setting(7, OWN, "generation_config"),
    "dtype that torch does not have": setting("int8; import os", OWN, "dtype"),
    "dtype of whole numbers": setting("int64", OWN, "dtype"),
    "lora of unknown options": setting({"r": 4, "evil": 1}, OWN, "lora"),
    "lora of a text": setting({"r": "x"}, OWN, "lora"),
    "lora where there are no adapters": setting({"r": 4}, OWN, "lora"),
    "tokenizer a list": setting(["a"], OWN, "tokenizer"),
    "tokenizer of bytes": setting({"tokenizer.json": b"x"}, OWN, "tokenizer"),
    "tokenizer that is none": setting({"tokenizer.json": "{}"}, OWN, "tokenizer"),
    "stop tokens of text": setting(["a"], OWN, "stop_token_ids"),
    "tokens_seen negative": setting(-1, OWN, "tokens_seen"),
    "gates not finite": setting([float("nan"), 1.0], OWN, "gates"),
    "weights of text": setting({"model.a": "x"}, "state_dict"),
    "weights by number": setting({1: torch.ones(1)}, "state_dict"),
    "no weights": setting({}, "state_dict"),
    "weights of another shape": setting({"model.a": torch.ones(1)}, "state_dict"),
    "version of no number": setting("x\n\x1b[2J", "pytorch-lightning_version"),
    "global_step of text": setting("3", "global_step"),
    "epoch negative": setting(-1, "epoch"),
    "loops a list": setting([], "loops"),
    "optimizer_states an object": setting({}, "optimizer_states"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.filterwarnings("ignore")
def test_a_malformed_checkpoint_is_one_line(change: Change, tmp_path: Path) -> None:
    held, path = whole(), tmp_path / "odd.ckpt"
    change(held)
    AtomicCheckpointIO().save_checkpoint(held, path)
    with pytest.raises(UserError) as caught:
        model_from_checkpoint(load_checkpoint(path))
    assert "ckpt" in str(caught.value) and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [[], "text", None, 7, torch.ones(2), {"a": 1}, {1: 2}])
def test_archives_that_hold_something_else_are_one_line(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: is not a checkpoint of SFTModule"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_the_whole_one_has_no_problem() -> None:
    assert not problem(whole())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer, stops = model_from_checkpoint(whole())
    assert stops == [1] and tokenizer is not None and model.training


NAMES = {
    "tokenizer.json": True, "additional_chat_templates/tool_use.jinja": True, "a b.txt": True,
    "../x": False, "a/../../x": False, "/etc/x": False, "C:/x": False, "C:x": False, "..\\x": False, "a\\b": False,
    "": False, ".": False, "..": False, "a//b": False, "./a": False, "a/": False, ".hidden": False, "~/x": False,
    "a/b/c/d": False, "a\nb": False, "a\0b": False, "x" * 300: False, "\u202ea": False, "-rf": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "inside"), NAMES.items())
def test_names_stay_in_their_folder(name: str, inside: bool) -> None:
    assert is_inside(name) is inside


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, inside in NAMES.items() if not inside])
def test_a_checkpoint_that_names_files_elsewhere_is_refused_and_writes_nothing(name: str, tmp_path: Path) -> None:
    held, path = whole(), tmp_path / "theirs.ckpt"
    held[OWN]["tokenizer"][name] = "written by a checkpoint"
    torch.save(held, path)
    with pytest.raises(UserError, match=r"theirs\.ckpt: is refused: it names a file of its tokenizer"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="names a file of its tokenizer"):
        model_from_checkpoint(held)  # whoever has read it


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_is_compared_with_its_digests(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert not check_folder(tmp_path), "there is nothing to compare with"
    write_digests(tmp_path, {name: file_digest(tmp_path / name) for name in ("a", "b")})
    assert check_folder(tmp_path)


@pytest.mark.parametrize("odd", ["changed", "missing", "added", "list changed", "list cut"])
def test_a_folder_that_is_not_what_was_written_is_named(odd: str, tmp_path: Path) -> None:
    from deft_lightning.models.seal import Damaged

    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_digests(tmp_path, {name: file_digest(tmp_path / name) for name in ("a", "b")})
    listed = (tmp_path / DIGESTS).read_text()
    if odd == "changed":
        (tmp_path / "b").write_text("c")
    elif odd == "missing":
        (tmp_path / "b").unlink()
    elif odd == "added":
        (tmp_path / "c").write_text("c")
    elif odd == "list changed":
        (tmp_path / DIGESTS).write_text(listed.replace("  b", "\t b"))
    else:
        (tmp_path / DIGESTS).write_text(listed[:-1])
    with pytest.raises(Damaged, match=rf"({DIGESTS}|b|c) (has changed|is missing|was not written with it)"):
        check_folder(tmp_path)


def test_a_bit_of_the_list_of_digests_cannot_change_unseen(tmp_path: Path) -> None:
    from deft_lightning.models.seal import Damaged

    (tmp_path / "__0_0.distcp").write_text("share")
    write_digests(tmp_path, {"__0_0.distcp": file_digest(tmp_path / "__0_0.distcp")})
    raw = (tmp_path / DIGESTS).read_bytes()
    for at in range(len(raw)):
        for bit in (0, 3, 5):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            (tmp_path / DIGESTS).write_bytes(changed)
            with pytest.raises(Damaged):
                check_folder(tmp_path)


def test_reading_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.ckpt", "no such checkpoint"), (tmp_path, "not a complete checkpoint")):
        with pytest.raises(UserError, match=why):
            read_checkpoint(path)
