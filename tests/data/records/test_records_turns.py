"""Turns of every exporter, tools and calls: only roles, calls and prompts that templates know get through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.errors import UserError

WHERE = "data.jsonl, row 3"
USER = {"role": "user", "content": "Weather in Paris?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
SPEC = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {}}}}
TOOL = {"type": "function", "function": SPEC}


def read(record: dict[str, Any], **options: Any) -> Any:
    return normalise(record, WHERE, detect_format(record, WHERE, {}), options.pop("column_map", {}), **options)


def refused(record: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(record, **options)
    message = str(caught.value)
    assert message.startswith(WHERE) and len(message.splitlines()) == 1
    return message


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["Human", "HUMAN", " human ", "User", "human"])
def test_roles_are_known_in_any_case(spelling: str) -> None:
    record = {"conversations": [{"from": spelling, "value": "a"}, {"from": "GPT", "value": "b"}]}
    assert [m["role"] for m in read(record).messages] == ["user", "assistant"]


@pytest.mark.parametrize("field", ["messages", "conversations"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_either_pair_of_keys_is_read_in_either_column(field: str, keys: tuple[str, str]) -> None:
    record = {field: [dict(zip(keys, turn, strict=True)) for turn in (("human", "a"), ("gpt", "b"))]}
    assert read(record).messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def test_a_key_that_holds_nothing_does_not_hide_the_other() -> None:
    # Where objects of both kinds share a column, Arrow gives each the keys of all.
    turns = [
        {"from": None, "value": None, "role": "user", "content": "a"},
        {"from": "gpt", "value": "b", "role": None, "content": float("nan")},
    ]
    for field in ("messages", "conversations"):
        assert [m["content"] for m in read({field: turns}).messages] == ["a", "b"]


def test_no_role_but_the_four_that_templates_know_gets_through() -> None:
    said = ["system", "human", "function_call", "observation", "gpt", "function_response", "tool", "model"]
    record = {"conversations": [{"from": role, "value": f"v{i}"} for i, role in enumerate(said)]}
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    assert [(m["role"], m["content"]) for m in read(record).messages] == [(r, f"v{i}") for i, r in enumerate(roles)]


def test_turns_may_come_as_json_within_a_cell() -> None:
    assert read({"messages": json.dumps([USER, ANSWER])}).messages == (USER, ANSWER)
    assert "non-empty list" in refused({"messages": "[broken"})


def test_a_format_that_columns_are_mapped_for_comes_before_others() -> None:
    record = {"messages": [USER, ANSWER], "task": "2 + 2?", "gold": "4", "text": "t"}
    for column_map in ({"question": "task", "answer": "gold"}, {"prompt": "task", "completion": "gold"}):
        for need_response in (True, False):
            format = detect_format(record, WHERE, column_map, need_response=need_response)
            assert format == ("question_answer" if "answer" in column_map else "prompt_completion")
    assert detect_format(record, WHERE, {"id": "task", "system": "gold"}) == "messages"


def test_a_format_with_a_response_comes_before_the_prompt_of_another() -> None:
    record = {"prompt": [USER], "question": "2 + 2?", "answer": "4"}
    assert detect_format(record, WHERE, {}, need_response=False) == "question_answer"


# --- the system prompt ----------------------------------------------------------------------------------------------

BESIDE: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Sunny."}]},
    "text": {"prompt": USER["content"], "completion": "Sunny."},
    "chat": {"prompt": [USER], "completion": [ANSWER]},
    "alpaca": {"instruction": USER["content"], "output": "Sunny."},
    "question": {"question": USER["content"], "answer": "Sunny."},
}
every_conversation = pytest.mark.parametrize("name", BESIDE)


@every_conversation
def test_a_system_column_comes_first_in_every_format(name: str) -> None:
    assert read({**BESIDE[name], "system": "Be brief."}).messages == (
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
    )
    mapped = {**BESIDE[name], "sys": {"prompt": "Be brief."}}
    assert read(mapped, column_map={"system": "sys.prompt"}).messages[0]["content"] == "Be brief."


@every_conversation
@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan")])
def test_a_system_column_that_says_nothing_is_no_turn(name: str, nothing: Any) -> None:
    assert read({**BESIDE[name], "system": nothing}).messages == (USER, ANSWER)


@every_conversation
def test_the_order_of_the_columns_does_not_matter(name: str) -> None:
    record = {"id": "x", "system": "Be brief.", **BESIDE[name]}
    turned = dict(reversed(record.items()))
    assert read(turned) == read(record) and detect_format(turned, WHERE, {}) == detect_format(record, WHERE, {})


def test_a_system_column_that_repeats_the_system_turn_is_said_once_and_another_is_an_error() -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    assert len(read({"messages": turns, "system": "Be brief."}).messages) == 3
    assert "'system'" in (message := refused({"messages": turns, "system": "Be long."})) and "keep one" in message


# --- calls and tools ------------------------------------------------------------------------------------------------


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [call('{"city": "Paris"}')]},
        {"tool_calls": [call({"city": "Paris"})]},
        {"content": "", "tool_calls": [call({"city": "Paris"})]},
        {"content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]},
        {"content": None, "tool_calls": json.dumps([call({"city": "Paris"})])},
        {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"content": float("nan"), "tool_calls": [call('{"city": "Paris"}')], "function_call": None},
    ],
)
def test_a_turn_that_only_calls_has_empty_content_and_the_calls_in_one_layout(turn: dict[str, Any]) -> None:
    result = {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"}
    example = read({"messages": [USER, {"role": "assistant", **turn}, result, ANSWER]})
    assert example.messages == (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, ANSWER)
    assert example.response == "Sunny." and len(example.prompt) == 3


def test_the_id_of_a_call_and_words_beside_it_are_kept() -> None:
    turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("", id="c1"), call({"n": None}, id=2)]}
    assert read({"messages": [USER, turn]}).messages[1] == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {}}},
            {"id": "2", "type": "function", "function": {"name": "weather", "arguments": {"n": None}}},
        ],
    }


def test_a_conversation_that_ends_with_a_call_has_no_response_to_swap_and_a_prompt_before_it() -> None:
    example = read({"messages": [USER, {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]}]})
    assert example.response is None and example.prompt == (USER,)


def test_no_calls_are_no_key() -> None:
    turns = [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": [], "function_call": None}]
    assert read({"messages": turns}).messages == (USER, ANSWER)


def test_a_call_that_sharegpt_writes_as_json_becomes_a_call_and_other_words_stay() -> None:
    def said(value: str) -> Any:
        turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]
        return read({"conversations": turns}).messages[1]

    written = {"name": "weather", "arguments": {"city": "Paris"}}
    wanted = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert said(json.dumps(written)) == wanted == said(json.dumps([{**written, "arguments": '{"city": "Paris"}'}]))
    for other in ("weather(Paris)", '{"city": "Paris"}', "[]", "[1]", '{"name"'):
        assert said(other) in ({"role": "assistant", "content": other}, wanted) and said(other) != wanted


@pytest.mark.parametrize("spec", [[TOOL], [SPEC], json.dumps([TOOL]), [json.dumps(SPEC)], json.dumps([SPEC], indent=1)])
@pytest.mark.parametrize("name", ["messages", "sharegpt", "chat"])
def test_tools_stay_beside_the_conversation_in_one_layout(name: str, spec: Any) -> None:
    example = read({**BESIDE[name], "tools": spec})
    assert example.tools == (TOOL,) and example.messages == (USER, ANSWER)


@pytest.mark.parametrize("nothing", [None, [], "", " ", "[]", "null", float("nan")])
def test_no_tools_are_none_and_change_no_digest(nothing: Any) -> None:
    example = read({"messages": [USER, ANSWER], "tools": nothing})
    assert example.tools is None and example.digest == read({"messages": [USER, ANSWER]}).digest


def test_tools_and_calls_are_part_of_the_digest() -> None:
    def digest(arguments: Any = "Paris", **columns: Any) -> str:
        turn = {"role": "assistant", "content": None, "tool_calls": [call({"city": arguments})]}
        return str(read({"messages": [USER, turn], **columns}).digest)

    assert len({digest(), digest("Rome"), digest(tools=[TOOL]), digest(tools=[{"name": "other"}])}) == 4
    assert digest(tools=[TOOL]) == digest(tools=[SPEC])


@pytest.mark.parametrize("tools", ["hammer", ["hammer"], {"name": "x"}, [{"description": "x"}], 3, [None], "[1"])
def test_tools_that_are_none_are_one_line_that_says_how_to_leave_them_out(tools: Any) -> None:
    assert "--data.column_map.tools none" in refused({"messages": [USER, ANSWER], "tools": tools})
    assert read({"messages": [USER, ANSWER], "tools": tools}, column_map={"tools": "none"}).tools is None


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        (["weather"], "tool_calls[0]"),
        ("weather", "tool_calls[0]"),
        ([{"function": "weather"}], "tool_calls[0]"),
        ([{"function": {"arguments": {}}}], "tool_calls[0]"),
        ([call({}), call("Paris")], "tool_calls[1].arguments"),
        ([call(["Paris"])], "tool_calls[0].arguments"),
        ([call('{"city": ')], "tool_calls[0].arguments"),
        ([call({"city": "\ud800"})], "surrogate"),
    ],
)
def test_a_call_that_cannot_be_read_is_one_line(calls: Any, says: str) -> None:
    assert says in refused({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]})


# --- questions and answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers", [["Sunny.", "Sun"], {"text": ["Sunny.", "Sun"], "answer_start": [3, 5]}, ["Sunny."], ("Sunny.",)]
)
def test_of_several_answers_the_first_is_learnt(answers: Any) -> None:
    assert read({"question": USER["content"], "answers": answers}).messages == (USER, ANSWER)
    assert read({"question": USER["content"], "answers": answers, "answer": "Rain."}).response == "Rain."


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([], "holds no answer"),
        ({"text": []}, "'answers.text': holds no answer"),
        ("Sunny.", "expected a list of answers, got str"),
        ({"value": "x"}, "'answers.text': expected a list"),
        ([None], "'answers[0]': is missing"),
        ([""], "'answers[0]': is empty"),
        ([["a"]], "'answers[0]'"),
    ],
)
def test_answers_of_which_none_can_be_learnt_are_one_line(answers: Any, says: str) -> None:
    assert says in refused({"question": "a", "answers": answers})


@pytest.mark.parametrize("answers", [[], {"text": []}, None])
def test_a_question_without_answers_is_a_prompt_where_no_response_is_needed(answers: Any) -> None:
    example = normalise({"question": "a", "answers": answers}, WHERE, "question_answer", {}, need_response=False)
    assert example.prompt == ({"role": "user", "content": "a"},) and example.response is None


def test_the_passage_that_a_question_is_about_stands_before_it() -> None:
    # SQuAD without its context, Dolly without its own, would teach to guess.
    squad = {"id": "7", "title": "t", "context": "Paris is sunny.", "question": "How?", "answers": {"text": ["Sunny"]}}
    assert read(squad).messages[0]["content"] == "Paris is sunny.\n\nHow?"
    dolly = {"instruction": "How?", "context": "Paris is sunny.", "response": "Sunny", "category": "qa"}
    assert read(dolly).messages[0]["content"] == "How?\n\nParis is sunny."
    assert read({**dolly, "context": ""}).messages[0]["content"] == "How?"
    assert "--data.column_map.context none" in refused({**squad, "context": {"sentences": []}})
    assert read({**squad, "context": {}}, column_map={"context": "none"}).messages[0]["content"] == "How?"
