"""Rows come out of files, folders and tasks as they are, each with its place; what cannot be read is one line."""

from __future__ import annotations

import bz2
import csv
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.records.formats import normalise
from deft_lightning.data.sources.read import read
from deft_lightning.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": "2 + 2?", "answer": "4"},
    {"question": "wie groß, \"genau\"?\nUnd 日本, 😀", "answer": "a, b;\n\n c"},
    {"question": "why\u2028not", "answer": "x" * 200_000},
]  # fmt: skip


def refused(source: str | Path, **options: Any) -> str:
    """The message of the error, which must be a single line; reading stops at it."""
    with pytest.raises(UserError) as caught:
        list(read(str(source), **options))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- files ----------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_json_object(path: Path) -> None:
    path.write_text(json.dumps({"version": 2, "data": ROWS, "about": {"rows": 3}}), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    ("rows.jsonl", write_jsonl),
    ("rows.json", write_json),
    ("object.json", write_json_object),
    ("rows.csv", write_csv),
    ("rows.parquet", write_parquet),
    ("ROWS.JSONL", write_jsonl),
]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_a_file_gives_its_rows_in_order_each_with_file_and_row(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    write(path)
    assert list(read(str(path))) == [(f"{path}, row {i}", row) for i, row in enumerate(ROWS, 1)]


def test_a_path_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl")
    assert [row for _, row in read("~/rows.jsonl")] == ROWS


def test_blank_lines_of_jsonl_are_no_rows_but_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}', encoding="utf-8")
    assert list(read(str(path))) == [(f"{path}, row 2", {"a": 1}), (f"{path}, row 5", {"a": 2})]


def test_nested_values_of_parquet_are_plain_lists_and_objects(tmp_path: Path) -> None:
    rows = [{"extra": {"q": "a", "n": 1}, "messages": [{"role": "user", "content": "hi"}], "none": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read(str(tmp_path / "rows.parquet"))] == rows


def test_parquet_rows_are_numbered_through_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(25))}), tmp_path / "rows.parquet", row_group_size=4)
    found = list(read(str(tmp_path / "rows.parquet")))
    assert [row["a"] for _, row in found] == list(range(25))
    assert found[-1][0].endswith("rows.parquet, row 25")


def test_a_byte_order_mark_does_not_become_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\na,b\n")
    assert [row for _, row in read(str(tmp_path / "rows.csv"))] == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_before_json_is_read_over_or_named(tmp_path: Path, name: str) -> None:
    text = '[{"a": 1}]' if name.endswith(".json") else '{"a": 1}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    try:
        assert [row for _, row in read(str(tmp_path / name))] == [{"a": 1}]
    except UserError as error:
        assert "BOM" in str(error) and name in str(error) and len(str(error).splitlines()) == 1


def test_a_short_csv_row_has_none_for_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\na\n")
    assert [row for _, row in read(str(tmp_path / "rows.csv"))] == [{"question": "a", "answer": None}]


