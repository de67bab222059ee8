"""Metrics against numpy and against counting by hand: means per token, packed histograms, binned AUROC, exact match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deft_lightning.functional import TokenContext, TokenStats
from deft_lightning.metrics import ExampleSums, Histogram, PackedHistogram, Quantiles, TokenMeter, binned_auroc, spread

quick = settings(deadline=None, max_examples=60, derandomize=True)
UNIT = ((0.0, 1.0),)


def stats(log_prob: Sequence[float], correct: Sequence[bool]) -> TokenStats:
    values = torch.tensor(log_prob, dtype=torch.float32)
    return TokenStats(values, torch.ones_like(values), torch.zeros_like(values), torch.tensor(correct).bool())


def loss_of(*values: float) -> Tensor:
    return torch.tensor(sum(values), dtype=torch.float32)


# --- TokenMeter -----------------------------------------------------------------------------------------------------


def test_token_meter_weighs_tokens_and_not_batches() -> None:
    meter = TokenMeter()
    meter.update(loss_of(0.5, 0.25, 0.25), stats([-1.0, -2.0, -3.0], [True, False, True]))
    meter.update(loss_of(4.0), stats([-10.0], [False]))
    found = {name: value.item() for name, value in meter.compute().items()}
    assert found == pytest.approx(
        {"loss": 5 / 4, "nll": 16 / 4, "ppl": math.exp(4.0), "token_accuracy": 0.5, "weight": 1, "tokens": 4}
    )


def test_token_meter_means_the_loss_by_weight_and_says_how_good_the_model_is_without() -> None:
    meter = TokenMeter()
    meter.update(
        loss_of(0.5 * 2, 0.25 * 3), stats([-1.0, -2.0], [True, False]).within(TokenContext(torch.tensor([2.0, 3.0])))
    )
    meter.update(
        loss_of(0.1 * 7), stats([-9.0], [False]).within(TokenContext(torch.tensor([0.1], dtype=torch.float64)))
    )
    found = {name: value.item() for name, value in meter.compute().items()}
    wanted = {"loss": 2.45 / 5.1, "nll": 4.0, "ppl": math.exp(4.0), "token_accuracy": 1 / 3, "weight": 1.7, "tokens": 3}
    assert found == pytest.approx(wanted)
    meter.reset()
    meter.update(loss_of(0.0), stats([-1.0], [True]).within(TokenContext(torch.zeros(1))))
    assert (meter.compute()["loss"], meter.compute()["weight"], meter.compute()["tokens"]) == (0.0, 0.0, 1.0)


def test_token_meter_without_tokens_is_zero_and_its_perplexity_one() -> None:
    expected = {"loss": 0.0, "nll": 0.0, "ppl": 1.0, "token_accuracy": 0.0, "weight": 0.0, "tokens": 0.0}
    meter = TokenMeter()
    meter.update(loss_of(), stats([], []))
    assert {name: value.item() for name, value in meter.compute().items()} == expected


def test_an_empty_batch_does_not_change_the_means() -> None:
    meter = TokenMeter()
    meter.update(loss_of(1.0), stats([-1.0], [True]))
    before = meter.compute()
    meter.update(loss_of(), stats([], []))
    assert meter.compute() == before


def test_token_meter_starts_afresh_after_reset() -> None:
    meter = TokenMeter()
    meter.update(loss_of(100.0), stats([-50.0, -50.0], [False, False]))
    meter.compute()
    meter.reset()
    meter.update(loss_of(1.0), stats([-2.0], [True]))
    found = meter.compute()
    assert (found["loss"], found["nll"], found["token_accuracy"], found["tokens"]) == (1.0, 2.0, 1.0, 1.0)


def test_token_meter_does_not_lose_small_terms_in_a_large_sum() -> None:
    """In float32 a sum of 2^24 no longer grows when 1 is added to it."""
    meter = TokenMeter()
    meter.update(torch.tensor(2.0**24), stats([-1.0], [True]))
    for _ in range(100):
        meter.update(loss_of(1.0), stats([-1.0], [True]))
    assert meter.compute()["loss"].item() == pytest.approx((2**24 + 100) / 101, rel=1e-12)


def test_token_meter_keeps_no_graph() -> None:
    meter = TokenMeter()
    meter.update(torch.tensor(3.0, requires_grad=True) * 2, stats([-1.0], [True]))
    assert not meter.sums.requires_grad


token_batches = st.lists(
    st.lists(st.tuples(st.floats(0, 9), st.floats(-9, 0), st.booleans()), max_size=6), min_size=1, max_size=5
)


@pytest.mark.slow
@given(token_batches, st.integers(0, 5))
@quick
def test_merging_two_token_meters_equals_one_over_the_concatenation(
    batches: list[list[tuple[float, float, bool]]], cut: int
) -> None:
    whole, first, second = TokenMeter(), TokenMeter(), TokenMeter()
    for i, batch in enumerate(batches):
        losses, log_probs, correct = [list(column) for column in zip(*batch, strict=True)] or [[], [], []]
        for meter in (whole, first if i < cut else second):
            meter.update(loss_of(*losses), stats(log_probs, correct))
    first.merge_state(second)
    for name, value in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], value, rtol=1e-12, atol=1e-12, msg=name)


# --- PackedHistogram ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 7, 50])
@pytest.mark.parametrize("edges", [(0.0, 1.0), (-2.0, 3.0), (0.0, math.log(262))])
def test_packed_histogram_counts_as_numpy_does(edges: tuple[float, float], bins: int) -> None:
    values = np.random.default_rng(bins).uniform(*edges, size=1000)
    packed = PackedHistogram([edges], bins)
    for part in np.array_split(values, 7):
        packed.update(0, torch.from_numpy(part))
    (row,) = packed.rows()
    counts, bounds = np.histogram(values, bins=bins, range=edges)
    assert row.counts == counts.tolist()
    assert row.edges == pytest.approx(bounds.tolist(), abs=1e-12)
    assert row.total == 1000
    assert row.sum == pytest.approx(values.sum(), rel=1e-12)
    assert row.sum_squares == pytest.approx(np.square(values).sum(), rel=1e-12)
    assert row.mean == pytest.approx(values.mean(), rel=1e-12)


def test_quantities_of_a_packed_histogram_do_not_mix() -> None:
    packed = PackedHistogram([(0.0, 1.0), (0.0, 10.0), (-1.0, 0.0)], bins=2)
    packed.update(1, torch.tensor([1.0, 9.0, 9.0]))
    packed.update(2, torch.tensor([-0.75]))
    empty, second, third = packed.rows()
    assert (empty.total, empty.sum, empty.counts) == (0, 0, [0, 0])
    assert (second.counts, second.sum, second.edges) == ([1, 2], 19.0, [0.0, 5.0, 10.0])
    assert (third.counts, third.sum) == ([1, 0], -0.75)


def test_both_ends_of_the_range_fall_into_the_outermost_bins() -> None:
    packed = PackedHistogram(UNIT, bins=4)
    packed.update(0, torch.tensor([0.0, 1.0]))
    assert packed.rows()[0].counts == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("value", "bin"),
    [(-3.0, 0), (1.5, -1), (1e6, -1), (1e17, -1), (1e30, -1), (-1e30, 0), (math.inf, -1), (-math.inf, 0)],
)
def test_a_value_outside_the_range_counts_in_the_nearest_bin(value: float, bin: int) -> None:
    packed = PackedHistogram(UNIT, bins=50)
    packed.update(0, torch.tensor([value], dtype=torch.float64))
    counts = packed.rows()[0].counts
    assert counts[bin] == 1 and sum(counts) == 1, counts.index(1)


def test_packed_histogram_keeps_exact_sums_of_float32_values() -> None:
    values = torch.full((4096,), 0.1, dtype=torch.float32)
    packed = PackedHistogram(UNIT)
    packed.update(0, values)
    assert packed.rows()[0].sum == pytest.approx(4096 * float(values[0]), rel=1e-14)


def test_packed_histogram_without_values_has_no_mean_to_divide_by() -> None:
    packed = PackedHistogram(UNIT, bins=3)
    packed.update(0, torch.empty(0))
    (row,) = packed.rows()
    assert (row.total, row.mean, row.effective_sample_size, row.counts) == (0, 0.0, 0.0, [0, 0, 0])


def test_packed_histogram_starts_afresh_after_reset() -> None:
    packed = PackedHistogram(UNIT, bins=2)
    packed.update(0, torch.tensor([0.1, 0.2]))
    packed.rows()
    packed.reset()
    packed.update(0, torch.tensor([0.9]))
    (row,) = packed.rows()
    assert (row.counts, row.total) == ([0, 1], 1)
    assert row.sum == pytest.approx(0.9)


@pytest.mark.slow
@given(st.lists(st.lists(st.floats(-0.5, 1.5, width=32), max_size=8), min_size=1, max_size=5), st.integers(0, 5))
@quick
def test_merging_two_packed_histograms_equals_one_over_the_concatenation(parts: list[list[float]], cut: int) -> None:
    whole, first, second = (PackedHistogram([(0.0, 1.0), (-1.0, 2.0)], bins=9) for _ in range(3))
    for i, part in enumerate(parts):
        for packed in (whole, first if i < cut else second):
            packed.update(i % 2, torch.tensor(part))
    first.merge_state(second)
    for merged, single in zip(first.rows(), whole.rows(), strict=True):
        assert (merged.counts, merged.total) == (single.counts, single.total)
        assert merged.sum == pytest.approx(single.sum, abs=1e-12)
        assert merged.sum_squares == pytest.approx(single.sum_squares, abs=1e-12)


def test_effective_sample_size_is_one_for_equal_values_and_their_share_for_indicators() -> None:
    packed = PackedHistogram([(0.0, 1.0)] * 3)
    packed.update(0, torch.full((10,), 0.3))
    packed.update(1, torch.tensor([1.0] * 3 + [0.0] * 9))
    packed.update(2, torch.zeros(5))
    equal, indicator, zero = packed.rows()
    assert equal.effective_sample_size == pytest.approx(1.0)
    assert indicator.effective_sample_size == pytest.approx(3 / 12)
    assert zero.effective_sample_size == 0.0


def test_raw_histogram_spans_what_is_filled_and_keeps_every_count() -> None:
    raw = Histogram([0.0, 0.25, 0.5, 0.75, 1.0], [0, 2, 0, 1], 3, 1.5, 0.9).raw()
    assert (raw["min"], raw["max"], raw["num"], raw["sum"], raw["sum_squares"]) == (0.25, 1.0, 3, 1.5, 0.9)
    assert raw["bucket_limits"] == [0.25, 0.5, 0.75, 1.0]
    assert raw["bucket_counts"] == [0, 2, 0, 1]


# --- AUROC ----------------------------------------------------------------------------------------------------------


def exact_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Rank-sum statistic over all pairs; a tie counts one half."""
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@pytest.mark.parametrize("bins", [4, 64, 1024])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5, 3.0])
def test_binned_auroc_is_within_half_the_pairs_that_share_a_bin_of_the_exact_one(bins: int, shift: float) -> None:
    generator = np.random.default_rng(0)
    # Noisy tokens are less probable: their -log p is larger.
    noisy, clean = np.exp(generator.normal(shift, 2, 300)), np.exp(generator.normal(0, 2, 500))
    packed = PackedHistogram([(0.0, 1.0)] * 2, bins)
    for row, values in enumerate((noisy, clean)):
        packed.update(row, spread(torch.from_numpy(-values)))
    places = [np.floor(values / (1 + values) * bins) for values in (noisy, clean)]
    shared = float((places[0][:, None] == places[1][None, :]).mean())
    rows = packed.rows()
    assert abs(binned_auroc(rows[0].counts, rows[1].counts) - exact_auroc(noisy, clean)) <= shared / 2 + 1e-12
    if bins == 1024:
        assert shared < 0.01, "the bound would show nothing"


