"""Edits against an oracle that carries every letter by itself; marks against the tokens of real tokenizers."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_lightning.data import CharNoise, Edit, Noise, NoiseOp, OptionFlip, ResponseSwap, StepEdit, TokenReplace
from deft_lightning.data.encoding.encode import encode, tokenise
from deft_lightning.data.encoding.template import set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer, vocabulary
from deft_lightning.data.examples import Example, Prepared
from deft_lightning.data.noise import AnswerCorrupt, Mark, apply_edits
from deft_lightning.data.noise.apply import Applied, corrupt_responses, corrupt_tokens
from deft_lightning.data.noise.edits import whole
from deft_lightning.data.prepared.report import Report
from deft_lightning.errors import UserError

quick = settings(deadline=None, max_examples=150, derandomize=True)


# --- edits ----------------------------------------------------------------------------------------------------------


class Letter(NamedTuple):
    """A letter with the operation that wrote it, and the operation that cut before it; 0 for none."""

    text: str
    code: int
    cut: int


def letter_by_letter(letters: list[Letter], edits: list[Edit], code: int) -> list[Letter]:
    """Edit a list of letters that ends in an empty one."""
    after: list[Letter] = []
    removed: dict[int, Edit] = {place: edit for edit in edits for place in range(edit.start, edit.end)}
    cut = 0
    for place, letter in enumerate(letters):
        for edit in edits:
            # What is written where something starts stands before what stays there.
            if edit.start == place and edit.text:
                after += [Letter(new, code, 0) for new in edit.text]
                cut = 0
            if edit.end == place and edit.start < edit.end and not edit.text:
                cut = code
        if place in removed:
            continue
        after.append(letter._replace(cut=cut or letter.cut))
        cut = 0
    return after


def as_letters(text: str, marks: list[Mark]) -> list[Letter]:
    codes, cuts = [0] * (len(text) + 1), [0] * (len(text) + 1)
    for start, end, code in marks:
        if start == end:
            assert not cuts[start]
            cuts[start] = code
        for place in range(start, end):
            assert not codes[place]
            codes[place] = code
    return [Letter(*parts) for parts in zip([*text, ""], codes, cuts, strict=True)]


@st.composite
def edits_within(draw: st.DrawFn, text: str) -> list[Edit]:
    edits: list[Edit] = []
    at = 0
    while at <= len(text) and draw(st.booleans()):
        start = draw(st.integers(at, len(text)))
        end = draw(st.integers(start, min(len(text), start + 3)))
        # Two edits in one place would be one.
        edits.append(Edit(start, end, draw(st.text("abX", max_size=3))))
        at = end + 1
    return [edit for edit in edits if edit.text != text[edit.start : edit.end]]


@pytest.mark.slow
@settings(quick, max_examples=500)
@given(text=st.text("ab", max_size=12), data=st.data())
def test_edits_of_several_operations_are_those_of_every_letter_by_itself(text: str, data: st.DataObject) -> None:
    marks: list[Mark] = []
    letters = as_letters(text, marks)
    for code in range(1, 5):
        edits = data.draw(edits_within(text))
        text, marks = apply_edits(text, edits, code, marks)
        letters = letter_by_letter(letters, edits, code)
        assert text == "".join(letter.text for letter in letters)
        assert as_letters(text, marks) == letters
        assert marks == sorted(marks)


@pytest.mark.parametrize(
    ("edits", "text", "marks"),
    [
        ([Edit(0, 6, "xy")], "xy", [(0, 2, 2)]),
        ([Edit(2, 4, "")], "abef", [(2, 2, 2)]),
        ([Edit(4, 6, "")], "abcd", [(4, 4, 2)]),
        ([Edit(6, 6, "!")], "abcdef!", [(6, 7, 2)]),
        ([Edit(1, 3, ""), Edit(3, 3, "XY"), Edit(5, 6, "f")], "aXYdef", [(1, 1, 2), (1, 3, 2)]),
    ],
)
def test_edits_and_their_marks(edits: list[Edit], text: str, marks: list[tuple[int, int, int]]) -> None:
    assert apply_edits("abcdef", edits, 2, []) == (text, marks)


def test_an_edit_inside_an_earlier_mark_cuts_it() -> None:
    text, marks = apply_edits("abcdef", [Edit(0, 6, "uvwxyz")], 1, [])
    text, marks = apply_edits(text, [Edit(2, 4, "-")], 2, marks)
    assert (text, marks) == ("uv-yz", [(0, 2, 1), (2, 3, 2), (3, 5, 1)])
    assert apply_edits(text, [], 3, marks) == (text, marks)


@pytest.mark.parametrize(
    "edits",
    [
        [Edit(2, 7, "")],
        [Edit(3, 2, "x")],
        [Edit(-1, 2, "x")],
        [Edit(2, 4, "x"), Edit(3, 5, "y")],
        [Edit(4, 5, ""), Edit(0, 1, "")],
    ],
)
def test_edits_that_overlap_or_leave_the_text_are_an_error_of_one_line(edits: list[Edit]) -> None:
    with pytest.raises(UserError, match=r"edit .*--data\.noise\.ops") as caught:
        apply_edits("abcdef", edits, 1, [])
    assert len(str(caught.value).splitlines()) == 1


# --- tokens ---------------------------------------------------------------------------------------------------------

CHATML = "chatml"
STRIPPING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TAGGED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ SAID }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGGED, ESCAPING = _TAGGED.replace("SAID", "m['content']"), _TAGGED.replace("SAID", "m['content'] | tojson")
# Says the response a second time, after other words: which one is meant is not to be told.
TWICE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}so: {{ m['content'] }} / {% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "own": None, "chatml": CHATML, "stripping": STRIPPING, "escaping": ESCAPING, "generation tags": TAGGED,
    "twice": TWICE,
}  # fmt: skip
TEXTS = [
    "First, we add 12 and 30.\nThat makes 42 pencils in all.\n#### 42",
    "Each box holds 8 eggs. There are 5 boxes. So the answer is 40.",
    "Ça coûte 15 € — très cher.\nIl paie 20 €.\n#### 5",
    '  The house is "big" and 日本語 too.\n\nIt has 7 rooms.\n#### 7\n',
]


def tokenizer_of(template: str, size: int) -> Any:
    tokenizer = build_tokenizer(TEXTS * 3, size)
    set_template(tokenizer, TEMPLATES[template])
    return tokenizer


def worked_answer(response: str, id: str = "id", question: str = "How many?") -> Example:
    turns = (("user", question), ("assistant", "Let me see."), ("user", question), ("assistant", response))
    return Example(id, id, id, messages=tuple({"role": role, "content": content} for role, content in turns))


def tokenised(tokenizer: Any, response: str, marks: list[Mark]) -> Prepared:
    (found,) = tokenise(tokenizer, [worked_answer(response)], [marks])
    return found


def flagged(tokenizer: Any, response: str, marks: list[Mark]) -> list[tuple[str, int]]:
    """The supervised tokens of the last turn as text, with their codes."""
    found = tokenised(tokenizer, response, marks)
    turn = encode(tokenizer, worked_answer(response)).turn == 3
    assert not found.noise_code[~turn].any()
    return [(tokenizer.decode([i]), int(c)) for i, c in zip(found.input_ids[turn], found.noise_code[turn], strict=True)]


each_template = pytest.mark.parametrize("template", TEMPLATES)
locating = pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "twice"])
each_size = pytest.mark.parametrize("size", [262, 400])


@pytest.mark.slow
@each_template
@each_size
@settings(quick, max_examples=25)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4), data=st.data())
def test_marks_change_no_token_label_or_turn(template: str, size: int, texts: list[str], data: st.DataObject) -> None:
    tokenizer, examples = tokenizer_of(template, size), [worked_answer(text) for text in texts]
    marks: list[list[Mark]] = []
    for text in texts:  # none, or a part of the last turn
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, len(text)))
        marks.append([Mark(start, end, 1)] if data.draw(st.booleans()) else [])
    clean, noisy = tokenise(tokenizer, examples, [[] for _ in examples]), tokenise(tokenizer, examples, marks)
    for example, mark, before, after in zip(examples, marks, clean, noisy, strict=True):
        assert after.input_ids.tolist() == before.input_ids.tolist() and after.labels.tolist() == before.labels.tolist()
        assert encode(tokenizer, example, mark).turn.tolist() == encode(tokenizer, example).turn.tolist()
        assert bool(after.noise_code.any()) <= bool(mark) and not before.noise_code.any()


@pytest.mark.slow
@locating
@each_size
@settings(quick, max_examples=25)
@given(text=st.sampled_from(TEXTS), data=st.data())
def test_a_token_is_noisy_when_it_holds_a_letter_of_a_mark(
    template: str, size: int, text: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(template, size)
    first = len(text) - len(text.lstrip())
    start = data.draw(st.integers(first, len(text.rstrip()) - 1))
    end = data.draw(st.integers(start + 1, len(text.rstrip())))
    found = tokenised(tokenizer, text, [Mark(start, end, 3)])
    # The oracle works on bytes: a token of this tokenizer is the bytes that it stands for.
    written = list(text)
    if template == "stripping":
        start, end, written = start - first, end - first, list(text.strip())
    if template == "escaping":
        written = [json.dumps(letter, ensure_ascii=False)[1:-1] for letter in written]
        start, end, written = start + 1, end + 1, ['"', *written, '"']
    owner = [i for i, letter in enumerate(written) for _ in letter.encode()]
    turn, at, expected = np.flatnonzero(encode(tokenizer, worked_answer(text)).turn == 3), 0, []
    letters = bytes_of(tokenizer)
    for token in found.input_ids[turn]:
        # A letter of several bytes counts as a whole, whichever of them the token holds.
        width = len(letters[int(token)])
        expected.append(3 * any(start <= i < end for i in owner[at : at + width]))
        at += width
    assert found.noise_code[turn].tolist() == expected


def bytes_of(tokenizer: Any) -> dict[int, bytes]:
    """Bytes of each token of a byte-level vocabulary; special ones count as what they are written as."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_tokens)
    return {
        i: token.encode() if token in special else bytes(back[letter] for letter in token)
        for token, i in tokenizer.get_vocab().items()
    }


