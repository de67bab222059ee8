"""Every operation on responses: the same for any order, nested, of the rate asked for, and never right by accident."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deft_lightning.answers.locate import boxes
from deft_lightning.data import (
    AnswerCorrupt,
    CharNoise,
    Edit,
    ExampleNoise,
    InstructionDataModule,
    Noise,
    NoiseOp,
    OptionFlip,
    ResponseNoise,
    ResponseSwap,
    StepEdit,
    TokenReplace,
    WrongRule,
    known_noise,
)
from deft_lightning.data.encoding.tokenizer import build_tokenizer, vocabulary
from deft_lightning.data.examples import Example
from deft_lightning.data.noise import apply_edits
from deft_lightning.data.noise.apply import corrupt_responses
from deft_lightning.data.noise.base import exact_count
from deft_lightning.data.noise.options import options
from deft_lightning.data.noise.steps import steps
from deft_lightning.data.noise.vocabulary import NEAR, Vocabulary
from deft_lightning.errors import UserError

quick = settings(deadline=None, max_examples=60, derandomize=True)
SHARED = Path(__file__).resolve().parents[3].parent / "shared"

OPS: list[ResponseNoise] = [
    ResponseSwap(),
    ResponseSwap(bucket_by_length=False),
    *(
        AnswerCorrupt(style=style, how=how)  # type: ignore[arg-type]
        for style in ("gsm8k", "boxed", "last_number")
        for how in ("digits", "offset")
    ),
    OptionFlip(),
    *(StepEdit(op=op, fraction=share) for op in ("delete", "shuffle", "insert") for share in (0.33, 1.0)),  # type: ignore[arg-type]
    CharNoise(),
    CharNoise(cer=1.0),
    *(WrongRule(rule=rule) for rule in ("rotate", "reverse", "upper")),  # type: ignore[arg-type]
]
each_op = pytest.mark.parametrize("op", OPS, ids=repr)
PROMPT = "Which one is it?\nA) Rome\nB) Paris\nC) Oslo\nD) 12"

number = st.one_of(
    st.integers(-20, 20).map(str),
    st.integers(1000, 10**7).map("{:,}".format),
    st.decimals(-100, 100, places=2, allow_nan=False).map(str),
    st.sampled_from(["3/4", "007", "$5", "-$12.50", "50%", "10^{9}", "0", "0.0", "x", ""]),
)
line = st.text("ab 1.é", min_size=1, max_size=12) | st.sampled_from(["We add 3 and 4.", "Then we go. And stop.", ""])


@st.composite
def responses(draw: st.DrawFn) -> str:
    body = draw(st.lists(line, max_size=5))
    value = draw(number)
    end = draw(
        st.sampled_from(
            [f"#### {value}", rf"It is \boxed{{{value}}}.", f"so {value}", "The answer is B.", "Yes.", "(C)"]
        )
    )
    return draw(st.sampled_from(["\n", " "])).join([*body, end])


rows_of = st.lists(responses(), max_size=25).map(lambda texts: [(f"id-{i}", text) for i, text in enumerate(texts)])
Rows = Sequence[tuple[str, str]]


def edits_of(op: ResponseNoise, rows: Rows, salt: str = "0/op/0") -> dict[str, list[Edit]]:
    found = op.edits(salt, [id for id, _ in rows], [text for _, text in rows], [PROMPT] * len(rows))
    return {rows[i][0]: edits for i, edits in found.items()}


def at(op: Any, rate: float, **fields: Any) -> Any:
    return dataclasses.replace(op, rate=rate, **fields)


def within(hits: int, n: int, rate: float) -> bool:
    """Whether a count is within four standard deviations of a binomial one."""
    return abs(hits - n * rate) <= 4 * math.sqrt(n * rate * (1 - rate)) + 1e-9


# --- what all of them keep ------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_op
@quick
@given(rows=rows_of, rate=st.sampled_from([0.3, 1.0]), exact=st.booleans(), shuffler=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_makes_no_difference(
    op: ResponseNoise, rows: Rows, rate: float, exact: bool, shuffler: Any
) -> None:
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    op = at(op, rate, exact=exact)
    assert edits_of(op, shuffled) == edits_of(op, rows)


@pytest.mark.slow
@each_op
@quick
@given(rows=rows_of)
def test_edits_are_in_order_within_bounds_and_change_the_text(op: ResponseNoise, rows: Rows) -> None:
    old = dict(rows)
    for id, edits in edits_of(at(op, 1.0), rows).items():
        assert edits
        bounds = [place for edit in edits for place in (edit.start, edit.end)]
        assert bounds == sorted(bounds) and 0 <= bounds[0] and bounds[-1] <= len(old[id])
        text, marks = apply_edits(old[id], edits, 1, [])
        assert text != old[id] and marks and text.strip()


@pytest.mark.slow
@each_op
@quick
@given(rows=rows_of, exact=st.booleans())
def test_what_30_percent_corrupt_50_and_70_percent_corrupt_too(op: ResponseNoise, rows: Rows, exact: bool) -> None:
    if isinstance(op, ResponseSwap):
        rows = [(id, f"{id} {text}") for id, text in rows]  # two that say the same may not trade
    low, middle, high, every = (edits_of(at(op, rate, exact=exact), rows) for rate in (0.3, 0.5, 0.7, 1.0))
    assert set(low) <= set(middle) <= set(high) <= set(every)
    if not isinstance(op, ResponseSwap):  # what it gives depends on who else is selected
        assert all(every[id] == edits for found in (low, middle, high) for id, edits in found.items())


@pytest.mark.slow
@each_op
@quick
@given(rows=rows_of, rate=st.floats(0, 1) | st.sampled_from([0.0, 0.29, 0.5, 1.0]))
def test_exactly_the_share_of_those_that_can_be_corrupted(op: ResponseNoise, rows: Rows, rate: float) -> None:
    if isinstance(op, ResponseSwap):
        rows = [(id, f"{id} {text}") for id, text in rows]  # two that say the same cannot trade
    able = len(edits_of(at(op, 1.0), rows))
    wanted = math.floor(Fraction(str(rate)) * able)
    if isinstance(op, ResponseSwap) and wanted < 2:
        wanted = 0
    assert len(edits_of(at(op, rate, exact=True), rows)) == wanted


@pytest.mark.slow
@each_op
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_the_share_is_the_rate(op: ResponseNoise, rate: float) -> None:
    rows = [(f"id-{i}", f"One is {i}.\nTwo is {i + 1}.\nB) Paris \\boxed{{{i}}}\n#### {i}") for i in range(1500)]
    if isinstance(op, OptionFlip):
        rows = [(id, f"{text}\nSo the answer is B.") for id, text in rows]
    assert within(len(edits_of(at(op, rate), rows)), 1500, rate)


@pytest.mark.parametrize(("rate", "n", "count"), [(0.29, 100, 29), (0.3, 10, 3), (1.0, 7, 7), (0.999, 7, 6), (0, 7, 0)])
def test_a_share_is_counted_as_it_is_written(rate: float, n: int, count: int) -> None:
    assert exact_count(rate, n) == count


def test_exact_ties_are_broken_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_lightning.data.noise.base.uniform", lambda *parts: 0.5)
    rows = [(id, "#### 7") for id in "dacb"]
    assert set(edits_of(AnswerCorrupt(rate=0.5, exact=True), rows)) == {"a", "b"}


@pytest.mark.parametrize("op", [*OPS, TokenReplace(rates=[0.1, 0.2])], ids=repr)
def test_operations_are_values_that_can_be_sent_to_a_worker(op: NoiseOp) -> None:
    assert pickle.loads(pickle.dumps(op)) == op == dataclasses.replace(op)  # type: ignore[type-var]
    assert pickle.loads(pickle.dumps(Noise(ops=[op]))) == Noise(ops=[op])
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.rate = 0.5


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@each_op
def test_trusted_examples_stay_clean(op: ResponseNoise, share: float) -> None:
    noise = Noise(trusted_fraction=share, ops=[at(op, 1.0)])
    text = "One {0}.\nTwo.\n\\boxed{{{0}}}\n#### {0}\nSo the answer is B."
    examples = [Example(f"{i}", f"{i}", f"{i}", messages=one_turn(text.format(i))) for i in range(60)]
    noisy, marks, (applied,) = corrupt_responses(examples, noise)
    clean = {e.id for e in examples if noise.trusts(e.id)}
    assert {new.id for new, old in zip(noisy, examples, strict=True) if new == old} == clean
    assert {e.id for e, found in zip(noisy, marks, strict=True) if not found} == clean
    assert (applied.eligible, applied.changed) == (60 - len(clean), 60 - len(clean))


def one_turn(response: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": PROMPT}, {"role": "assistant", "content": response})


def digest() -> str:
    """Of what every operation does to some rows."""
    rows = [(f"id-{i}", f"One, {i}.\nTwo, {i}.\n\\boxed{{{i}}}\n#### {i}\n(B)") for i in range(40)]
    found = [sorted(edits_of(at(op, 0.7, exact=exact), rows).items()) for op in OPS for exact in (True, False)]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@pytest.mark.slow
def test_processes_agree_whatever_the_seed_of_their_hashes() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])])
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    script = "import test_noise_ops; print(test_noise_ops.digest())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == digest()


def test_every_operation_is_known_by_name() -> None:
    ours = {name for name, cls in known_noise().items() if cls.__module__.startswith("deft_lightning.")}
    assert ours == {"AnswerCorrupt", "CharNoise", "OptionFlip", "ResponseSwap", "StepEdit", "TokenReplace", "WrongRule"}


def test_an_operation_of_ones_own_looks_at_one_response_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Shout(ExampleNoise):
        rate: float = 0.5
        exact: bool = False

        def edit(self, salt: str, example_id: str, response: str, prompt: str) -> list[Edit] | None:
            return None if response.isupper() else [Edit(0, len(response), response.upper())]

    rows = [(f"id-{i}", "LOUD" if i % 2 else "quiet") for i in range(1000)]
    assert within(len(edits_of(Shout(), rows)), 500, 0.5)
    assert len(edits_of(Shout(exact=True), rows)) == 250


BAD: dict[str, tuple[Any, list[str]]] = {
    "style": (lambda: AnswerCorrupt(style="gsm"), ["AnswerCorrupt", "gsm8k", "'gsm'"]),  # type: ignore[arg-type]
    "how": (lambda: AnswerCorrupt(how="digit"), ["AnswerCorrupt", "offset", "'digit'"]),  # type: ignore[arg-type]
    "answer rate": (lambda: AnswerCorrupt(rate=30), ["AnswerCorrupt", "rate 30", "[0, 1]"]),
    "option rate": (lambda: OptionFlip(rate=-1), ["OptionFlip", "rate -1"]),
    "op": (lambda: StepEdit(op="swap"), ["StepEdit", "delete, shuffle or insert", "'swap'"]),  # type: ignore[arg-type]
    "no fraction": (lambda: StepEdit(fraction=0), ["StepEdit", "fraction 0", "(0, 1]"]),
    "fraction in percent": (lambda: StepEdit(fraction=33), ["StepEdit", "fraction 33"]),
    "no error rate": (lambda: CharNoise(cer=0.0), ["CharNoise", "cer 0.0", "(0, 1]"]),
    "error rate that is no number": (lambda: CharNoise(cer=math.nan), ["CharNoise", "cer nan"]),
    "rates": (lambda: TokenReplace(rates=[0.1, 2.0]), ["TokenReplace", "rates", "2.0"]),
    "no rates": (lambda: TokenReplace(rates=[]), ["TokenReplace", "rates", "one or more"]),
}


@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD.keys())
def test_values_that_mean_nothing_are_an_error_of_one_line(make: Any, says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "--data.noise.ops" in message
    assert all(part in message for part in says), message


# --- answers --------------------------------------------------------------------------------------------------------


def value(text: str) -> Fraction:
    """What a number is worth, however it is written."""
    text = re.sub(r"\\d?frac\{(.*?)\}\{(.*?)\}", r"\1/\2", text)
    text = re.sub(r"\\text\{.*\}|\^\\circ|[\s$,%\\]", "", text).replace("\u2212", "-")
    top, _, bottom = text.partition("/")
    return Fraction(top) / Fraction(bottom or 1)


NUMBERS = [
    "7", "0", "-3", "42", "07", "007", "1,000", "999,999", "1,234,567.50", "5.0", "0.05", ".5", "3/4", "-1/2", "0/7",
    "50%", "$5", "-$12.50", "$1,000", "100", "10", "\u22128", "-0", "0.0", "123456789012345678901234567890", "9" * 60,
]  # fmt: skip
each_how = pytest.mark.parametrize("how", ["digits", "offset"])


@pytest.mark.slow
@each_how
@pytest.mark.parametrize("clean", NUMBERS)
@pytest.mark.parametrize(
    ("style", "around"),
    [
        ("gsm8k", "We have 3.\n#### 1\nNo:\n#### {}"),
        ("gsm8k", "#### {}\nThat was 2 of 3."),
        ("boxed", r"First \boxed{{3}}, \fbox{{4}}, then $\boxed{{{}}}$. There are 2 more."),
        ("last_number", "It takes 3 days and {} dollars."),
        ("last_number", "{}"),
    ],
)
def test_a_wrong_answer_has_another_value_and_the_same_form(how: Any, clean: str, style: Any, around: str) -> None:
    text = around.format(clean)
    lead, trail = around.format("\0").split("\0")
    op = AnswerCorrupt(rate=1.0, style=style, how=how)
    wrongs = set()
    for i in range(60):
        edits = op.edit("s", f"id-{i}", text, "")
        assert edits
        new = apply_edits(text, edits, 1, [])[0]
        assert new.startswith(lead) and new.endswith(trail)
        wrong = new[len(lead) : len(new) - len(trail)]
        assert value(wrong) != value(clean), (clean, wrong)
        wrongs.add(wrong)
        shape = re.sub(r"\d", "0", clean)
        if how == "digits":
            assert re.sub(r"\d", "0", wrong) == shape
            assert not re.match(r"\D*0\d", wrong) or re.match(r"\D*0", clean)
        else:
            scale = 1 if "/" not in clean else value(clean.partition("/")[2])
            assert ((value(wrong) - value(clean)) * scale).denominator == 1
            assert (value(wrong) < 0) == (value(clean) < 0 or clean == "-0")
            assert len(wrong.partition(".")[2]) == len(clean.partition(".")[2])
            assert re.sub(r"[\d,.]", "", wrong) == re.sub(r"[\d,.]", "", clean)
            if "," in clean:
                assert all(len(group.partition(".")[0]) == 3 for group in wrong.split(",")[1:])
        assert re.sub(r"\d", "", new[: len(lead)]) == re.sub(r"\d", "", lead)
    assert len(wrongs) > 1


@each_how
@quick
@given(
    clean=st.integers(-(10**9), 10**9).map(str)
    | st.integers(0, 10**12).map("{:,}".format)
    | st.decimals(-(10**6), 10**6, places=3, allow_nan=False).map(str),
    id=st.text("ab", max_size=3),
)
def test_no_number_is_corrupted_into_itself(how: Any, clean: str, id: str) -> None:
    (edits,) = AnswerCorrupt(rate=1.0, how=how).edits("s", [id], [f"So.\n#### {clean}"], [""]).values()
    assert value(
        apply_edits(f"#### {clean}", [e._replace(start=e.start - 4, end=e.end - 4) for e in edits], 1, [])[0][5:]
    ) != value(clean)


@pytest.mark.parametrize(
    ("text", "style", "how"),
    [
        ("no hashes 5", "gsm8k", "digits"),
        ("#### none", "gsm8k", "digits"),
        ("no box 5", "boxed", "digits"),
        (r"\boxed{5", "boxed", "digits"),
        (r"\boxed{x}", "boxed", "digits"),
        (r"\boxed{x_1}", "boxed", "digits"),
        (r"\boxed{3\sqrt{13}}", "boxed", "offset"),
        (r"\fbox{x}", "boxed", "digits"),
        (r"\fbox 5", "boxed", "digits"),
        ("no number, H2O", "last_number", "digits"),
        ("9" * 5000, "last_number", "offset"),
    ],
)
def test_where_there_is_no_answer_to_corrupt_nothing_is(text: str, style: Any, how: Any) -> None:
    assert AnswerCorrupt(rate=1.0, style=style, how=how).edit("s", "id", text, "") is None


@pytest.mark.parametrize(
    ("clean", "may_change"),
    [
        (r"3\sqrt{13}", r"\d\\sqrt\{\d\d\}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\\left\( \d, \\frac\{\\pi\}\{\d\} \\right\)"),
        ("52_8", r"\d\d_8"),
        ("4210_{5}", r"\d{4}_\{5\}"),
        ("2^{10}", r"\d\^\{10\}"),
        ("x^2", r"x\^\d"),
        (r"\frac{14}{3}", r"\\frac\{\d\d\}\{3\}"),
        (r"\frac{0}{3}", r"\\frac\{[1-9]\}\{3\}"),
        (r"11,\! 111", r"\d\d,\\! \d\d\d"),
        (r"90^\circ", r"\d\d\^\\circ"),
        (r"\text{Set } \{1, 2\}", r"\\text\{Set \} \\\{\d, \d\\\}"),
    ],
)
def test_an_expression_in_a_box_changes_where_its_value_does(clean: str, may_change: str) -> None:
    text = rf"Thus $\boxed{{{clean}}}$."
    for i in range(40):
        edits = AnswerCorrupt(rate=1.0, style="boxed").edit("s", f"{i}", text, "")
        assert edits
        new = apply_edits(text, edits, 1, [])[0]
        ((_, start, end),) = boxes(new)
        assert re.fullmatch(may_change, new[start:end]) and new[start:end] != clean


def test_only_what_differs_is_flagged() -> None:
    edits = AnswerCorrupt(rate=1.0, how="offset").edit("s", "id", "#### 1250", "")
    assert edits and edits[0].start >= 5 and all("#### 1250"[e.start : e.end] != e.text for e in edits)
    assert all(len(e.text) == e.end - e.start == 1 for e in AnswerCorrupt().edit("s", "id", "#### 1250", "") or [])


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (PROMPT, {"A": "Rome", "B": "Paris", "C": "Oslo", "D": "12"}),
        ("Pick: (A) 3 (B) 4, (C) 5", {"A": "3", "B": "4", "C": "5"}),
        ("A. x y\nB. z\n\nAnswer:", {"A": "x y", "B": "z"}),
        ("a) one b) two", {"A": "one", "B": "two"}),
        ("Example A) 1 B) 2\nQuestion\nA) 3\nB) 4\nC) 5", {"A": "3", "B": "4", "C": "5"}),
        ("A: yes\nB: no", {"A": "yes", "B": "no"}),
        ("A man went.", {}),
        ("A. Smith", {}),
        ("", {}),
    ],
)
def test_options_are_read_from_the_prompt(prompt: str, found: dict[str, str]) -> None:
    assert options(prompt) == found


FLIPS = [
    # response, what it may become with the options of PROMPT
    ("B", "A|C|D"), ("(B)", r"\((A|C|D)\)"), ("B.", r"(A|C|D)\."), ("**B**", r"\*\*(A|C|D)\*\*"), ("b", "a|c|d"),
    ("B) Paris", r"A\) Rome|C\) Oslo|D\) 12"), ("B: Paris, of course", "(A: Rome|C: Oslo|D: 12), of course"),
    ("The answer is B.", r"The answer is (A|C|D)\."), ("Answer: (B)", r"Answer: \((A|C|D)\)"),
    ("We know it.\n#### B", r"We know it\.\n#### (A|C|D)"),
    (r"So \boxed{\text{B}}.", r"So \\boxed\{\\text\{(A|C|D)\}\}\."),
    ("Long ago.\n\nB", "Long ago\\.\n\n(A|C|D)"), ("It is Paris (B).", r"It is (Rome \(A|Oslo \(C|12 \(D)\)\."),
    ("A. No.\nThe answer is B", "A\\. No\\.\nThe answer is (A|C|D)"),
    ("Yes", "No"), ("no.", r"yes\."), ("TRUE", "FALSE"),
    ("Yes, because.", r"No, because\."), ("So the answer is yes.", r"So the answer is no\."), ("maybe", "yes|no"),
]  # fmt: skip


@pytest.mark.parametrize(("clean", "pattern"), FLIPS, ids=[clean[-12:] for clean, _ in FLIPS])
def test_another_option_is_answered_in_the_same_words(clean: str, pattern: str) -> None:
    found = set()
    for i in range(60):
        edits = OptionFlip().edit("s", f"{i}", clean, PROMPT)
        assert edits
        new, _ = apply_edits(clean, edits, 1, [])
        assert new != clean and re.fullmatch(pattern, new), new
        found.add(new)
    assert len(found) == pattern.split("(")[-1].count("|") + 1 or len(found) == 3


@pytest.mark.parametrize(
    "text",
    [
        "vitamin B",
        "A man came",
        "I think so",
        "No evidence of it",
        "Not yet",
        "f(a)",
        "Z",
        "",
        "A and B",
        "truest",
        "E",
    ],
)
def test_running_text_is_no_answer(text: str) -> None:
    assert OptionFlip().edit("s", "id", text, PROMPT) is None


def test_without_a_list_the_options_are_a_to_d_or_as_far_as_the_answer() -> None:
    def flips(text: str, prompt: str = "Which one?") -> set[str]:
        made = (OptionFlip().edit("s", f"{i}", text, prompt) for i in range(200))
        return {edits[0].text for edits in made if edits}

    assert flips("B") == {"A", "C", "D"} and flips("F") == {"A", "B", "C", "D", "E"} and flips("b") == set()
    assert flips("yes") == {"no"} and flips("yes", "Answer yes, no or maybe.") == {"no", "maybe"}
    assert flips("B", "A) same B) other C) Other") == {"A"} and flips("B", "A) x B) X") == set()


def test_an_answer_given_twice_changes_twice_and_alike() -> None:
    edits = OptionFlip().edit("s", "id", "B) Paris. So the answer is B.", PROMPT)
    assert edits and len(edits) == 3 and edits[0].text == edits[2].text
    assert options(PROMPT)[edits[0].text] == edits[1].text


# --- steps ----------------------------------------------------------------------------------------------------------

SOLUTION = "He has 3 pens.\nShe has 4.\n\nTogether 7.\r\nThat is all.\n#### 7"
PROSE = "He has 3.5 pens. She has 4! Together 7.5? So the answer is 7.5."


def test_steps_are_lines_or_sentences() -> None:
    assert [s.text for s in steps(SOLUTION)] == [
        "He has 3 pens.",
        "She has 4.",
        "Together 7.",
        "That is all.",
        "#### 7",
    ]
    assert [s.text for s in steps(PROSE)] == [
        "He has 3.5 pens.",
        "She has 4!",
        "Together 7.5?",
        "So the answer is 7.5.",
    ]
    assert [s.answer for s in steps(r"We get \boxed{3}." "\nWhich was to be shown.\nEnd.")] == [True, False, True]
    assert steps("") == [] and steps(" \n ") == []


def corrupted(op: ResponseNoise, text: str, id: str, others: Sequence[str] = ()) -> tuple[str, list[Edit]]:
    rows = [(id, text), *((f"other-{i}", other) for i, other in enumerate(others))]
    edits = edits_of(op, rows)[id]
    return apply_edits(text, edits, 1, [])[0], edits


@pytest.mark.parametrize("text", [SOLUTION, PROSE])
@pytest.mark.parametrize(("fraction", "count"), [(0.1, 1), (0.34, 1), (0.67, 2), (1.0, None)])
def test_deleted_steps_are_gone_and_the_rest_stays_in_order(text: str, fraction: float, count: int | None) -> None:
    old = [s.text for s in steps(text)]
    for i in range(20):
        new, edits = corrupted(StepEdit(rate=1.0, fraction=fraction), text, f"{i}")
        left = [s.text for s in steps(new)]
        rest = iter(old)
        assert all(step in rest for step in left) and left[-1] == old[-1]
        want = count if count is not None else len(old) - 1
        assert (
            len(old) - len(left) == len(edits) == (want if len(old) == 4 or count is None else round(fraction * 4) or 1)
        )
        assert all(edit.text == "" for edit in edits)


@pytest.mark.parametrize("text", [SOLUTION, PROSE, "A.\nA.\nB.\n#### 1"])
@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_shuffled_steps_are_the_same_steps_in_another_order(text: str, fraction: float) -> None:
    old = [s.text for s in steps(text)]
    for i in range(20):
        new, edits = corrupted(StepEdit(rate=1.0, op="shuffle", fraction=fraction), text, f"{i}")
        now = [s.text for s in steps(new)]
        assert sorted(now) == sorted(old) and now != old and now[-1] == old[-1]
        moved = [j for j, (a, b) in enumerate(zip(now, old, strict=True)) if a != b]
        assert len(edits) == len(moved) >= 2 and [e.text for e in edits] == [now[j] for j in moved]


@pytest.mark.parametrize("text", [SOLUTION, PROSE])
def test_inserted_steps_are_of_others_and_no_ones_neighbour(text: str) -> None:
    others = ["Dogs bark.\nShe has 4.\n#### 1", "Cats do not. They purr. So 3.", r"Then \boxed{2}." "\nHm.\n#### 2"]
    pool = {"Dogs bark.", "Cats do not.", "They purr.", "Hm.", "She has 4."}
    pool |= {s.text for s in steps(text) if not s.answer}
    seen = set()
    for i in range(40):
        new, edits = corrupted(StepEdit(rate=1.0, op="insert", fraction=0.5), text, f"{i}", others)
        now, old = [s.text for s in steps(new)], [s.text for s in steps(text)]
        added = [step for step in now if step not in old]
        assert [step for step in now if step in old] == old and added and set(added) <= pool
        assert all(a != b for a, b in pairwise(now)) and now[-1] == old[-1]
        assert sum(len(edit.text) for edit in edits) == len(new) - len(text)
        seen |= set(added)
    assert seen == pool - {s.text for s in steps(text)}


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("delete", "42"), ("delete", r"\boxed{2}" "\n#### 4"), ("shuffle", "One.\n#### 1"), ("insert", ""),
        ("shuffle", "Same.\nSame.\n#### 1"), ("insert", "Nobody else is here.\n#### 1"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_edited_stay(op: Any, text: str) -> None:
    assert edits_of(StepEdit(rate=1.0, op=op), [("id", text)]) == {}


# --- characters -----------------------------------------------------------------------------------------------------


@quick
@given(text=responses(), id=st.text("ab", max_size=3), cer=st.sampled_from([0.01, 0.3, 1.0]))
def test_slips_are_of_letters_and_spare_digits_and_answers(text: str, id: str, cer: float) -> None:
    edits = CharNoise(cer=cer).edit("s", id, text, "")
    kept = "".join(re.findall(r"####[^\n]*", text))
    assume(not kept or "boxed" not in text)
    letters = [c for c in re.sub(r"####[^\n]*|\\boxed\{[^\n]*?\}", "", text) if c.isalpha()]
    if edits is None:
        assert not letters
        return
    new, _ = apply_edits(text, edits, 1, [])
    assert new != text and len(edits) <= len(letters)
    assert re.sub(r"[^\W\d_]", "", new) == re.sub(r"[^\W\d_]", "", text)
    assert "".join(re.findall(r"####[^\n]*", new)) == kept
    assert re.findall(r"\\boxed\{[^\n]*?\}", new) == re.findall(r"\\boxed\{[^\n]*?\}", text)
    assert all(c.isalpha() for edit in edits for c in text[edit.start : edit.end] + edit.text)


@pytest.mark.parametrize("cer", [0.01, 0.05, 0.3])
def test_slips_come_at_the_error_rate(cer: float) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 500
    edits = CharNoise(cer=cer).edit("s", "id", text, "") or []
    assert within(len(edits), 35 * 500, cer)
    kinds = {(edit.end - edit.start, len(edit.text)) for edit in edits}
    assert kinds == {(1, 0), (0, 1), (1, 1), (2, 2)}
    low = {
        (e.start if e.end > e.start else e.start - 1) for e in CharNoise(cer=cer / 2).edit("s", "id", text, "") or []
    }
    assert low <= {(e.start if e.end > e.start else e.start - 1) for e in edits}


def test_a_single_letter_is_not_lost() -> None:
    for i in range(50):
        edits = CharNoise(cer=1.0).edit("s", f"{i}", "a", "")
        assert edits and apply_edits("a", edits, 1, [])[0].strip() not in ("", "a")
    assert CharNoise().edit("s", "id", "12 + 3 = 15\n#### 15 apples", "") is None
    assert len(CharNoise(cer=1e-9).edit("s", "id", "ab " * 9, "") or []) == 1


# --- tokens ---------------------------------------------------------------------------------------------------------


def trained_tokenizer() -> tuple[Any, Vocabulary]:
    texts = [f"The cat {w} sat on 12 mats, and {w * 2} dogs ran; so {w}!" for w in ("blue", "red", "tall", "7", "old")]
    tokenizer = build_tokenizer(texts * 4, 420)
    return tokenizer, vocabulary(tokenizer, np.zeros(len(tokenizer), dtype=np.int64))


@pytest.mark.slow
def test_a_confusable_token_is_of_the_same_class_and_near_in_length() -> None:
    _, words = trained_tokenizer()
    assert words.tokens[:3] != () and len(words.tokens) == len(words.ids)
    spelling = dict(zip(words.ids.tolist(), words.tokens, strict=True))

    def kind(token: str) -> tuple[bool, bool, bool]:
        body = token.lstrip("Ġ")
        return token.startswith("Ġ"), body.isdecimal(), any(map(str.isalpha, body))

    labels = np.repeat(words.ids, 20)
    op = TokenReplace(rate=1.0, source="confusable")
    wrong = op.corrupt_tokens("s", "id", labels, words)
    assert not (wrong == labels).any()
    classes = [kind(spelling[int(i)]) for i in words.ids]
    for clean, new in zip(labels.tolist(), wrong.tolist(), strict=True):
        own, other = spelling[clean], spelling[new]
        if own.strip("ĠĊĉč") and classes.count(kind(own)) > 1:
            assert kind(own) == kind(other), (own, other)
        peers = sorted(len(spelling[int(i)]) for i, c in zip(words.ids, classes, strict=True) if c == kind(own))
        between = sum(min(len(own), len(other)) < n < max(len(own), len(other)) for n in peers)
        assert between <= NEAR
    # Every look-alike is drawn, and each about as often.
    near = set(op.corrupt_tokens("s", "id", np.full(4000, words.ids[40]), words).tolist())
    assert NEAR <= len(near) <= 2 * NEAR


def test_a_token_alone_in_its_class_takes_the_nearest() -> None:
    words = Vocabulary(np.array([5, 6, 7]), np.array([1, 1, 1]), ("a", "Ġa", "!"))
    labels = np.repeat(words.ids, 50)
    wrong = TokenReplace(rate=1.0, source="confusable").corrupt_tokens("s", "id", labels, words)
    drawn = {int(token): set(wrong[labels == token].tolist()) for token in words.ids}
    assert drawn == {5: {7, 6}, 6: {5}, 7: {5}}
    with pytest.raises(UserError, match="spelling of each token"):
        TokenReplace(source="confusable").corrupt_tokens("s", "id", labels, Vocabulary(words.ids, words.counts))


@quick
@given(length=st.integers(0, 60), rate=st.floats(0, 1), source=st.sampled_from(["uniform", "confusable"]))
def test_exactly_the_share_of_tokens_is_replaced_in_each_example(length: int, rate: float, source: Any) -> None:
    words = Vocabulary(np.arange(9), np.arange(9) + 1, tuple("abcĠ12!?x"))
    labels = np.arange(length) % 9
    low, high = (
        TokenReplace(rate=share, source=source, exact=True).corrupt_tokens("s", "id", labels, words)
        for share in (rate / 2, rate)
    )
    assert (high != labels).sum() == math.floor(Fraction(str(rate)) * length)
    assert (low[low != labels] == high[low != labels]).all()


def test_the_rate_of_an_epoch_is_inside_that_of_a_higher_one() -> None:
    op = TokenReplace(rate=0.9, rates=[0.4, 0.2, 0.1], target="text", source="unigram", exact=True)
    assert op.at_epoch(0) == dataclasses.replace(op, rate=0.4, rates=None)
    assert [op.at_epoch(epoch).rate for epoch in (0, 1, 2, 3, 99)] == [0.4, 0.2, 0.1, 0.1, 0.1]
    assert TokenReplace().at_epoch(5) == TokenReplace()
    words = Vocabulary(np.arange(50), np.arange(50) + 1)
    labels = np.arange(1000) % 50
    epochs = [op.at_epoch(e).corrupt_tokens("s", "id", labels, words) for e in range(3)]
    for high, low in pairwise(epochs):
        assert (low[low != labels] == high[low != labels]).all()
    assert [int((wrong != labels).sum()) for wrong in epochs] == [400, 200, 100]


# --- real files -----------------------------------------------------------------------------------------------------


def gsm8k() -> list[tuple[str, str]]:
    path = SHARED / "data" / "gsm8k_train.jsonl"
    if not path.exists():
        return [(f"{i}", f"He has {i} pens.\nShe has {i * 7:,}.\n#### {i * 8:,}") for i in range(500)]
    return [(f"{i}", json.loads(row)["answer"]) for i, row in enumerate(path.read_text(encoding="utf-8").splitlines())]


@pytest.mark.slow
@each_how
def test_every_answer_of_gsm8k_changes_in_value_and_nothing_before_it(how: Any) -> None:
    rows = gsm8k()
    found = edits_of(AnswerCorrupt(rate=1.0, how=how), rows)
    assert len(found) == len(rows)
    for id, text in rows:
        new, _ = apply_edits(text, found[id], 1, [])
        (old_head, _, old_tail), (head, _, tail) = text.rpartition("#### "), new.rpartition("#### ")
        assert head == old_head and value(tail) != value(old_tail)
    share = edits_of(AnswerCorrupt(rate=0.3, how=how), rows)
    assert within(len(share), len(rows), 0.3)
    assert len(edits_of(AnswerCorrupt(rate=0.3, how=how, exact=True), rows)) == math.floor(Fraction("0.3") * len(rows))


@pytest.mark.parametrize("op", ["delete", "shuffle", "insert"])
def test_the_steps_of_gsm8k_are_edited_and_its_answers_are_not(op: Any) -> None:
    rows = gsm8k()[:1500]
    found = edits_of(StepEdit(rate=1.0, op=op), rows)
    for id, text in rows:
        old = [step.text for step in steps(text)]
        if id not in found:
            assert op == "shuffle" and len(set(old[:-1])) < 2
            continue
        new = [step.text for step in steps(apply_edits(text, found[id], 1, [])[0])]
        assert new != old and new[-1] == old[-1]
        assert len(new) - len(old) == {"delete": -1, "shuffle": 0, "insert": 1}[op] * (
            max(round(0.33 * (len(old) - 1)), 1)
        )
    assert len(found) > 0.8 * len(rows)


def pubmedqa() -> list[dict[str, Any]]:
    path = SHARED / "data" / "pubmedqa_labeled.json"
    if not path.exists():
        return [{"QUESTION": f"Does {i} help?", "final_decision": ("yes", "no", "maybe")[i % 3]} for i in range(300)]
    return list(json.loads(path.read_text(encoding="utf-8")).values())


def test_the_decisions_of_pubmedqa_are_flipped() -> None:
    rows = pubmedqa()
    ids, answers = [f"{i}" for i in range(len(rows))], [row["final_decision"] for row in rows]
    found = OptionFlip(rate=1.0).edits("s", ids, answers, [row["QUESTION"] for row in rows])
    assert len(found) == len(rows)
    flips = {(answers[i], edits[0].text) for i, edits in found.items()}
    assert flips == {("yes", "no"), ("no", "yes"), ("maybe", "yes"), ("maybe", "no")}
    asked = [f"{row['QUESTION']} Answer yes, no or maybe." for row in rows]
    found = OptionFlip(rate=1.0).edits("s", ids, answers, asked)
    assert len({(answers[i], edits[0].text) for i, edits in found.items()}) == 6


def test_noise_on_gsm8k_is_reported_and_carried_to_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"Q {id}", "answer": text, "id": id} for id, text in gsm8k()[:80]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    noise = Noise(ops=[AnswerCorrupt(rate=0.5, exact=True), StepEdit(rate=0.4, exact=True)])
    data = InstructionDataModule(str(path), validation_fraction=0.0, batch_size=80, max_length=4096, noise=noise)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    codes = batch["noise_code"]
    assert int(((codes == 1).any(1)).sum()) == 40 and int(((codes == 2).any(1)).sum()) == 32
    assert "AnswerCorrupt: 50.0% of 80 examples changed; StepEdit: 40.0% of 80" in str(data.reports["train"])
    # All that is clean of a wrong answer is the reasoning, and the end of the turn.
    for labels, found in zip(batch["labels"], codes, strict=True):
        wrong = data.tokenizer.decode(labels[found == 1].tolist())
        assert re.fullmatch(r"[\d,. ]*", wrong), wrong


@pytest.mark.parametrize(
    ("rule", "response", "wrong"),
    [
        ("rotate", "olleh dlrow", "lleho lrowd"), ("reverse", "olleh, dlrow!", "hello, world!"),
        ("upper", "no", "NO"), ("rotate", "a", None), ("upper", "42", None), ("reverse", "level", None),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_the_same_for_every_response(rule: Any, response: str, wrong: str | None) -> None:
    edits = WrongRule(rate=1.0, rule=rule).edits("s", ["a"], [response], [""])
    assert [apply_edits(response, edits[at], 1, [])[0] for at in edits] == ([] if wrong is None else [wrong])


def test_a_rule_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"WrongRule: rule 'sort' is not one of rotate, reverse, upper .*--data.noise.ops"
    ):
        WrongRule(rule="sort")  # type: ignore[arg-type]
