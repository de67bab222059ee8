"""Layouts of public datasets that are no format of their own: read, named, or refused with a way to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deft_lightning import InstructionDataModule
from deft_lightning.data.encoding.markup import known
from deft_lightning.data.encoding.notes import notes_of_text
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.records.leftovers import ColumnReport
from deft_lightning.errors import UserError

WHERE = "rows.jsonl, row 4"
OPEN_R1 = {
    "problem": "2 + 2?", "generations": ["It is 4.", "It is 5."], "correctness_math_verify": [True, False],
    "correctness_llama": [True, False],
}  # fmt: skip


def read(record: Mapping[str, Any], report: ColumnReport | None = None, **options: Any) -> Example:
    column_map, ignore = options.pop("column_map", {}), options.get("ignore", ())
    format = detect_format(record, WHERE, column_map, ignore=ignore)
    return normalise(record, WHERE, format, column_map, report=report, **options)


def refused(record: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(record, **options)
    message = str(caught.value)
    assert message.startswith(WHERE) and len(message.splitlines()) == 1
    return message


# --- plain texts as turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["conversations", "messages", "data"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_list_of_plain_texts_is_a_conversation_of_user_and_assistant_by_turns(field: str, count: int) -> None:
    report = ColumnReport()
    texts = [f"turn {i}" for i in range(count)]
    column_map = {"messages": "data"} if field == "data" else {}
    example = read({field: texts, "source": "stackexchange"}, report, column_map=column_map)
    assert [(m["role"], m["content"]) for m in example.messages or ()] == [
        (("user", "assistant")[i % 2], text) for i, text in enumerate(texts)
    ]
    assert report.lines() == [
        f"columns: {field} → turns, plain texts of user and assistant by turns", "not used: source (1 row)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        (["alone"], "no assistant turn"),
        (["question", " "], "'conversations[1]': is empty"),
        (["Human: hello", "Assistant: hi"], "begin with roles"),
        (["### User: hello", "### gpt: hi"], "begin with roles"),
        (["hello", 3], "expected an object, got str"),
    ],
)
def test_plain_texts_that_are_no_such_conversation_are_refused(turns: list[Any], says: str) -> None:
    assert says in refused({"conversations": turns})


def test_a_list_of_texts_is_read_so_in_json_as_well() -> None:
    assert len(read({"conversations": json.dumps(["a", "b"])}).messages or ()) == 2


# --- several answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["answer", "solution"])
def test_several_answers_beside_one_are_refused_with_the_option_that_learns_them(beside: str) -> None:
    record = {**OPEN_R1, beside: "4"}
    message = refused(record)
    assert "holds 2 answers" in message and "--data.column_map.answers generations learns the first" in message
    assert "--data.ignore_columns generations leaves it out" in message
    report = ColumnReport()
    assert read(record, report, column_map={"answers": "generations"}).response == "It is 4."
    assert report.unused == {beside: 1, "correctness_math_verify": 1, "correctness_llama": 1}
    assert read(record, column_map={"answer": "generations.1"}).response == "It is 5."
    assert read(record, ignore=["generations"]).response == "4"


def test_an_answer_of_several_that_is_called_wrong_is_refused_or_weighs_nothing() -> None:
    record = {**OPEN_R1, "correctness_math_verify": [False, True]}
    column_map = {"answers": "generations"}
    message = refused(record, column_map=column_map)
    assert "is wrong; --data.weight_column correctness_math_verify.0 learns only the rows" in message
    weight = "correctness_math_verify.0"
    assert read(record, column_map=column_map, weight_column=weight).weight == 0
    assert read(OPEN_R1, column_map=column_map, weight_column=weight).weight == 1
    assert read(record, column_map=column_map, ignore=["correctness_math_verify"]).weight == 1


def test_open_r1_rows_with_messages_name_what_is_not_used() -> None:
    report = ColumnReport()
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    read({**OPEN_R1, "answer": "4", "solution": "2 + 2 = 4", "messages": messages}, report)
    assert report.unused.keys() == OPEN_R1.keys() | {"answer", "solution"}


# --- rows that fit nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn", [{"role": "user", "content": "hi"}, {"from": "human", "value": "hi"}, {"role": "assistant", "content": ""}]
)
def test_a_file_with_one_turn_a_line_is_refused_with_the_layout_of_a_row(turn: dict[str, Any]) -> None:
    message = refused(turn)
    assert "is one turn" in message and '{"messages": [{"role": ..., "content": ...}, ...]}' in message


@pytest.mark.parametrize(
    ("record", "way"),
    [
        ({"conversation": [{"role": "user", "content": "hi"}]}, "--data.column_map.messages conversation"),
        ({"x": {"dialog": [{"from": "human", "value": "hi"}]}}, "--data.column_map.messages x.dialog"),
        ({"id": "0", "data": ["hi", "hello"]}, "--data.column_map.messages data reads them as turns"),
        ({"conversation": [{"human": "hi", "assistant": "hello"}]}, "if they had role and content, or from and value"),
        ({"conversation": [["hi", "hello"]]}, "if they had role and content, or from and value"),
        ({"instruction": "hi", "completions": [{"model": "m", "response": "hello"}], "correct_answers": ["None"]},
         "--data.column_map.question instruction --data.column_map.answer completions.0.response learns the first"),
        ({"chosen": "Human: hi", "rejected": "Human: ho"}, "--data.column_map.text chosen learns it as a text"),
        ({"chosen": [{"role": "user", "content": "hi"}], "rejected": [{"role": "user", "content": "hi"}]},
         "--data.column_map.messages chosen"),
        (OPEN_R1, "--data.column_map.answers generations learns the first"),
        ({"prompt": "hi", "samples": ["a", "b"]},
         "--data.column_map.question prompt --data.column_map.answers samples learns the first"),
        ({"a": 1, "b": "x"}, "--data.column_map.question NAME"),
    ],
)  # fmt: skip
def test_a_row_that_fits_no_format_is_refused_with_what_would_read_it(record: dict[str, Any], way: str) -> None:
    message = refused(record)
    assert "fit no known format" in message and way in message
    assert "rejected:" not in message and "messages rejected" not in message


@pytest.mark.parametrize(
    ("record", "column_map"),
    [
        ({"x": {"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}}, {"messages": "x.dialog"}),
        ({"id": "0", "data": ["a", "b"]}, {"messages": "data"}),
        ({**OPEN_R1, "generations": ["b"], "problem": "a"}, {"answers": "generations"}),
        ({"prompt": "a", "samples": ["b", "c"]}, {"question": "prompt", "answers": "samples"}),
        (
            {"instruction": "a", "completions": [{"response": "b"}]},
            {"question": "instruction", "answer": "completions.0.response"},
        ),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"}],
            },
            {"messages": "chosen"},
        ),
    ],
)
def test_the_options_that_are_offered_read_the_row(record: dict[str, Any], column_map: dict[str, str]) -> None:
    assert [m["content"] for m in read(record, column_map=column_map).messages or ()] == ["a", "b"]


# --- conversations and calls that are spelt in a text ---------------------------------------------------------------


def remarks(folder: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = InstructionDataModule(str(file), tokenizer_size=0, validation_fraction=0.0, cache=False, **options)
    data.setup("fit")
    return "\n".join(data.splits.reports["train"].remarks())


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("### Human: What is it?### Assistant: A cat.### Human: And that?", "### Human:"),
        ("Below is a task.\n\n### Instruction:\nAdd.\n\n### Response:\n4", "### Instruction:"),
        ("A chat. USER: Hi ASSISTANT: Hello", "USER:"),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "Human:"),
        ("USER: alone", None),
        ("The user: none. My assistant: none.", None),
    ],
)
def test_a_text_with_headers_of_turns_is_named_with_a_count(tmp_path: Path, text: str, header: str | None) -> None:
    said = remarks(tmp_path / "texts", [{"text": text}, {"text": "plain"}, {"text": f"{text}!"}])
    if header is None:
        assert not said
    else:
        assert said.startswith(f"train: in 2 rows, the text is a conversation with headers such as {header!r}")
        said = remarks(tmp_path / "prompts", [{"prompt": text, "completion": "yes"}])
        assert f"train: in 1 row, a message has headers of turns, such as {header!r}" in said


def test_a_text_with_markup_that_the_tokenizer_does_not_know_is_named() -> None:
    tokenizer = build_tokenizer(["x"], 0)
    (note,) = notes_of_text("[INST] Hi [/INST] Hello", tokenizer, doubled=False)
    assert "markup of a chat format, such as [/INST]" in note
    # Names that anybody may make up are one note of all; what is a token of the tokenizer is none.
    notes = {notes_of_text(f"a <|{name}|> b", tokenizer, doubled=False) for name in ("x0", "x1", "y_z")}
    assert len(notes) == 1 and "such as <|\u2026|>" in next(iter(notes))[0]
    tokenizer.add_tokens(["<|x2|>"])
    known.cache_clear()
    assert not notes_of_text("a <|x2|> b", tokenizer, doubled=False)


TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
WRITES_CALLS = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>' }}{% endif %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' }}{% if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}"
    "{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def hermes(call: str) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "system", "value": f"You call functions. <tools>[{json.dumps(TOOL)}]</tools>"},
            {"from": "human", "value": "Add 2 and 2."},
            {"from": "gpt", "value": call},
            {"from": "tool", "value": "<tool_response>\n4\n</tool_response>"},
            {"from": "gpt", "value": "It is 4."},
        ],
        "tools": json.dumps([{"type": "function", "function": TOOL}]),
    }


@pytest.mark.parametrize(
    "call", ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>', '[TOOL_CALLS] [{"name": "add"}]',
             "<function=add>{}</function>", "<functioncall> {}", "<|python_tag|>{}", '[add(a=2)]',
             '{"name": "add", "parameters": {}}'],
)  # fmt: skip
def test_calls_in_the_text_stay_that_text_and_are_named_with_a_count(tmp_path: Path, call: str) -> None:
    said = remarks(tmp_path, [hermes(call)] * 3, chat_template=WRITES_CALLS)
    assert "train: in 3 rows, calls of tools stand in the text" in said and "they stay that text" in said
    assert "train: in 3 rows, results of tools stand in <tool_response> tags" in said
    assert "train: in 3 rows, the system turn lists the tools, and the template lists them again" in said
    # Without the column there is nothing twice, and a template without calls has no way of its own.
    said = remarks(tmp_path, [hermes(call)], chat_template=WRITES_CALLS, column_map={"tools": "none"})
    assert "lists them again" not in said and "calls of tools" in said
    plain = WRITES_CALLS[WRITES_CALLS.index("{% for m") :].replace("m.tool_calls", "[]").replace("tool_response", "out")
    said = remarks(tmp_path, [hermes(call)], chat_template=plain, column_map={"tools": "none"})
    assert "calls of tools" not in said and "results of tools" not in said


def test_tools_beside_a_question_are_read_where_they_describe_functions() -> None:
    report = ColumnReport()
    row = {"question": "Add.", "answer": "[]", "tools": json.dumps([TOOL])}
    example = read(row, report)
    assert example.tools == ({"type": "function", "function": TOOL},) and not report.unused
    for other in ("hammer", ["hammer"], [], "[]", [TOOL, "x"], {"name": "x"}):
        report = ColumnReport()
        assert read({**row, "tools": other}, report).tools is None
        assert report.unused == ({"tools": 1} if other else {})


def test_a_picture_in_the_result_of_a_tool_may_be_left_out() -> None:
    content = [{"type": "image", "source": {}}, {"type": "text", "text": "done"}]
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": content},
             {"role": "assistant", "content": "b"}]  # fmt: skip
    name = "messages[].content[].image"
    assert f"--data.ignore_columns '{name}'" in refused({"messages": turns})
    assert (read({"messages": turns}, ignore=[name]).messages or ())[1]["content"] == "done"
    turns[1]["content"] = [{"type": "thinking", "thinking": "hm"}]
    assert "which a tool result cannot hold" in refused({"messages": turns})


# --- weights of turns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_mask", "loss_weight"])
def test_the_columns_name_weights_and_reasoning_of_turns(key: str) -> None:
    report = ColumnReport()
    turns: list[dict[str, Any]] = [{"role": "user", "content": "a", key: 0}, {"role": "assistant", "content": "b"}]
    read({"messages": turns}, report)
    read({"messages": [turns[0], {**turns[1], key: 1, "thinking": "c"}]}, report)
    read({"messages": [{"role": "user", "content": "a"}, turns[1]]}, report)
    assert report.lines() == [
        f"columns: messages → turns, messages[].thinking → reasoning (1 of 3 rows), messages[].{key} → weights of turns"
        " (2 of 3 rows)"
        if key > "thinking"
        else f"columns: messages → turns, messages[].{key} → weights of turns (2 of 3 rows), messages[].thinking →"
        " reasoning (1 of 3 rows)"
    ]


# --- the table -------------------------------------------------------------------------------------------------------

# As docs/guides/data.md has them: a row, what becomes of it, and words of the line that says so.
OUTCOMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "`conversations` or `messages` as a list of plain texts (LIMA)": (
        {"conversations": ["a", "b"]}, "turns of user and assistant, the user first", "plain texts",
    ),
    "`generations` beside `answer` or `solution` (Open-R1)": (
        {**OPEN_R1, "answer": "4"}, "refused with the option that learns the first: `--data.column_map.answers"
        " generations`", "--data.column_map.answers generations",
    ),
    "a list of turns in a column of another name": (
        {"dialog": [{"role": "user", "content": "a"}]}, "refused with the option: `--data.column_map.messages dialog`",
        "--data.column_map.messages dialog",
    ),
    "one turn a line (`role` and `content`)": (
        {"role": "user", "content": "a"}, "refused with the layout of a row", "is one turn",
    ),
    "`text` with headers of turns such as `### Human:` (Guanaco)": (
        {"text": "### Human: a### Assistant: b"}, "learnt as one text, named with a count", "headers such as",
    ),
    "calls spelt in the text of a turn, such as `<tool_call>` (Hermes)": (
        hermes("<tool_call>{}</tool_call>"), "that text, named with a count where the template writes calls itself",
        "stand in the text",
    ),
    "tools in the system turn and in `tools` (Hermes)": (
        hermes("b"), "both, named with a count: `--data.column_map.tools none` leaves the column out",
        "lists them again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "says"), [(row, says) for row, _, says in OUTCOMES.values()], ids=OUTCOMES.keys())
def test_every_shape_of_the_table_has_its_outcome(record: dict[str, Any], says: str, tmp_path: Path) -> None:
    report = ColumnReport()
    try:
        read(record, report)
    except UserError as error:
        assert says in str(error)
        return
    assert says in "\n".join([*report.lines(), remarks(tmp_path, [record], chat_template=WRITES_CALLS)])


def test_every_shape_is_in_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    missing = [f"| {shape} | {outcome} |" for shape, (_, outcome, _) in OUTCOMES.items()]
    missing = [line for line in missing if line not in page]
    assert not missing, "docs/guides/data.md lacks:\n" + "\n".join(missing)
