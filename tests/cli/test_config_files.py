"""Configuration files: no key is lost, any encoding is read or named, and nothing in them is unbounded or run."""

from __future__ import annotations

import codecs
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse.typing import Path_fr as FilePath
from parsed import refused

from deft_lightning.cli.config_files import DEEPEST, LARGEST, load, read_text
from deft_lightning.errors import UserError
from deft_lightning.study.command import main as study

GOOD = "model:\n  pretrained: é\ntrainer:\n  max_steps: 3\n"


def read(path: Path, content: str | bytes, name: str = "c.yaml") -> Any:
    """Return what a configuration file holds, as the parser would read it."""
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(read_text(FilePath(str(path / name))), path=name)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer:\n  a: 1\nmodel: {}\ntrainer:\n  b: 1\n", "trainer", (1, 4)),
        ("m:\n  o:\n    class_path: A\n    init_args:\n      lr: 1\n      lr: 2\n", "m.o.init_args.lr", (5, 6)),
        ("t:\n  c:\n  - a: 1\n  - a: 1\n    a: 2\n", "t.c[1].a", (4, 5)),
        ('{"t": {"a": 1,\n "a": 2}}', "t.a", (1, 2)),
        ("t: {a: 1,\n 'a': 2}", "t.a", (1, 2)),
        ("trainer.max_steps: 1\ntrainer:\n  max_steps: 2\n", "trainer.max_steps", (1, 3)),
        ("x: &x {a: 1}\nt:\n  <<: *x\n  b: 1\n  b: 2\n", "t.b", (4, 5)),
        ("a: 1\r\nb: 2\r\na: 3\r\n", "a", (1, 3)),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    text: str, key: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert f"c.yaml: the key {key!r} is given twice, in line {lines[0]} and in line {lines[1]}" in str(error.value)


def test_merge_keys_and_anchors_are_no_repetition(tmp_path: Path) -> None:
    text = "a: &a {k: 1, l: 1}\nb: &b {m: 2}\nc:\n  <<: *a\n  <<: *b\n  k: 5\nd: {<<: [*a, *b]}\ne: [*a, *a]\n"
    found = read(tmp_path, text)
    assert found["c"] == {"k": 5, "l": 1, "m": 2} and found["d"] == {"k": 1, "l": 1, "m": 2}
    assert found["e"] == [{"k": 1, "l": 1}] * 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_unicode_encoding_is_read(encoding: str, tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.encode(encoding)) == {"model": {"pretrained": "é"}, "trainer": {"max_steps": 3}}


def test_utf_16_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, codecs.BOM_UTF16_BE + GOOD.encode("utf-16-be"))["trainer"] == {"max_steps": 3}