def test_rows_before_a_broken_line_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    rows = read(str(tmp_path / "rows.jsonl"))
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(UserError, match="row 2"):
        next(rows)


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    # what is wrong: (file, content, what the line must say besides the file)
    "empty jsonl": ("rows.jsonl", b"", ["is empty", "--data.source"]),
    "jsonl of blank lines": ("rows.jsonl", b"\n \n", ["is empty"]),
    "empty json": ("rows.json", b"", ["is empty"]),
    "json without rows": ("rows.json", b"[]", ["is empty"]),
    "json object without rows": ("rows.json", b'{"data": []}', ["is empty"]),
    "empty csv": ("rows.csv", b"", ["is empty"]),
    "csv of a header alone": ("rows.csv", b"question,answer\n", ["is empty"]),
    "broken line": ("rows.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}\n', ["row 2", "is not JSON"]),
    "two objects on a line": ("rows.jsonl", b'{"a": 1}{"a": 2}\n', ["row 1", "is not JSON"]),
    "json list in a jsonl file, cut short": ("rows.jsonl", b'[\n{"a": 1}\n', ["row 2", "is not JSON"]),
    "lists on the lines of a jsonl file": ("rows.jsonl", b'[{"a": 1}]\n[{"a": 2}]\n', ["row 1", "is a list"]),
    "broken json": ("rows.json", b'[{"a": 1},', ["is not JSON"]),
    "jsonl in a json file": ("rows.json", b'{"a": 1}\n{"a": 2}\n', ["is not JSON", ".jsonl"]),
    "object without a list": ("rows.json", b'{"a": {"q": 1}}', ["list of rows"]),
    "object with two lists": ("rows.json", b'{"train": [1], "test": [2]}', ["list of rows"]),
    "a number": ("rows.json", b"42", ["list of rows"]),
    "null": ("rows.json", b"null", ["list of rows"]),
    "jsonl that is not UTF-8": ("rows.jsonl", '{"a": "é"}\n'.encode("latin-1"), ["is not UTF-8"]),
    "json that is not UTF-8": ("rows.json", '[{"a": "é"}]'.encode("latin-1"), ["is not UTF-8"]),
    "csv that is not UTF-8": ("rows.csv", "a,b\né,2\n".encode("latin-1"), ["is not UTF-8"]),
    "jsonl in UTF-16": ("rows.jsonl", '{"a": 1}\n'.encode("utf-16"), ["is not UTF-8"]),
    "csv row with too many fields": ("rows.csv", b"a,b\n1,2\n3,4,5\n", ["row 2", "more fields than the header"]),
    "parquet that is none": ("rows.parquet", b"question,answer\n", ["is not a parquet file"]),
    "empty parquet file": ("rows.parquet", b"", ["is not a parquet file"]),
    "unknown suffix": ("rows.txt", b"hello", ["'.txt'", ".jsonl", ".json", ".csv", ".parquet", "--data.source"]),
    "an unknown compression": ("rows.jsonl.lz4", b"BZh", ["'.lz4'", ".jsonl", ".gz", ".xz"]),
    "bz2 that is text": ("rows.jsonl.bz2", b"hello", ["Invalid data stream"]),
    "bz2 cut short": ("rows.jsonl.bz2", bz2.compress(b'{"a": 1}')[:-5], ["cut short"]),
    "xz that is text": ("rows.jsonl.xz", b"hello", ["cut short or damaged"]),
    "xz cut short": ("rows.jsonl.xz", lzma.compress(b'{"a": 1}')[:-5], ["cut short"]),
    "xz with a flipped bit": ("rows.jsonl.xz", lzma.compress(b'{"a": 1}')[:-30] + b"x" * 30, ["cut short or damaged"]),
    "compressed and cut short": ("rows.jsonl.gz", b"\x1f\x8b", ["cut short"]),
    "no suffix": ("rows", b"hello", [".jsonl", "--data.source"]),
}


@pytest.mark.parametrize(("name", "content", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, says: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(path)
    assert str(path) in message
    assert all(part in message for part in says), message


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    assert "is empty" in refused(tmp_path / "rows.parquet")


@pytest.mark.parametrize("rows", [0, 3, 2000])
def test_the_place_of_a_byte_that_is_not_utf8_is_its_place_in_the_file(tmp_path: Path, rows: int) -> None:
    # 2000 rows are past the first block that Python decodes at once.
    before = b'{"a": 1}\n' * rows + b'{"a": "'
    (tmp_path / "rows.jsonl").write_bytes(before + b'\xff"}\n')
    message = refused(tmp_path / "rows.jsonl")
    place = re.search(r"row (\d+)|byte (\d+)", message)
    assert place, message
    row, byte = place.groups()
    assert int(row) == rows + 1 if row else int(byte) == len(before)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "a/b/c", "./rows", "~/rows"])
def test_a_file_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path, name: str) -> None:
    source = str(tmp_path / name) if name.startswith("rows") else name
    message = refused(source)
    assert source in message and "no such file or folder" in message and "--data.source" in message


# --- folders and the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two splits; what ``datasets`` prepares goes below the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "folder"
    path.mkdir()
    for split, rows in {"train": ROWS[:2], "test": ROWS[:1]}.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_the_rows_of_a_split_each_with_its_file(folder: Path) -> None:
    found = list(read(str(folder)))
    assert [row for _, row in found] == ROWS[:2]
    assert [where for where, _ in found] == [f"{folder}/train.jsonl, row 1", f"{folder}/train.jsonl, row 2"]


def test_a_folder_of_other_files_is_loaded_through_datasets(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "rows.txt").write_text("one\ntwo\n")
    found = list(read(str(folder / "text")))
    assert [row for _, row in found] == [{"text": "one"}, {"text": "two"}]
    assert [where for where, _ in found] == [f"{folder}/text[train], row 1", f"{folder}/text[train], row 2"]


