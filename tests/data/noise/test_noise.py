"""Label noise is a function of (seed, operation, example id): of exact rate, nested, never the truth, and recorded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deft_lightning import hashing
from deft_lightning.data import (
    Edit,
    InstructionDataModule,
    Noise,
    NoiseOp,
    ResponseNoise,
    ResponseSwap,
    TokenNoise,
    TokenReplace,
    known_noise,
)
from deft_lightning.data.examples import Example, Prepared
from deft_lightning.data.noise.apply import corrupt_responses, corrupt_tokens
from deft_lightning.data.noise.base import Vocabulary

Ids = NDArray[np.int64]
quick = settings(deadline=None, max_examples=80, derandomize=True)
rates = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])
salts = st.text("ab/0", max_size=4)
each_bucketing = pytest.mark.parametrize("bucket", [False, True], ids=["any length", "similar length"])
each_source = pytest.mark.parametrize("source", ["uniform", "unigram", "confusable"])


def near(hits: int, n: int, rate: float) -> bool:
    """Whether a count is within five standard deviations of a binomial one."""
    return abs(hits - n * rate) <= 5 * math.sqrt(n * rate * (1 - rate)) + 1e-9


# --- hashing --------------------------------------------------------------------------------------------------------


def test_draws_are_pinned() -> None:
    # printf '0/TokenReplace/0\037gsm8k-17' | b2sum -l 128 -> 205fbd63ed08da844a9e4ef38c4584bd, read from the right
    assert hashing.key("0/TokenReplace/0", "gsm8k-17") == 0xBD84458CF34E9E4A84DA08ED63BD5F20
    assert hashing.uniform("0/TokenReplace/0", "gsm8k-17") == 0.740299555694316
    # printf '7\037split\037日本' | b2sum -l 128 -> 681ca9d52cd0cfffc16d40427ac966af
    assert hashing.key(7, "split", "日本") == 0xAF66C97A42406DC1FFCFD02CD5A91C68
    assert hashing.uniform(7, "split", "日本") == 0.6851621554835688
    assert hashing.stream("0/TokenReplace/0", "gsm8k-17").random(2).tolist() == [
        0.46683936661259595,
        0.21997118781879144,
    ]


def test_draws_are_uniform() -> None:
    drawn = np.sort([hashing.uniform("salt", i) for i in range(20_000)])
    assert 0 <= drawn[0] and drawn[-1] < 1
    # Kolmogorov and Smirnov: exceeded once in ten thousand.
    assert np.abs(drawn - (np.arange(20_000) + 0.5) / 20_000).max() < 2.23 / math.sqrt(20_000)


@quick
@given(parts=st.lists(st.text(st.characters(exclude_characters="\x1f"), max_size=3) | st.integers(), min_size=1))
def test_keys_know_where_one_part_ends(parts: list[object]) -> None:
    assert hashing.key(*parts) != hashing.key(*parts, "")
    assert hashing.key("x", *parts) != hashing.key("", "x", *parts)
    assert hashing.key("xy", *parts) != hashing.key("x", "y", *parts)


def test_any_text_can_be_a_part() -> None:
    assert hashing.key("\ud800") != hashing.key("\udfff")


# --- whole responses ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    id: str
    response: str


def swap(rows: Sequence[Row], rate: float, *, bucket: bool = True, salt: str = "0/ResponseSwap/0") -> dict[str, str]:
    """New responses by id."""
    op = ResponseSwap(rate=rate, bucket_by_length=bucket)
    swapped = op.edits(salt, [row.id for row in rows], [row.response for row in rows], [""] * len(rows))
    assert all(edits == [(0, len(rows[i].response), edits[0].text)] for i, edits in swapped.items())
    return {rows[i].id: edits[0].text for i, edits in swapped.items()}


def many(n: int, *, seed: int = 0) -> list[Row]:
    """Rows with distinct responses of 1 to 3000 letters, evenly on a log scale."""
    lengths = np.exp(np.random.default_rng(seed).uniform(0, math.log(3000), n)).astype(int)
    return [Row(f"id-{i}", f"{i}:".ljust(length, "x")) for i, length in enumerate(lengths)]


distinct = st.lists(st.text("ab", max_size=9), max_size=60, unique=True).map(
    lambda texts: [Row(f"id-{i}", text) for i, text in enumerate(texts)]
)
repeated = st.lists(st.sampled_from(["yes", "no", "maybe", "so"]), max_size=60).map(
    lambda texts: [Row(f"id-{i}", text) for i, text in enumerate(texts)]
)


@pytest.mark.slow
@each_bucketing
@quick
@given(rows=distinct | repeated, rate=rates, salt=salts)
def test_swapped_responses_are_never_ones_own_and_are_a_permutation(
    bucket: bool, rows: list[Row], rate: float, salt: str
) -> None:
    old = {row.id: row.response for row in rows}
    new = swap(rows, rate, bucket=bucket, salt=salt)
    assert all(new[id] != old[id] for id in new)
    assert Counter(new.values()) == Counter(old[id] for id in new)


@each_bucketing
@quick
@given(rows=distinct | repeated, rate=rates, salt=salts, shuffler=st.randoms(use_true_random=False))
def test_swaps_do_not_depend_on_the_order_of_rows(
    bucket: bool, rows: list[Row], rate: float, salt: str, shuffler: Any
) -> None:
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert swap(shuffled, rate, bucket=bucket, salt=salt) == swap(rows, rate, bucket=bucket, salt=salt)


@pytest.mark.slow
@each_bucketing
@quick
@given(rows=distinct, rate=rates, salt=salts, kept=st.lists(st.booleans(), min_size=60, max_size=60))
def test_who_is_swapped_does_not_depend_on_the_other_rows(
    bucket: bool, rows: list[Row], rate: float, salt: str, kept: list[bool]
) -> None:
    some = [row for row, keep in zip(rows, kept, strict=False) if keep]
    everyone = set(swap(rows, rate, bucket=bucket, salt=salt))
    expected = everyone & {row.id for row in some}
    # One alone has nobody to swap with.
    assert set(swap(some, rate, bucket=bucket, salt=salt)) == (expected if len(expected) > 1 else set())


@pytest.mark.slow
@each_bucketing
@quick
@given(rows=distinct, pair=st.tuples(rates, rates).map(sorted), salt=salts)
def test_who_is_swapped_at_a_low_rate_is_swapped_at_a_higher_one(
    bucket: bool, rows: list[Row], pair: list[float], salt: str
) -> None:
    low, high = (set(swap(rows, rate, bucket=bucket, salt=salt)) for rate in pair)
    assert low <= high


@each_bucketing
def test_who_is_swapped_at_0_3_is_swapped_at_0_5(bucket: bool) -> None:
    rows = many(2000)
    low, high = (set(swap(rows, rate, bucket=bucket)) for rate in (0.3, 0.5))
    assert low < high and near(len(low), 2000, 0.3) and near(len(high), 2000, 0.5)


@pytest.mark.slow
@each_bucketing
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_swapped_responses_is_the_rate(bucket: bool, rate: float) -> None:
    assert near(len(swap(many(5000), rate, bucket=bucket)), 5000, rate)


@pytest.mark.parametrize("n", [0, 1])
@each_bucketing
def test_nobody_is_swapped_with_nobody(bucket: bool, n: int) -> None:
    assert swap(many(n), 1.0, bucket=bucket) == {}


@each_bucketing
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 16, 17, 23, 24, 25, 33])
def test_everybody_is_swapped_at_rate_1_whatever_their_number(bucket: bool, n: int) -> None:
    assert set(swap(many(n), 1.0, bucket=bucket)) == {row.id for row in many(n)}


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_bucket_by_length_gives_responses_of_similar_length(rate: float) -> None:
    rows = many(3000)
    old = {row.id: math.log(len(row.response)) for row in rows}

    def correlation(new: dict[str, str]) -> float:
        return float(np.corrcoef([old[id] for id in new], [math.log(len(text)) for text in new.values()])[0, 1])

    assert correlation(swap(rows, rate)) > 0.97
    assert abs(correlation(swap(rows, rate, bucket=False))) < 5 / math.sqrt(3000 * rate)
    # Of those that are swapped, hardly any is in length between what one had and what one is given.
    new = swap(rows, rate)
    lengths = np.sort([len(text) for text in new.values()])
    own = dict(rows)
    pairs = np.sort([(len(own[id]), len(text)) for id, text in new.items()], axis=1)
    between = np.searchsorted(lengths, pairs[:, 1], "left") - np.searchsorted(lengths, pairs[:, 0], "right")
    assert between.max() <= 32
    # Nor does a response go to the next longer one as a rule, which would give the noise away too.
    longer = sum(len(text) > len(own[id]) for id, text in new.items())
    shorter = sum(len(text) < len(own[id]) for id, text in new.items())
    assert near(longer, longer + shorter, 0.5)


@pytest.mark.slow
@each_bucketing
def test_two_operations_draw_independently(bucket: bool) -> None:
    first, second = Noise(ops=[ResponseSwap(), ResponseSwap()]).salts()
    chosen = [set(swap(many(5000), 0.4, bucket=bucket, salt=salt)) for salt in (first, second)]
    assert near(len(chosen[0] & chosen[1]), 5000, 0.16)


@each_bucketing
def test_another_seed_draws_independently(bucket: bool) -> None:
    chosen = [
        set(swap(many(5000), 0.4, bucket=bucket, salt=Noise(seed=seed, ops=[ResponseSwap()]).salts()[0]))
        for seed in (0, 1)
    ]
    assert near(len(chosen[0] & chosen[1]), 5000, 0.16)


# --- single tokens --------------------------------------------------------------------------------------------------


def spelt(token: int) -> str:
    """Some spelling: words, numbers and marks, with and without a blank before them."""
    return ("▁" if token % 2 else "") + ("abcdefg"[: token % 7 + 1], str(token), "...!"[: token % 4 + 1])[token % 3]


def vocabulary_of(counts: Sequence[int]) -> Vocabulary:
    """A vocabulary of the tokens from 0 on."""
    return Vocabulary(np.arange(len(counts)), np.array(counts), tuple(map(spelt, range(len(counts)))))


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    ids = draw(st.lists(st.integers(0, 500), min_size=2, max_size=12, unique=True))
    counts = draw(st.lists(st.integers(0, 9), min_size=len(ids), max_size=len(ids)))
    counts[:2] = (max(count, 1) for count in counts[:2])
    return Vocabulary(np.array(ids), np.array(counts), tuple(map(spelt, ids)))


labels_of = st.lists(st.integers(0, 30) | st.integers(0, 500), max_size=40).map(lambda ids: np.array(ids, np.int64))


def replace(
    labels: Ids, vocabulary: Vocabulary, rate: float, *, source: str = "uniform", salt: str = "0/TokenReplace/0",
    id: str = "id",
) -> Ids:  # fmt: skip
    op = TokenReplace(rate=rate, source=source)  # type: ignore[arg-type]
    return op.corrupt_tokens(salt, id, labels, vocabulary)


@pytest.mark.slow
@each_source
@quick
@given(vocabulary=vocabularies(), labels=labels_of, salt=salts)
def test_at_rate_1_every_token_becomes_another_one_that_may_be_drawn(
    source: str, vocabulary: Vocabulary, labels: Ids, salt: str
) -> None:
    before = labels.copy()
    wrong = replace(labels, vocabulary, 1.0, source=source, salt=salt)
    assert wrong.shape == labels.shape and not (wrong == labels).any()
    drawable = vocabulary.ids[vocabulary.counts > 0] if source == "unigram" else vocabulary.ids
    assert set(wrong.tolist()) <= set(drawable.tolist())
    assert (labels == before).all()


@pytest.mark.slow
@each_source
@quick
@given(vocabulary=vocabularies(), labels=labels_of, salt=salts, data=st.data())
def test_the_clean_token_is_never_drawn_even_if_it_is_nearly_all_there_is(
    source: str, vocabulary: Vocabulary, labels: Ids, salt: str, data: st.DataObject
) -> None:
    common = data.draw(st.integers(0, len(vocabulary.ids) - 1))
    counts = vocabulary.counts.copy()
    counts[common] = 10**12
    everywhere = np.full(max(len(labels), 1), vocabulary.ids[common])
    wrong = replace(everywhere, Vocabulary(vocabulary.ids, counts, vocabulary.tokens), 1.0, source=source, salt=salt)
    assert not (wrong == everywhere).any()


@pytest.mark.slow
@each_source
@quick
@given(vocabulary=vocabularies(), labels=labels_of, pair=st.tuples(rates, rates).map(sorted), salt=salts)
def test_what_is_replaced_at_a_low_rate_is_replaced_by_the_same_at_a_higher_one(
    source: str, vocabulary: Vocabulary, labels: Ids, pair: list[float], salt: str
) -> None:
    low, high = (replace(labels, vocabulary, rate, source=source, salt=salt) for rate in pair)
    assert (low[low != labels] == high[low != labels]).all()
    assert (high[high == labels] == low[high == labels]).all()


@each_source
def test_what_is_replaced_at_0_3_is_replaced_by_the_same_at_0_5(source: str) -> None:
    labels = np.arange(20_000) % 97
    vocabulary = vocabulary_of(range(1, 98))
    low, high = (replace(labels, vocabulary, rate, source=source) for rate in (0.3, 0.5))
    hit = low != labels
    assert (low[hit] == high[hit]).all()
    assert near(int(hit.sum()), 20_000, 0.3) and near(int((high != labels).sum()), 20_000, 0.5)


@pytest.mark.slow
@each_source
@quick
@given(vocabulary=vocabularies(), labels=labels_of, rate=rates, cut=st.integers(0, 40))
def test_tokens_do_not_depend_on_what_follows_them(
    source: str, vocabulary: Vocabulary, labels: Ids, rate: float, cut: int
) -> None:
    whole = replace(labels, vocabulary, rate, source=source)
    assert (replace(labels[:cut], vocabulary, rate, source=source) == whole[:cut]).all()


@pytest.mark.slow
@each_source
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2, 0.5, 0.9, 1.0])
def test_the_share_of_replaced_tokens_is_the_rate(source: str, rate: float) -> None:
    vocabulary = vocabulary_of([i % 3 for i in range(50)])
    labels = np.arange(100) % 60
    hits = sum(
        int((replace(labels, vocabulary, rate, source=source, id=f"id-{i}") != labels).sum()) for i in range(300)
    )
    assert near(hits, 30_000, rate)


def shares(counts: Sequence[int], label: int, source: str) -> Counter[int]:
    return Counter(replace(np.full(40_000, label), vocabulary_of(counts), 1.0, source=source).tolist())


@pytest.mark.parametrize("label", [0, 3, 7, 99])
def test_uniform_draws_every_other_token_alike(label: int) -> None:
    found = shares([1] * 8, label, "uniform")
    others = set(range(8)) - {label}
    assert set(found) == others
    assert all(near(found[token], 40_000, 1 / len(others)) for token in others)


@pytest.mark.parametrize("label", [0, 2, 4, 99])
def test_unigram_draws_the_others_as_often_as_they_occur(label: int) -> None:
    counts = [50, 0, 30, 15, 4, 0, 1]
    found = shares(counts, label, "unigram")
    rest = sum(count for token, count in enumerate(counts) if token != label)
    for token, count in enumerate(counts):
        assert near(found[token], 40_000, 0 if token == label else count / rest)


def test_positions_examples_operations_and_seeds_draw_independently() -> None:
    labels = np.zeros(20_000, np.int64)
    words = Vocabulary(np.arange(100), np.ones(100, np.int64))
    repeats = Noise(ops=[TokenReplace(), TokenReplace()]).salts()
    (other_seed,) = Noise(seed=1, ops=[TokenReplace()]).salts()
    first = replace(labels, words, 0.4, salt=repeats[0])
    for other in (
        np.roll(first, 1),
        replace(labels, words, 0.4, salt=repeats[0], id="id2"),
        replace(labels, words, 0.4, salt=repeats[1]),
        replace(labels, words, 0.4, salt=other_seed),
    ):
        both = (first != 0) & (other != 0)
        assert near(int(both.sum()), 20_000, 0.16)
        assert near(int((first[both] == other[both]).sum()), int(both.sum()), 1 / 99)


def test_salts_depend_on_the_operations_of_the_same_kind_alone() -> None:
    lone = Noise(seed=3, ops=[TokenReplace(rate=0.1)]).salts()
    mixed = Noise(seed=3, ops=[ResponseSwap(), TokenReplace(rate=0.9, source="unigram"), ResponseSwap()]).salts()
    assert mixed[1] == lone[0] and len(set(mixed)) == 3
    assert not set(mixed) & set(Noise(seed=4, ops=[ResponseSwap(), TokenReplace(), ResponseSwap()]).salts())


# --- what is recorded -----------------------------------------------------------------------------------------------


def conversation_of(id: str, *contents: str) -> Example:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return Example(id, id, id, messages=messages)


def tokens_of(n: int, length: int = 12, prompt: int = 4, vocabulary: int = 20) -> list[Prepared]:
    drawn = np.random.default_rng(0).integers(vocabulary, size=(n, length))
    labels = np.where(np.arange(length) < prompt, -100, drawn)
    return [Prepared(f"id-{i}", drawn[i], labels[i], np.zeros(length, np.int64)) for i in range(n)]


def coded(examples: Sequence[Example], noise: Noise) -> tuple[list[Example], list[int]]:
    """The examples with one code each: all of the response is of one operation, or clean."""
    noisy, marks, _ = corrupt_responses(examples, noise)
    for example, found in zip(noisy, marks, strict=True):
        codes, text = {mark.code for mark in found}, example.response or ""
        assert len(codes) <= 1 and {(m.start, m.end) for m in found} <= {(0, len(text)), (len(text), len(text))}
    return noisy, [found[0].code if found else 0 for found in marks]


WORDS = vocabulary_of(range(1, 21))


@pytest.mark.slow
@each_source
@quick
@given(rate=rates, seed=st.integers(0, 9))
def test_labels_alone_are_corrupted_and_the_context_stays_clean(source: Any, rate: float, seed: int) -> None:
    clean = tokens_of(15)
    noisy = corrupt_tokens(clean, Noise(seed=seed, ops=[TokenReplace(rate=rate, source=source)]), WORDS)
    for before, after in zip(clean, noisy, strict=True):
        assert (after.input_ids == before.input_ids).all() and after.id == before.id
        assert ((after.labels == -100) == (before.labels == -100)).all()
        assert (after.noise_code == (after.labels != before.labels)).all()


@pytest.mark.slow
@each_source
@quick
@given(rate=rates, seed=st.integers(0, 9))
def test_text_is_corrupted_together_with_its_labels(source: Any, rate: float, seed: int) -> None:
    clean = tokens_of(15)
    on_text = Noise(seed=seed, ops=[TokenReplace(rate=rate, source=source, target="text")])
    on_labels = Noise(seed=seed, ops=[TokenReplace(rate=rate, source=source)])
    for before, after, labels in zip(
        clean, corrupt_tokens(clean, on_text, WORDS), corrupt_tokens(clean, on_labels, WORDS), strict=True
    ):
        supervised = before.labels != -100
        assert (after.labels == labels.labels).all() and (after.noise_code == labels.noise_code).all()
        assert (after.input_ids[supervised] == after.labels[supervised]).all()
        assert (after.input_ids[~supervised] == before.input_ids[~supervised]).all()


def test_the_clean_examples_are_left_as_they_were() -> None:
    clean = tokens_of(5)
    corrupt_tokens(clean, Noise(ops=[TokenReplace(rate=1.0, target="text")]), WORDS)
    for before, after in zip(tokens_of(5), clean, strict=True):
        assert (before.input_ids == after.input_ids).all() and (before.labels == after.labels).all()
        assert not after.noise_code.any()


@pytest.mark.parametrize("target", ["labels", "text"])
@settings(quick, max_examples=30)
@given(first=rates, second=rates, vocabulary=st.integers(2, 20), seed=st.integers(0, 99))
def test_after_several_operations_a_code_marks_exactly_the_labels_that_are_wrong(
    target: Any, first: float, second: float, vocabulary: int, seed: int
) -> None:
    words = Vocabulary(np.arange(vocabulary), np.ones(vocabulary, np.int64))
    clean = tokens_of(10, vocabulary=vocabulary)
    ops = [TokenReplace(rate=rate, target=target) for rate in (first, second)]
    for before, after in zip(clean, corrupt_tokens(clean, Noise(seed=seed, ops=[*ops]), words), strict=True):
        assert ((after.noise_code > 0) == (after.labels != before.labels)).all()


def test_of_two_tokens_replaced_twice_none_is_wrong_and_none_is_marked() -> None:
    words = Vocabulary(np.arange(2), np.ones(2, np.int64))
    clean = tokens_of(3, vocabulary=2)
    noisy = corrupt_tokens(clean, Noise(ops=[TokenReplace(rate=1.0), TokenReplace(rate=1.0)]), words)
    for before, after in zip(clean, noisy, strict=True):
        assert (after.labels == before.labels).all()
        assert not after.noise_code.any()


def test_the_code_is_the_place_of_the_last_operation_that_changed_the_label() -> None:
    clean = tokens_of(200)
    ops: list[NoiseOp] = [ResponseSwap(), TokenReplace(rate=0.4), TokenReplace(rate=0.2)]
    codes = np.stack([p.noise_code for p in corrupt_tokens(clean, Noise(ops=ops), WORDS)])[:, 4:]
    # A token that the third hits too is the third's; it may also be put right again, once in nineteen times.
    assert set(np.unique(codes)) == {0, 2, 3}
    assert near(int((codes == 2).sum()), codes.size, 0.4 * 0.8)
    assert near(int((codes == 3).sum()), codes.size, 0.2)


@each_bucketing
@quick
@given(rate=rates, seed=st.integers(0, 9))
def test_the_last_response_of_the_swapped_is_replaced_and_nothing_else(bucket: bool, rate: float, seed: int) -> None:
    examples = [conversation_of(f"id-{i}", "q", f"first {i}", "q", "last " + "x" * i) for i in range(20)]
    noisy, codes = coded(examples, Noise(seed=seed, ops=[ResponseSwap(rate=rate, bucket_by_length=bucket)]))
    for before, after, code in zip(examples, noisy, codes, strict=True):
        assert before.messages is not None and after.messages is not None
        assert after.messages[:-1] == before.messages[:-1]
        assert (after.id, after.digest, after.where) == (before.id, before.digest, before.where)
        assert code == (after.response != before.response)


def test_what_has_no_response_is_not_swapped() -> None:
    others = [
        conversation_of("a", "q"),
        Example("b", "b", "b", text="a tale"),
        Example("c", "c", "c", tokens=([1, 2], [1, 2])),
    ]
    examples = [*others, conversation_of("d", "q", "one"), conversation_of("e", "q", "two")]
    noisy, codes = coded(examples, Noise(ops=[ResponseSwap(rate=1.0)]))
    assert noisy[:3] == others and codes == [0, 0, 0, 1, 1]
    assert [e.response for e in noisy[3:]] == ["two", "one"]


def test_a_response_that_comes_back_is_not_marked() -> None:
    examples = [conversation_of("a", "q", "one"), conversation_of("b", "q", "two")]
    noisy, codes = coded(examples, Noise(ops=[ResponseSwap(rate=1.0), ResponseSwap(rate=1.0)]))
    assert noisy == examples and codes == [0, 0]


def test_after_several_swaps_a_code_marks_exactly_the_wrong_responses() -> None:
    examples = [conversation_of(f"id-{i}", "q", f"answer {i % 7}") for i in range(300)]
    noisy, codes = coded(examples, Noise(ops=[ResponseSwap(rate=0.5), ResponseSwap(rate=0.5)]))
    assert [code > 0 for code in codes] == [n.response != e.response for n, e in zip(noisy, examples, strict=True)]
    assert set(codes) == {0, 1, 2}


# --- trusted examples -----------------------------------------------------------------------------------------------


def test_trusted_examples_are_the_share_asked_for_and_nested() -> None:
    ids = [f"id-{i}" for i in range(5000)]
    trusted = {share: {id for id in ids if Noise(trusted_fraction=share).trusts(id)} for share in (0, 0.1, 0.4, 1)}
    assert not trusted[0] and trusted[0.1] < trusted[0.4] < trusted[1] == set(ids)
    assert all(near(len(chosen), 5000, share) for share, chosen in trusted.items())
    other = {id for id in ids if Noise(seed=1, trusted_fraction=0.4).trusts(id)}
    assert near(len(other & trusted[0.4]), 5000, 0.16)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_no_operation_touches_a_trusted_example(share: float) -> None:
    noise = Noise(trusted_fraction=share, ops=[ResponseSwap(rate=1.0), TokenReplace(rate=1.0)])
    examples = [conversation_of(f"id-{i}", "q", f"answer {i}") for i in range(200)]
    noisy, codes = coded(examples, noise)
    trusted = {e.id for e in examples if noise.trusts(e.id)}
    assert near(len(trusted), 200, share)
    assert {e.id for e, code in zip(examples, codes, strict=True) if code == 0} == trusted
    # Nor is its response given to anybody: it would be one of two that are right.
    given_away = {n.response for n in noisy if n.id not in trusted}
    assert given_away == {e.response for e in examples if e.id not in trusted}
    clean = tokens_of(200)
    for before, after in zip(clean, corrupt_tokens(clean, noise, WORDS), strict=True):
        assert after.noise_code[4:].all() == (before.id not in trusted)
        assert (after.labels == before.labels).all() == (before.id in trusted)


def test_trust_is_independent_of_what_would_be_corrupted() -> None:
    noise = Noise(trusted_fraction=0.5, ops=[ResponseSwap(rate=0.5)])
    examples = [conversation_of(f"id-{i}", "q", f"answer {i}") for i in range(4000)]
    _, codes = coded(examples, noise)
    assert near(sum(code > 0 for code in codes), 4000, 0.25)


# --- splits ---------------------------------------------------------------------------------------------------------


def labels_of_splits(path: Path, noise: Noise) -> dict[str, dict[str, tuple[list[int], list[int], list[int]]]]:
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}, {chr(97 + i % 26)}."} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(str(path), validation_fraction=0.4, batch_size=200, noise=noise)
    data.setup("fit")
    found = {}
    held_out = data.val_dataloader()
    if isinstance(held_out, list):  # clean rows, and corrupted ones beside them
        held_out = held_out[int("validation" in noise.splits)]
    for split, loader in {"train": data.train_dataloader(), "validation": held_out}.items():
        (batch,) = loader
        fields = (batch["input_ids"].tolist(), batch["labels"].tolist(), batch["noise_code"].tolist())
        found[split] = dict(zip(batch["example_id"], zip(*fields, strict=True), strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("op", [ResponseSwap(rate=0.5), TokenReplace(rate=0.5, target="text")], ids=repr)
@pytest.mark.parametrize("splits", [["train"], ["validation"], ["train", "validation"], []], ids=str)
def test_the_named_splits_are_corrupted_and_the_others_are_untouched(
    tmp_path: Path, splits: list[Any], op: NoiseOp
) -> None:
    clean = labels_of_splits(tmp_path / "rows.jsonl", Noise())
    noisy = labels_of_splits(tmp_path / "rows.jsonl", Noise(splits=splits, ops=[op]))
    for split in ("train", "validation"):
        assert len(clean[split]) > 20 and set(clean[split]) == set(noisy[split])
        assert (clean[split] != noisy[split]) == (split in splits)
        assert any(any(codes) for _, _, codes in noisy[split].values()) == (split in splits)


def test_training_is_corrupted_and_validation_is_not_unless_told_otherwise(tmp_path: Path) -> None:
    op = TokenReplace(rate=0.5)
    assert labels_of_splits(tmp_path / "rows.jsonl", Noise(ops=[op])) == labels_of_splits(
        tmp_path / "rows.jsonl", Noise(splits=["train"], ops=[op])
    )


def test_the_built_tokenizer_is_that_of_the_clean_text(tmp_path: Path) -> None:
    # Were it trained on corrupted text, the clean tokens of two noise levels could not be compared.
    clean = labels_of_splits(tmp_path / "rows.jsonl", Noise())
    noisy = labels_of_splits(tmp_path / "rows.jsonl", Noise(ops=[ResponseSwap(rate=1.0), TokenReplace(rate=0.9)]))
    assert clean["validation"] == noisy["validation"]


# --- what is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], object], list[str]]] = {
    "rate above 1": (lambda: TokenReplace(rate=1.01), ["TokenReplace", "rate 1.01", "[0, 1]"]),
    "rate below 0": (lambda: ResponseSwap(rate=-0.1), ["ResponseSwap", "rate -0.1", "[0, 1]"]),
    "rate in percent": (lambda: ResponseSwap(rate=30), ["ResponseSwap", "rate 30", "[0, 1]"]),
    "rate that is no number": (lambda: TokenReplace(rate=math.nan), ["TokenReplace", "nan"]),
    "infinite rate": (lambda: TokenReplace(rate=math.inf), ["TokenReplace", "inf"]),
    "unknown source": (lambda: TokenReplace(source="bigram"), ["TokenReplace", "uniform", "unigram"]),  # type: ignore[arg-type]
    "unknown target": (lambda: TokenReplace(target="inputs"), ["TokenReplace", "labels", "text"]),  # type: ignore[arg-type]
    "trusted above 1": (lambda: Noise(trusted_fraction=1.5), ["trusted_fraction 1.5", "[0, 1]"]),
    "trusted below 0": (lambda: Noise(trusted_fraction=-0.5), ["trusted_fraction -0.5", "[0, 1]"]),
    "trusted that is no number": (lambda: Noise(trusted_fraction=math.nan), ["trusted_fraction nan"]),
    "more operations than codes": (lambda: Noise(ops=[TokenReplace()] * 128), ["127"]),
    "unknown split": (lambda: Noise(splits=["trian"]), ["trian", "train", "validation"]),  # type: ignore[list-item]
    "a split without noise of its own": (lambda: Noise(splits=["test"]), ["test", "validation"]),  # type: ignore[list-item]
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD.keys())
def test_values_that_mean_nothing_are_a_value_error_of_one_line(make: Callable[[], object], says: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "--data.noise" in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize("rate", [0, 0.0, 1, 1.0, 0.5])
def test_shares_up_to_the_bounds_are_accepted(rate: float) -> None:
    assert TokenReplace(rate=rate).rate == ResponseSwap(rate=rate).rate == Noise(trusted_fraction=rate).trusted_fraction


@pytest.mark.parametrize(
    ("source", "vocabulary"),
    [
        ("uniform", Vocabulary(np.array([], np.int64), np.array([], np.int64))),
        ("uniform", Vocabulary(np.array([3]), np.array([9]))),
        ("unigram", Vocabulary(np.array([3, 4, 5]), np.array([9, 0, 0]))),
    ],
)
def test_a_vocabulary_with_nothing_to_draw_is_an_error_of_one_line(source: Any, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="fewer than two tokens") as caught:
        replace(np.array([3, 3]), vocabulary, 0.5, source=source)
    assert len(str(caught.value).splitlines()) == 1


def test_operations_are_values() -> None:
    assert TokenReplace(rate=0.2) == TokenReplace(rate=0.2) != TokenReplace(rate=0.3)
    assert Noise(ops=[ResponseSwap()]) == Noise(ops=[ResponseSwap()])
    with pytest.raises(AttributeError):
        TokenReplace().rate = 0.3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Noise().seed = 3  # type: ignore[misc]


# --- an operation of one's own --------------------------------------------------------------------------------------


def test_the_operations_are_known_by_name() -> None:
    known = known_noise()
    assert known["ResponseSwap"] is ResponseSwap and known["TokenReplace"] is TokenReplace
    assert not {"NoiseOp", "ResponseNoise", "TokenNoise"} & set(known)
    assert list(known) == sorted(known)


def test_an_operation_of_ones_own_is_found_applied_and_recorded() -> None:
    @dataclass(frozen=True)
    class Shout(ResponseNoise):
        rate: float = 0.5

        def edits(
            self, salt: str, ids: Sequence[str], responses: Sequence[str], prompts: Sequence[str]
        ) -> dict[int, list[Edit]]:
            assert set(prompts) == {"q"}
            chosen = self.select(salt, ids, range(len(ids)))
            return {i: [Edit(0, len(responses[i]), responses[i].upper())] for i in chosen}

    @dataclass(frozen=True)
    class NextToken(TokenNoise):
        rate: float = 1.0
        target = "labels"

        def corrupt_tokens(
            self, salt: str, example_id: str, labels: Ids, vocabulary: Vocabulary, skipped: int = 0
        ) -> Ids:
            return labels + 1

    assert known_noise()["Shout"] is Shout and known_noise()["NextToken"] is NextToken
    noise = Noise(ops=[TokenReplace(rate=0.0), Shout(), NextToken()])
    examples = [conversation_of(f"id-{i}", "q", "answer") for i in range(2000)]
    noisy, codes = coded(examples, noise)
    assert [e.response for e in noisy] == ["ANSWER" if code else "answer" for code in codes]
    assert set(codes) == {0, 2} and near(sum(code > 0 for code in codes), 2000, 0.5)
    for before, after in zip(tokens_of(3), corrupt_tokens(tokens_of(3), noise, WORDS), strict=True):
        assert (after.labels[4:] == before.labels[4:] + 1).all() and (after.noise_code[4:] == 3).all()
    with pytest.raises(ValueError, match="Shout: rate 2 is outside"):
        Shout(rate=2)


@pytest.mark.parametrize("bucket", [True, False])
def test_swaps_of_short_answer_classes_still_give_wrong_labels(bucket: bool) -> None:
    # Answers of one class have one length: buckets by length alone would trade yes for yes.
    answers = [("yes", "no", "maybe")[i * i % 7 % 3] for i in range(600)]
    ids = [f"q{i}" for i in range(600)]
    edits = ResponseSwap(0.4, bucket_by_length=bucket).edits("s", ids, answers, [""] * 600)
    swapped = {i: made[0].text for i, made in edits.items()}
    selected = [i for i in range(600) if hashing.uniform("s", ids[i]) < 0.4]
    assert set(swapped) <= set(selected) and len(swapped) > 0.5 * len(selected)
    assert all(swapped[i] != answers[i] for i in swapped)
    # What was taken away was given to somebody else.
    assert sorted(swapped.get(i, answers[i]) for i in selected) == sorted(answers[i] for i in selected)


def test_response_noise_without_responses_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    data = InstructionDataModule(str(path), validation_fraction=0.0, noise=Noise(ops=[ResponseSwap(0.5)]))
    with pytest.warns(UserWarning, match=r"ResponseSwap does nothing.*--data\.noise\.ops"):
        data.setup("fit")
    assert data.reports["train"].noisy == 0
