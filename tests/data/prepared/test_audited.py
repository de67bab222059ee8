"""An audit acts on the training rows: the worst are left out, others weigh less, and nothing is matched in silence."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruction_rows import on_rank
from worlds import sums, write_rows

from deft_lightning import InstructionDataModule
from deft_lightning.data.noise import Noise, ResponseSwap, TokenReplace
from deft_lightning.data.prepared.audit_file import Top
from deft_lightning.errors import UserError

SPLIT = "train"


def opened(source: Any, **options: Any) -> InstructionDataModule:
    """Return prepared data; a quarter of the rows is held out unless the options say otherwise."""
    data = InstructionDataModule(source, **{"batch_size": 4, "validation_fraction": 0.25, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def ids(data: InstructionDataModule, split: str = SPLIT) -> list[str]:
    return [data.example(split, at).id for at in range(data.size(split))]


def records(data: InstructionDataModule, order: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return what an audit of data says, by default in reverse order of the rows."""
    origins, tokenizer = data.origins(), data.tokenizer
    place = {id: at for at, id in enumerate(ids(data))}
    lines = []
    for rank, id in enumerate(reversed(list(place)) if order is None else order, 1):
        labels = data.example(SPLIT, place[id]).labels
        lines.append({
            "rank": rank, "id": id, "file": origins[id].file, "row": origins[id].row, "score": 9.0 - rank,
            "noise": None, "prompt": origins[id].prompt, "answer": tokenizer.decode(labels[labels >= 0]),
        })  # fmt: skip
    return lines


def said(caught: Iterable[warnings.WarningMessage]) -> str:
    return "\n".join(str(one.message) for one in caught)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", sums())


@pytest.fixture
def whole(rows: str) -> InstructionDataModule:
    """Return all rows."""
    return opened(rows)


def without_ids(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "id"} for line in lines]


# --- which and how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "count"), [(3, 3), ("3", 3), ("50%", 19), ("10 %", 3), ("2.8%", 1), (None, 38)])
def test_the_worst_of_an_audit_are_left_out_and_the_other_splits_stay(
    top: Any, count: int, rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)
    named = lines[:-1] if top is None else lines  # one row has to be left
    audit = write_rows(tmp_path / "audit.jsonl", named)
    data = opened(rows, exclude=audit, exclude_top=top)
    total = whole.size(SPLIT)
    count = min(count, len(named))
    gone = {line["id"] for line in named[:count]}
    assert ids(data) == [id for id in ids(whole) if id not in gone]
    assert ids(data, "validation") == ids(whole, "validation")
    assert data.audited == [
        f"left out {count} of {total} training rows by {audit} ({100 * count / total:.3g} %)"
    ]  # fmt: skip
    assert data.reports[SPLIT].examples == total - count


def test_the_rank_decides_and_without_one_the_order_of_the_lines(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)
    shuffled = write_rows(tmp_path / "shuffled.jsonl", [*lines[5:], *lines[:5]])
    assert set(ids(whole)) - set(ids(opened(rows, exclude=shuffled, exclude_top=2))) == {
        line["id"] for line in lines[:2]
    }
    unranked = [{key: value for key, value in line.items() if key != "rank"} for line in [*lines[5:], *lines[:5]]]
    bare = write_rows(tmp_path / "bare.jsonl", unranked)
    assert set(ids(whole)) - set(ids(opened(rows, exclude=bare, exclude_top=2))) == {line["id"] for line in lines[5:7]}


@pytest.mark.parametrize("top", ["5", "5%", "0.5%", "100%", 1, "7 %"])
def test_a_share_or_a_count_is_read(top: Any) -> None:
    assert 0 <= Top.read(top).of(1000, "audit.jsonl") <= 1000


@pytest.mark.parametrize("top", ["0", "0%", 0, -1, 0.05, "0.05", "101%", "five", "%", "", True, "1e2%", "5%%", "-5%"])
def test_what_is_neither_a_share_nor_a_count_is_refused(top: Any, rows: str) -> None:
    with pytest.raises(UserError, match=r"--data.exclude_top must be a share such as 5% or a count such as 50, not "):
        InstructionDataModule(rows, exclude="audit.jsonl", exclude_top=top)