def test_split_chooses_among_the_files_of_a_folder(folder: Path) -> None:
    assert [row for _, row in read(str(folder), split="test")] == ROWS[:1]


def test_a_folder_below_the_home_folder_is_found(folder: Path) -> None:
    assert [row for _, row in read("~/folder")] == ROWS[:2]


def test_a_split_that_a_folder_lacks_is_one_line_that_names_it(folder: Path) -> None:
    message = refused(folder, split="validatoin")
    assert str(folder) in message and "validatoin" in message and "--data.split" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "train[:10]"}, "--data.split train[:10]: rows.jsonl has no splits"),
        ({"subset": "main"}, "--data.subset main: rows.jsonl has no subsets"),
        ({"source": "rows.jsonl?split=test"}, "split test: rows.jsonl has no splits"),
        ({"source": "rows.jsonl[test]"}, "split test: rows.jsonl has no splits"),
        ({"source": "*.jsonl", "split": "test"}, "--data.split test: *.jsonl has no splits"),
        ({"source": "row?.jsonl", "split": "test"}, "--data.split test: row?.jsonl has no splits"),
        ({"source": "row[s].jsonl", "split": "test"}, "--data.split test: row[s].jsonl has no splits"),
        ({"source": "s3://bucket/rows.jsonl", "split": "test"}, "test: s3://bucket/rows.jsonl has no splits"),
        ({"source": "reasoning_gym:spell_backward?size=9", "split": "test"}, "spell_backward?size=9 has no splits"),
        ({"source": ["rows.jsonl", "rows.jsonl?limit=2"], "split": "test"}, "--data.split test: rows.jsonl has no"),
    ],
)
def test_a_split_that_no_source_can_have_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        InstructionDataModule(**{"source": "rows.jsonl", **options}).settings.recipe()
    message = str(caught.value)
    assert says in message and len(message.splitlines()) == 1
    assert ("?limit=1000' reads its first 1000 rows" in message) is ("reasoning_gym" not in message)


@pytest.mark.parametrize("asked", ["rows.jsonl?split=test", "rows.jsonl[test]", "rows.jsonl?subset=main"])
@pytest.mark.parametrize("training", [False, True])
def test_a_split_that_a_test_source_cannot_have_is_refused(
    asked: str, training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model is trained first: the test comes at the end."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl")
    settings = InstructionDataModule("rows.jsonl", test_source=asked).settings
    with pytest.raises(UserError, match=r"^rows\.jsonl.* has no (split|subset)s; 'rows\.jsonl\?limit=1000' reads"):
        settings.recipe(None if training else settings.test_source)
    assert settings.recipe("rows.jsonl?limit=2").source == "rows.jsonl?limit=2"


