"""A template that is called directly writes what transformers writes with it, and refuses what transformers refuses."""

from __future__ import annotations

from typing import Any

import pytest
import stock
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deft_lightning.data.encoding.compiled import compiled, is_plain
from deft_lightning.data.encoding.encode import encode
from deft_lightning.data.encoding.offsets import Offsets, before, encodings
from deft_lightning.data.encoding.template import Renderer, chatml, render, set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example, Message
from deft_lightning.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
WORDS = ("a", " b", "\n", "", "</think>", "<think>", "<|im_end|>", "{{ x }}", "é", "\u65e5\u672c", "/no_think", " ")
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": st.lists(st.sampled_from(WORDS), max_size=4).map("".join)},
        optional={"reasoning_content": st.sampled_from(["hm", ""]), "name": st.just("f")},
    ),
    min_size=1, max_size=5,
)  # fmt: skip
TOKENIZER = build_tokenizer(["one two three"], 300)
EVERY = {name: stock.stock(name) for name in stock.NAMES if stock.folder() is not None}


def outcome(render: Any) -> Any:
    try:
        return render()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [*EVERY, "ours", "chatml"])
@settings(max_examples=10, deadline=None)
@given(messages, st.booleans())
def test_a_template_that_is_called_directly_writes_what_transformers_writes(
    name: str, talk: list[Message], prompt: bool
) -> None:
    tokenizer = EVERY.get(name, TOKENIZER)
    if name == "chatml":
        tokenizer = build_tokenizer(["one"], 0)
        tokenizer.chat_template = chatml(tokenizer)
    program = compiled(tokenizer, tokenizer.get_chat_template())
    assert program is not None
    expected = outcome(lambda: render(tokenizer, talk, prompt=prompt))
    assert outcome(lambda: Renderer(tokenizer, None)(talk, prompt=prompt)) == expected
    if is_plain(talk):
        assert outcome(lambda: program(talk, prompt=prompt)) == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": 3}, {"role": "user"}, {"role": "user", "content": None},
        {"role": "assistant", "content": "x", "reasoning_content": "y"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "user", "content": type("Text", (str,), {})("x")},
    ],
)  # fmt: skip
def test_what_transformers_would_give_to_a_template_in_another_form_is_not_plain(message: Message) -> None:
    assert not is_plain([{"role": "user", "content": "x"}, message])
    assert not is_plain([])


def test_a_template_cannot_reach_code_nor_change_the_messages_that_it_is_given() -> None:
    tokenizer = build_tokenizer(["one"], 0)
    talk: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for text in (
        "{{ ''.__class__.__mro__ }}",
        "{% do messages.append(1) %}",
        "{{ messages[0].update({'role': 'z'}) }}",
    ):
        set_template(tokenizer, text)
        with pytest.raises(UserError, match="chat template"):
            encode(tokenizer, Example("i", "d", "row", messages=tuple(talk)))
    assert talk == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def test_a_tokenizer_that_renders_in_a_way_of_its_own_is_asked() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            return ["own"]

    tokenizer = Own(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|end|>")
    tokenizer.chat_template = TOKENIZER.chat_template
    assert Renderer(tokenizer, None)([{"role": "user", "content": "x"}], prompt=True) == "own"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "one two", "\U0001f44d\U0001f3fd", "<|end|>"]), max_size=12).map("".join))
def test_places_of_tokens_are_those_of_the_tokenizer(text: str) -> None:
    for tokenizer in (TOKENIZER, *EVERY.values()):
        ((ids, offsets),) = encodings(tokenizer, [text])
        listed = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == listed["input_ids"]
        assert isinstance(offsets, Offsets)
        assert list(offsets) == [offsets[at] for at in range(len(offsets))] == listed["offset_mapping"]
        for letter in range(len(text) + 2):
            assert before(offsets, letter) == sum(start < letter for start, _ in offsets)
