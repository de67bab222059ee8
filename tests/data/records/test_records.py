"""Every format a user brings becomes the same messages; a row that cannot be read is one line with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data.examples import Example
from deft_lightning.data.records.formats import ALIASES, CONVERSATIONS, OTHERS, detect_format, normalise
from deft_lightning.errors import UserError

WHERE = "data.jsonl, row 3"
FORMATS = [*CONVERSATIONS, *OTHERS]


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def refused(
    record: Any, format: str, column_map: Mapping[str, str] | None = None, *, need_response: bool = True
) -> str:
    """The message of the error, which must be a single line that begins with the place."""
    with pytest.raises(UserError) as caught:
        normalise(record, WHERE, format, column_map or {}, need_response=need_response)
    message = str(caught.value)
    assert message.startswith(WHERE) and len(message.splitlines()) == 1
    return message


# --- what each format becomes ---------------------------------------------------------------------------------------

QA = (("user", "2 + 2?"), ("assistant", "4"))
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
GOOD: dict[str, tuple[str, dict[str, Any], tuple[tuple[str, str], ...]]] = {
    "messages": ("messages", {"messages": turns(*QA)}, QA),
    "messages with system and tool turns": (
        "messages",
        {"messages": turns(("system", "be brief"), *QA, ("tool", "log"), ("assistant", "done"))},
        (("system", "be brief"), *QA, ("tool", "log"), ("assistant", "done")),
    ),
    "messages with empty turns of others": (
        "messages",
        {"messages": turns(("system", ""), ("user", ""), ("assistant", "4"))},
        (("system", ""), ("user", ""), ("assistant", "4")),
    ),
    "messages with roles of other exporters": (
        "messages",
        {"messages": turns(("developer", "be brief"), ("human", "2 + 2?"), ("model", "4"))},
        (("system", "be brief"), *QA),
    ),
    "messages keep blanks around the content": (
        "messages",
        {"messages": turns(("user", " 2 + 2?\n"), ("assistant", "\n4 "))},
        (("user", " 2 + 2?\n"), ("assistant", "\n4 ")),
    ),
    "content as text parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
        QA,
    ),
    "sharegpt": ("sharegpt", {"conversations": SHAREGPT}, QA),
    "sharegpt with every role": (
        "sharegpt",
        {"conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": "add(2, 2)"},
            {"from": "observation", "value": "4"},
            {"from": "tool", "value": "log"},
            {"from": "gpt", "value": "It is 4"},
        ]},
        (("system", "be brief"), ("user", "2 + 2?"), ("assistant", "add(2, 2)"), ("tool", "4"), ("tool", "log"),
         ("assistant", "It is 4")),
    ),
    "sharegpt with a system column": (
        "sharegpt",
        {"system": "be brief", "conversations": SHAREGPT},
        (("system", "be brief"), *QA),
    ),
    "sharegpt with an empty system column": (
        "sharegpt",
        {"system": "", "conversations": SHAREGPT},
        QA,
    ),
    "sharegpt with role and content": ("sharegpt", {"conversations": turns(*QA)}, QA),
    "prompt and completion as text": ("prompt_completion", {"prompt": "2 + 2?", "completion": "4"}, QA),
    "prompt and completion as chat": (
        "prompt_completion",
        {"prompt": turns(("system", "be brief"), QA[0]), "completion": turns(QA[1])},
        (("system", "be brief"), *QA),
    ),
    "prompt as chat, completion as text": ("prompt_completion", {"prompt": turns(QA[0]), "completion": "4"}, QA),
    "prompt as text, completion as chat": ("prompt_completion", {"prompt": "2 + 2?", "completion": turns(QA[1])}, QA),
    "alpaca": ("alpaca", {"instruction": "2 + 2?", "output": "4"}, QA),
    "alpaca with response": ("alpaca", {"instruction": "2 + 2?", "response": "4"}, QA),
    "alpaca with blank input": ("alpaca", {"instruction": "2 + 2?", "input": " ", "output": "4"}, QA),
    "alpaca with null columns": (
        "alpaca",
        {"instruction": "2 + 2?", "input": None, "system": None, "history": None, "output": "4"},
        QA,
    ),
    "alpaca with everything": (
        "alpaca",
        {"system": "be brief", "history": [["1 + 1?", "2"], ("1 + 2?", "3")], "instruction": "Add.", "input": "2, 2",
         "output": "4"},
        (("system", "be brief"), ("user", "1 + 1?"), ("assistant", "2"), ("user", "1 + 2?"), ("assistant", "3"),
         ("user", "Add.\n\n2, 2"), ("assistant", "4")),
    ),
    "question and answer": ("question_answer", {"question": "2 + 2?", "answer": "4"}, QA),
    "an answer that is an integer": ("question_answer", {"question": "2 + 2?", "answer": 4}, QA),
    "an answer that is a float": (
        "question_answer", {"question": "half?", "answer": 0.5}, (("user", "half?"), ("assistant", "0.5")),
    ),
    "an answer that is zero": (
        "question_answer", {"question": "1 - 1?", "answer": 0}, (("user", "1 - 1?"), ("assistant", "0")),
    ),
    "an answer that is a truth value": (
        "question_answer", {"question": "so?", "answer": False}, (("user", "so?"), ("assistant", "False")),
    ),
    "a number within messages": ("messages", {"messages": [*turns(QA[0]), {"role": "assistant", "content": 4}]}, QA),
}  # fmt: skip
every_good_row = pytest.mark.parametrize(("format", "record", "expected"), GOOD.values(), ids=GOOD.keys())


@every_good_row
def test_a_record_becomes_these_messages(
    format: str, record: dict[str, Any], expected: tuple[tuple[str, str], ...]
) -> None:
    before = json.dumps(record)
    example = normalise(record, WHERE, format, {})
    assert example.messages == tuple(turns(*expected))
    assert example.text is None and example.tokens is None and example.where == WHERE
    assert json.dumps(record) == before


@every_good_row
@pytest.mark.parametrize("need_response", [True, False])
def test_auto_recognises_the_format_by_its_fields(
    format: str, record: dict[str, Any], expected: object, need_response: bool
) -> None:
    assert detect_format(record, WHERE, {}, need_response=need_response) == format


@every_good_row
def test_the_last_assistant_turn_is_the_response_and_what_precedes_it_the_prompt(
    format: str, record: dict[str, Any], expected: tuple[tuple[str, str], ...]
) -> None:
    example = normalise(record, WHERE, format, {})
    assert example.response == expected[-1][1]
    assert example.prompt == tuple(turns(*expected[:-1]))


@pytest.mark.parametrize(("alias", "role"), ALIASES.items())
def test_every_alias_stands_for_a_role_of_chat_templates(alias: str, role: str) -> None:
    assert role in {"system", "user", "assistant", "tool"}
    record = {"conversations": [*SHAREGPT, {"from": alias, "value": "b"}]}
    messages = normalise(record, WHERE, "sharegpt", {}).messages
    assert messages is not None and messages[2] == {"role": role, "content": "b"}


def test_a_conversation_that_ends_with_the_user_has_no_response_and_is_all_prompt() -> None:
    example = normalise({"messages": turns(*QA, ("user", "sure?"))}, WHERE, "messages", {})
    assert example.response is None
    assert example.prompt == tuple(turns(*QA, ("user", "sure?")))


def test_text_is_kept_as_it_is() -> None:
    example = normalise({"text": " Once upon\n a time. "}, WHERE, "text", {})
    assert example.text == " Once upon\n a time. " and example.messages is None and example.tokens is None
    assert example.response is None and example.prompt == ()


def test_tokens_without_labels_supervise_every_token() -> None:
    assert normalise({"input_ids": [5, 6, 7]}, WHERE, "tokens", {}).tokens == ([5, 6, 7], [5, 6, 7])


def test_tokens_keep_their_labels() -> None:
    record = {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]}
    example = normalise(record, WHERE, "tokens", {})
    assert example.tokens == ([5, 6, 7], [-100, 6, 9]) and example.messages is None and example.text is None


@pytest.mark.parametrize(("record", "format"), [({"text": "a"}, "text"), ({"input_ids": [1]}, "tokens")])
def test_auto_recognises_text_and_tokens(record: dict[str, Any], format: str) -> None:
    assert detect_format(record, WHERE, {}) == format


def test_auto_prefers_a_conversation_to_the_text_made_of_it() -> None:
    assert detect_format({"text": "### all of it", "instruction": "Add.", "output": "4"}, WHERE, {}) == "alpaca"


def test_auto_needs_a_value_not_only_a_column() -> None:
    assert detect_format({"question": "2 + 2?", "answer": None, "text": "2 + 2 = 4"}, WHERE, {}) == "text"


@pytest.mark.parametrize(
    "record", [{}, {"question": "2 + 2?"}, {"instruction": "Add."}, {"prompt": "a", "output": "b"}]
)
def test_auto_says_which_columns_fit_nothing_and_how_to_map_them(record: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        detect_format(record, WHERE, {})
    message = str(caught.value)
    assert message.startswith(WHERE) and len(message.splitlines()) == 1
    assert "--data.format" in message and "--data.column_map" in message
    assert all(column in message for column in record)


# --- column_map -----------------------------------------------------------------------------------------------------


def test_column_map_renames_columns() -> None:
    record = {"problem": "2 + 2?", "solution": "4", "answer": "not this one"}
    column_map = {"question": "problem", "answer": "solution"}
    assert detect_format(record, WHERE, column_map) == "question_answer"
    assert normalise(record, WHERE, "question_answer", column_map).messages == tuple(turns(*QA))


def test_column_map_follows_dotted_keys() -> None:
    record = {"extra_info": {"question": "2 + 2?", "more": {"answer": 4}}}
    column_map = {"question": "extra_info.question", "answer": "extra_info.more.answer"}
    assert detect_format(record, WHERE, column_map) == "question_answer"
    assert normalise(record, WHERE, "question_answer", column_map).messages == tuple(turns(*QA))


def test_a_column_whose_name_has_a_dot_wins_over_the_nested_one() -> None:
    record = {"a.q": "2 + 2?", "a": {"q": "nested"}, "answer": "4"}
    assert normalise(record, WHERE, "question_answer", {"question": "a.q"}).messages == tuple(turns(*QA))


@pytest.mark.parametrize(
    ("format", "column_map", "record"),
    [
        ("messages", {"messages": "chat"}, {"chat": turns(*QA)}),
        ("sharegpt", {"conversations": "log.turns"}, {"log": {"turns": SHAREGPT}}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, {"q": "2 + 2?", "a": "4"}),
        ("alpaca", {"instruction": "task", "output": "result"}, {"task": "2 + 2?", "result": "4"}),
        ("alpaca", {"response": "result"}, {"instruction": "2 + 2?", "result": "4"}),
    ],
)
def test_column_map_serves_every_format(format: str, column_map: dict[str, str], record: dict[str, Any]) -> None:
    assert detect_format(record, WHERE, column_map) == format
    assert normalise(record, WHERE, format, column_map).messages == tuple(turns(*QA))


def test_column_map_serves_text_and_tokens() -> None:
    assert normalise({"body": "a tale"}, WHERE, "text", {"text": "body"}).text == "a tale"
    record = {"t": {"ids": [1, 2]}, "y": [-100, 2]}
    assert normalise(record, WHERE, "tokens", {"input_ids": "t.ids", "labels": "y"}).tokens == ([1, 2], [-100, 2])


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"question": "a", "info": {}}, "'info.solution'"),
        ({"question": "a", "info": None}, "'info.solution'"),
        ({"question": "a", "info": "text"}, "'info.solution'"),
        ({"question": "a", "info": {"solution": " "}}, "'info.solution'"),
        ({"question": "a", "info": {"solution": ["b"]}}, "'info.solution'"),
    ],
)
def test_an_error_names_the_mapped_column(record: dict[str, Any], named: str) -> None:
    assert named in refused(record, "question_answer", {"answer": "info.solution"})


# --- ids and digests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "id"), [("chal-7", "chal-7"), (0, "0"), (12, "12")])
def test_an_id_of_the_record_is_kept(own: object, id: str) -> None:
    assert normalise({"id": own, "question": "a", "answer": "b"}, WHERE, "question_answer", {}).id == id


def test_column_map_names_the_id() -> None:
    record = {"ID": "chal-7", "question": "a", "answer": "b"}
    assert normalise(record, WHERE, "question_answer", {"id": "ID"}).id == "chal-7"


@pytest.mark.parametrize("own", [None, "", ["x"], {"x": 1}])
def test_without_a_usable_id_the_content_is_the_id(own: object) -> None:
    example = normalise({"id": own, "question": "a", "answer": "b"}, WHERE, "question_answer", {})
    assert example.id == example.digest == normalise({"question": "a", "answer": "b"}, "x", "question_answer", {}).id


def test_the_digest_is_of_the_content_alone() -> None:
    def digest(record: dict[str, Any], format: str = "question_answer", where: str = WHERE) -> str:
        return normalise(record, where, format, {}).digest

    same = digest({"question": "a", "answer": "b"})
    assert digest({"answer": "b", "question": "a", "id": 7, "source": "web"}, where="other.csv, row 9") == same
    assert digest({"messages": turns(("user", "a"), ("assistant", "b"))}, "messages") == same
    others = [
        digest({"question": "a", "answer": "c"}),
        digest({"question": "b", "answer": "a"}),
        digest({"question": "a b", "answer": "b"}),
        digest({"messages": turns(("system", "a"), ("assistant", "b"))}, "messages"),
        digest({"messages": turns(("user", "a"), ("assistant", "b"), ("user", "c"))}, "messages"),
        digest({"text": "ab"}, "text"),
        digest({"input_ids": [1, 2]}, "tokens"),
        digest({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens"),
    ]
    assert len({same, *others}) == len(others) + 1


# --- rows without a response ----------------------------------------------------------------------------------------

PROMPT_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("messages", {"messages": turns(QA[0])}),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "2 + 2?"}]}),
    "prompt_completion as text": ("prompt_completion", {"prompt": "2 + 2?"}),
    "prompt_completion as chat": ("prompt_completion", {"prompt": turns(QA[0])}),
    "alpaca": ("alpaca", {"instruction": "2 + 2?"}),
    "question_answer": ("question_answer", {"question": "2 + 2?", "answer": None}),
}
every_prompt = pytest.mark.parametrize(("format", "record"), PROMPT_ONLY.values(), ids=PROMPT_ONLY.keys())


@every_prompt
def test_a_prompt_alone_is_welcome_where_no_response_is_needed(format: str, record: dict[str, Any]) -> None:
    example = normalise(record, WHERE, format, {}, need_response=False)
    assert example.messages == tuple(turns(QA[0])) == example.prompt
    assert example.response is None


@every_prompt
def test_auto_recognises_a_prompt_alone_where_no_response_is_needed(format: str, record: dict[str, Any]) -> None:
    assert detect_format(record, WHERE, {}, need_response=False) == format


@every_prompt
def test_a_prompt_alone_is_refused_where_a_response_is_needed(format: str, record: dict[str, Any]) -> None:
    message = refused(record, format)
    assert "no assistant turn" in message or "missing field" in message


@pytest.mark.parametrize("column_map", [{}, {"answer": "gold"}, {"answer": "extra.gold"}])
def test_a_prompt_alone_is_welcome_under_any_column_map(column_map: dict[str, str]) -> None:
    example = normalise({"question": "2 + 2?"}, WHERE, "question_answer", column_map, need_response=False)
    assert example.messages == tuple(turns(QA[0]))


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("question_answer", {"question": "2 + 2?", "answer": ""}),
        ("alpaca", {"instruction": "2 + 2?", "output": ""}),
        ("prompt_completion", {"prompt": "2 + 2?", "completion": ""}),
    ],
)
def test_an_empty_response_is_as_good_as_none_where_no_response_is_needed(format: str, record: dict[str, Any]) -> None:
    # An empty cell is the only way a CSV file can say that there is no response.
    example = normalise(record, WHERE, format, {}, need_response=False)
    assert example.messages == tuple(turns(QA[0])) and example.response is None


@every_good_row
def test_a_response_that_is_there_is_kept_where_none_is_needed(
    format: str, record: dict[str, Any], expected: tuple[tuple[str, str], ...]
) -> None:
    example = normalise(record, WHERE, format, {}, need_response=False)
    assert example.messages == tuple(turns(*expected))


# --- errors ---------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}
BAD: dict[str, tuple[str, Any, list[str]]] = {
    # what is wrong: (format, record, what the line must say besides file and row)
    "unknown role": (
        "messages",
        {"messages": [USER, {"role": "asistant", "content": "b"}]},
        ["messages[1].role", "unknown role 'asistant'", "Did you mean assistant"],
    ),
    "unknown speaker": (
        "sharegpt",
        {"conversations": [{"from": "humann", "value": "a"}]},
        ["conversations[0].from", "unknown role 'humann'", "Did you mean human"],
    ),
    "role that is no word": ("messages", {"messages": [{"role": ["user"], "content": "a"}]}, ["messages[0].role"]),
    "missing role": ("messages", {"messages": [{"content": "a"}]}, ["messages[0].role", "is missing"]),
    "null role": ("messages", {"messages": [{"role": None, "content": "a"}]}, ["messages[0].role", "is missing"]),
    "missing speaker": ("sharegpt", {"conversations": [{"value": "a"}]}, ["conversations[0].", "is missing"]),
    "missing content": ("messages", {"messages": [USER, {"role": "assistant"}]}, ["messages[1].content", "is missing"]),
    "null content": ("messages", {"messages": [{"role": "user", "content": None}]}, ["messages[0].content", "missing"]),
    "missing value": ("sharegpt", {"conversations": [{"from": "gpt"}]}, ["conversations[0].value", "is missing"]),
    "empty assistant turn": (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        ["messages[1].content", "is empty"],
    ),
    "empty gpt turn": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        ["conversations[1].value", "is empty"],
    ),
    "assistant turn of empty parts": (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": []}]},
        ["messages[1].content", "is empty"],
    ),
    "content that is an object": (
        "messages",
        {"messages": [{"role": "user", "content": {"text": "a"}}]},
        ["messages[0].content", "expected text, got dict"],
    ),
    "content with an image": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        ["messages[0].content", "expected text, got list"],
    ),
    "no messages": ("messages", {"messages": []}, ["'messages'", "non-empty list"]),
    "messages as text": ("messages", {"messages": "hello"}, ["'messages'", "non-empty list"]),
    "messages as an object": ("messages", {"messages": USER}, ["'messages'", "non-empty list"]),
    "message that is text": (
        "messages", {"messages": ["hello", {"role": "user"}]}, ["messages[0]", "expected an object, got str"],
    ),
    "messages missing": ("messages", {"text": "a"}, ["missing field 'messages'", "text", "--data.column_map.messages"]),
    "conversations missing": ("sharegpt", {"x": 1}, ["missing field 'conversations'"]),
    "only the user speaks": ("messages", {"messages": [USER]}, ["'messages'", "no assistant turn"]),
    "only the human speaks": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}]},
        ["'conversations'", "no assistant turn"],
    ),
    "completion without assistant": (
        "prompt_completion",
        {"prompt": "a", "completion": [USER]},
        ["no assistant turn"],
    ),
    "prompt missing": ("prompt_completion", {"completion": "b"}, ["missing field 'prompt'"]),
    "prompt empty": ("prompt_completion", {"prompt": "", "completion": "b"}, ["'prompt'", "is empty"]),
    "prompt without turns": ("prompt_completion", {"prompt": [], "completion": "b"}, ["'prompt'", "non-empty list"]),
    "prompt of a wrong type": ("prompt_completion", {"prompt": {"a": 1}, "completion": "b"}, ["'prompt'", "got dict"]),
    "completion missing": ("prompt_completion", {"prompt": "a"}, ["missing field 'completion'"]),
    "completion empty": ("prompt_completion", {"prompt": "a", "completion": " "}, ["'completion'", "is empty"]),
    "completion of a wrong type": ("prompt_completion", {"prompt": "a", "completion": {}}, ["'completion'", "dict"]),
    "instruction missing": ("alpaca", {"output": "b"}, ["missing field 'instruction'"]),
    "instruction empty": ("alpaca", {"instruction": "", "output": "b"}, ["'instruction'", "is empty"]),
    "output missing": ("alpaca", {"instruction": "a", "text": "x"}, ["'output' or 'response'", "instruction, text"]),
    "output empty": ("alpaca", {"instruction": "a", "output": ""}, ["'output'", "is empty"]),
    "response empty": ("alpaca", {"instruction": "a", "response": "\t"}, ["'response'", "is empty"]),
    "input of a wrong type": ("alpaca", {"instruction": "a", "input": ["x"], "output": "b"}, ["'input'", "got list"]),
    "system of a wrong type": ("alpaca", {"instruction": "a", "system": {}, "output": "b"}, ["'system'", "got dict"]),
    "history of triples": (
        "alpaca",
        {"instruction": "a", "history": [["x", "y"], ["x", "y", "z"]], "output": "b"},
        ["history[1]", "pair"],
    ),
    "history of text": ("alpaca", {"instruction": "a", "history": "xy", "output": "b"}, ["history"]),
    "history that is a number": ("alpaca", {"instruction": "a", "history": 5, "output": "b"}, ["history"]),
    "history with an empty answer": (
        "alpaca", {"instruction": "a", "history": [["x", ""]], "output": "b"}, ["history[0]", "is empty"],
    ),
    "question missing": ("question_answer", {"answer": "b"}, ["missing field 'question'", "answer"]),
    "answer null": ("question_answer", {"question": "a", "answer": None}, ["missing field 'answer'"]),
    "answer empty": ("question_answer", {"question": "a", "answer": ""}, ["'answer'", "is empty"]),
    "answer of a wrong type": ("question_answer", {"question": "a", "answer": ["b"]}, ["'answer'", "got list"]),
    "text missing": ("text", {"body": "a"}, ["missing field 'text'", "body", "--data.column_map.text"]),
    "text empty": ("text", {"text": " "}, ["'text'", "is empty"]),
    "text of a wrong type": ("text", {"text": {"a": 1}}, ["'text'", "got dict"]),
    "tokens missing": ("tokens", {"text": "a"}, ["missing field 'input_ids'"]),
    "tokens empty": ("tokens", {"input_ids": []}, ["'input_ids'", "non-empty list of integers"]),
    "tokens as text": ("tokens", {"input_ids": "1 2"}, ["'input_ids'", "list of integers"]),
    "tokens as floats": ("tokens", {"input_ids": [1.0, 2.0]}, ["'input_ids'", "list of integers"]),
    "tokens as truth values": ("tokens", {"input_ids": [True, False]}, ["'input_ids'", "list of integers"]),
    "tokens in a batch": ("tokens", {"input_ids": [[1, 2]]}, ["'input_ids'", "list of integers"]),
    "labels of another length": ("tokens", {"input_ids": [1, 2], "labels": [1]}, ["'labels'", "1 entries", "2"]),
    "labels of a wrong type": ("tokens", {"input_ids": [1, 2], "labels": [1, None]}, ["'labels'", "list of integers"]),
    "labels empty": ("tokens", {"input_ids": [1, 2], "labels": []}, ["'labels'", "list of integers"]),
}  # fmt: skip


@pytest.mark.parametrize(("format", "record", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_one_line_that_names_file_row_and_field(format: str, record: Any, says: list[str]) -> None:
    message = refused(record, format)
    assert all(part in message for part in says), message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("record", [["a", "b"], "a", 3, None, True])
def test_a_row_that_is_no_object_is_refused_with_its_type(format: str, record: object) -> None:
    message = refused(record, format)
    assert "expected an object" in message and type(record).__name__ in message
    with pytest.raises(UserError, match="expected an object"):
        detect_format(record, WHERE, {})


def test_line_breaks_of_the_data_do_not_break_the_message() -> None:
    message = refused({"messages": [{"role": "user\nsystem", "content": "a"}], "x\ny": 1}, "messages")
    assert "messages[0].role" in message
    assert "missing field" in refused({"x\ny": 1}, "messages")


# --- anything at all ------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "tool", "a\nb", "nobody", "", " "])
SCALARS = st.none() | st.booleans() | st.integers(-200, 10) | st.floats() | WORDS
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text"])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": WORDS}) | st.fixed_dictionaries({"from": WORDS, "value": WORDS}),
    max_size=3,
)
IDS = st.lists(st.sampled_from([1, 2, -100]), min_size=2, max_size=2)
PAIRS = st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2)
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": TURNS, "system": WORDS},
    "prompt_completion": {"prompt": WORDS | TURNS, "completion": WORDS | TURNS},
    "alpaca": dict.fromkeys(["instruction", "input", "output", "response", "system"], WORDS) | {"history": PAIRS},
    "question_answer": {"question": WORDS, "answer": WORDS},
    "text": {"text": WORDS},
    "tokens": {"input_ids": IDS, "labels": IDS},
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format and a row of it that is right, but for one field that may be absent or hold anything."""
    format = draw(st.sampled_from(FORMATS))
    record = {field: draw(right) for field, right in FIELDS[format].items()}
    record["id"] = draw(st.none() | st.integers(0, 9) | WORDS)
    spoilt = draw(st.sampled_from([None, *record]))
    if spoilt is not None and draw(st.booleans()):
        record[spoilt] = draw(ANYTHING)
    elif spoilt is not None:
        del record[spoilt]
    return format, record