@pytest.mark.parametrize("source", [None, "rows.jsonl"])
@pytest.mark.parametrize("options", [{"split": "test"}, {"subset": "main"}])
def test_options_that_neither_the_test_source_nor_another_can_have_are_refused(
    source: str | None, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl")
    settings = InstructionDataModule(source, test_source="rows.jsonl", **options).settings
    with pytest.raises(UserError, match=r"^--data\.(split test|subset main): rows\.jsonl has no "):
        settings.recipe(settings.test_source)


@pytest.mark.parametrize("source", ["rows.jsonl?split=train", "rows.jsonl[train]"])
def test_every_file_has_the_split_train(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl")
    recipe = InstructionDataModule(source).settings.recipe()
    assert len(list(read(recipe.source))) == len(ROWS)


def test_the_split_of_a_folder_is_no_matter_of_a_test_file(folder: Path) -> None:
    rows = write_jsonl(folder / "tests.jsonl")
    settings = InstructionDataModule(str(folder), split="validation", test_source=str(rows)).settings
    assert settings.recipe(settings.test_source).split == "validation"


def test_a_split_is_for_the_sources_that_have_some(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert InstructionDataModule(source="s3://bucket/rows", split="test").settings.recipe().split == "test"
    assert InstructionDataModule(source=f"{folder}[test]").settings.recipe().split == "train"
    for more in ({"source": [str(folder), "train.jsonl"]}, {"source": "train.jsonl", "validation_source": str(folder)}):
        assert InstructionDataModule(split="test", **more).settings.recipe().split == "test"


def test_a_folder_without_data_is_one_line_that_names_it(folder: Path) -> None:
    (folder / "nothing").mkdir()
    message = refused(folder / "nothing")
    assert str(folder / "nothing") in message and "--data.source" in message


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_reached_is_one_line_and_soon() -> None:
    # The variable is read when the hub's client is imported, so it takes a process of its own.
    code = (
        "from deft_lightning.data.sources.read import read\n"
        "from deft_lightning.errors import UserError\n"
        "try:\n    list(read('no-such-owner/no-such-data'))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    assert "no-such-owner/no-such-data" in done.stdout and "--data.source" in done.stdout


# --- reasoning_gym --------------------------------------------------------------------------------------------------

TASK = "reasoning_gym:spell_backward"


def test_a_task_gives_questions_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{TASK}?size=30&min_word_len=4&max_word_len=6"
    found = list(read(source))
    assert [where for where, _ in found] == [f"{source}, row {i}" for i in range(1, 31)]
    for _, row in found:
        word = re.search(r"(\w+)$", row["question"])
        assert word is not None and row["answer"] == word[1][::-1] and 4 <= len(word[1]) <= 6
    assert capsys.readouterr().out == ""


def test_a_task_without_options_is_of_a_default_size_and_the_same_each_time() -> None:
    once, again = ([row["question"] for _, row in read(TASK)] for _ in range(2))
    assert once == again and len(once) > 100


@pytest.mark.parametrize(("word", "negative"), [("true", True), ("false", False)])
def test_options_of_a_task_keep_their_types(word: str, negative: bool) -> None:
    # As text, "false" would be true, and the numbers would be none.
    source = f"reasoning_gym:chain_sum?size=40&min_digits=2&max_digits=2&allow_negation={word}"
    terms = [term for _, row in read(source) for term in re.findall(r"(-?\d+)(?: |$)", row["question"])]
    assert len(terms) >= 80
    assert any(term.startswith("-") for term in terms) == negative


def test_another_field_of_a_task_can_be_the_question_or_the_answer() -> None:
    plain = [row for _, row in read(f"{TASK}?size=10")]
    words = [row for _, row in read(f"{TASK}?size=10&question=metadata.word")]
    assert [row["question"] for row in words] == [row["answer"][::-1] for row in plain]
    assert [row["answer"] for row in words] == [row["answer"] for row in plain]
    both = [row for _, row in read(f"{TASK}?size=10&answer=metadata.word&question=metadata.source_index")]
    assert [(row["question"], row["answer"]) for row in both] == [(i, row["question"]) for i, row in enumerate(words)]


@pytest.mark.parametrize("path", ["metadata.wrod", "nothing", "metadata.word.length", ""])
def test_a_field_that_a_task_lacks_is_an_error_that_names_row_and_field(path: str) -> None:
    source = f"{TASK}?size=3&question={path}"
    with pytest.raises(UserError, match="'question'") as caught:
        for where, row in read(source):
            normalise(row, where, "question_answer", {})
    assert f"{source}, row 1" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_another_seed_gives_other_rows() -> None:
    first, second = ([row["question"] for _, row in read(f"{TASK}?size=20&seed={seed}")] for seed in (1, 1000))
    assert not set(first) & set(second)


@pytest.mark.parametrize(("task", "meant"), [("spell_backwards", "spell_backward"), ("Leg_Countin", "leg_counting")])
def test_an_unknown_task_names_what_comes_close(task: str, meant: str) -> None:
    message = refused(f"reasoning_gym:{task}")
    assert f"no task {task!r}" in message and "Did you mean" in message and meant in message


@pytest.mark.parametrize("task", ["", "zzzzqqqq", "?size=3"])
def test_a_task_that_resembles_nothing_is_refused_all_the_same(task: str) -> None:
    assert "no task" in refused(f"reasoning_gym:{task}")


@pytest.mark.parametrize(
    "options",
    [
        "word_len=4",  # no such option
        "min_word_len=5&max_word_len=2",  # the task's own check
        "size=0",
        "size=-1",
        "size=many",
        "size=1.5",
        "size",
        "seed=abc",
        "min_word_len=[1",  # not a value at all
        "min_word_len=60&max_word_len=70",  # no such word
    ],
)
def test_options_that_a_task_refuses_are_one_line_that_names_the_source(options: str) -> None:
    source = f"{TASK}?{options}"
    message = refused(source)
    assert source in message and "--data.source" in message
