"""Stock templates of the models people use: what is supervised is what the assistant says, or the row is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stock import NAMES, folder, stock, tokenizer_for

from deft_lightning.data.encoding.encode import encode, tokenise
from deft_lightning.data.encoding.spans import lay_out
from deft_lightning.data.encoding.supervise import Supervise, Teaching
from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.examples import Example, Message
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

needs_trl = pytest.mark.skipif(
    folder() is None, reason="TRL has the templates; test_thoughts.py has small ones of ours"
)
PLACE = folder() or Path()
ADDS = {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"x": {"type": "string", "description": "what"}}, "required": ["x"],
}}  # fmt: skip
TOOLS = ({"type": "function", "function": ADDS},)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def calling(value: str) -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": value}}}]}


SYSTEM: Message = {"role": "system", "content": "Be w90."}
RESULT: Message = {"role": "tool", "content": "w91", "name": "add"}
SHAPES: dict[str, list[Message]] = {
    "one turn": [user("w1 w2"), says("w3 w4")],
    "two turns": [user("w1"), says("w2 w3"), user("w4"), says("w5")],
    "system first": [SYSTEM, user("w1"), says("w2 w3")],
    "system in the middle": [user("w1"), says("w2"), SYSTEM, user("w3"), says("w4")],
    "a thought": [user("w1"), says("w2", reasoning_content="w3 w4")],
    "a thought in the text": [user("w1"), says("<think>\nw3 w4\n</think>\n\nw2")],
    "thoughts in two turns": [user("w1"), says("w2", reasoning_content="w3"), user("w4"),
                              says("w5", reasoning_content="w6")],
    "a loop of tools": [user("w1"), says("", **calling("w2")), RESULT, says("w3")],
    "thoughts in a loop": [user("w1"), says("", reasoning_content="w4", **calling("w2")), RESULT,
                           says("w3", reasoning_content="w5")],
    "assistant first": [says("w1"), user("w2"), says("w3")],
    "assistant alone": [says("w1 w2")],
}  # fmt: skip
WORD = re.compile(r"w\d+")


def words_of(message: Message) -> list[str]:
    called = [call["function"]["arguments"]["x"] for call in message.get("tool_calls", ())]
    return WORD.findall(" ".join([message.get("reasoning_content", ""), message["content"], *called]))


def row(messages: Sequence[Message]) -> Example:
    called = any("tool_calls" in message for message in messages)
    return Example("id", "digest", "rows.jsonl, row 1", messages=tuple(messages), tools=TOOLS if called else None)


def spell(tokenizer: Any, ids: np.ndarray[Any, Any]) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def outcome(tokenizer: Any, messages: Sequence[Message], supervise: Supervise = "assistant") -> str:
    """Return "exact", or why the row is refused; fail where what is supervised is something else."""
    try:
        encoded = encode(tokenizer, row(messages), teaching=Teaching(supervise))
    except UserError as error:
        problem = str(error)
        assert len(problem.splitlines()) == 1 and problem.startswith("rows.jsonl, row 1: the chat template ")
        return problem.partition("the chat template ")[2]
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in spoken if supervise == "assistant" else spoken[-1:]:
        # Every word of the turn and no other one, in one run of tokens.
        at = np.flatnonzero(encoded.turn == i)
        assert at.tolist() == list(range(at[0], at[-1] + 1))
        text = spell(tokenizer, encoded.input_ids[at])
        assert WORD.findall(text) == words_of(messages[i]), text
        assert not re.search(r"<think>\s*</think>", text) and not text.lstrip().startswith("</think>"), text
        thought = WORD.findall(spell(tokenizer, encoded.input_ids[at][encoded.thought[at]]))
        given = WORD.findall(messages[i].get("reasoning_content") or messages[i]["content"].rpartition("</think>")[0])
        assert thought == given
    everything = WORD.findall(spell(tokenizer, encoded.input_ids))
    lost = {word for message in messages for word in words_of(message)} - set(everything)
    assert not lost or any("reasoning" in note for note in encoded.notes), f"{lost} left out without a word"
    return "exact"


def reason(problem: str) -> str:
    """Return the cell of a table for an outcome."""
    if problem == "exact":
        return "exact"
    for starts, cell in (
        ("refuses it", "no: the template raises"),
        ("leaves out the reasoning", "no: it writes no reasoning" if "supervise last" not in problem
         else "no: it drops earlier reasoning"),
        ("leaves out the tool", "no: it knows no tools"),
        ("leaves out or changes the tool calls", "no: it writes no calls"),
        ("leaves out or changes message", "no: it leaves out a turn"),
    ):  # fmt: skip
        if problem.startswith(starts):
            return cell
    return f"no: {problem}"


@needs_trl
@pytest.mark.parametrize("name", NAMES)
def test_a_turn_alone_several_turns_and_the_last_of_many_are_usable_under_every_template(name: str) -> None:
    tokenizer = stock(name)
    for shape in ("one turn", "two turns"):
        assert outcome(tokenizer, SHAPES[shape]) == "exact"
        assert outcome(tokenizer, SHAPES[shape], "last") == "exact"


@needs_trl
def test_the_table_of_the_documentation_is_what_happens() -> None:
    lines = [f"| template | {' | '.join(SHAPES)} |", f"|---|{'---|' * len(SHAPES)}"]
    for name in NAMES:
        tokenizer = stock(name)
        cells = [reason(outcome(tokenizer, messages)) for messages in SHAPES.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    table = "\n".join(lines)
    page = (Path(__file__).parents[3] / "docs" / "guides" / "chat_templates.md").read_text(encoding="utf-8")
    assert table in page, f"docs/guides/chat_templates.md does not hold this table:\n{table}"


@needs_trl
@pytest.mark.parametrize("name", [name for name in NAMES if (PLACE / f"{name}_training.jinja").is_file()])
def test_the_mask_is_that_of_trl_without_what_the_prompt_or_the_template_gives(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, compared = stock(name), 0
    training = (PLACE / f"{name}_training.jinja").read_text(encoding="utf-8")
    for shape, messages in SHAPES.items():
        example = row(messages)
        try:
            rendering = lay_out(tokenizer, messages, example.where, example.tools)
            (text,), (runs,) = render_jinja_template(
                conversations=[messages], tools=list(example.tools) if example.tools else None, chat_template=training,
                return_assistant_tokens_mask=True, add_generation_prompt=False, **tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception:  # one of the two refuses the shape
            continue
        if text != rendering.text:
            continue  # their variant writes something else
        encoded = encode(tokenizer, example)
        ours = [spell(tokenizer, encoded.input_ids[encoded.turn == i]) for _, _, i in rendering.spans]
        theirs = "".join(text[start:end] for start, end in runs)
        rest = theirs
        for turn in ours:
            before, found, rest = rest.partition(turn)
            assert found, f"{shape}: {turn!r} is not in their mask {theirs!r}"
            # What they learn and we do not: separators, the header of a turn, an opened or empty block of thoughts.
            assert not WORD.search(before), f"{shape}: {before!r} is learnt by them alone"
        assert not WORD.search(rest)
        compared += 1
    assert compared >= 2


@needs_trl
def test_the_training_variant_of_an_installed_trl_keeps_every_thought() -> None:
    tokenizer = tokenizer_for("qwen3")
    set_template(tokenizer, "trl:qwen3")
    assert outcome(tokenizer, SHAPES["thoughts in two turns"]) == "exact"
    assert outcome(tokenizer, SHAPES["thoughts in a loop"]) == "exact"


@needs_trl
def test_a_template_that_trl_does_not_have_is_one_line_with_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"trl:qwen33: TRL has no such template\. Did you mean qwen3 or"):
        set_template(tokenizer_for("qwen3"), "trl:qwen33")


weights = st.sampled_from([None, 0, 0.25, 1, 3])


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Conversations in which every word occurs once; thoughts, calls of a tool, and weights at random."""
    count = iter(range(1, 10_000))

    def text(most: int = 3) -> str:
        return " ".join(f"w{next(count)}" for _ in range(draw(st.integers(1, most))))

    messages: list[Message] = [{"role": "system", "content": text()}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(text()))
        if draw(st.booleans()) and draw(st.booleans()):
            messages += [_answer(draw, text, called=True), {**RESULT, "content": text()}]
        messages.append(_answer(draw, text, called=False))
    return messages


