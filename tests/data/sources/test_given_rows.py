"""Rows that a program hands over: prepared as a file of them would be, known by what they hold."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import on_rank, write

from deft_lightning.data import CharNoise, InstructionDataModule, Noise, ResponseSwap, TokenReplace
from deft_lightning.data.sources.given import DatasetRows, ListedRows, settled
from deft_lightning.data.sources.read import read, weights
from deft_lightning.errors import UserError
from deft_lightning.training.resume.settings import content

pytestmark = pytest.mark.slow

NOISE = Noise(
    splits=["train", "validation"], ops=[ResponseSwap(rate=0.2), CharNoise(rate=0.3), TokenReplace(rate=0.1)]
)  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"id": i // 2 if i % 7 else None, "question": f"What is {i}?", "answer": f"It is {i}, éa" + "!" * (i % 5)}
    for i in range(60)
]
CALLS = [
    {
        "tools": [{"name": name, "parameters": {"type": "object"}} for name in ("get", "put")],
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": f"So {i}."},
        ],
    }
    for i, (name, arguments) in enumerate([("get", {"x": 1}), ("put", {"y": "b"})] * 8)
]


def ready(source: Any, folder: Path, **options: Any) -> InstructionDataModule:
    known = {"validation_fraction": 0.25, "batch_size": 4, "tokenizer_size": 0, "noise": NOISE, "max_length": 512}
    data = InstructionDataModule(source, cache_dir=str(folder / "cache"), **{**known, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch.items()}


def served(data: InstructionDataModule) -> list[Any]:
    """Every batch of every loader."""
    validation = data.val_dataloader()
    loaders = [data.train_dataloader(), *(validation if isinstance(validation, list) else [validation])]
    return [[plain(batch) for batch in loader] for loader in [*loaders, data.test_dataloader()]]


def folders(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "cache").rglob("meta.json"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_proc": 2},
        {"packing": True, "keep": "end"},
        {"supervise": "all", "chat_template": "chatml", "on_bad_row": "skip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [ROWS, CALLS], ids=["questions", "calls"])
def test_rows_and_datasets_are_prepared_as_a_file_of_them(
    rows: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, **({"chat_template": "chatml"} if rows is CALLS else {})}
    rows = rows * (10 if "num_proc" in options else 1)  # a job of a worker is 500
    expected = served(ready(write(tmp_path / "rows.jsonl", rows), tmp_path, **options))
    assert served(ready(rows, tmp_path, **options)) == expected
    assert served(ready(datasets.Dataset.from_list(rows), tmp_path, **options)) == expected
    assert len(folders(tmp_path)) == 3


def test_validation_and_test_rows_may_be_handed_over_too(tmp_path: Path) -> None:
    held_out, tests = ROWS[:8], [{"question": "Why?", "answer": "So."}] * 2
    files = [write(tmp_path / name, rows) for name, rows in (("v.jsonl", held_out), ("t.jsonl", tests))]
    names: dict[str, Any] = {"validation_source": files[0], "test_source": files[1]}
    expected = served(ready(write(tmp_path / "rows.jsonl", ROWS), tmp_path, **names))
    given: dict[str, Any] = {"validation_source": held_out, "test_source": tests}
    assert served(ready(ROWS, tmp_path, **given)) == expected
    given = {name: datasets.Dataset.from_list(rows) for name, rows in given.items()}
    assert served(ready(datasets.Dataset.from_list(ROWS), tmp_path, **given)) == expected


def test_every_rank_has_its_share_of_them(tmp_path: Path) -> None:
    data = ready(ROWS, tmp_path, noise=Noise())
    seen = [
        [id for batch in on_rank(data, rank, 3).train_dataloader() for id in batch["example_id"]] for rank in (0, 1, 2)
    ]
    assert len({id for rank in seen for id in rank}) == sum(map(len, seen)) == data.size("train") // 3 * 3


def test_the_same_content_is_prepared_once_and_another_anew(tmp_path: Path) -> None:
    ready(ROWS, tmp_path)
    ready([dict(row) for row in ROWS], tmp_path)
    ready(tuple(ROWS), tmp_path)
    assert len(folders(tmp_path)) == 1
    ready([*ROWS[:-1], {**ROWS[-1], "answer": "another"}], tmp_path)
    assert len(folders(tmp_path)) == 2
    dataset = datasets.Dataset.from_list(ROWS)
    for same in (dataset, datasets.Dataset.from_list(ROWS), dataset.with_format("numpy"), dataset.select(range(60))):
        ready(same, tmp_path)
        assert len(folders(tmp_path)) == 3
    for number, other in enumerate((dataset.select(range(59)), dataset.shuffle(seed=1), dataset.remove_columns("id"))):
        ready(other, tmp_path)
        assert len(folders(tmp_path)) == 4 + number


def test_what_happens_to_the_list_afterwards_changes_nothing(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    data = InstructionDataModule(
        rows, validation_fraction=0.25, batch_size=4, tokenizer_size=0, noise=NOISE, max_length=512,
        cache_dir=str(tmp_path / "cache"),
    )  # type: ignore[arg-type]  # fmt: skip
    rows[0]["answer"] = "changed"
    rows.pop()
    data.setup("fit")
    assert served(data) == served(ready(ROWS, tmp_path))
    assert len(folders(tmp_path)) == 1


BAD = [
    ({"question": "a", "answer": ""}, "rows, row 3, field 'answer': is empty"),
    ({"question": "a"}, "rows, row 3: missing field 'answer'"),
    (5, "rows, row 3: expected an object with named fields, got int"),
    ("rows.jsonl", "rows, row 3: expected an object with named fields, got str"),
    ({"question": "a", "answer": b"x"}, "rows, row 3, field 'answer': holds what JSON cannot write (got bytes)"),
    ({"question": "a", "answer": {1, 2}}, "rows, row 3, field 'answer': holds what JSON cannot write (got set)"),
    ({"question": "\ud800", "answer": "b"}, "rows, row 3, field 'question': holds half a surrogate pair"),
]


@pytest.mark.parametrize(("bad", "problem"), BAD)
def test_a_bad_row_is_one_line_with_its_place(bad: Any, problem: str, tmp_path: Path) -> None:
    rows = [*ROWS[:2], bad, *ROWS[2:]]
    with pytest.raises(UserError) as caught:
        ready(rows, tmp_path)
    assert str(caught.value).startswith(problem) and len(str(caught.value).splitlines()) == 1
    skipped = ready(rows, tmp_path, on_bad_row="skip")
    assert served(skipped) == served(ready(ROWS, tmp_path, on_bad_row="skip"))
    (listed,) = (tmp_path / "cache").rglob("bad_rows.tsv")
    assert listed.read_text(encoding="utf-8").splitlines()[1].split("\t")[:2] == ["rows", "3"]


def test_a_bad_row_of_a_dataset_is_one_line_with_its_place(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([*ROWS[:2], {"question": "a", "answer": " "}])
    with pytest.raises(UserError, match=r"^rows, row 3, field 'answer': is empty$"):
        ready(rows, tmp_path)


@pytest.mark.parametrize(
    "source",
    [5, iter(ROWS), {1, 2}, datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), datasets.IterableDataset],
    ids=lambda source: type(source).__name__,
)
@pytest.mark.parametrize("name", ["source", "validation_source", "test_source"])
def test_anything_else_is_refused_when_it_is_handed_over(name: str, source: Any) -> None:
    with pytest.raises(UserError) as caught:
        InstructionDataModule(**{name: source})
    message = str(caught.value)
    assert message.startswith(f"--data.{name}: got ") and len(message.splitlines()) == 1
    assert "train" in message if isinstance(source, datasets.DatasetDict) else "datasets.Dataset" in message


def test_a_list_of_names_stays_a_list_of_names(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:30]), write(tmp_path / "b.jsonl", ROWS[30:])
    assert settled([first, second], "") == [first, second] and weights([first, second]) == {first: 1.0, second: 1.0}
    data = ready([first, second], tmp_path)
    # Of several sources a batch says besides which one an example is from.
    of_two = [[{k: v for k, v in batch.items() if not k.startswith("source")} for batch in loader]
              for loader in served(data)]  # fmt: skip
    assert of_two == served(ready(ROWS, tmp_path))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(rows=st.lists(st.dictionaries(st.text("abcd", min_size=1), json_values, max_size=4), min_size=1, max_size=4))
def test_a_record_is_what_a_line_of_json_gives(rows: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    assert [record for _, record in read(ListedRows(rows))] == [record for _, record in read(path)]


def test_values_that_json_has_no_word_for_are_those_of_a_file() -> None:
    row = {
        "a": np.int64(3), "b": np.float32(0.5), "c": np.array([[1, 2]]), "d": datetime.date(2024, 2, 3),
        "e": Decimal("1.50"), "f": (1, 2), "g": {1: np.str_("x")}, "h": np.bool_(True),
    }  # fmt: skip
    ((where, record),) = read(ListedRows([row]))
    assert where == "rows, row 1" and record == json.loads(
        '{"a": 3, "b": 0.5, "c": [[1, 2]], "d": "2024-02-03", "e": "1.50", "f": [1, 2], "g": {"1": "x"}, "h": true}'
    )


def test_a_resumed_run_compares_what_they_hold() -> None:
    for make in (ListedRows, lambda rows: DatasetRows(datasets.Dataset.from_list(rows))):
        rows, same, other = make(ROWS), make([dict(row) for row in ROWS]), make(ROWS[1:])  # type: ignore[no-untyped-call]
        assert content(rows) == content(same) != content(other)
        assert rows == same != other and len({rows, same, other}) == 2 and str(rows) == "rows"