def test_binned_auroc_of_one_value_a_bin_is_exact() -> None:
    positive, negative = [0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1]
    places = np.arange(6)
    exact = exact_auroc(np.repeat(places, positive), np.repeat(places, negative))
    assert binned_auroc(positive, negative) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([0, 0, 5], [7, 0, 0], 1.0),
        ([5, 0, 0], [0, 0, 7], 0.0),
        ([3, 4], [3, 4], 0.5),
        ([9], [2], 0.5),
        ([0, 0], [1, 2], 0.5),
        ([1, 2], [0, 0], 0.5),
        ([], [], 0.5),
    ],
)
def test_binned_auroc_of_separated_equal_and_empty_classes(
    positive: list[int], negative: list[int], expected: float
) -> None:
    assert binned_auroc(positive, negative) == expected


def test_spread_is_t_over_one_plus_t_of_minus_the_logarithm() -> None:
    values = [0.0, -1e-6, -0.5, -1.0, -3.0, -1e4]
    expected = [-v / (1 - v) for v in values]
    assert spread(torch.tensor(values, dtype=torch.float64)).tolist() == pytest.approx(expected, rel=1e-12)


def test_spread_sends_certainty_to_zero_impossibility_to_one_and_keeps_ranks() -> None:
    log_prob = torch.tensor([0.5, 0.0, -1e-3, -0.1, -2.0, -80.0, -math.inf], dtype=torch.float64)
    found = spread(log_prob)
    assert found[0] == found[1] == 0.0 and found[-1] == 1.0
    assert (found[1:].diff() > 0).all()