def test_shares_that_are_none_counts_that_are_too_many_and_an_empty_rest_are_refused(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    audit = write_rows(tmp_path / "audit.jsonl", records(whole))
    with pytest.raises(UserError, match=r"exclude_top 1% of the 38 rows of .*audit.jsonl is less than one row"):
        opened(rows, exclude=audit, exclude_top="1%")
    with pytest.raises(UserError, match=r"exclude_top 39: .*audit.jsonl ranks 38 rows"):
        opened(rows, exclude=audit, exclude_top=39)
    with pytest.raises(UserError, match=r"leaves out all 38 training rows; set --data.exclude_top"):
        opened(rows, exclude=audit)
    with pytest.raises(UserError, match=r"--data.exclude_top needs an audit; name it with --data.exclude"):
        InstructionDataModule(rows, exclude_top=3)


# --- which row a line names ------------------------------------------------------------------------------------------


def test_a_file_that_moved_and_whose_rows_moved_is_known_by_content(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)[:4]
    audit = write_rows(tmp_path / "audit.jsonl", lines)
    moved = write_rows(tmp_path / "elsewhere" / "other.jsonl", reversed(sums()))
    data = opened(moved, exclude=audit)
    assert set(ids(whole)) - set(ids(data)) == {line["id"] for line in lines}
    assert len(ids(data)) == 34


def test_lines_without_an_id_or_with_one_of_the_users_go_by_file_row_prompt_and_answer(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)[:4]
    gone = {line["id"] for line in lines}
    short = [{key: line[key] for key in ("file", "row", "prompt")} for line in lines]
    elsewhere = [{**line, "id": f"mine {line['row']}", "file": f"/gone/{Path(rows).name}"} for line in lines]
    for name, given in (("bare", without_ids(lines)), ("short", short), ("elsewhere", elsewhere)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = opened(rows, exclude=write_rows(tmp_path / f"{name}.jsonl", given))
        assert set(ids(whole)) - set(ids(data)) == gone, name


def test_rows_that_changed_are_counted_and_the_first_is_named(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)
    audit = write_rows(tmp_path / "audit.jsonl", lines[:6])
    changed = sums()
    for line in lines[:2]:
        changed[line["row"] - 1]["answer"] += "5"  # corrected, so it is not what was judged
    changed[lines[2]["row"] - 1] = {"question": "new", "answer": "row"}
    write_rows(Path(rows), changed)
    with pytest.warns(UserWarning) as caught:
        data = opened(rows, exclude=audit)
    first = f"{audit}, row 1 ({lines[0]['file']}, row {lines[0]['row']}): the row has another answer now"
    assert f"{audit}: 3 of its 6 rows are not among the training rows; the first: {first}" in said(caught)
    assert "left out 3 of" in data.audited[0]
    assert not {line["id"] for line in lines[3:6]} & set(ids(data))


OWN = [{"id": f"q{i}", "question": f"{i} + {i}", "answer": f"that is {2 * i}"} for i in range(24)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"question": "another"}, "the row has another prompt now"), ({"answer": "no"}, "the row has another answer now"),
     ({"answer": "that is 1234"}, "the row has another answer now"), ({"id": "new"}, "no training row has this id")],
)  # fmt: skip
def test_an_id_of_the_rows_own_is_not_enough(change: dict[str, str], problem: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", OWN)
    lines = records(opened(rows, validation_fraction=0.0))
    audit = write_rows(tmp_path / "audit.jsonl", lines[:3])
    at = lines[0]["row"] - 1
    new = {**OWN[at], **change}
    write_rows(Path(rows), [*OWN[:at], new, *OWN[at + 1 :]])
    if "id" in change:  # the same row under another name, at the same place
        data = opened(rows, exclude=audit, validation_fraction=0.0)
        assert "left out 3 of 24" in data.audited[0]
        return
    with pytest.warns(UserWarning, match=rf"1 of its 3 rows is not among the training rows; the first: .*{problem}"):
        data = opened(rows, exclude=audit, validation_fraction=0.0)
    assert "left out 2 of 24" in data.audited[0]
    assert f"q{at}" in ids(data)


@pytest.mark.parametrize(
    ("recorded", "row", "same"),
    [("4<|im_end|>", "4", True), ("4</s>", "4", True), (" 4 \n", "4", True), ("14</s>", "4", False),
     ("4</s>", "42", False), ("4.5</s>", "4", False), ("a long answer that was cu", "a long answer that was cut", True),
     ("cut", "cut off", False), ("<<5-3=2>>2</s>", "<<5-3=2>>2", True), ("[4]</s>", "[4]", True),
     ("[4]", "4", False), ("[4]", "[5]", False),
     ("4<\uff5cend\u2581of\u2581sentence\uff5c>", "4", True), ("", "4", False)],
)  # fmt: skip
def test_answers_are_compared_but_for_what_a_template_adds(recorded: str, row: str, same: bool, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": row}, *sums(4)])
    line = {"file": rows, "row": 1, "prompt": "q", "answer": recorded}
    audit = write_rows(tmp_path / "audit.jsonl", [line])
    if same:
        assert opened(rows, exclude=audit, validation_fraction=0.0).size(SPLIT) == 4
    else:
        with pytest.raises(UserError, match="the row has another answer now"):
            opened(rows, exclude=audit, validation_fraction=0.0)


def test_an_audit_of_another_source_is_refused_and_validation_rows_are_told_apart(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = records(whole)
    audit = write_rows(tmp_path / "audit.jsonl", lines[:4])
    other = write_rows(tmp_path / "other.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])
    for option in ("exclude", "weights_from"):
        weighted = write_rows(tmp_path / "audit.jsonl", [{**line, "weight": 1} for line in lines[:4]])
        with pytest.raises(UserError, match=rf"--data.{option} .*none of its 4 rows is a training row; was another"):
            opened(other, **{option: weighted})
    with pytest.warns(UserWarning, match=r"of its 4 rows (is|are) not among the training rows; .*is a validation row"):
        data = opened(rows, exclude=audit, seed=3)
    assert ids(data, "validation") == ids(opened(rows, seed=3), "validation")


def test_conversations_texts_and_tokens_are_known(tmp_path: Path) -> None:
    turns = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"},
                      {"role": "user", "content": "and?"}, {"role": "assistant", "content": f"b{i}"}]}
        for i in range(8)
    ]  # fmt: skip
    for name, given in (("turns", turns), ("texts", [{"text": f"once upon {i}"} for i in range(8)])):
        rows = write_rows(tmp_path / f"{name}.jsonl", given)
        for supervise in ("assistant", "last", "all"):
            lines = records(opened(rows, validation_fraction=0.0, supervise=supervise))[:3]
            audit = write_rows(tmp_path / "audit.jsonl", without_ids(lines))
            if name == "texts" or supervise != "all":
                assert opened(rows, validation_fraction=0.0, exclude=audit, supervise=supervise).size(SPLIT) == 5
            by_id = write_rows(tmp_path / "by_id.jsonl", lines)
            assert opened(rows, validation_fraction=0.0, exclude=by_id, supervise=supervise).size(SPLIT) == 5


# --- sources, noise, batches -----------------------------------------------------------------------------------------


def test_several_files_with_rows_of_one_number_are_told_apart(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a" / "rows.jsonl", sums(8))
    second = write_rows(tmp_path / "b" / "rows.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(8)])
    whole = opened([first, second], validation_fraction=0.0)
    lines = [line for line in records(whole) if line["row"] in (2, 3)]
    assert {line["file"] for line in lines} == {first, second}
    for given in (lines, without_ids(lines), [{**line, "file": "rows.jsonl"} for line in without_ids(lines)]):
        data = opened([first, second], validation_fraction=0.0, exclude=write_rows(tmp_path / "audit.jsonl", given))
        assert set(ids(whole)) - set(ids(data)) == {line["id"] for line in lines}
        assert len(ids(data)) == 12


def test_a_row_that_a_weight_gives_twice_is_one_row_unless_the_audit_names_both(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sums(8))
    once = records(opened({rows: 1.0}, validation_fraction=0.0))[:3]
    audit = write_rows(tmp_path / "audit.jsonl", once)
    assert opened({rows: 2.0}, validation_fraction=0.0, exclude=audit).size(SPLIT) == 10
    twice = records(opened({rows: 2.0}, validation_fraction=0.0))
    assert opened(
        {rows: 2.0}, validation_fraction=0.0, exclude=write_rows(tmp_path / "twice.jsonl", twice), exclude_top=3
    ).size(SPLIT) == 13  # fmt: skip


def test_rows_from_python_and_generated_rows_are_known(tmp_path: Path) -> None:
    lines = records(opened(sums(12), validation_fraction=0.0))[:3]
    assert lines[0]["file"] == "rows"
    assert opened(
        sums(12), validation_fraction=0.0, exclude=write_rows(tmp_path / "audit.jsonl", lines)
    ).size(SPLIT) == 9  # fmt: skip
    pytest.importorskip("reasoning_gym")
    task = "reasoning_gym:spell_backward?size=12&seed=1"
    lines = records(opened(task, validation_fraction=0.0))[:3]
    audit = write_rows(tmp_path / "audit.jsonl", lines)
    assert opened(task, validation_fraction=0.0, exclude=audit).size(SPLIT) == 9


@pytest.mark.parametrize(
    "ops", [[ResponseSwap(rate=0.5)], [ResponseSwap(rate=0.5, exact=True)], [TokenReplace(rate=0.3, source="unigram")]]
)
def test_noise_hits_the_same_rows_in_the_same_way_whoever_is_left_out(
    ops: list[Any], rows: str, tmp_path: Path
) -> None:
    whole = opened(rows, noise=Noise(ops=ops))
    audit = write_rows(tmp_path / "audit.jsonl", records(whole))
    data = opened(rows, noise=Noise(ops=ops), exclude=audit, exclude_top="40%")
    before = {id: whole.example(SPLIT, at) for at, id in enumerate(ids(whole))}
    assert 0 < data.size(SPLIT) < len(before)
    hit = 0
    for at in range(data.size(SPLIT)):
        now = data.example(SPLIT, at)
        for name in ("input_ids", "labels", "noise_code"):
            np.testing.assert_array_equal(getattr(now, name), getattr(before[now.id], name))
        hit += bool(now.noise_code.any())
    assert hit


def test_label_counts_are_of_the_rows_that_are_trained_on(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    data = opened(rows, exclude=write_rows(tmp_path / "audit.jsonl", records(whole)), exclude_top=10)
    labels = np.concatenate([data.example(SPLIT, at).labels for at in range(data.size(SPLIT))])
    assert data.label_counts is not None
    np.testing.assert_array_equal(data.label_counts, np.bincount(labels[labels >= 0], minlength=len(data.label_counts)))
    assert data.label_counts.sum() < whole.label_counts.sum()  # type: ignore[union-attr]
    assert data.tokenizer.get_vocab() == whole.tokenizer.get_vocab()


def test_packed_rows_workers_and_ranks_see_what_is_left(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    audit = write_rows(tmp_path / "audit.jsonl", records(whole))
    options = {"exclude": audit, "exclude_top": 12, "packing": True, "max_length": 32, "batch_size": 1}
    kept = set(ids(opened(rows, **options)))
    assert len(kept) == 26
    seen: list[str] = []
    for rank in range(2):
        data = on_rank(opened(rows, num_proc=2, num_workers=0, **options), rank, 2)
        seen += [id for batch in data.train_dataloader() for ids in batch["example_id"] for id in _flat(ids)]
    assert set(seen) <= kept
    assert len(set(seen)) >= 20  # an odd row may be left over between the ranks


def _flat(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def test_many_processes_prepare_the_same(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sums(1200))
    whole = opened(rows, validation_fraction=0.0)
    audit = write_rows(tmp_path / "audit.jsonl", records(whole))
    one, two = (
        opened(rows, validation_fraction=0.0, exclude=audit, exclude_top="30%", num_proc=n, cache=False) for n in (1, 2)
    )
    assert ids(one) == ids(two) == ids(whole)[:840]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_knows_what_was_left_out(rows: str, whole: InstructionDataModule, tmp_path: Path) -> None:
    lines = records(whole)
    audit = tmp_path / "audit.jsonl"
    sizes, folders = [], []
    for given, top in ((lines, 3), (lines, 4), (lines[::-1], 4), (lines, 3)):
        # The same lines in another order, and the ranks with them.
        write_rows(audit, [{**line, "rank": rank} for rank, line in enumerate(given, 1)])
        data = opened(rows, exclude=str(audit), exclude_top=top)
        sizes.append(data.size(SPLIT))
        folders.append(data.splits.folder)
    assert sizes == [35, 34, 34, 35]
    assert len(set(folders)) == 3
    assert folders[0] == folders[3]
    assert whole.splits.folder not in folders
    again = opened(rows, exclude=str(audit), exclude_top=3)
    assert again.audited == data.audited  # said by a run that takes it from the cache too


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_of(data: InstructionDataModule) -> dict[str, float]:
    result = {}
    for at in range(data.size(SPLIT)):
        example = data.example(SPLIT, at)
        learnt = example.labels >= 0
        weights = np.ones(learnt.sum()) if example.weight is None else example.weight[learnt]
        assert (weights == weights[0]).all()
        result[example.id] = float(weights[0])
    return result


def test_a_written_weight_counts_before_the_probability_and_multiplies_the_rows_own(tmp_path: Path) -> None:
    own = [{**row, "weight": 0.5 if at % 2 else 1.0} for at, row in enumerate(sums(8))]
    rows = write_rows(tmp_path / "rows.jsonl", own)
    whole = opened(rows, validation_fraction=0.0)
    lines = records(whole, ids(whole)[:5])
    given = [
        {"right": 0.25},
        {"right": 0.25},
        {"weight": 3, "right": 0.1},
        {"weight": 3.0},
        {"weight": None, "right": 1},
    ]
    audit = write_rows(tmp_path / "audit.jsonl", [{**line, **more} for line, more in zip(lines, given, strict=True)])
    data = opened(rows, validation_fraction=0.0, weights_from=audit)
    assert list(weight_of(data).values()) == [0.25, 0.125, 3.0, 1.5, 1.0, 0.5, 1.0, 0.5]
    assert data.audited == [f"weights of 5 of 8 training rows by {audit}: 0.25 to 3, mean 1.5"]
    assert data.reports[SPLIT].weighted == 7 - 1


def test_a_weight_of_0_leaves_the_row_out_and_both_options_go_together(
    rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    lines = [
        {**line, "right": right} for line, right in zip(records(whole), [0.0, 1e-300, 0.5, *[1.0] * 35], strict=True)
    ]
    audit = write_rows(tmp_path / "audit.jsonl", lines)
    data = opened(rows, weights_from=audit)
    assert data.audited == [
        f"weights of 38 of 38 training rows by {audit}: 0 to 1, mean 0.934; left out 2 with weight 0"
    ]
    assert ids(data) == [id for id in ids(whole) if id not in {line["id"] for line in lines[:2]}]
    both = opened(rows, weights_from=audit, exclude=audit, exclude_top=1)
    assert both.audited[0].startswith("left out 1 of 38")
    assert (
        both.audited[1] == f"weights of 37 of 38 training rows by {audit}: 0 to 1, mean 0.959; left out 1 with weight 0"
    )
    assert weight_of(both) == weight_of(data)
    assert weight_of(data)[lines[2]["id"]] == 0.5
    assert ids(data, "validation") == ids(whole, "validation")
    assert not data.splits["validation"].weighted


def test_weights_of_one_change_nothing(rows: str, whole: InstructionDataModule, tmp_path: Path) -> None:
    audit = write_rows(tmp_path / "audit.jsonl", [{**line, "right": 1.0} for line in records(whole)])
    data = opened(rows, weights_from=audit)
    assert not data.splits[SPLIT].weighted
    assert ids(data) == ids(whole)


@pytest.mark.parametrize(
    ("more", "problem"),
    [({}, r"row 1: has neither `weight` nor `right`"), ({"right": None}, r"row 1: has neither `weight` nor"),
     ({"right": 1.5}, r"row 1, field 'right': expected a probability, got 1.5"),
     ({"weight": -1}, r"row 1, field 'weight': expected a finite number of at least 0, got -1"),
     ({"weight": "1"}, r"row 1, field 'weight': expected a finite number of at least 0, got '1'"),
     ({"weight": True}, r"row 1, field 'weight': expected a finite number"),
     ({"weight": 0}, r"every training row has weight 0 or is left out"),
     ({"weight": 1e300}, r"finite in float32")],
)  # fmt: skip
def test_weights_that_are_none_are_refused(
    more: dict[str, Any], problem: str, rows: str, whole: InstructionDataModule, tmp_path: Path
) -> None:
    audit = write_rows(tmp_path / "audit.jsonl", [{**line, **more} for line in records(whole)])
    with pytest.raises(UserError, match=problem):
        opened(rows, weights_from=audit)


def test_two_weights_for_one_row_are_refused(rows: str, whole: InstructionDataModule, tmp_path: Path) -> None:
    lines = records(whole)[:2]
    audit = write_rows(tmp_path / "audit.jsonl", [{**lines[0], "weight": 0.5}, {**lines[0], "weight": 0.25}])
    with pytest.raises(UserError, match=r"--data.weights_from .*row 2: gives a second weight to the same row"):
        opened(rows, weights_from=audit)
    write_rows(Path(audit), [{**lines[0], "weight": 0.5}, {**lines[0], "weight": 0.5}])
    assert weight_of(opened(rows, weights_from=audit))[lines[0]["id"]] == 0.5


# --- files that are no audit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["exclude", "weights_from"])
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("audit.jsonl", b"", "is empty"), ("audit.jsonl", b"\n\n", "is empty"),
        ("audit.jsonl", b'{"id": "a"\n{"id": "b"}\n', "is not JSON"), ("audit.jsonl", b"\xff\xfe\0a", "is not UTF-8"),
        ("audit.jsonl", b'{"id": "\xff"}\n', "is not UTF-8"), ("audit.jsonl", b"[1, 2]\n", "is not a row of an audit"),
        ("audit.jsonl", b'"text"\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"question": "1 + 1", "answer": "2"}\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"file": "rows.jsonl", "row": 1}\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"file": "rows.jsonl", "row": "1", "prompt": "q"}\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"id": 7, "prompt": "q"}\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"id": " ", "prompt": "q"}\n', "is not a row of an audit"),
        ("audit.jsonl", b'{"id": "a", "prompt": ["q"]}\n', "field 'prompt': expected text, got list"),
        ("audit.jsonl", b'{"id": "a", "rank": 0}\n', "field 'rank': expected a whole number from 1, got 0"),
        ("audit.jsonl", b'{"id": "a", "rank": "first"}\n', "field 'rank': expected a whole number from 1"),
        ("audit.jsonl", b"[" * 100_000, "is"), ("audit.csv", b"id,prompt\n,q\n", "is not a row of an audit"),
        ("audit.txt", b'{"id": "a"}\n', "unknown file type '.txt'"),
        ("audit.jsonl.gz", gzip.compress(b'{"id": "a", "weight": 1}\n', mtime=0)[:-6], "cut short or damaged"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_audit_gets_one_line(
    option: str, name: str, content: bytes, problem: str, rows: str, tmp_path: Path
) -> None:
    audit = tmp_path / name
    audit.write_bytes(content)
    with pytest.raises(UserError, match=problem) as refused:
        opened(rows, **{option: str(audit)})
    assert "\n" not in str(refused.value)
    assert str(audit) in str(refused.value)
    assert f"--data.{option}" in str(refused.value)
    assert "--data.source" not in str(refused.value)


@pytest.mark.parametrize("option", ["exclude", "weights_from"])
def test_a_file_that_is_not_there_or_is_a_folder_gets_one_line(option: str, rows: str, tmp_path: Path) -> None:
    for name in (str(tmp_path / "gone.jsonl"), str(tmp_path), "https://host/audit.jsonl"):
        with pytest.raises(UserError, match="no such file") as refused:
            opened(rows, **{option: name})
        assert f"--data.{option}" in str(refused.value)


def test_a_compressed_audit_is_read(rows: str, whole: InstructionDataModule, tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl.gz"
    audit.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in records(whole)[:5]).encode()))
    assert opened(rows, exclude=str(audit)).size(SPLIT) == 33