@pytest.mark.slow
@settings(deadline=None, max_examples=1000, derandomize=True)
@given(case=rows(), need_response=st.booleans())
def test_any_record_becomes_an_example_or_one_line(case: tuple[str, dict[str, Any]], need_response: bool) -> None:
    format, record = case
    try:
        example = normalise(record, WHERE, format, {}, need_response=need_response)
    except UserError as error:
        assert str(error).startswith(WHERE) and len(str(error).splitlines()) == 1
        return
    assert isinstance(example, Example) and example.id
    assert sum(value is not None for value in (example.messages, example.text, example.tokens)) == 1
    if example.messages is not None:
        assert all(m["role"] in ("system", "user", "assistant", "tool") for m in example.messages)
        assert all(isinstance(m["content"], str) for m in example.messages)
        answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
        assert all(answer.strip() for answer in answers) and (answers or not need_response)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_nan_as_pandas_writes_it_is_a_missing_value(field: str) -> None:
    record = {"question": "2 + 2?", "answer": "4", field: float("nan")}
    with pytest.raises(UserError, match=rf"row 1: missing field '{field}'"):
        normalise(record, "rows.jsonl, row 1", "question_answer", {})


def test_nan_in_an_optional_field_is_left_out() -> None:
    record = {"instruction": "Say hi", "input": float("nan"), "output": "hi"}
    example = normalise(record, "rows.jsonl, row 1", "alpaca", {})
    assert example.messages is not None and example.messages[0]["content"] == "Say hi"
