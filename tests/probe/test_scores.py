"""Scores of rows: against sums written out, and on rows that share what the model does not expect."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deft_lightning.metrics import exact_auroc
from deft_lightning.probe.join import joined
from deft_lightning.probe.knowledge import ENOUGH, knowledge_text, new_numbers
from deft_lightning.probe.scores import (
    LEAST,
    LOUDEST,
    SHARED,
    TAIL,
    Tokens,
    last_numbers,
    rarest,
    rarity,
    score_rows,
    shares,
    usual,
)
from deft_lightning.probe.truth import auroc_interval, truth_record, truth_text

FORMAT, WORDS = 0, 20  # a token of every row that the model never expects; how many others there are


def tokens_of(rows: list[list[tuple[int, float]]], bare: list[float] | None = None) -> Tokens:
    """Rows of ``(target, log p)`` with a model that is sure of something everywhere."""
    flat = [pair for row in rows for pair in row]
    log_prob = np.array([value for _, value in flat])
    return Tokens(
        np.array([len(row) for row in rows]), np.array([target for target, _ in flat]), log_prob > math.log(0.5),
        log_prob, np.full(len(flat), 0.9), np.full(len(flat), np.nan) if bare is None else np.array(bare),
        np.zeros(len(flat), bool), np.zeros(len(flat), bool),
    )  # fmt: skip


def file_of(generator: np.random.Generator, count: int = 120) -> tuple[Tokens, np.ndarray]:
    """Rows of 10 to 200 tokens, each with two tokens of a format; in every second one a token is wrong."""
    rows, noisy = [], np.arange(count) % 2 == 1
    for wrong in noisy:
        length = int(generator.integers(10, 200))
        pairs = zip(generator.integers(1, WORDS, length), generator.exponential(0.3, length), strict=True)
        row = [(int(target), -float(surprise)) for target, surprise in pairs]
        row[0], row[-1] = (FORMAT, -12.0 - generator.random()), (FORMAT, -11.0 - generator.random())
        if wrong:
            row[length // 2] = (row[length // 2][0], -7.0)
        rows.append(row)
    return tokens_of(rows), noisy


def apart(score: np.ndarray, noisy: np.ndarray) -> float:
    return exact_auroc(score[noisy].tolist(), score[~noisy].tolist())


def test_one_wrong_token_counts_in_a_row_of_any_length_and_format_does_not() -> None:
    tokens, noisy = file_of(np.random.default_rng(0))
    scores = score_rows(tokens).scores
    assert apart(scores["audit"], noisy) > 0.99
    assert apart(scores["conflict"], noisy) < 0.7  # two tokens of a format outweigh one that is wrong
    clean = ~noisy
    assert abs(np.corrcoef(scores["odd"][clean], tokens.counts[clean])[0, 1]) < 0.3


def test_an_answer_that_its_prompt_does_not_help_belongs_elsewhere() -> None:
    generator, sizes = np.random.default_rng(0), [40] * 30
    gain = np.concatenate([generator.normal(0.0 if row < 10 else 1.0, 1.0, 40) for row in range(30)])
    rows = [[(1, -6.0)] * 40 for _ in sizes]
    swapped = np.arange(30) < 10
    score = score_rows(tokens_of(rows, (-6.0 - gain).tolist()))
    found = score.scores["elsewhere"]
    assert apart(found, swapped) == 1.0 and abs(found[swapped]).max() < 15 and (found[~swapped] < -20).all()
    assert found == pytest.approx(np.clip(-gain, -LOUDEST, LOUDEST).reshape(30, 40).sum(1))
    assert "elsewhere" not in score.largest[10:]  # tokens and answers tell nothing here
    assert apart(score.scores["audit"], swapped) > 0.9
    nobody = score_rows(tokens_of(rows, (-6.0 + abs(gain)).tolist())).scores  # a prompt that helps no answer
    assert (nobody["elsewhere"] == 0).all()
    assert (score_rows(tokens_of(rows)).scores["elsewhere"] == 0).all()  # no prompt


def test_one_wrong_number_is_no_answer_to_another_prompt() -> None:
    """Twenty nats of one token say no more for another prompt than three."""
    log_prob, bare = np.full((10, 8), -2.0), np.full((10, 8), -3.0)
    log_prob[0, 5] = -23.0
    tokens = tokens_of([[(1, float(value)) for value in row] for row in log_prob], bare.ravel().tolist())
    found = score_rows(tokens).scores["elsewhere"]
    assert found == pytest.approx([LOUDEST - 7.0] + [-8.0] * 9)


def test_a_model_that_reads_no_prompts_says_nothing_of_them() -> None:
    """Noise of sums grows with length; where the prompt helps few answers it would be all that is ranked by."""
    generator, rows = np.random.default_rng(0), [[(1, -4.0)] * 40 for _ in range(50)]
    lift = generator.normal(0.3, 1.0, (50, 40))
    found = score_rows(tokens_of(rows, (-4.0 + lift).ravel().tolist())).scores["elsewhere"]
    assert (found == 0).all()


def test_kinds_of_evidence_are_joined_by_rates_that_the_rows_show() -> None:
    generator, rows = np.random.default_rng(0), 400
    kind = generator.choice(4, rows, p=[0.7, 0.0, 0.2, 0.1])
    # Log ratios of normal densities: of three kinds, of which no row has the first.
    evidence = [3.0 * generator.normal(3.0 * (kind == own), 1.0) - 4.5 for own in (1, 2, 3)]
    found = joined(*evidence)
    # Rows of two kinds look like a third now and then: that one gets a few percent.
    assert found.rates == pytest.approx([0.7, 0.01, 0.2, 0.1], abs=0.08) and found.rates.sum() == pytest.approx(1.0)
    assert found.odds == pytest.approx(np.log(np.exp(found.parts).sum(0) / found.rates[0]))
    noisy = kind > 0
    assert apart(found.odds, noisy) > 0.96 > apart(np.sum(evidence, axis=0), noisy)
    assert (found.parts.argmax(0)[noisy] + 1 == kind[noisy]).mean() > 0.9
    assert joined(np.zeros(0)).odds.shape == (0,)
    assert np.ptp(joined(np.zeros(5), np.zeros(5)).odds) == 0.0


def test_a_few_wrong_tokens_in_a_row_outweigh_what_is_odd_about_answers_and_prompts() -> None:
    """Half of the rows have 5 % of wrong tokens; answers and prompts tell nothing, and are odd by chance."""
    generator = np.random.default_rng(1)
    rows, bare, noisy = [], list[float](), np.arange(80) % 2 == 1
    for wrong in noisy:
        length = int(generator.integers(60, 160))
        surprise = generator.exponential(0.8, length)
        if wrong:
            surprise[generator.random(length) < 0.05] += 8.0
        rows.append([(int(t), -float(v)) for t, v in zip(generator.integers(1, WORDS, length), surprise, strict=True)])
        bare += (-surprise - generator.normal(0.1, 1.0, length)).tolist()
    tokens = tokens_of(rows, bare)
    last = np.zeros(len(bare), bool)
    for end in np.cumsum(tokens.counts):
        last[end - 3 : end] = True
    scores = score_rows(tokens._replace(number=last | (tokens.target < 4), last=last)).scores
    # 0.971. Evidence of the prompt in nats costs a little here; bounded by the file it passed 0.975.
    assert apart(scores["audit"], noisy) > max(0.965, apart(scores["nll"], noisy))
    assert apart(scores["answer"], noisy) < 0.6 and apart(scores["elsewhere"], noisy) < 0.6


def test_short_answers_that_share_nothing_are_ranked_as_well_as_by_nll() -> None:
    """Letters of which none is a habit of the file: a mean over the same letter elsewhere would only add noise."""
    generator = np.random.default_rng(0)
    rows, noisy = [], generator.random(400) < 0.2
    for wrong in noisy:
        length = int(generator.integers(3, 8))
        surprise = generator.exponential(0.02, length)
        unsure = int(generator.integers(length))
        surprise[unsure] += generator.exponential(2.0) + 1.0 if wrong else generator.exponential(0.3)
        rows.append([(int(t), -float(v)) for t, v in zip(generator.integers(0, 400, length), surprise, strict=True)])
    scores = score_rows(tokens_of(rows)).scores
    assert apart(scores["audit"], noisy) >= apart(scores["nll"], noisy) > 0.9


def test_what_rows_share_is_text_that_enough_of_them_have() -> None:
    rows = [[(0, -5.0), (1 + row, -1.0)] for row in range(30)] + [[(50, -4.0), (50, -8.0)], []]
    tokens = tokens_of(rows)
    share = shares(tokens)
    assert share[0] == pytest.approx(30 / 31) and share[1] == share[-1] == pytest.approx(1 / 31) and 1 / 31 < SHARED
    habit = usual(tokens, -tokens.log_prob)
    mean = -tokens.log_prob.mean()
    assert habit[1::2] == pytest.approx(mean) and habit[-2:] == pytest.approx(mean)
    # Of others behind no token, of others anywhere, and three tokens of the file.
    of_text = (29 * 5 + 3 * mean) / 32
    assert habit[:60:2] == pytest.approx((29 * 5 + 3 * of_text) / 32)


def test_the_last_number_is_judged_among_numbers() -> None:
    """What is a common slip for a word is none for a number, most of which can be copied."""
    generator = np.random.default_rng(0)
    texts, values, noisy, counts = [], [], [], []
    for row in range(80):
        words = ["word"] * 40 + ["7"] * 40 + ["\n", "####", " ", "1", ",", "2", "3", "<end>"]
        surprise = np.concatenate([generator.exponential(2.0, 40), generator.exponential(0.2, 40), np.full(8, 0.01)])
        if row % 2:
            surprise[-2] = 5.0
        texts += words
        values += surprise.tolist()
        noisy.append(row % 2 == 1)
        counts.append(len(words))
    number, last = last_numbers(np.array(counts), texts)
    assert [texts[i] for i in np.flatnonzero(last)[:4]] == ["1", ",", "2", "3"] and last.sum() == 4 * 80
    _, target = np.unique(texts, return_inverse=True)
    flat = tokens_of([[(int(t), -v) for t, v in zip(target, values, strict=True)]])
    tokens = flat._replace(counts=np.array(counts), number=number, last=last)
    scores = score_rows(tokens).scores
    assert apart(scores["answer"], np.array(noisy)) > 0.99 and apart(scores["audit"], np.array(noisy)) > 0.95
    wrong = [part for part, is_noisy in zip(score_rows(tokens).largest, noisy, strict=True) if is_noisy]
    assert wrong.count("answer") > 35
    assert apart(scores["odd"], np.array(noisy)) < 0.8 and apart(scores["conflict"], np.array(noisy)) < 0.8


def test_a_row_without_tokens_is_none_of_the_others() -> None:
    rows = [[], [(1, -1.0), (2, -0.1)], [], [(1, -3.0)], []]
    tokens = tokens_of(rows, [-1.0, -0.1, -4.0])
    assert tokens.before.tolist() == [-1, 1, -1]
    for values in score_rows(tokens).scores.values():
        assert np.isfinite(values).all() and values[0] == values[2] == values[4]
    assert all(len(values) == 2 for values in score_rows(tokens_of([[], []])).scores.values())


def test_oddness_is_the_evidence_of_the_largest_tokens_for_their_number() -> None:
    generator = np.random.default_rng(3)
    rows = [[(1, -float(s)) for s in generator.exponential(1, n)] for n in (1, 7, 30)] + [[]]
    tokens = tokens_of(rows)
    nats = rarity(-tokens.log_prob, *TAIL)
    wanted, start = [], 0
    for count in tokens.counts[:3]:
        own = np.sort(nats[start : start + count])[::-1]
        wanted.append(max(own[k] + math.log(k + 1) - math.log(count) for k in range(count)))
        start += count
    assert rarest(tokens, nats, np.ones(len(nats), bool)).tolist() == pytest.approx([*wanted, 0.0])


def test_rarity_is_that_of_the_tokens_that_are_right() -> None:
    generator, (body, room) = np.random.default_rng(0), TAIL
    right = generator.exponential(2.0, 20000)
    values = np.concatenate([right, np.full(150, 40.0)])  # of wrong ones there may be many alike
    low, ended = -2.0 * math.log(1 - body), (room - body) / (1 - body)
    for value in (1.0, 4.0, 10.0):
        found = float(rarity(np.append(values, value), *TAIL)[-1])
        beyond = max(value - low, 0.0)  # where the tail is loud: all that is beyond counts as its end
        assert found == pytest.approx((value - beyond) / 2.0 + beyond / (2.0 * ended), rel=0.1, abs=0.05)
    by_heart = np.append(np.full(99, 1e-6), 9.0)  # what a model has learnt by heart: nine nats are not thousands
    assert rarity(by_heart, *TAIL)[-1] == pytest.approx(9.0 / LEAST - math.log(1 - body), rel=1e-3)
    assert rarity(np.zeros(5), *TAIL).tolist() == [0.0] * 5 and len(rarity(np.zeros(0), *TAIL)) == 0


@pytest.mark.parametrize("auroc", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_interval_of_an_auroc_holds_it_and_shrinks_with_the_rows(auroc: float) -> None:
    low, high = auroc_interval(auroc, 20, 30)
    assert 0 <= low <= auroc <= high <= 1 and high - low > 0.05
    closer = auroc_interval(auroc, 2000, 3000)
    assert closer[1] - closer[0] < (high - low) / 5


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, shift = np.random.default_rng(0), 1.0
    truth = 0.5 * (1 + math.erf(shift / 2))  # of normal scores one standard deviation apart
    covered = 0
    for _ in range(400):
        found = exact_auroc(generator.normal(shift, 1, 40).tolist(), generator.normal(0, 1, 60).tolist())
        low, high = auroc_interval(found, 40, 60)
        covered += low <= truth <= high
    assert 0.86 <= covered / 400 <= 0.96


def test_a_ranking_worse_than_chance_is_a_plain_sentence() -> None:
    noisy = [True] * 30 + [False] * 30 + [None]
    upside_down = {"audit": np.arange(61.0), "length": -np.arange(61.0)}
    record = truth_record("bad", upside_down, noisy)
    assert record["auroc"] == 0.0 and record["scores"]["length"]["auroc"] == 1.0
    assert (record["known"], record["noisy"], record["base"]) == (60, 30, 0.5)
    assert record["first"] == {"20": 0.0, "30": 0.0}
    said = " ".join(truth_text(record))
    assert "Warning: audit ranks these rows worse than chance" in said and "0% of the first 20" in said
    right = truth_record("bad", {"audit": -np.arange(61.0)}, noisy)
    assert right["first"]["20"] == 1.0 and "Warning" not in " ".join(truth_text(right))
    unclear = truth_record("bad", {"audit": -(np.arange(61.0) % 7)}, noisy)
    assert "cannot be separated from chance" in " ".join(truth_text(unclear))
    assert truth_record(None, upside_down, [False] * 61)["scores"] == {}


def test_only_numbers_that_are_new_tell_what_a_model_knows() -> None:
    texts = ["1", "2", " plus", " 3", " is", " ", "1", "5", ",", " 12", " and", " 7"]
    learnt = [False] * 4 + [True] * 8
    # 15 is half expected, 12 is in the prompt, 7 is expected.
    expected = [False] * 6 + [True, False, True, False, True, True]
    assert new_numbers(texts, learnt, expected) == [False, True]


@pytest.mark.parametrize(("count", "share", "said"), [(ENOUGH, 0.33, True), (ENOUGH, 0.66, False), (3, 0.1, None)])
def test_a_model_that_does_not_expect_new_numbers_knows_too_little(count: int, share: float, said: bool | None) -> None:
    lines = knowledge_text({"format": [], "format_share": 0.0, "numbers": count, "numbers_expected": share})
    assert len(lines) == (said is not None)
    assert all(("it knows too little to judge rows by their numbers" in line) == said for line in lines)
