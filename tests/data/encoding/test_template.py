"""Supervised is what the assistant says and the end of its turn, to the token; generation sees all that precedes."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import write
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.encoding.encode import encode, prompts, tokenise
from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example, Message
from deft_lightning.data.noise.edits import whole
from deft_lightning.data.records.formats import normalise
from deft_lightning.errors import UserError

TEXTS = [
    "Once upon a time there was a cat. The user asked the assistant; the system and the tool said nothing.\n",
    "def f(x):\n    return x + 1\n\n\n\n    y = f(2)\n\n",
    "".join(map(chr, range(33, 127))),
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
GPT2 = None  # pre_tokenizers.ByteLevel's own pattern
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _wrap(tokenizer: Tokenizer, bos: bool, tokens: dict[str, Any]) -> Any:
    if bos:
        start = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    tokens = {"eos_token": "</s>", "pad_token": "</s>", **({"bos_token": "<s>"} if bos else {}), **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


@functools.cache
def _byte_level(pattern: str | None) -> str:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS * 30,
        trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
    )
    return str(tokenizer.to_str())


def byte_level(
    *, bos: bool = False, pattern: str | None = GPT2, special: Sequence[str] = (), plain: Sequence[str] = (),
    **tokens: Any,
) -> Any:  # fmt: skip
    """A byte-level BPE tokenizer without a template, as GPT-2, Llama 3 and Qwen are.

    ``special`` tokens are marked so in the vocabulary alone, ``plain`` ones not even there; name them through
    ``additional_special_tokens`` for transformers to know them.
    """
    tokenizer = Tokenizer.from_str(_byte_level(pattern))
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(plain))
    return _wrap(tokenizer, bos, tokens)


@functools.cache
def _sentencepiece(scheme: str) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":  # as Llama 2 converts it: blanks are letters like any other
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = [text.replace("\n", " ") for text in TEXTS]
    tokenizer.train_from_iterator(
        texts * 30,
        trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False),
    )
    if scheme == "normalizer":
        tokenizer.pre_tokenizer = None
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(settings)


def sentencepiece(scheme: str, special: Sequence[str] = (), **tokens: Any) -> Any:
    """A tokenizer that writes blanks as ▁, falls back to bytes and starts with <s>, as Llama 2 and Gemma do."""
    tokenizer = Tokenizer.from_str(_sentencepiece(scheme))
    tokenizer.add_special_tokens(list(special))
    return _wrap(tokenizer, True, {"unk_token": "<unk>", **tokens})


def spell(tokenizer: Any, ids: Sequence[int] | np.ndarray[Any, Any]) -> str:
    """What tokens stand for, blank by blank; a decoder would tidy up at the start."""
    ids = [int(i) for i in ids]
    if "ByteLevel" in type(tokenizer.backend_tokenizer.decoder).__name__:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    raw = b""
    for piece in tokenizer.convert_ids_to_tokens(ids):
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return raw.decode()


def conversation(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in pairs)


def example(messages: Sequence[Message]) -> Example:
    return Example("id", "digest", "data.jsonl, row 3", messages=tuple(messages))


def refused(tokenizer: Any, messages: Sequence[Message]) -> str:
    with pytest.raises(UserError) as caught:
        encode(tokenizer, example(messages))
    message = str(caught.value)
    assert message.startswith("data.jsonl, row 3") and len(message.splitlines()) == 1
    assert "--data.chat_template" in message
    return message


# --- the kinds of tokenizer and template ----------------------------------------------------------------------------

HEADER = "{{ '<|im_start|>' + m['role'] + '\n' }}"
GENERATION = (
    "{{ '<s>' if bos_token else '' }}{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
MARKERS = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IM = ["<|im_start|>", "<|im_end|>"]
# Two headers that hold the name of no role, blanks between turns, and an end of turn that is no end of sequence.
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TURN = ["<start_of_turn>", "<end_of_turn>"]


class Kind(NamedTuple):
    """A tokenizer, the template it is given, the end of a turn, and whether token offsets are exact to the blank."""

    make: Callable[[], Any]
    template: str | None
    end: str
    exact: bool = True


def named(tokens: Sequence[str]) -> dict[str, Any]:
    return {"special": tokens, "additional_special_tokens": list(tokens)}


KINDS: dict[str, Kind] = {
    "built": Kind(lambda: build_tokenizer(TEXTS, 400), None, "<|end|>"),
    "built, a token a byte": Kind(lambda: build_tokenizer(TEXTS, 1), None, "<|end|>"),
    "chatml, byte-level": Kind(byte_level, None, "</s>"),
    "chatml, byte-level, bos": Kind(lambda: byte_level(bos=True), None, "</s>"),
    "chatml, byte-level of Llama 3": Kind(lambda: byte_level(bos=True, pattern=LLAMA3), None, "</s>"),
    "chatml, metaspace always": Kind(lambda: sentencepiece("always"), None, "</s>", exact=False),
    "chatml, metaspace first": Kind(lambda: sentencepiece("first"), None, "</s>", exact=False),
    "chatml, metaspace never": Kind(lambda: sentencepiece("never"), None, "</s>", exact=False),
    "chatml, normalizer": Kind(lambda: sentencepiece("normalizer"), None, "</s>", exact=False),
    "chatml, named <|im_end|>": Kind(lambda: byte_level(**named(IM)), None, "<|im_end|>"),
    "chatml, <|im_end|> ends the sequence": Kind(
        lambda: byte_level(special=IM, eos_token="<|im_end|>"), None, "<|im_end|>"
    ),
    "gemma, named turns": Kind(lambda: byte_level(bos=True, **named(TURN)), GEMMA, "<end_of_turn>"),
    "markers, byte-level": Kind(lambda: byte_level(bos=True, **named(ROLES)), MARKERS, "</s>"),
    "markers, metaspace always": Kind(lambda: sentencepiece("always", **named(ROLES)), MARKERS, "</s>", exact=False),
    "markers, normalizer": Kind(lambda: sentencepiece("normalizer", **named(ROLES)), MARKERS, "</s>", exact=False),
    "generation tags, byte-level": Kind(byte_level, GENERATION, "</s>"),
    "generation tags, byte-level, bos": Kind(lambda: byte_level(bos=True), GENERATION, "</s>"),
    "generation tags, metaspace first": Kind(lambda: sentencepiece("first"), GENERATION, "</s>", exact=False),
    "generation tags, normalizer": Kind(lambda: sentencepiece("normalizer"), GENERATION, "</s>", exact=False),
}

# The end of a turn is a token of its own, but none that the tokenizer's configuration names: tokenizer.json alone says
# that it is special, or not even that.
UNNAMED: dict[str, Kind] = {
    "chatml, special <|im_end|>": Kind(lambda: byte_level(special=IM), None, "<|im_end|>"),
    "chatml, plain <|im_end|>": Kind(lambda: byte_level(plain=IM), None, "<|im_end|>"),
    "gemma, special turns": Kind(lambda: byte_level(bos=True, special=TURN), GEMMA, "<end_of_turn>"),
}
ALL = KINDS | UNNAMED


@functools.cache
def ready(kind: str) -> Any:
    tokenizer = ALL[kind].make()
    set_template(tokenizer, ALL[kind].template)
    return tokenizer


every_kind = pytest.mark.parametrize("kind", KINDS)


def check(kind: str, messages: Sequence[Message]) -> None:
    """The oracle: spell the tokens of each turn, and compare with the message; tokenise each prompt by itself."""
    tokenizer, end, exact = ready(kind), ALL[kind].end, ALL[kind].exact
    encoded = encode(tokenizer, example(messages))
    assert encoded.input_ids.shape == encoded.turn.shape and encoded.input_ids.dtype == np.int64
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert set(encoded.turn.tolist()) - {-1} == set(spoken)
    for i in spoken:
        at = np.flatnonzero(encoded.turn == i)
        assert at.tolist() == list(range(at[0], at[-1] + 1))
        wanted, found = messages[i]["content"] + end, spell(tokenizer, encoded.input_ids[at])
        # ▁ may be written before the first word of a text although there is no blank.
        assert found == wanted or (not exact and found == " " + wanted), f"supervised {found!r} instead of {wanted!r}"
        (prompt,) = prompts(tokenizer, [example(messages[: i + 1])])
        assert prompt.gold == messages[i]["content"]
        assert prompt.input_ids == encoded.input_ids[: at[0]].tolist()
        # What a message spells as a special token is its letters: test_markup.py.
        special = [token.content for token in tokenizer.added_tokens_decoder.values()]
        if not any(token in message["content"] for message in messages for token in special):
            assert prompt.input_ids == tokenizer(prompt.text, add_special_tokens=False).input_ids


CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "one turn": conversation(("user", "What?"), ("assistant", "A cat.")),
    "system": conversation(("system", "Be brief."), ("user", "What?"), ("assistant", "A cat.")),
    "several turns": conversation(
        ("user", "What?"), ("assistant", "A cat."), ("user", "Why?"), ("assistant", "Once."), ("user", ""),
        ("assistant", "The end."),
    ),
    "tool": conversation(
        ("system", "Tools: f"), ("user", "f(2)?"), ("assistant", "f(2)"), ("tool", "3"), ("assistant", "It is 3."),
    ),
    "two assistant turns in a row": conversation(("user", "f(2)?"), ("assistant", "f(2)"), ("assistant", "It is 3.")),
    "the user says the last word": conversation(("user", "What?"), ("assistant", "A cat."), ("user", "Thanks.")),
    "the assistant repeats the user": conversation(
        ("user", "A cat."), ("assistant", "A cat."), ("user", "A cat."), ("assistant", "A cat.")
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
@every_kind
def test_supervised_is_the_content_and_the_end_of_turn_and_generation_sees_what_precedes(kind: str, name: str) -> None:
    check(kind, CONVERSATIONS[name])


@pytest.mark.parametrize("name", ["one turn", "several turns", "the user says the last word"])
@pytest.mark.parametrize("kind", UNNAMED)
def test_an_end_of_turn_that_the_tokenizer_does_not_name_ends_the_supervision_too(kind: str, name: str) -> None:
    check(kind, CONVERSATIONS[name])


@pytest.mark.parametrize("kind", ["built", "chatml, byte-level", "markers, byte-level", "generation tags, byte-level"])
def test_the_assistant_may_say_the_first_word(kind: str) -> None:
    check(kind, conversation(("assistant", "Ask."), ("user", "What?"), ("assistant", "A cat.")))


CONTENTS = {
    "one letter": "x",
    "two lines": "One.\n\nTwo.",
    "code": "def f(x):\n    return x\n\n\nf(2)",
    "letters of many bytes": "naïve 日本語 😀👩‍🚀 é",
    "blanks at the end": "A cat.  ",
    "a line break at the end": "A cat.\n",
    "line breaks at the end": "A cat.\n\n\n",
    "the header in the content": "<|im_start|>assistant\nno",
    "what looks like a template": "{{ messages }}{% for %}",
    "quotes": "'\"\\'",
}


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@every_kind
def test_any_content_is_supervised_as_it_is(kind: str, content: str) -> None:
    check(kind, conversation(("user", "Go on."), ("assistant", content), ("user", content), ("assistant", content)))


@pytest.mark.parametrize("content", ["one</s>two", "one</s>\n", "<s>", "</s>"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].exact])
def test_special_tokens_in_the_content_do_not_end_the_supervision(kind: str, content: str) -> None:
    check(kind, conversation(("user", content), ("assistant", content), ("user", content), ("assistant", content)))


LEADING = {"blank": " x", "blanks": "    x", "line break": "\nx", "line breaks": "\n\nx", "both": "\n    return x"}


@pytest.mark.parametrize("content", LEADING.values(), ids=LEADING.keys())
@pytest.mark.parametrize(
    "kind",
    [
        "built",
        "chatml, byte-level",
        "chatml, byte-level of Llama 3",
        "markers, byte-level",
        "generation tags, byte-level",
    ],
)
def test_blanks_at_the_start_of_the_content_do_not_melt_into_the_prompt(kind: str, content: str) -> None:
    check(kind, conversation(("user", "Go on."), ("assistant", content)))


@pytest.mark.slow
@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    pairs=st.lists(
        st.tuples(st.text("ab \n.é😀", max_size=6), st.text("ab \n.é😀", min_size=1, max_size=8)),
        min_size=1,
        max_size=3,
    ),
    system=st.booleans(),
)
def test_any_conversation_is_supervised_exactly(kind: str, pairs: list[tuple[str, str]], system: bool) -> None:
    messages = [("system", "s")] if system else []
    for question, answer in pairs:
        messages += [("user", question), ("assistant", "x" + answer + "x")]  # blanks at the edges: see above
    check(kind, conversation(*messages))


# --- ChatML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("chatml")])
def test_chatml_is_written_to_the_letter(kind: str) -> None:
    tokenizer, end = ready(kind), KINDS[kind].end
    encoded = encode(tokenizer, example(CONVERSATIONS["system"]))
    bos = "<s>" if tokenizer.bos_token else ""
    wanted = (
        f"{bos}<|im_start|>system\nBe brief.{end}\n<|im_start|>user\nWhat?{end}\n<|im_start|>assistant\nA cat.{end}\n"
    )
    found = spell(tokenizer, encoded.input_ids)
    assert found == wanted if KINDS[kind].exact else found.replace(" ", "") == wanted.replace(" ", "")
    (prompt,) = prompts(tokenizer, [example(CONVERSATIONS["system"])])
    assert prompt.text == wanted.removesuffix(f"A cat.{end}\n")


@pytest.mark.parametrize("bos", [False, True])
def test_chatml_begins_with_one_bos_where_the_tokenizer_does(bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    set_template(tokenizer, "chatml")
    ids = encode(tokenizer, example(CONVERSATIONS["several turns"])).input_ids.tolist()
    start = tokenizer.convert_tokens_to_ids("<s>")
    assert ids.count(start) == bos and (ids[0] == start) == bos


def test_a_bos_that_the_tokenizer_does_not_prepend_is_not_written() -> None:
    tokenizer = byte_level(bos_token="<s>")
    set_template(tokenizer, None)
    assert "<s>" not in tokenizer.chat_template


def test_chatml_does_not_grow_the_vocabulary() -> None:
    tokenizer = byte_level()
    before = len(tokenizer)
    set_template(tokenizer, None)
    encode(tokenizer, example(CONVERSATIONS["tool"]))
    assert len(tokenizer) == before


# --- choice of the template -----------------------------------------------------------------------------------------


def test_the_tokenizers_own_template_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ 'mine' }}"
    set_template(tokenizer, None)
    assert tokenizer.chat_template == "{{ 'mine' }}"
    set_template(tokenizer, "{{ 'inline' }}")
    assert tokenizer.chat_template == "{{ 'inline' }}"
    (tmp_path / "template.jinja").write_text("{{ 'file, é' }}\n", encoding="utf-8")
    set_template(tokenizer, str(tmp_path / "template.jinja"))
    assert tokenizer.chat_template == "{{ 'file, é' }}\n"
    set_template(tokenizer, "chatml")
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize("choice", ["chatlm", "missing.jinja", ""])
def test_a_choice_that_is_no_template_is_refused_in_one_line(choice: str) -> None:
    with pytest.raises(UserError) as caught:
        set_template(byte_level(), choice)
    assert "--data.chat_template" in str(caught.value) and repr(choice) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- templates that lose something ----------------------------------------------------------------------------------

TALK = conversation(
    ("system", "SYS"), ("user", "one"), ("assistant", "two"), ("tool", "TTT"), ("user", "three"), ("assistant", "four")
)
PLAIN = "{{ '<' + m['role'] + '>' + m['content'] + '</s>\n' }}"
TAGGED = "{{ '<' + m['role'] + '>' }}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}"


def template(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


STYLES = {
    "without tags": PLAIN,
    "with tags": "{% if m['role'] == 'assistant' %}" + TAGGED + "{% else %}" + PLAIN + "{% endif %}",
}
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())


@each_style
def test_a_template_that_keeps_every_turn_is_accepted(style: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(style))
    encoded = encode(tokenizer, example(TALK))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 2]) == "two</s>"
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 5]) == "four</s>"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@each_style
def test_a_template_that_drops_the_turns_of_a_role_is_an_error(style: str, role: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(f"{{% if m['role'] != '{role}' %}}{style}{{% endif %}}"))
    refused(tokenizer, TALK)


@each_style
def test_a_template_that_keeps_the_last_turns_only_is_an_error(style: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(f"{{% if loop.revindex <= 2 %}}{style}{{% endif %}}"))
    refused(tokenizer, TALK)


def test_a_template_that_rewrites_earlier_answers_is_an_error_once_there_are_earlier_answers() -> None:
    # As reasoning models do: the thoughts of an answer are gone once the next turn begins.
    tokenizer = byte_level()
    shorten = "{{ '<' + m['role'] + '>' + (m['content'] if loop.last else m['content'].split('!')[-1]) + '</s>' }}"
    set_template(tokenizer, template(shorten))
    talk = conversation(("user", "one"), ("assistant", "think!two"), ("user", "three"), ("assistant", "think!four"))
    assert "message 2" in refused(tokenizer, talk)
    encoded = encode(tokenizer, example(talk[:2]))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 1]) == "think!two</s>"


def test_a_template_that_changes_the_answer_is_an_error() -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template("{{ '<' + m['role'] + '>' + m['content'] | upper + '</s>' }}"))
    assert "message 2" in refused(tokenizer, conversation(("user", "one"), ("assistant", "two")))


@pytest.mark.parametrize("header", ["<ASSISTANT>", "<bot>", "<assistan>"])
def test_a_template_that_prompts_with_something_else_than_it_trains_on_is_an_error(header: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(PLAIN).replace("<assistant>", header))
    refused(tokenizer, conversation(("user", "one"), ("assistant", "two")))


def test_a_template_that_trims_the_answer_supervises_what_is_left() -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template("{{ '<' + m['role'] + '>' + m['content'] | trim + '</s>\n' }}"))
    encoded = encode(tokenizer, example(conversation(("user", "one"), ("assistant", " \n two  "))))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 1]) == "two</s>"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{{ raise_exception('no\nsystem turn') }}", "no system turn"),
        ("{% for m in messages %}{{ m }", "--data.chat_template"),
        ("{{ messages[7]['content'] }}", "--data.chat_template"),
        ("{{ nobody() }}", "nobody"),
    ],
)
def test_a_template_that_fails_is_one_line_that_names_the_row(broken: str, says: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, broken)
    assert says in refused(tokenizer, TALK)


# --- generation tags ------------------------------------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<u>{{ m['content'] }}{% else %}"
    "<a>{{ m['content'].split('!')[0] + '!' }}{% generation %}{{ m['content'].split('!')[1] + '</s>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-  generation %}"])
def test_tags_mark_their_own_span_however_they_are_spelt(tag: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, THINKING.replace("{% generation %}", tag))
    encoded = encode(tokenizer, example(conversation(("user", "one"), ("assistant", "think!two"))))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 1]) == "two</s>"
    assert spell(tokenizer, encoded.input_ids) == "<u>one<a>think!two</s>"


def test_tags_around_the_last_answer_alone_supervise_it_as_that_turn() -> None:
    tokenizer = byte_level()
    last_only = "{% if loop.last %}" + TAGGED + "{% else %}" + PLAIN + "{% endif %}"
    set_template(tokenizer, template(last_only))
    talk = conversation(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    encoded = encode(tokenizer, example(talk))
    assert spell(tokenizer, encoded.input_ids[encoded.turn != -1]) == "four</s>"
    # The number of the turn is what noise on the response is recorded by.
    assert set(encoded.turn.tolist()) == {-1, 3}


# --- tools and calls ------------------------------------------------------------------------------------------------

SPEC = {"type": "function", "function": {"name": "weather", "description": 'the "sky", é', "parameters": {}}}


def calls(*arguments: dict[str, Any], says: str = "") -> Message:
    made = [{"type": "function", "function": {"name": "weather", "arguments": a}} for a in arguments]
    return {"role": "assistant", "content": says, "tool_calls": made}


ASKS = conversation(("system", "SYS"), ("user", "Sun in Köln?"))
CALLED = (*ASKS, calls({"city": "Köln", "days": 2}), *conversation(("tool", '{"sky": "é"}'), ("assistant", "Yes.")))
TOOLS = "{% if tools %}{{ '<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '</s>' }}{% endif %}"
WITH_CALLS = (
    "{{ '<' + m['role'] + '>' + m['content'] }}{% if m.get('tool_calls') %}{% for c in m['tool_calls'] %}"
    "{{ '<call>' + (c['function'] | tojson) }}{% endfor %}{% endif %}{{ '</s>\n' }}"
)
WITH_CALLS_TAGGED = (
    "{{ '<' + m['role'] + '>' }}{% generation %}{{ m['content'] }}{% if m.get('tool_calls') %}"
    "{% for c in m['tool_calls'] %}{{ '<call>' + (c['function'] | tojson) }}{% endfor %}{% endif %}{{ '</s>' }}"
    "{% endgeneration %}{{ '\n' }}"
)
KNOWS_CALLS = {
    "without tags": TOOLS + template(WITH_CALLS),
    "with tags": TOOLS
    + template("{% if m['role'] == 'assistant' %}" + WITH_CALLS_TAGGED + "{% else %}" + PLAIN + "{% endif %}"),
}
knows_calls = pytest.mark.parametrize("text", KNOWS_CALLS.values(), ids=KNOWS_CALLS.keys())


def with_tools(messages: Sequence[Message]) -> Example:
    return Example("id", "digest", "data.jsonl, row 3", messages=tuple(messages), tools=(SPEC,))


@knows_calls
def test_a_call_is_supervised_as_the_template_writes_it_and_the_tools_are_in_the_prompt(text: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, text)
    encoded = encode(tokenizer, with_tools(CALLED))
    call = '<call>{"name": "weather", "arguments": {"city": "Köln", "days": 2}}</s>'
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 2]) == call
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 4]) == "Yes.</s>"
    (prompt,) = prompts(tokenizer, [with_tools(CALLED)])
    at = int(np.flatnonzero(encoded.turn == 4)[0])
    assert prompt.input_ids == encoded.input_ids[:at].tolist() and '"name": "weather"' in prompt.text.split("</s>")[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("chatml")])
def test_chatml_lists_tools_in_the_system_turn_and_writes_calls(kind: str) -> None:
    tokenizer, end = ready(kind), KINDS[kind].end
    encoded = encode(tokenizer, with_tools(CALLED))
    bos = "<s>" if tokenizer.bos_token else ""
    wanted = (
        f"{bos}<|im_start|>system\nSYS\n\n<tools>\n{json.dumps(SPEC, ensure_ascii=False)}\n</tools>{end}\n"
        f"<|im_start|>user\nSun in Köln?{end}\n<|im_start|>assistant\n<tool_call>\n"
        f'{{"name": "weather", "arguments": {{"city": "Köln", "days": 2}}}}\n</tool_call>{end}\n'
        f'<|im_start|>tool\n{{"sky": "é"}}{end}\n<|im_start|>assistant\nYes.{end}\n'
    )
    found = spell(tokenizer, encoded.input_ids)
    assert found == wanted if KINDS[kind].exact else found.replace(" ", "") == wanted.replace(" ", "")
    said = spell(tokenizer, encoded.input_ids[encoded.turn == 2])
    assert said.endswith(f"</tool_call>{end}") and said.strip().startswith("<tool_call>")


def test_chatml_writes_words_and_several_calls_of_one_turn_and_tools_without_a_system_turn() -> None:
    tokenizer = ready("chatml, byte-level")
    talk = (*conversation(("user", "Both?")), calls({"city": "A"}, {"city": "B"}, says="Let me see."))
    text = spell(tokenizer, encode(tokenizer, with_tools(talk)).input_ids)
    assert text.startswith(f"<|im_start|>system\n<tools>\n{json.dumps(SPEC, ensure_ascii=False)}\n</tools></s>\n")
    assert text.count("<|im_start|>system") == 1 and "assistant\nLet me see.\n<tool_call>\n" in text
    assert "</tool_call>\n<tool_call>" in text


@each_style
def test_a_template_that_knows_no_calls_is_an_error_and_not_an_empty_turn(style: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(style))
    assert "tool calls of message 3" in refused(tokenizer, CALLED)
    assert "tool calls of message 3" in refused(tokenizer, (*ASKS, calls({"city": "Köln"}, says="Let me see.")))


@pytest.mark.parametrize(
    "writes",
    [
        "{{ '<call>' + m['tool_calls'][0]['function'] | tojson }}",  # the first alone
        "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] }}{% endfor %}",  # no arguments
        "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['arguments'] | tojson }}{% endfor %}",  # no name
    ],
)
def test_a_template_that_writes_a_part_of_the_calls_is_an_error(writes: str) -> None:
    tokenizer = byte_level()
    turn = "{{ '<' + m['role'] + '>' + m['content'] }}{% if m.get('tool_calls') %}" + writes + "{% endif %}</s>"
    set_template(tokenizer, template(turn))
    both = calls({"city": "Köln", "days": 2}, {"city": "Bonn", "days": 3})
    assert "tool calls of message 3" in refused(tokenizer, (*ASKS, both))


def test_a_template_that_writes_calls_in_a_way_of_its_own_is_accepted() -> None:
    tokenizer = byte_level()
    own = (
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] }}({% for k, v in c['function']['arguments'].items() %}"
        "{{ k }}={{ v }};{% endfor %}){% endfor %}"
    )
    turn = "{{ '<' + m['role'] + '>' + m['content'] }}{% if m.get('tool_calls') %}" + own + "{% endif %}</s>"
    set_template(tokenizer, template(turn))
    values: dict[str, Any] = {"s": 'a "b"\né', "i": 2, "f": 0.5, "t": True, "n": None, "l": [1, "x"], "o": {"k": "v"}}
    encoded = encode(tokenizer, example((*ASKS, calls(values))))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 2]).startswith('weather(s=a "b"\né;i=2;f=0.5;t=True;')


@each_style
def test_a_template_that_knows_no_tools_is_an_error_that_says_how_to_leave_them_out(style: str) -> None:
    tokenizer = byte_level()
    set_template(tokenizer, template(style))
    for act in (lambda e: encode(tokenizer, e), lambda e: prompts(tokenizer, [e])):
        with pytest.raises(UserError, match=r"row 3: .*leaves out the tool 'weather'.*--data\.column_map\.tools none"):
            act(with_tools(TALK))


def test_a_tokenizer_with_a_template_for_tools_beside_the_other_uses_it() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": template(PLAIN), "tool_use": KNOWS_CALLS["with tags"]}
    encoded = encode(tokenizer, with_tools(CALLED))
    assert spell(tokenizer, encoded.input_ids[encoded.turn == 4]) == "Yes.</s>"
    assert spell(tokenizer, encode(tokenizer, example(TALK)).input_ids).startswith("<system>SYS")


def test_a_result_that_the_template_writes_as_json_is_not_taken_for_changed() -> None:
    tokenizer = byte_level()
    body = "{{ '<' + m['role'] + '>' + (m['content'] | tojson if m['role'] == 'tool' else m['content']) + '</s>' }}"
    set_template(tokenizer, template(body))
    encoded = encode(tokenizer, example((*ASKS, *conversation(("tool", '{"sky": "é"}\n'), ("assistant", "Yes.")))))
    assert '\\"sky\\": \\"é\\"' in spell(tokenizer, encoded.input_ids)


def test_roles_as_sharegpt_names_them_are_mapped_before_a_stock_template_could_drop_them() -> None:
    # Such templates write the turns that they know and pass over all others.
    tokenizer = byte_level()
    known = "{% if m['role'] in ('system', 'user', 'assistant', 'tool') %}" + PLAIN + "{% endif %}"
    set_template(tokenizer, template(known))
    said = [("system", "S"), ("human", "H"), ("function_call", "F"), ("observation", "O"), ("gpt", "G")]
    record = {"conversations": [{"from": role, "value": value} for role, value in said]}
    text = spell(tokenizer, encode(tokenizer, normalise(record, "rows.jsonl, row 1", "sharegpt", {})).input_ids)
    assert text == "<system>S</s>\n<user>H</s>\n<assistant>F</s>\n<tool>O</s>\n<assistant>G</s>\n"


# --- text and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_text_ends_with_the_end_of_sequence_and_is_supervised_but_for_the_first_token(bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    text = Example("id", "digest", "row", text="Once upon a time")
    (prepared,) = tokenise(tokenizer, [text], [[]])
    assert spell(tokenizer, prepared.input_ids) == "<s>" * bos + "Once upon a time</s>"
    assert prepared.labels.tolist() == [-100, *prepared.input_ids.tolist()[1:]]


def test_an_end_of_sequence_that_the_tokenizer_adds_is_not_doubled() -> None:
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", end)])
    assert encode(tokenizer, Example("id", "digest", "row", text="Once")).input_ids.tolist().count(end) == 1


@every_kind
def test_labels_are_the_supervised_tokens_themselves(kind: str) -> None:
    tokenizer = ready(kind)
    encoded = encode(tokenizer, example(CONVERSATIONS["tool"]))
    (prepared,) = tokenise(tokenizer, [example(CONVERSATIONS["tool"])], [[]])
    assert prepared.input_ids.tolist() == encoded.input_ids.tolist()
    assert prepared.labels.tolist() == np.where(encoded.turn >= 0, encoded.input_ids, -100).tolist()
    assert not prepared.noise_code.any()


@every_kind
def test_the_code_of_a_response_marks_its_last_turn_alone(kind: str) -> None:
    tokenizer = ready(kind)
    encoded = encode(tokenizer, example(CONVERSATIONS["tool"]))
    talk = example(CONVERSATIONS["tool"])
    (prepared,) = tokenise(tokenizer, [talk], [whole(talk.response or "", 3)])
    assert prepared.noise_code.tolist() == np.where(encoded.turn == 4, 3, 0).tolist()


def test_nothing_is_learnt_at_the_first_token_of_all() -> None:
    tokenizer = byte_level()
    set_template(tokenizer, "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}")
    talk = example(conversation(("assistant", "Once upon a time")))
    (prepared,) = tokenise(tokenizer, [talk], [whole("Once upon a time", 1)])
    assert prepared.labels[0] == -100 and prepared.noise_code[0] == 0
    assert prepared.labels.tolist()[1:] == prepared.input_ids.tolist()[1:] and all(prepared.noise_code[1:] == 1)


# --- the built tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 262])
def test_a_small_built_tokenizer_has_one_token_a_byte_and_two_a_turn(size: int) -> None:
    tokenizer = build_tokenizer(TEXTS, size)
    assert len(tokenizer) == 256 + 6
    talk = conversation(("system", "é"), ("user", "日本 x"), ("assistant", "😀  \n"))
    assert len(encode(tokenizer, example(talk)).input_ids) == (2 + 2) + (6 + 2 + 2) + (4 + 3 + 2)


def test_a_larger_built_tokenizer_has_the_size_asked_for_and_merges_the_header() -> None:
    tokenizer = build_tokenizer(TEXTS * 2, 300)
    assert len(tokenizer) == 300
    ids = encode(tokenizer, example(conversation(("user", "return"), ("assistant", "return")))).input_ids
    assert 6 <= len(ids) < 4 + 2 * len("return")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_the_built_tokenizer_does_not_depend_on_the_order_of_its_texts() -> None:
    texts = [f"{word} {i}" for i, word in enumerate("the cat sat on the mat and the dog sat on the cat".split() * 20)]
    first, second = build_tokenizer(texts, 320), build_tokenizer(texts[::-1], 320)
    assert first.get_vocab() == second.get_vocab()
    assert first(" ".join(texts)).input_ids == second(" ".join(texts)).input_ids


# --- where generation stops -----------------------------------------------------------------------------------------


ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]


def module(tmp_path: Path, tokenizer: Any | None = None, **options: Any) -> InstructionDataModule:
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        options["tokenizer"] = str(tmp_path / "tokenizer")
    return InstructionDataModule(write(tmp_path / "rows.jsonl", ROWS), validation_fraction=0.3, **options)


STOPS: dict[str, set[str]] = {
    "built": {"<|end|>"},
    "chatml, byte-level": {"</s>"},
    "chatml, normalizer": {"</s>"},
    "chatml, named <|im_end|>": {"</s>", "<|im_end|>"},
    "chatml, special <|im_end|>": {"</s>", "<|im_end|>"},
    "gemma, named turns": {"</s>", "<end_of_turn>"},
    "gemma, special turns": {"</s>", "<end_of_turn>"},
    "generation tags, byte-level": {"</s>"},
}


def stopping(tmp_path: Path, kind: str) -> InstructionDataModule:
    return module(tmp_path, None if kind == "built" else ALL[kind].make(), chat_template=ALL[kind].template)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("kind", STOPS)
def test_generation_stops_at_the_end_of_sequence_and_at_the_end_of_a_turn_in_every_stage(
    tmp_path: Path, kind: str, stage: str
) -> None:
    data = stopping(tmp_path, kind)
    data.setup(stage)
    assert set(data.tokenizer.convert_ids_to_tokens(data.stop_token_ids)) == STOPS[kind]


@pytest.mark.parametrize("kind", STOPS)
def test_no_warning_where_the_end_of_turn_is_learnt(tmp_path: Path, kind: str) -> None:
    data = stopping(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stop.*")
        data.setup("fit")
    labels = next(iter(data.train_dataloader()))["labels"]
    last = {int(row[row != -100][-1]) for row in labels}
    assert data.tokenizer.convert_ids_to_tokens(sorted(last)) == [ALL[kind].end]
    assert last <= set(data.stop_token_ids)


def test_a_template_without_an_end_of_turn_is_warned_of(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    data = module(tmp_path, chat_template=text + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    with pytest.warns(UserWarning, match="where to stop.*--data.chat_template"):
        data.setup("fit")


@pytest.mark.parametrize(
    "silent",
    [
        # Tags that are there, and around nothing.
        "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'bot' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_supervises_nothing_is_an_error_that_names_the_option(tmp_path: Path, silent: str) -> None:
    data = module(tmp_path, chat_template=silent)
    with pytest.raises(UserError, match=r"no supervised token.*--data\.chat_template") as caught:
        data.setup("fit")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_template_that_refuses_a_prompt_is_one_line_that_names_the_row(tmp_path: Path, stage: str) -> None:
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    rows = [{"system": "be brief", "instruction": "a", "output": "b"}]
    data = module(
        tmp_path,
        chat_template=refusing + "{{ m['content'] }}<|end|>{% endfor %}",
        test_source=write(tmp_path / "test.jsonl", rows),
    )
    data.setup(stage)
    with pytest.raises(UserError, match=r"test\.jsonl, row 1.*no system turn.*--data\.chat_template"):
        data.test_dataloader() if stage == "test" else data.predict_dataloader()
