"""Nothing of a row is ignored in silence: every column and key is used, named with a count, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from instruction_rows import write

from deft_lightning import InstructionDataModule
from deft_lightning.data.examples import Example
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.records.leftovers import ColumnReport
from deft_lightning.errors import UserError

WHERE = "rows.jsonl, row 4"


def read(record: Mapping[str, Any], report: ColumnReport | None = None, **options: Any) -> Example:
    column_map = options.pop("column_map", {})
    format = detect_format(record, WHERE, column_map, ignore=options.get("ignore", ()))
    return normalise(record, WHERE, format, column_map, report=report, **options)


def refused(record: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(record, **options)
    message = str(caught.value)
    assert message.startswith(WHERE) and len(message.splitlines()) == 1
    return message


def turns(*pairs: tuple[str, Any], **last: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in pairs]
    made[-1] |= last
    return made


ASKED = (("user", "2 + 2?"), ("assistant", "4"))
QA = {"question": "2 + 2?", "answer": "4"}
# A row, and what its columns and keys become: the outcome is a column of the table in docs/guides/data.md.
USED: dict[str, tuple[dict[str, Any], str]] = {
    "`system`, `system_prompt`, `system_message`": ({**QA, "system_prompt": "Be brief."}, "the system turn"),
    "`reasoning`, `reasoning_content`, `thinking` beside an answer": (
        {**QA, "reasoning": "two and two"}, "the reasoning before it",
    ),
    "the same keys of a turn": ({"messages": turns(*ASKED, thinking="two and two")}, "the reasoning before it"),
    "`channel: analysis`, then `final`": (
        {"messages": [{"role": "user", "content": "2 + 2?"},
                      {"role": "assistant", "content": "two and two", "channel": "analysis"},
                      {"role": "assistant", "content": "4", "channel": "final"}]},
        "the reasoning before it",
    ),
    "`weight`, `train`, `loss`, `loss_mask`, `loss_weight` of a turn": (
        {"messages": turns(*ASKED, loss_weight=0.5)}, "its weight",
    ),
    "`weight` of a row, if a number": ({**QA, "weight": 0.5}, "its weight"),
    "`functions`, as `tools`": (
        {"messages": turns(*ASKED), "functions": [{"name": "add", "parameters": {}}]}, "the tools",
    ),
}  # fmt: skip
ALIASES: dict[str, dict[str, Any]] = {
    "problem and solution": {"problem": "2 + 2?", "solution": "4"},
    "question and response": {"question": "2 + 2?", "response": "4"},
    "prompt and response": {"prompt": "2 + 2?", "response": "4"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "`chosen`, `rejected` and their like": ({"prompt": "Hi", "completion": "Yes?", "rejected": "No!"}, "preference"),
    "`label` that is true or false": ({**QA, "label": False}, "--data.weight_column label"),
    "`images`, `video`, `audio`": ({**QA, "images": ["cat.jpg"]}, "pictures"),
    "pictures in a turn, such as `images`": (
        {"messages": turns(*ASKED, images=["cat.jpg"])},
        "--data.ignore_columns 'messages[].images' leaves it out",
    ),
    "parts of a content that are pictures": (
        {"messages": turns(("user", [{"type": "text", "text": "2 + 2?"}, {"type": "image_url"}]), ASKED[1])},
        "--data.ignore_columns 'messages[].content[].image_url' leaves it out",
    ),
    "a second answer, such as `solution` beside `answer`": ({**QA, "solution": "2 + 2 = 4"}, "second answer"),
}
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "any other column": ({**QA, "tags": ["sums"], "source": "me", "empty": "", "none": None}, "source"),
    "a part of a column": ({"extra": {"q": "2 + 2?", "level": 3}, "answer": "4"}, "extra.level"),
    "any other key of a turn": ({"messages": turns(*ASKED, mood="glad")}, "messages[].mood"),
}


@pytest.mark.parametrize(("record", "becomes"), USED.values(), ids=USED.keys())
def test_what_belongs_to_the_example_becomes_part_of_it(record: dict[str, Any], becomes: str) -> None:
    report = ColumnReport()
    example = read(record, report)
    assert not report.unused
    messages = example.messages or ()
    if becomes == "the system turn":
        assert messages[0] == {"role": "system", "content": "Be brief."}
    elif becomes == "the tools":
        assert example.tools is not None and example.tools[0]["function"]["name"] == "add"
    elif becomes == "its weight":
        assert example.weight * messages[-1].get("weight", 1) == 0.5
    else:
        assert messages[-1] == {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


@pytest.mark.parametrize("record", ALIASES.values(), ids=ALIASES.keys())
def test_names_that_say_the_same_are_read(record: dict[str, Any]) -> None:
    report = ColumnReport()
    assert [message["content"] for message in read(record, report).messages or ()] == ["2 + 2?", "4"]
    assert not report.unused


@pytest.mark.parametrize(("record", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_change_the_meaning_is_refused_unless_it_is_left_out_on_purpose(
    record: dict[str, Any], says: str
) -> None:
    assert says in refused(record)
    left = {"rejected", "label", "images", "solution", "messages[].images", "messages[].content[].image_url"}
    report = ColumnReport()
    assert (read(record, report, ignore=left).messages or ())[-1]["role"] == "assistant"
    assert not report.unused


@pytest.mark.parametrize(
    ("turn", "ignored"),
    [
        ({"loss": 2.31e9, "train": True}, "messages[].loss"),
        ({"loss": "high"}, "messages[].loss"),
        ({"weight": 1, "train": 0.5}, "messages[].train"),
        ({"thinking": "hm"}, "messages[].thinking"),
        ({"video": "a.mp4"}, "messages[].video"),
    ],
)
def test_a_key_of_a_turn_that_is_left_out_on_purpose_is_read_as_absent(turn: dict[str, Any], ignored: str) -> None:
    report = ColumnReport()
    record = {"messages": turns(*ASKED, **turn)}
    assert read(record, report, ignore=[ignored]).messages == tuple(turns(*ASKED)) and not report.unused
    if "thinking" not in turn:
        assert ignored in refused(record)


def test_a_column_that_is_left_out_on_purpose_is_read_as_absent() -> None:
    report = ColumnReport()
    example = read({**QA, "system": "Be brief.", "solution": "2 + 2 = 4", "a": {"b": 1, "c": 2}}, report,
                   ignore=["system", "answer", "a.b"], column_map={"id": "a.b"})  # fmt: skip
    assert [message["content"] for message in example.messages or ()] == ["2 + 2?", "2 + 2 = 4"]
    assert example.id == example.digest and report.unused == {"a": 1}
    assert detect_format({**QA, "text": "x"}, WHERE, {}, ignore=["answer"]) == "text"
    assert "fit no known format" in refused(QA, ignore=["answer"])


@pytest.mark.parametrize(("record", "name"), NAMED.values(), ids=NAMED.keys())
def test_what_means_nothing_is_named_with_a_count(record: dict[str, Any], name: str) -> None:
    report = ColumnReport()
    for _ in range(3):
        read(record, report, column_map={"question": "extra.q"} if "extra" in record else {})
    assert not report.ignored
    assert f"{name} (3 rows)" in report.lines()[-1] and report.lines()[-1].startswith("not used: ")
    assert not {"empty", "none"} & set(report.unused)
    again = ColumnReport.load(report.state())
    assert again == report


def test_what_is_left_out_on_purpose_is_counted_and_a_name_that_no_row_has_is_said() -> None:
    report = ColumnReport()
    record = {"messages": turns(*ASKED, images=["cat.jpg"], mood="glad"), "tags": "x", "extra": {"a": 1}}
    names = ["messages[].images", "messages[].mood", "tags", "imgaes"]
    read(record, report, ignore=names)
    read({"messages": turns(*ASKED), "tags": "x"}, report, ignore=names)
    assert report.lines()[-1] == (
        "left out on purpose: imgaes (no row has it), messages[].images (1 row), messages[].mood (1 row), tags (2 rows)"
    )
    assert report.unused == {"extra": 1} and ColumnReport.load(report.state()) == report


@pytest.mark.parametrize(
    "given", ["[messages[].images, tags]", ["messages[].images", "tags"], "['messages[].images', tags]"]
)
def test_names_with_brackets_may_be_written_in_a_list(given: str | list[str]) -> None:
    assert InstructionDataModule("x.jsonl", ignore_columns=given).settings.ignore_columns == (
        "messages[].images", "tags",
    )  # fmt: skip
    assert InstructionDataModule("x.jsonl", ignore_columns="tags").settings.ignore_columns == ("tags",)


def test_the_report_says_which_columns_became_what_and_in_how_many_rows() -> None:
    report = ColumnReport()
    read(QA, report)
    read({**QA, "system": "Be brief."}, report)
    assert report.lines() == ["columns: answer → response, question → prompt, system → system (1 of 2 rows)"]


def test_the_passage_that_a_question_is_about_is_part_of_the_prompt() -> None:
    report = ColumnReport()
    example = read({"Body": "Two and two apples.", "Question": "How many?", "Answer": 4.0}, report)
    assert example.prompt[0]["content"] == "Two and two apples.\n\nHow many?" and not report.unused
    left_out = read({"body": "Two apples.", **QA}, report, column_map={"context": "none"})
    assert left_out.prompt[0]["content"] == "2 + 2?" and report.unused == {"body": 1}


@pytest.mark.parametrize(
    ("role", "part"),
    [
        ("user", {"type": "thinking", "thinking": "hm"}),
        ("user", {"type": "tool_use", "name": "add", "input": {}}),
        ("assistant", {"type": "tool_result", "tool_use_id": "t", "content": "7"}),
    ],
)
def test_a_part_in_a_turn_of_another_role_is_not_lost(role: str, part: dict[str, Any]) -> None:
    messages = turns(*ASKED)
    place = 0 if role == "user" else 1
    messages[place]["content"] = [{"type": "text", "text": "so"}, part]
    assert f"no turn of role '{role}' has" in refused({"messages": messages})


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "a", "rejected": "b", **QA},
        {"conversations": turns(*ASKED), "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt"}},
        {"prompt": "Hi", "completion": "a", "answer_dispreferred": "b"},
        {"text": "Hi", "rejected_response": "b"},
    ],
)
def test_preferences_are_refused_under_any_layout(record: dict[str, Any]) -> None:
    assert "preference" in refused(record)


def test_the_better_answer_of_a_preference_is_learnt_when_it_is_named() -> None:
    record = {"conversations": turns(ASKED[0]), "chosen": {"from": "gpt", "value": "4"}, "rejected": {"value": "5"}}
    report = ColumnReport()
    example = read(record, report, column_map={"prompt": "conversations", "completion": "chosen"})
    assert example.response == "4" and report.unused == {"rejected": 1}


def test_a_second_answer_that_says_the_same_stops_nothing() -> None:
    assert read({**QA, "solution": " 4 "}).response == "4"
    assert read({**QA, "solution": "2 + 2 = 4"}, column_map={"answer": "solution"}).response == "2 + 2 = 4"


def test_a_verdict_that_is_no_truth_value_is_a_column_like_any_other() -> None:
    report = ColumnReport()
    read({**QA, "label": 2}, report)
    assert report.unused == {"label": 1}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_is_noted_of_rows_is_said_by_a_run(
    tmp_path: Path, num_proc: int, recwarn: pytest.WarningsRecorder
) -> None:
    rows = [{**QA, "question": f"what ends a turn, {i}? <|end|> does", "tags": "x"} for i in range(600)]
    data = InstructionDataModule(
        source=write(tmp_path / "rows.jsonl", rows), tokenizer_size=0, validation_fraction=0.0, num_proc=num_proc,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.setup("fit")
    said = [str(warning.message) for warning in recwarn.list]
    assert any("rows.jsonl: not used: tags (600 rows)" in line for line in said)
    assert any(
        "train: in 600 rows, a message, call or tool spells the special token <|end|>: it is read as plain text" in line
        for line in said
    )


def test_every_outcome_is_in_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    rows = [f"| {name} | {becomes} |" for name, (_, becomes) in USED.items()]
    rows += [f"| {name} | refused |" for name in REFUSED] + [f"| {name} | named with a count |" for name in NAMED]
    missing = [line for line in rows if line not in page]
    assert not missing, "docs/guides/data.md lacks:\n" + "\n".join(missing)