@each_size
@pytest.mark.parametrize("template", ["own", "chatml", "generation tags"])
def test_a_cut_flags_the_token_behind_it_or_around_it(template: str, size: int) -> None:
    tokenizer = tokenizer_of(template, size)
    text = "ab cd\nef"
    for place in range(len(text) + 1):
        found = flagged(tokenizer, text, [Mark(place, place, 2)])
        assert [code for _, code in found].count(2) == 1
        at = next(i for i, (_, code) in enumerate(found) if code)
        before = len("".join(token for token, _ in found[:at]))
        assert before <= place and (found[at][0] == "<|end|>" or place < before + len(found[at][0]))
        assert (found[at][0] == "<|end|>") == (place == len(text))


@each_template
@each_size
def test_another_response_altogether_flags_all_of_its_turn(template: str, size: int) -> None:
    tokenizer = tokenizer_of(template, size)
    for text in TEXTS:
        assert {code for _, code in flagged(tokenizer, text, whole(text, 2))} == {2}
    text, marks = apply_edits(TEXTS[0], [Edit(0, 5, "Fisrt"), Edit(40, 45, "")], 5, whole(TEXTS[0], 2))
    codes = [code for _, code in flagged(tokenizer, text, marks)]
    assert set(codes) == ({5} if template == "twice" else {2, 5}) and codes[-1] == (5 if template == "twice" else 2)


