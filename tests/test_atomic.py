"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from deft_lightning.atomic import is_partial, partial_name, sweep, whole_file, whole_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    with whole_file(target) as partial:
        partial.write_text("1")
        assert not target.exists() and is_partial(partial)
    with whole_file(target, sync=True) as partial:
        partial.write_text("2")
        assert target.read_text() == "1"
    assert target.read_text() == "2" and names(target.parent) == {"a.json"}


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(target) as partial:
        partial.write_text("new")
        raise OSError("full")
    assert target.read_text() == "old" and names(tmp_path) == {"a"}


def test_a_folder_gets_its_name_once_it_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()  # empty: makes room
    with whole_folder(target) as partial:
        (partial / "x").write_text("1")
        assert not any(target.iterdir())
    assert (target / "x").read_text() == "1" and names(tmp_path) == {"out"}
    with pytest.raises(OSError), whole_folder(target) as partial:  # not empty: kept
        (partial / "y").touch()
    assert names(tmp_path) == {"out"} and names(target) == {"x"}


KILLED = """
    import sys, time
    from pathlib import Path
    from deft_lightning.atomic import whole_folder
    with whole_folder(Path(sys.argv[1]) / "out") as partial:
        (partial / "big").write_bytes(b"x" * 1000)
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the start of a process is read from /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path, how: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert len(names(tmp_path)) == 1 and not sweep(tmp_path), "its writer lives"
        process.send_signal(how)
        process.wait()
    assert len(sweep(tmp_path)) == 1 and not names(tmp_path)


def test_a_process_of_the_same_number_that_began_at_another_time_is_another(tmp_path: Path) -> None:
    mine = partial_name(tmp_path / "a")
    mine.touch()
    before, _, _ = mine.name.rpartition("-")
    (tmp_path / f"{before}-12345").touch()
    sweep(tmp_path)
    assert names(tmp_path) == {mine.name}


def test_of_other_machines_only_what_is_old_is_swept(tmp_path: Path) -> None:
    for name in (".a.elsewhere.1-5", ".b.elsewhere.1-5"):
        (tmp_path / name).touch()
    long_ago = time.time() - 200_000
    os.utime(tmp_path / ".a.elsewhere.1-5", (long_ago, long_ago))
    sweep(tmp_path)
    assert names(tmp_path) == {".b.elsewhere.1-5"}


def test_files_of_the_user_are_never_swept(tmp_path: Path) -> None:
    for name in (".git", ".a.1", "a.host.1-2", ".env.local", ".x.1234"):
        (tmp_path / name).touch()
    assert not sweep(tmp_path) and len(names(tmp_path)) == 5


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("\u00fc" * 127)
    with whole_file(target) as partial:
        partial.touch()
    assert target.exists()