BROKEN: dict[str, tuple[bytes, list[str]]] = {
    "cp1252": (GOOD.encode("cp1252"), ["line 2", "0xe9", "UTF-8"]),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), ["UTF-16 without a byte order mark"]),
    "UTF-16 cut short": (GOOD.encode("utf-16")[:-1], ["is not UTF-16 text"]),
    "a NUL": (b"a: 1\nb: \0\n", ["line 2", "NUL"]),
    "a binary file": (bytes(range(256)) * 40, ["is not UTF-8 text"]),
    "an empty file": (b"", ["is empty"]),
    "comments alone": (b"# none\n", ["is empty"]),
    "a list": (b"- a\n", ["is a list", "NAME: VALUE"]),
    "a word": (b"hello\n", ["is a single text"]),
    "a number": (b"5\n", ["is a single value"]),
    "tabs": (b"a:\n\tb: 1\n", ["line 2", "is not YAML"]),
    "an open bracket": (b"a: {b: 1\nc: 2", ["line 2", "is not YAML"]),
    "two documents": (b"a: 1\n---\nb: 1\n", ["line 2", "is not YAML"]),
    "an unknown tag": (b"a: !foo 1\n", ["line 1", "!foo"]),
    "a tag that does not fit": (b"a: !!int five\n", ["five"]),
    "a date that is none": (b"a: !!timestamp x\n", ["does not fit its tag"]),
    "a list for a key": (b"? [a]\n: 1\n", ["line 1", "unhashable"]),
    "an octal number": (b"a:\n  b: 010\n", ["line 2", "010 means 8", "quotes"]),
    "a number in base 60": (b"max_time: 1:30:00\n", ["line 1", "means 5400", "quotes"]),
    "an unknown alias": (b"a: *b\n", ["line 1", "alias"]),
    "an alias of itself": (b"a: &a\n- *a\n", ["line 2", "*a refers to itself"]),
    "a tower of lists": (b"a: " + b"[" * 500 + b"]" * 500, [f"more than {DEEPEST} deep"]),
    "a higher tower": (b"[" * 100_000, ["is not YAML"]),
    "a tower of keys": ("".join(f"{' ' * i}a:\n" for i in range(200)).encode(), ["line 65", "deep"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_configuration_is_one_line_that_names_file_and_line(name: str, tmp_path: Path) -> None:
    content, wanted = BROKEN[name]
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'c.yaml'}") and "\n" not in message and len(message) < 400
    assert all(part in message for part in wanted), message


def test_aliases_that_multiply_are_bounded(tmp_path: Path) -> None:
    names = "abcdefghi"
    rows = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in itertools.pairwise(names)]
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"line \d: holds more than 100,000 values"):
        read(tmp_path, "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *rows]))
    assert time.perf_counter() - start < 1


def test_a_file_of_50_mb_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(UserError, match=rf"50,000,000 bytes; a configuration has at most {LARGEST:,}"):
        read_text(FilePath(str(tmp_path / "c.yaml")))


def test_objects_of_python_are_never_made(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/new:os.mkdir ['{marker}']",
        "!!python/name:os.system",
        "!!python/module:os",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]",
    ):
        with pytest.raises(UserError, match="Python objects are not read from files"):
            read(tmp_path, f"model: {tag}\n")
        assert load(tag.split(" ")[0][2:] + ": x")  # as the value of an option too, nothing is made
    assert not marker.exists()


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    found = read(tmp_path, "a: 5e-5\nb: 1E4\nc: .5e-3\nd: 1_000\ne: '010'\nf: 2024-01-01\ng: no\n")
    assert found == {"a": 5e-5, "b": 1e4, "c": 0.5e-3, "d": 1000, "e": "010", "f": "2024-01-01", "g": False}


@pytest.mark.slow
def test_every_verb_and_every_place_of_a_file_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text("head: dense\nhead: fused\n")
    outer = tmp_path / "outer.yaml"
    outer.write_text("model: twice.yaml\n")
    ops = tmp_path / "ops.yaml"
    ops.write_text("- class_path: ResponseSwap\n  init_args: {}\n  init_args: {rate: 0.1}\n")
    said = "twice.yaml: the key 'head' is given twice, in line 1 and in line 2"
    for args in (
        ["preview", "--config", str(twice)],
        ["--config", str(twice), "probe"],
        ["fit", "--model", str(twice)],
        ["fit", "--config", str(outer)],
    ):
        assert said in refused(args, capsys)
    line = refused(["fit", "--data.noise.ops", str(ops)], capsys)
    assert "--data.noise.ops" in line and "'[0].init_args' is given twice, in line 2 and in line 3" in line
    with pytest.raises(SystemExit):
        study(["--config", str(twice)])
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--model.architecture", "{a: 1, a: 2}"], ["--model.architecture", "'a' is given twice"]),
        (["--model", '{"head": "dense", "head": "fused"}'], ["--model", "'head' is given twice"]),
        (["--config", "{trainer: {max_steps: 1, max_steps: 2}}"], ["--config", "'trainer.max_steps' is given twice"]),
        (["--config", "{trainer: 5}"], ["trainer: expected options below it"]),
        (["--config", "{data: {noise: null}}"], ["data.noise: expected options below it"]),
        (["--config", "s3://bucket/c.yaml"], ["s3fs"]),
        (["--config", os.sep], ["--config", "not a file"]),
        (["--config", "nothing.yaml"], ["--config", "does not exist", "nothing.yaml"]),
    ],
)
def test_values_on_the_command_line_are_as_careful(
    args: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", *args], capsys)
    assert all(part in line for part in wanted), line


def test_a_template_that_looks_like_yaml_stays_text() -> None:
    with pytest.raises(yaml.YAMLError):  # jsonargparse then takes it for an ordinary string
        load("{% for m in messages %}{{ m }}{% endfor %}")