def test_a_response_that_cannot_be_found_is_flagged_as_a_whole() -> None:
    tokenizer = tokenizer_of("twice", 262)
    assert {code for _, code in flagged(tokenizer, "ab cd", [Mark(0, 1, 4)])} == {4}
    # One that opens the turn is found, however often it is said again.
    set_template(tokenizer, TWICE.replace("so: ", ""))
    assert [code for _, code in flagged(tokenizer, "ab cd", [Mark(0, 1, 4)])][:2] == [4, 0]


def test_what_a_template_strips_is_no_noise() -> None:
    tokenizer = tokenizer_of("stripping", 262)
    assert not any(code for _, code in flagged(tokenizer, "  ab  ", [Mark(0, 2, 1), Mark(4, 6, 1)]))
    assert flagged(tokenizer, "  ab  ", [Mark(1, 3, 1)]) == [("a", 1), ("b", 0), ("<|end|>", 0)]
    assert flagged(tokenizer, "  ab  ", [Mark(6, 6, 1)]) == [("a", 0), ("b", 0), ("<|end|>", 1)]


def test_of_two_operations_on_one_token_the_later_counts() -> None:
    tokenizer = tokenizer_of("own", 400)
    found = flagged(tokenizer, "pencils pencils", [Mark(0, 7, 7), Mark(7, 9, 2)])
    assert len(found) < 10 and found[0][1] == 7 and 2 in {code for _, code in found}
    found = flagged(tokenizer, "pencils", [Mark(0, 2, 2), Mark(2, 3, 7), Mark(3, 7, 2)])
    assert [code for token, code in found[:-1] if "n" in token] == [7]


