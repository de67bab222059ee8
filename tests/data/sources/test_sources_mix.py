"""Several sources, each weighted by its rows; and the rows that cannot be used, counted and written down."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from instruction_rows import write

from deft_lightning.data.sources.read import BadRows, read, read_many, weights
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError

N = 4000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("mix")
    a = [{"question": f"a{i}", "answer": "x"} for i in range(N)]
    b = [{"question": f"b{i}", "answer": "x"} for i in range(N)]
    return write(folder / "a.jsonl", a), write(folder / "b.jsonl", b)


def counts(source: Any, **options: Any) -> Counter[str]:
    return Counter(record["question"] for _, record, _ in read_many(source, **options))


@pytest.mark.slow
def test_a_weight_of_one_gives_every_row_once_with_its_place_and_source(files: tuple[str, str]) -> None:
    for source in (list(files), dict.fromkeys(files, 1.0)):
        found = list(read_many(source))
        assert [(where, record) for where, record, _ in found] == [*read(files[0]), *read(files[1])]
        assert [name for _, _, name in found] == [files[0]] * N + [files[1]] * N
    assert [(where, record) for where, record, _ in read_many(files[0])] == list(read(files[0]))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, 1.5, 2.5, 3.0])
def test_each_source_comes_weight_times(files: tuple[str, str], weight: float) -> None:
    found = counts({files[0]: weight, files[1]: 1})
    a = {question: n for question, n in found.items() if question.startswith("a")}
    whole, share = int(weight), weight - int(weight)
    assert set(a.values()) <= {whole, whole + 1} and (not whole or len(a) == N)
    more = sum(n == whole + 1 for n in a.values())
    assert abs(more - share * N) <= 4 * (N * share * (1 - share)) ** 0.5
    assert sum(n for question, n in found.items() if question.startswith("b")) == N


@pytest.mark.slow
def test_what_a_smaller_weight_chooses_a_larger_one_chooses_too(files: tuple[str, str]) -> None:
    before: Counter[str] = Counter()
    for weight in (0.1, 0.3, 0.9, 1.0, 1.2, 2.7):
        now = counts({files[0]: weight})
        assert before <= now
        before = now


def test_the_choice_depends_on_the_content_and_not_on_order_file_or_columns(
    files: tuple[str, str], tmp_path: Path
) -> None:
    rows = [record for _, record in read(files[0])]
    turned = write(tmp_path / "turned.jsonl", [dict(reversed(row.items())) for row in reversed(rows)])
    assert counts({turned: 0.4}) == counts({files[0]: 0.4})
    half = write(tmp_path / "half.jsonl", rows[: N // 2])
    assert counts({half: 0.4}) == Counter({q: n for q, n in counts({files[0]: 0.4}).items() if int(q[1:]) < N // 2})


@pytest.mark.slow
def test_the_choice_is_the_same_in_every_process_and_another_with_every_seed(files: tuple[str, str]) -> None:
    code = (
        "import sys\nfrom deft_lightning.data.sources.read import read_many\n"
        "print(sum(int(r['question'][1:]) for _, r, _ in read_many({sys.argv[1]: 0.3})))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code, files[0]], env=env, capture_output=True, text=True, check=True)
    here = counts({files[0]: 0.3})
    assert int(done.stdout) == sum(int(question[1:]) for question in here)
    other = counts({files[0]: 0.3}, seed=1)
    assert 0.2 * len(here) < len(here & other) < 0.4 * len(here)  # as independent draws meet


def test_the_choice_is_not_the_one_that_holds_rows_out(files: tuple[str, str]) -> None:
    # Else a source of weight 0.05 would be all validation.
    from deft_lightning.data.records.formats import normalise
    from deft_lightning.hashing import uniform

    rows = [normalise(record, where, "question_answer", {}) for where, record, _ in read_many({files[0]: 0.2})]
    held_out = sum(uniform(0, "split", row.digest) < 0.2 for row in rows)
    assert 0.1 * len(rows) < held_out < 0.3 * len(rows)


def test_every_bad_row_is_told_once_whatever_the_weight(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    for weight in (0.01, 1, 2.5):
        bad = BadRows()
        list(read_many({f"{tmp_path}/rows.jsonl": weight}, on_bad_row=bad))
        assert len(bad) == 1 and "row 2" in bad.first[0]
    with pytest.raises(UserError, match="row 2"):
        list(read_many({f"{tmp_path}/rows.jsonl": 0.01}))


def test_a_weight_of_zero_leaves_a_source_out_unopened(files: tuple[str, str]) -> None:
    assert set(counts({files[0]: 1, "/nowhere.jsonl": 0})) == set(counts(files[0]))


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf"), "1", True, None])
def test_a_weight_that_means_nothing_is_one_line_that_names_the_source(weight: Any) -> None:
    with pytest.raises(UserError, match=r"weight of rows\.jsonl.*at least 0") as caught:
        weights({"rows.jsonl": weight})
    assert "--data.source" in str(caught.value)


@pytest.mark.parametrize("source", [[], {}, {"a.jsonl": 0}])
def test_no_source_at_all_is_one_line(source: Any) -> None:
    with pytest.raises(UserError, match=r"--data\.source"):
        weights(source)


def test_a_source_that_is_listed_twice_counts_twice() -> None:
    assert weights(["a", "b", "a"]) == {"a": 2.0, "b": 1.0} and weights("a") == {"a": 1.0}
    assert weights({"a": 2, "b": 0.5}) == {"a": 2, "b": 0.5}


def test_options_of_a_source_are_its_own(files: tuple[str, str]) -> None:
    assert sum(counts([f"{files[0]}?limit=3", files[1]]).values()) == N + 3


def test_values_that_are_no_json_are_hashed_too(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": i, "b": b"\xff", "c": Decimal("1.5"), "d": datetime.date(2024, 1, 1)} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = ([r["a"] for _, r, _ in read_many({f"{tmp_path}/rows.parquet": 0.5})] for _ in range(2))
    assert first == second and 60 < len(first) < 140


# --- bad rows -------------------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_by_kind_and_the_first_are_shown() -> None:
    bad = BadRows(shown=2)
    assert len(bad) == 0 and str(bad) == "no bad rows"
    bad(RowError("a.jsonl, row 1", "is empty", "answer", "empty"))
    bad(RowError("a.jsonl, row 7", "is empty", "question", "empty"))
    bad(RowError("b.jsonl, row 2", "is not JSON", kind="not JSON"))
    bad(UserError("something else"))
    assert len(bad) == 4 and bad.counts == {"empty": 2, "not JSON": 1, "other": 1}
    assert bad.first == ["a.jsonl, row 1, field 'answer': is empty", "a.jsonl, row 7, field 'question': is empty"]
    assert len(str(bad).splitlines()) == 1
    assert str(bad).startswith("4 bad rows (2 empty, 1 not JSON, 1 other): a.jsonl, row 1") and "2 more" in str(bad)


def test_all_bad_rows_are_written_a_line_each(tmp_path: Path) -> None:
    bad = BadRows(shown=1)
    for i in range(1, 50):
        bad(RowError(f"a, row 3\tb.jsonl, row {i}", "is\nempty", "ans\twer\ud800", "empty"))
    bad(UserError("something else"))
    path = bad.write(tmp_path / "runs" / "bad_rows.tsv")
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["file", "row", "field", "problem"]
    assert lines[1] == ["a, row 3 b.jsonl", "1", "ans wer\\ud800", "is empty"]
    assert [line[1] for line in lines[1:50]] == [str(i) for i in range(1, 50)]
    assert lines[50:] == [["", "", "", "something else"]]
    assert BadRows().write(tmp_path / "runs" / "bad_rows.tsv").read_text() == "file\trow\tfield\tproblem\n"


def test_an_error_of_a_row_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RowError("a.jsonl, row 1", "is empty", "answer", "empty")))
    assert (error.where, error.field, error.problem, error.kind) == ("a.jsonl, row 1", "answer", "is empty", "empty")
    assert str(error) == "a.jsonl, row 1, field 'answer': is empty"
