"""Reasoning reaches the template or is refused; what a template inserts of its own accord is not learnt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deft_lightning.data.encoding.encode import encode, tokenise
from deft_lightning.data.encoding.supervise import Teaching
from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.encoding.thoughts import key_of
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example, Message
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

ASKED: Message = {"role": "user", "content": "two cats?"}
THOUGHT: Message = {"role": "assistant", "content": "Eight.", "reasoning_content": "four each"}
WRITTEN: Message = {"role": "assistant", "content": "<think>\nfour each\n</think>\n\nEight."}
BARE: Message = {"role": "assistant", "content": "Eight."}
AGAIN: Message = {"role": "user", "content": "sure?"}
YES: Message = {"role": "assistant", "content": "Yes."}

LOOP = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ANSWER{% else %}"
    "{{ '<|user|>' + m['content'] + '<|end|>' }}"
)
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>OPEN' }}{% endif %}"


def template(answer: str, opens: str = "") -> str:
    return LOOP.replace("ANSWER", answer) + PROMPT.replace("OPEN", opens)


# How reasoning models write an answer, each in the fewest letters.
LAST_ONLY = template(  # thoughts behind the last question alone, empty ones too (Qwen 3)
    "{% set t = m['reasoning_content'] or '' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].strip() %}"
    "{% endif %}{{ '<|assistant|>' }}{% if loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|end|>' }}"
)
ALWAYS = template("{{ '<|assistant|><think>' + (m['thinking'] or '') + '</think>' + m['content'] + '<|end|>' }}")
NEVER = template("{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}", opens="<think>\n")
UNKNOWN = template("{{ '<|assistant|>' + m['content'] + '<|end|>' }}")
OPENED = template(  # generation begins inside a thought (Qwen 3.5)
    "{{ '<|assistant|><think>\n' + (m['reasoning'] or '') + '\n</think>\n\n' + m['content'] + '<|end|>' }}",
    opens="<think>\n",
)


def learnt(text: str, *messages: Message, **options: Any) -> list[str]:
    """Return what is learnt of each turn under a template."""
    tokenizer = build_tokenizer(["x"], 0)
    set_template(tokenizer, text)
    example = Example("id", "digest", "rows.jsonl, row 1", messages=messages)
    teaching = Teaching(**options)
    (prepared,), encoded = (
        tokenise(tokenizer, [example], [()], teaching=teaching),
        encode(tokenizer, example, teaching=teaching),
    )
    kept = prepared.labels != IGNORE_INDEX
    return [tokenizer.decode(prepared.labels[kept & (encoded.turn == i)]) for i in np.unique(encoded.turn[kept])]


@pytest.mark.parametrize(
    ("text", "key"), [(LAST_ONLY, "reasoning_content"), (ALWAYS, "thinking"), (OPENED, "reasoning"), (NEVER, None)]
)
def test_the_key_is_the_one_that_the_template_reads(text: str, key: str | None) -> None:
    assert key_of(text) == key


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (LAST_ONLY, "<think>\nfour each\n</think>\n\nEight.<|end|>"),
        (ALWAYS, "<think>four each</think>Eight.<|end|>"),
        (OPENED, "four each\n</think>\n\nEight.<|end|>"),
        ("chatml", "<think>\nfour each\n</think>\n\nEight.<|end|>"),
    ],
)
def test_a_thought_reaches_the_template_and_is_learnt_from_where_generation_begins(text: str, written: str) -> None:
    assert learnt(text, ASKED, THOUGHT) == [written]
    assert learnt(text, ASKED, THOUGHT, supervise_reasoning=False) == ["Eight.<|end|>"]


@pytest.mark.parametrize("text", [LAST_ONLY, ALWAYS, OPENED, NEVER, UNKNOWN, "chatml"])
def test_an_empty_block_that_the_template_inserts_is_not_learnt(text: str) -> None:
    assert learnt(text, ASKED, BARE) == ["Eight.<|end|>"]
    assert learnt(text, ASKED, BARE, AGAIN, YES) == ["Eight.<|end|>", "Yes.<|end|>"]


def test_an_empty_block_that_the_row_holds_is_learnt() -> None:
    empty: Message = {"role": "assistant", "content": "<think>\n\n</think>\n\nEight."}
    assert learnt(UNKNOWN, ASKED, empty) == ["<think>\n\n</think>\n\nEight.<|end|>"]


@pytest.mark.parametrize("text", [LAST_ONLY, UNKNOWN, "chatml"])
def test_tags_in_the_text_are_neither_doubled_nor_dropped(text: str) -> None:
    assert learnt(text, ASKED, WRITTEN) == ["<think>\nfour each\n</think>\n\nEight.<|end|>"]
    assert learnt(text, ASKED, WRITTEN, supervise_reasoning=False) == ["Eight.<|end|>"]


@pytest.mark.parametrize("text", [UNKNOWN, NEVER])
def test_a_template_that_leaves_a_thought_out_is_one_line_with_the_ways_out(text: str) -> None:
    with pytest.raises(UserError) as caught:
        learnt(text, ASKED, THOUGHT)
    message = str(caught.value)
    assert message.startswith("rows.jsonl, row 1: the chat template leaves out the reasoning of message 2; ")
    assert "chatml" in message and "--data.reasoning text" in message and "--data.reasoning drop" in message
    assert "--data.supervise last" not in message  # there is but one turn
    assert learnt(text, ASKED, THOUGHT, reasoning="drop") == ["Eight.<|end|>"]


def test_reasoning_may_be_put_into_the_text() -> None:
    assert learnt(UNKNOWN, ASKED, THOUGHT, reasoning="text") == ["<think>\nfour each\n</think>\n\nEight.<|end|>"]


def test_earlier_thoughts_that_the_template_drops_are_an_error_where_they_are_learnt() -> None:
    with pytest.raises(UserError, match=r"reasoning of message 2; learn only the last turn \(--data.supervise last\)"):
        learnt(LAST_ONLY, ASKED, THOUGHT, AGAIN, {**YES, "reasoning_content": "it is"})
    last = ["<think>\nit is\n</think>\n\nYes.<|end|>"]
    talk = (ASKED, THOUGHT, AGAIN, {**YES, "reasoning_content": "it is"})
    assert learnt(LAST_ONLY, *talk, supervise="last") == last
    assert learnt(LAST_ONLY, ASKED, {**THOUGHT, "weight": 0}, *talk[2:]) == last


def test_what_is_lost_of_turns_that_are_not_learnt_is_said() -> None:
    tokenizer = build_tokenizer(["x"], 0)
    set_template(tokenizer, LAST_ONLY)
    example = Example("id", "digest", "row", messages=(ASKED, THOUGHT, AGAIN, YES))
    (note,) = encode(tokenizer, example, teaching=Teaching("last")).notes
    assert note == "the template leaves out the reasoning of turns that are not supervised"


def test_the_assistant_may_speak_first_under_a_template_that_rewrites_history() -> None:
    assert learnt(LAST_ONLY, YES, ASKED, BARE) == ["Yes.<|end|>", "Eight.<|end|>"]
    assert learnt(NEVER, YES) == ["Yes.<|end|>"]


def test_a_word_of_the_markup_as_an_answer_is_found_where_it_is_said() -> None:
    word: Message = {"role": "assistant", "content": "user"}
    assert learnt(LAST_ONLY, ASKED, word, AGAIN, word) == ["user<|end|>", "user<|end|>"]