# --- end to end -----------------------------------------------------------------------------------------------------

OPS: list[NoiseOp] = [
    StepEdit(rate=0.5, op="delete"),
    StepEdit(rate=0.5, op="shuffle"),
    StepEdit(rate=0.5, op="insert"),
    CharNoise(rate=0.6, cer=0.1),
    AnswerCorrupt(rate=0.7, style="last_number"),
    OptionFlip(rate=0.5),
    ResponseSwap(rate=0.1),
]


@pytest.mark.slow
@locating
def test_noise_of_many_operations_reaches_the_tokens(template: str) -> None:
    examples = [worked_answer(f"{TEXTS[i % 4].strip()}{i}", f"id-{i}") for i in range(60)]
    noisy, marks, applied = corrupt_responses(examples, Noise(ops=OPS))
    tokenizer = tokenizer_of(template, 400)
    rows = tokenise(tokenizer, noisy, marks)
    for old, new, found, row in zip(examples, noisy, marks, rows, strict=True):
        assert (old.response != new.response) == bool(found) == bool(row.noise_code.any())
        assert set(row.noise_code.tolist()) - {0} <= {mark.code for mark in found}
        assert all(0 <= m.start <= m.end <= len(new.response or "") for m in found)
        assert ((row.noise_code == 0) | (row.labels != -100)).all()
    assert [a.name for a in applied] == [type(op).__name__ for op in OPS]
    assert all(0 < a.changed <= a.eligible == 60 for a in applied if a.name != "OptionFlip")
    # Tokens corrupted later keep the truth of the rest.
    labels = np.concatenate([row.labels[row.labels >= 0] for row in rows])
    words = vocabulary(tokenizer, np.bincount(labels, minlength=len(tokenizer)))
    after = corrupt_tokens(rows, Noise(ops=[*OPS, TokenReplace(rate=0.2)]), words)
    for before, row in zip(rows, after, strict=True):
        hit = before.labels != row.labels
        assert (row.noise_code[hit] == 8).all() and (row.noise_code[~hit] == before.noise_code[~hit]).all()


@settings(quick, max_examples=40)
@given(seed=st.integers(0, 10_000), rates=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_unflagged_letters_are_those_of_the_clean_response_in_order(seed: int, rates: list[float]) -> None:
    from dataclasses import replace

    examples = [worked_answer(f"{TEXTS[i % 4].strip()}{i}", f"id-{i}") for i in range(12)]
    ops = [replace(op, rate=rate) for op, rate in zip(OPS, rates, strict=True)]  # type: ignore[type-var]
    noisy, marks, _ = corrupt_responses(examples, Noise(seed=seed, ops=ops))
    for old, new, found in zip(examples, noisy, marks, strict=True):
        flat = {place for mark in found for place in range(mark.start, mark.end)}
        kept = [letter for place, letter in enumerate(new.response or "") if place not in flat]
        rest = iter(old.response or "")
        assert all(letter in rest for letter in kept)  # a subsequence


def test_an_operation_that_restores_the_response_leaves_it_clean() -> None:
    examples = [worked_answer("Yes.", f"id-{i}") for i in range(20)]
    noisy, marks, applied = corrupt_responses(examples, Noise(ops=[OptionFlip(rate=1.0), OptionFlip(rate=1.0)]))
    assert noisy == examples and not any(marks)
    assert applied == [Applied("OptionFlip", 1.0, 20, 20)] * 2


def test_the_report_says_what_each_operation_did() -> None:
    report = Report("train", applied=[Applied("AnswerCorrupt", 0.3, 7473, 2227), Applied("OptionFlip", 0.3, 7473, 0)])
    assert "AnswerCorrupt: 29.8% of 7,473 examples changed; OptionFlip: 0.0% of 7,473 examples changed" in str(report)


def test_prompts_are_the_last_user_turns() -> None:
    question = "Which one?\nA) Rome\nB) Paris"
    examples = [worked_answer("B) Paris", f"id-{i}", question) for i in range(9)]
    noisy, marks, _ = corrupt_responses(examples, Noise(ops=[OptionFlip(rate=1.0)]))
    assert {e.response for e in noisy} == {"A) Rome"} and marks[0] == [(0, 1, 1), (3, 7, 1)]
