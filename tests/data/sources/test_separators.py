"""Separators other than the one that a file's name promises, and headers that spell a field in their own way."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.sources.layouts import Expected
from deft_lightning.data.sources.read import read
from deft_lightning.data.sources.remarks import Remarks
from deft_lightning.data.sources.rows import BadRows, Row, RowError
from deft_lightning.errors import UserError

MARKS = {"commas": ",", "semicolons": ";", "tabs": "\t", "pipes": "|"}


def read_text(path: Path, text: str, expected: Expected | None = None) -> tuple[list[Any], list[str]]:
    path.write_text(text, encoding="utf-8", newline="")
    remarks = Remarks()
    rows = [row for _, row in read(str(path), expected=expected or Expected(), on_remark=remarks)]
    return rows, remarks.lines()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("end", ["csv", "tsv"])
@pytest.mark.parametrize("mark", MARKS)
def test_what_a_writer_of_csv_separates_in_any_way_comes_back(tmp_path: Path, mark: str, end: str, seed: int) -> None:
    draw = random.Random(seed)
    letters = ",;\t|\"'\n ab"
    names = draw.choice([["question", "answer"], ["id", "question", "answer", "note, more; yet|one"], ["a1", "b2"]])
    rows = [{name: "".join(draw.choices(letters, k=draw.randint(0, 9))) for name in names} for _ in range(5)]
    with (tmp_path / f"rows.{end}").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=MARKS[mark])
        writer.writeheader()
        writer.writerows(rows)
    remarks = Remarks()
    assert [row for _, row in read(f"{tmp_path}/rows.{end}", on_remark=remarks)] == rows
    usual = mark == {"csv": "commas", "tsv": "tabs"}[end]
    assert len(remarks.lines()) == (not usual)
    assert usual or remarks.lines()[0].endswith(f"rows.{end}: read with fields separated by {mark}")


CASES: dict[str, tuple[str, list[dict[str, str | None]], str]] = {
    # what it is about: (content, rows, separator if it is none of commas)
    "a comma in each row": (
        "question;answer;note, internal\nwhat, then?;4;x\na, b;5;y\n",
        [{"question": "what, then?", "answer": "4", "note, internal": "x"},
         {"question": "a, b", "answer": "5", "note, internal": "y"}], "semicolons",
    ),
    "commas with semicolons in the text": (
        "question,answer\na; b,c; d\ne; f,g; h\n", [{"question": "a; b", "answer": "c; d"},
                                                   {"question": "e; f", "answer": "g; h"}], "",
    ),
    "commas and short rows": ("question,answer;x\na\nb\n", [{"question": "a", "answer;x": None},
                                                            {"question": "b", "answer;x": None}], ""),
    "a header alone decides": ("Question ; Answer\na\n", [{"Question ": "a", "Answer": None}], "semicolons"),
    "names that are no fields": ("frage;antwort\na, b;c\n", [{"frage": "a, b", "antwort": "c"}], "semicolons"),
    "one column": ("text\na;b\nc;d\n", [{"text": "a;b"}, {"text": "c;d"}], ""),
    "Excel says it": ("sep=;\r\nquestion;answer\r\na;b\r\n", [{"question": "a", "answer": "b"}], "semicolons"),
    "a mark at the start": ("\ufeffquestion;answer\na;b\n", [{"question": "a", "answer": "b"}], "semicolons"),
    "quotes": ('"question";"answer"\n"a;\nb";c\n', [{"question": "a;\nb", "answer": "c"}], "semicolons"),
    "a separator at the end": ("question;answer;\na;b;\n", [{"question": "a", "answer": "b", "": ""}], "semicolons"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_separator_is_found_or_the_usual_one_is_taken(tmp_path: Path, name: str) -> None:
    text, rows, separator = CASES[name]
    found, said = read_text(tmp_path / "rows.csv", text)
    said = [line for line in said if "blanks" not in line]
    assert [{k: v and v.strip() for k, v in row.items()} for row in found] == rows
    assert bool(said) == bool(separator) and all(separator in line for line in said)


def test_the_row_that_disagrees_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question;answer\na;b\nc;d;e\nf;g\n")
    bad = BadRows()
    assert len(list(read(f"{tmp_path}/rows.csv", on_bad_row=bad))) == 2
    assert "rows.csv, row 2: has more fields than the header: 3 to 2, separated by semicolons" in bad.first[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frage;art|antwort\na;b|c\n", "semicolons and pipes alike"),
        ("sep=#\nquestion#answer\n", "sep=#; known: commas"),
        ("frage;antwort\na;b\nc;d;e\n", "put fields that hold ';' into quotes"),
    ],
)
def test_what_cannot_be_told_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / "rows.csv", text)
    assert says in str(caught.value) and "rows.csv" in str(caught.value)


def test_a_column_map_tells_separators_apart(tmp_path: Path) -> None:
    text = "frage;antwort, kurz\nwas, nun?;a, b\nx, y;c, d\n"  # as even with commas
    mapped = Expected(column_map={"question": "frage", "answer": "antwort, kurz"})
    assert read_text(tmp_path / "a.csv", text, mapped)[0][0] == {"frage": "was, nun?", "antwort, kurz": "a, b"}


def test_blanks_behind_every_separator_belong_to_no_field(tmp_path: Path) -> None:
    rows, said = read_text(tmp_path / "a.csv", 'question, answer\n"a, b", "c, d"\n e,f\n')
    assert rows == [{"question": "a, b", "answer": "c, d"}, {"question": "e", "answer": "f"}]
    assert len(said) == 1 and "blanks" in said[0]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Question", "QUESTION", " question ", "question\u00a0", "\ufeffquestion", "Question "]
)
def test_a_column_that_is_spelt_otherwise_is_the_field(name: str) -> None:
    row = Row({name: "a", "answer": "b"}, "here, row 1", {})
    assert row.get("question") == "a" and row.name("question") == name


@pytest.mark.parametrize("name", ["input ids", "Input_IDs", "INPUT IDS", "input  ids", "input__ids"])
def test_blanks_stand_for_underscores(name: str) -> None:
    assert Row({name: [1]}, "here, row 1", {}).get("input_ids") == [1]


def test_an_exact_name_wins_and_a_column_map_means_what_it_says() -> None:
    row = Row({"Question": "a", "question": "b", "Answer": "c"}, "here, row 1", {"answer": "none"})
    assert (row.get("question"), row.get("answer")) == ("b", None)


def test_two_columns_that_could_both_be_a_field_are_an_error_that_names_them() -> None:
    row = Row({"Question": "a", "QUESTION": "b"}, "here, row 1", {})
    with pytest.raises(RowError, match=r"row 1.*'Question' and 'QUESTION' both fit.*--data\.column_map\.question"):
        row.get("question")


def test_names_of_other_columns_do_not_matter() -> None:
    row = Row({"answer": "b", "Note": 1, "note": 2, 3: "x"}, "here, row 1", {})
    assert row.get("answer") == "b" and row.get("question") is None


def prepared(tmp_path: Path, name: str, text: str, **options: Any) -> InstructionDataModule:
    (tmp_path / name).write_text(text)
    data = InstructionDataModule(
        str(tmp_path / name), validation_fraction=0.0, tokenizer_size=300, cache_dir=str(tmp_path / "cache"), **options
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_what_was_decided_is_said_once_and_again_when_the_cache_is_read(tmp_path: Path) -> None:
    text = "Question;Answer\n" + "".join(f"q{i};a{i}\n" for i in range(9))
    for _ in range(2):
        data = prepared(tmp_path, "rows.csv", text)
        assert data.splits.remarks == [
            f"{tmp_path}/rows.csv: read with fields separated by semicolons",
            f"{tmp_path}/rows.csv: read 'Question' as question, 'Answer' as answer",
        ]
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(9)]
    plain = prepared(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert not plain.splits.remarks
    for at in range(9):
        assert data.example("train", at).input_ids.tolist() == plain.example("train", at).input_ids.tolist()