def _answer(draw: st.DrawFn, text: Any, called: bool) -> Message:
    message = says("", **calling(text(1))) if called else says(text())
    if draw(st.booleans()):
        message["reasoning_content"] = text()
    weight = draw(weights)
    return message if weight is None else {**message, "weight": weight}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(NAMES if folder() else ()), "chatml"])
@settings(max_examples=15, deadline=None)
@given(conversations(), st.sampled_from(["assistant", "last"]), st.booleans())
def test_any_conversation_is_learnt_as_meant_or_refused_in_a_line(
    name: str, messages: list[Message], supervise: Supervise, thoughts: bool
) -> None:
    tokenizer = tokenizer_for("qwen3") if name == "chatml" else stock(name)
    if name == "chatml":
        set_template(tokenizer, "chatml")
    teaching = Teaching(supervise, supervise_reasoning=thoughts)
    try:
        (prepared,) = tokenise(tokenizer, [row(messages)], [()], teaching=teaching)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and name != "chatml"
        return
    learnt = prepared.labels != IGNORE_INDEX
    assert (prepared.labels[learnt] == prepared.input_ids[learnt]).all()
    spoken = [message for message in messages if message["role"] == "assistant"]
    taught = [m for m in (spoken if supervise == "assistant" else spoken[-1:]) if m.get("weight", 1) > 0]
    bare = [{**message, "reasoning_content": ""} if not thoughts else message for message in taught]
    expected = [word for message in bare for word in words_of(message)]
    assert WORD.findall(spell(tokenizer, prepared.input_ids[learnt])) == expected
    turn = encode(tokenizer, row(messages), teaching=teaching).turn
    for message in taught:
        at = learnt & (turn == next(i for i, other in enumerate(messages) if other is message))
        found = np.ones(at.sum()) if prepared.weight is None else prepared.weight[at]
        assert found == pytest.approx(message.get("weight", 1))