# --- ExampleSums ----------------------------------------------------------------------------------------------------


def test_example_sums_count_add_and_square_by_group() -> None:
    metric = ExampleSums(2, 3)
    for group, values in [(0, [0.5, 1.0, 0.0]), (1, [1.0, 0.25, 0.0]), (0, [1.0, 0.0, 0.5])]:
        metric.update(group, values)
    assert metric.compute().tolist() == [
        [[2, 1.5, 1.25], [2, 1.0, 1.0], [2, 0.5, 0.25]],
        [[1, 1.0, 1.0], [1, 0.25, 0.0625], [1, 0.0, 0.0]],
    ]
    assert metric.compute().dtype == torch.float64


shares = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=2)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2), shares), max_size=12), st.integers(0, 12))
@quick
def test_merging_example_sums_equals_one_over_the_concatenation(
    examples: list[tuple[int, list[float]]], cut: int
) -> None:
    whole, first, second = ExampleSums(3, 2), ExampleSums(3, 2), ExampleSums(3, 2)
    for i, (group, values) in enumerate(examples):
        for metric in (whole, first if i < cut else second):
            metric.update(group, values)
    first.merge_state(second)
    assert torch.equal(first.compute(), whole.compute())
    counts = [sum(group == g for group, _ in examples) for g in range(3)]
    assert whole.compute()[:, 0, 0].tolist() == counts


def test_example_sums_start_afresh_after_reset() -> None:
    metric = ExampleSums(1, 1)
    metric.update(0, [1.0])
    metric.compute()
    metric.reset()
    metric.update(0, [0.5])
    assert metric.compute().tolist() == [[[1.0, 0.5, 0.25]]]


# --- Quantiles ------------------------------------------------------------------------------------------------------


def smallest(values: np.ndarray, share: Fraction) -> float:
    """The ceil(q n)-th smallest value, without rounding."""
    return float(np.sort(values)[max(0, math.ceil(share * len(values)) - 1)])


SHARES = [Fraction(1, 100), Fraction(1, 10), Fraction(1, 3), Fraction(1, 2), Fraction(9, 10), Fraction(1)]


@pytest.mark.parametrize("n", [1, 2, 9, 10, 30, 1001, 20_000])
def test_quantiles_are_values_that_occur_to_the_last_bit(n: int) -> None:
    generator = np.random.default_rng(n)
    columns = [
        generator.random(n), generator.exponential(7, n), np.exp(-generator.exponential(60, n)),
        1 - np.exp(-generator.exponential(20, n)), generator.integers(0, 3, n) / 2,
    ]  # fmt: skip
    values = np.stack(columns).astype(np.float32)
    quantiles = Quantiles([float(share) for share in SHARES])
    for part in np.array_split(values, 3, axis=1):
        quantiles.update(*torch.from_numpy(part))
    assert quantiles.compute() == [[smallest(row, share) for share in SHARES] for row in values]
    if n == 1001:
        for row, found in zip(values, quantiles.compute(), strict=True):
            assert found == np.quantile(row, [float(share) for share in SHARES], method="inverted_cdf").tolist()


@given(st.lists(st.floats(0, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40), st.integers(0, 40))
@quick
def test_quantiles_of_any_values_in_any_parts(values: list[float], cut: int) -> None:
    quantiles = Quantiles([float(share) for share in SHARES])
    for part in (values[:cut], values[cut:]):
        quantiles.update(torch.tensor(part), -torch.tensor(part))
    wanted = [smallest(np.array(values), share) for share in SHARES]
    assert quantiles.compute() == [wanted, [0.0] * len(SHARES)], "what is below zero counts as zero"


def test_quantiles_without_values_are_none_and_reset_forgets() -> None:
    quantiles = Quantiles()
    quantiles.update(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert quantiles.compute() == [[3.0, 3.0, 4.0], [1.0, 1.0, 2.0]]
    quantiles.reset()
    quantiles.update(torch.empty(0), torch.empty(0))
    assert quantiles.compute() == [[], []]


def test_what_is_not_a_number_counts_as_infinite() -> None:
    quantiles = Quantiles()
    quantiles.update(torch.tensor([math.nan, 1.0, 2.0, 3.0, -math.nan, math.inf]))
    assert quantiles.compute() == [[1.0, 3.0, math.inf]]
