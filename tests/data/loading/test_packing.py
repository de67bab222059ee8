"""Packed rows, token-bounded and length-grouped batches: nothing is lost, nothing is seen that should not be."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.__main__ import main
from deft_lightning.data import Noise, ResponseSwap, TokenReplace
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.packing import best_fit_decreasing, bounded_batches, exact_fit, grouped, pack
from deft_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"
quick = settings(deadline=None, max_examples=150, derandomize=True)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths that all fit a capacity, the capacity itself among them now and then."""
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=50)), capacity


def once(parts: Iterable[Iterable[int]], size: int) -> bool:
    return sorted(itertools.chain.from_iterable(parts)) == list(range(size))


def decreasing(lengths: list[int], capacity: int, *, best: bool) -> int:
    """Rows of a packing found by looking at every open row: the first that has room, or the fullest that has."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity - length)
            continue
        rooms[min(fitting, key=lambda i: rooms[i]) if best else fitting[0]] -= length
    return len(rooms)


def fewest(lengths: list[int], capacity: int) -> int:
    """The least number of rows there can be, by trying everything."""
    best = len(lengths)

    def place(at: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(lengths):
            best = len(rooms)
            return
        for i in range(len(rooms)):
            if rooms[i] >= lengths[at]:
                place(at + 1, [*rooms[:i], rooms[i] - lengths[at], *rooms[i + 1 :]])
        place(at + 1, [*rooms, capacity - lengths[at]])

    place(0, [])
    return best


Packer = Callable[[list[int], int], list[list[int]]]


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packer", [best_fit_decreasing, exact_fit, pack])
@quick
@given(packings())
def test_every_example_is_in_one_row_and_no_row_is_over_its_capacity(
    packer: Packer, case: tuple[list[int], int]
) -> None:
    lengths, capacity = case
    rows = packer(lengths, capacity)
    assert once(rows, len(lengths)) and all(rows)
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == packer(np.array(lengths, dtype=np.int32), capacity)  # type: ignore[arg-type]


@quick
@given(packings())
def test_packing_takes_the_fewer_rows_of_both_ways(case: tuple[list[int], int]) -> None:
    assert len(pack(*case)) == min(len(best_fit_decreasing(*case)), len(exact_fit(*case)))


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([7, 5, 3, 2, 1], [[7, 3], [5, 2, 1]]),
        ([8, 5, 3, 1], [[8, 1], [5, 3]]),  # of five there is one: 5 + 5 is no pair
        ([5, 5, 6, 4], [[4, 6], [5, 5]]),
        ([10, 1], [[10], [1]]),
        ([9, 8, 2], [[8, 2], [9]]),
        ([4, 4, 4, 2, 2, 2, 2], [[4, 4, 2], [4, 2, 2, 2]]),
    ],
)
def test_what_fills_a_row_exactly_is_put_together(lengths: list[int], wanted: list[list[int]]) -> None:
    found = sorted(sorted(lengths[i] for i in row) for row in exact_fit(lengths, 10))
    assert found == sorted(map(sorted, wanted))


def test_lengths_of_a_real_corpus_fill_their_rows_where_best_fit_does_not() -> None:
    lengths = [min(1024, round(x)) for x in np.random.default_rng(0).lognormal(5.0, 0.35, 7000).tolist()]
    full = {packer: sum(lengths) / (1024 * len(packer(lengths, 1024))) for packer in (best_fit_decreasing, pack)}
    assert full[best_fit_decreasing] < full[pack] and full[pack] >= 0.995


@quick
@given(packings())
def test_as_many_rows_as_the_search_through_all_open_rows(case: tuple[list[int], int]) -> None:
    assert len(best_fit_decreasing(*case)) == decreasing(*case, best=True)


@quick
@given(st.integers(2, 20).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=8), st.just(c))))
def test_at_most_two_ninths_more_rows_than_the_fewest_possible(case: tuple[list[int], int]) -> None:
    # Johnson's bound: 11/9 of the optimum and 6/9.
    best = fewest(*case)
    assert best <= len(best_fit_decreasing(*case)) <= 11 / 9 * best + 6 / 9


def test_over_many_inputs_fewer_rows_than_first_fit() -> None:
    # For a single input either can win by a row: no theorem puts best fit before first fit.
    rng, best, first = random.Random(0), 0, 0
    for _ in range(1500):
        capacity = rng.randint(4, 60)
        lengths = [rng.randint(1, max(1, round(capacity * rng.choice([0.3, 0.5, 1.0])))) for _ in range(30)]
        found, naive = len(best_fit_decreasing(lengths, capacity)), decreasing(lengths, capacity, best=False)
        assert found <= naive + 1
        best, first = best + found, first + naive
    assert best <= first


def test_examples_as_long_as_a_row_are_rows_of_their_own() -> None:
    assert best_fit_decreasing([7, 7, 7], 7) == [[0], [1], [2]]
    assert sorted(map(sorted, best_fit_decreasing([7, 3, 7, 4], 7))) == [[0], [1, 3], [2]]


def test_nothing_packs_into_nothing() -> None:
    assert best_fit_decreasing([], 8) == [] and bounded_batches([], 8, 0) == []


@pytest.mark.parametrize("lengths", [[9], [1, 9, 2], [8, 8, 9]])
def test_an_example_longer_than_a_row_is_an_error_that_names_it(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"example {lengths.index(9)} has 9 tokens"):
        best_fit_decreasing(lengths, 8)


# --- batches bounded by tokens, and neighbours of like length --------------------------------------------------------

many_lengths = st.lists(st.integers(1, 80), max_size=60)


def padding(batches: Iterable[Iterable[int]], lengths: list[int]) -> int:
    sizes = [[lengths[i] for i in batch] for batch in batches]
    return sum(len(row) * max(row) - sum(row) for row in sizes)


@quick
@given(many_lengths, st.integers(1, 120), st.integers(0, 3))
def test_a_batch_padded_to_its_longest_is_within_the_bound(lengths: list[int], bound: int, seed: int) -> None:
    batches = bounded_batches(lengths, bound, seed)
    assert once(batches, len(lengths)) and all(batches)
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= bound or len(batch) == 1
    assert batches == bounded_batches(lengths, bound, seed)
    alone = {i for batch in batches if len(batch) == 1 for i in batch}
    assert {i for i, length in enumerate(lengths) if length > bound} <= alone


@quick
@given(many_lengths.filter(bool), st.integers(1, 120))
def test_no_batch_could_have_taken_the_longest_of_the_next(lengths: list[int], bound: int) -> None:
    batches = bounded_batches(lengths, bound, 0)
    for batch, after in itertools.pairwise(batches):
        assert (len(batch) + 1) * max(lengths[i] for i in (*batch, *after)) > bound


def drawn(size: int) -> list[int]:
    """Lengths like those of questions with worked answers."""
    rng = random.Random(0)
    return [min(1024, max(20, round(rng.lognormvariate(5.6, 0.45)))) for _ in range(size)]


def test_bounded_batches_are_padded_far_less_than_random_ones() -> None:
    lengths = drawn(2000)
    batches = bounded_batches(lengths, 8192, 0)
    order = list(range(2000))
    random.Random(1).shuffle(order)
    sizes = itertools.accumulate((len(batch) for batch in batches), initial=0)
    shuffled = [order[a:b] for a, b in itertools.pairwise(sizes)]
    assert padding(batches, lengths) < 0.1 * padding(shuffled, lengths)


def test_the_seed_decides_which_examples_of_one_length_meet() -> None:
    lengths = [5] * 40
    found = [bounded_batches(lengths, 20, seed) for seed in (0, 1)]
    assert found[0] != found[1] and [len(b) for b in found[0]] == [len(b) for b in found[1]] == [4] * 10


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3))
def test_grouping_rearranges_and_loses_nothing(lengths: list[int], group: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    given = order.copy()
    found = grouped(order, lengths, group, [seed, 1])
    assert sorted(found.tolist()) == list(range(len(lengths)))
    assert (order == given).all()  # its argument is left alone
    assert (found == grouped(order, lengths, group, [seed, 1])).all()


def test_an_empty_order_stays_empty() -> None:
    assert len(grouped(np.arange(0), [], 4, [0])) == 0


def test_grouped_neighbours_are_of_like_length_and_the_seed_counts() -> None:
    lengths = drawn(4000)
    order = np.random.default_rng(0).permutation(4000)
    found = grouped(order, lengths, 16, [0, 0])

    def apart(order: np.ndarray) -> float:
        return float(np.abs(np.diff(np.array(lengths)[order])).mean())

    assert apart(found) < 0.25 * apart(order)
    assert (grouped(order, lengths, 16, [0, 1]) != found).any()
    # Long ones are not all at one end: the first tenth is like the whole.
    means = [np.array(lengths)[part].mean() for part in np.array_split(found, 10)]
    assert max(means) < 1.35 * min(means)


# --- collation -------------------------------------------------------------------------------------------------------


def prepared(id: str, tokens: list[int], *, noisy: Iterable[int] = (), context: int = 1) -> Prepared:
    """Labels are the tokens from ``context`` on; those at ``noisy`` are replaced by their successor."""
    ids = np.array(tokens, dtype=np.int64)
    labels = np.where(np.arange(len(ids)) < context, -100, ids)
    clean, codes = labels.copy(), np.zeros_like(ids)
    for at in noisy:
        labels[at], codes[at] = labels[at] + 1, 3
    return Prepared(id, ids, labels, codes, clean)


ROWS = [
    [prepared("a", [11, 12, 13]), prepared("b", [21, 22], noisy=[1])],
    [prepared("c", [31])],
    [prepared("d", [41, 42, 43, 44], context=2), prepared("e", [51]), prepared("f", [61, 62], noisy=[1])],
]


def test_packed_rows_are_laid_out_as_written_down_here() -> None:
    batch = TrainCollator(pad_id=0, packed=True)(ROWS)
    assert set(batch) == {
        "input_ids", "labels", "clean_labels", "noise_code", "segment", "example_id", "is_noisy", "num_tokens",
        "position_ids", "supervised_at",
    }  # fmt: skip
    expected = {
        "input_ids": [[11, 12, 13, 21, 22, 0, 0], [31, 0, 0, 0, 0, 0, 0], [41, 42, 43, 44, 51, 61, 62]],
        "labels": [[-100, 12, 13, -100, 23, -100, -100], [-100] * 7, [-100, -100, 43, 44, -100, -100, 63]],
        "clean_labels": [[-100, 12, 13, -100, 22, -100, -100], [-100] * 7, [-100, -100, 43, 44, -100, -100, 62]],
        "noise_code": [[0, 0, 0, 0, 3, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 3]],
        "segment": [[0, 0, 0, 1, 1, -1, -1], [2, -1, -1, -1, -1, -1, -1], [3, 3, 3, 3, 4, 5, 5]],
        # The padding starts again too: it is an example of its own, which nothing before it can see.
        "supervised_at": [1, 2, 4, 16, 17, 20],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0, 1]],
    }
    assert {name: batch[name].tolist() for name in expected} == expected
    assert batch["example_id"] == list("abcdef") and batch["num_tokens"] == 13
    assert batch["is_noisy"].tolist() == [False, True, False, False, False, True]
    assert batch["position_ids"].dtype == batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_flattened_rows_are_one_row_without_padding() -> None:
    batch = TrainCollator(pad_id=0, packed=True, flatten=True)(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 41, 42, 43, 44, 51, 61, 62]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 0, 1]]
    assert batch["segment"].tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5]]
    assert batch["example_id"] == list("abcdef") and batch["num_tokens"] == 13


# --- what a loader gives ---------------------------------------------------------------------------------------------


def talks(count: int) -> list[dict[str, Any]]:
    """Conversations of several turns and lengths."""
    rng = random.Random(5)
    rows = []
    for i in range(count):
        turns = []
        for turn in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": f"{i}.{turn} " + "word " * rng.randint(1, 6)})
            turns.append({"role": "assistant", "content": f"ok {i} " + "so " * rng.randint(0, 9)})
        rows.append({"id": f"t{i}", "messages": turns})
    return rows


def ready(folder: Path, rows: Iterable[object], **options: Any) -> InstructionDataModule:
    options = {"validation_fraction": 0.2, "batch_size": 3, "max_length": 96, "tokenizer_size": 300, **options}
    data = InstructionDataModule(write(folder / "rows.jsonl", rows), **options)
    data.setup("fit")
    return data


FIELDS = ("input_ids", "labels", "clean_labels", "noise_code")


def parts(batches: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Examples by id, cut out of their rows along the segments; an id that comes twice is an error."""
    found: dict[str, dict[str, Any]] = {}
    for batch in batches:
        for place, id in enumerate(batch["example_id"]):
            assert id not in found
            here = batch["segment"] == place
            assert len(set(here.nonzero()[:, 0].tolist())) == 1  # an example is in one row
            found[id] = {name: batch[name][here].tolist() for name in FIELDS}
            found[id]["is_noisy"] = bool(batch["is_noisy"][place])
            if "position_ids" in batch:
                assert batch["position_ids"][here].tolist() == list(range(int(here.sum())))
    return found


NOISE = Noise(
    splits=["train", "validation"],
    ops=[ResponseSwap(rate=0.3), TokenReplace(rate=0.2), TokenReplace(rate=0.1, target="text")],
)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_every_example_travels_through_packing_unchanged(tmp_path: Path, supervise: Any, keep: Any) -> None:
    options: dict[str, Any] = {"noise": NOISE, "supervise": supervise, "keep": keep, "max_length": 48}
    plain = ready(tmp_path, talks(60), **options)
    packed = ready(tmp_path, talks(60), packing=True, **options)
    assert plain.reports["train"].truncated > 3
    pairs = [(plain.train_dataloader(), packed.train_dataloader())]
    pairs += zip(plain.val_dataloader(), packed.val_dataloader(), strict=True)
    assert len(pairs) == 3
    for one, other in pairs:
        expected, batches = parts(one), list(other)
        found = parts(batches)
        assert found == expected and len(found) > 5
        for batch in batches:
            starts = batch["position_ids"] == 0
            # Nothing before an example in its row may be asked for its first token.
            assert (batch["labels"][starts] == -100).all() and (batch["noise_code"][starts] == 0).all()
            assert (batch["labels"][batch["segment"] < 0] == -100).all()
            assert batch["input_ids"].shape[1] <= 48
    noisy = [example for example in parts(packed.train_dataloader()).values() if example["is_noisy"]]
    assert len(noisy) > 10 and len({code for example in noisy for code in example["noise_code"]}) == 4


def test_fewer_rows_hold_the_same_tokens(tmp_path: Path) -> None:
    plain, packed = ready(tmp_path, talks(60)), ready(tmp_path, talks(60), packing=True)
    counts = []
    for data in (plain, packed):
        batches = list(data.train_dataloader())
        counts.append((sum(b["num_tokens"] for b in batches), sum(len(b["input_ids"]) for b in batches)))
    assert counts[0][0] == counts[1][0] and counts[1][1] < 0.8 * counts[0][1]


# --- the models ------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
# Windows shorter than the examples, so that they are tried together with the borders.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
}
KINDS = [(kind, how) for kind in MODELS for how in ("sdpa", "eager") if (kind, how) != ("gemma2", "sdpa")]


def built(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind], **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed_rows(vocabulary: int) -> list[list[Prepared]]:
    """Two rows of unequal length; an example of one token, and one as long as nothing else."""
    rng = np.random.default_rng(0)
    lengths = [[7, 1, 12, 5], [9, 8]]
    return [
        [prepared(f"{i}.{j}", rng.integers(3, vocabulary, n).tolist()) for j, n in enumerate(row)]
        for i, row in enumerate(lengths)
    ]


@torch.no_grad()
def differences(model: Any, vocabulary: int) -> dict[str, float]:
    """How far the logits of packed examples are from those of each alone: as packed, and in two careless ways."""
    rows = packed_rows(vocabulary)
    batch = TrainCollator(pad_id=0, packed=True)(rows)
    ids, positions = batch["input_ids"], batch["position_ids"]
    ways = {
        "packed": {"position_ids": positions},
        "mask of ones": {"position_ids": positions, "attention_mask": torch.ones_like(ids)},
        "no positions": {},
    }
    examples = [example for row in rows for example in row]
    found = {}
    for name, options in ways.items():
        logits = model(input_ids=ids, use_cache=False, **options).logits
        worst = 0.0
        for place, example in enumerate(examples):
            alone = model(input_ids=torch.from_numpy(example.input_ids)[None], use_cache=False).logits[0]
            worst = max(worst, float((logits[batch["segment"] == place] - alone).abs().max()))
        found[name] = worst
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_packed_examples_have_the_logits_they_have_alone(kind: str, attention: str) -> None:
    found = differences(built(kind, attention), 97)
    assert found["packed"] < 1e-4
    assert found["mask of ones"] > 0.5 and found["no positions"] > 0.5


def stories() -> Path:
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_have_the_logits_they_have_alone_in_a_pretrained_model(attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories(), attn_implementation=attention).eval()
    found = differences(model, 512)
    assert found["packed"] < 1e-4
    assert found["mask of ones"] > 0.5 and found["no positions"] > 0.5


def saved(folder: Path, kind: str = "llama") -> str:
    """A tiny pretrained model of a byte tokenizer."""
    tokenizer = build_tokenizer(["a"], 0)
    tokenizer.save_pretrained(folder / "model")
    # What is learnt is further from the borders than the short windows reach.
    wide = {"sliding_window": 64} if "sliding_window" in MODELS[kind] else {}
    model = built(kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **wide)
    model.save_pretrained(folder / "model")
    return str(folder / "model")


def gradient(module: SFTModule, batches: Iterable[dict[str, Any]]) -> tuple[float, int, dict[str, Tensor]]:
    """Loss, tokens and gradient, summed over batches."""
    module.zero_grad()
    total, tokens = 0.0, 0
    for batch in batches:
        loss, stats, _ = module.loss_and_stats(batch)
        loss.backward()
        total, tokens = total + float(loss.detach()), tokens + len(stats.log_prob)
    return total, tokens, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_the_gradient_of_packed_rows_is_the_sum_of_their_examples(tmp_path: Path, head: Any, kind: str) -> None:
    folder = saved(tmp_path, kind)
    noise = replace(NOISE, splits=["train"])
    options: dict[str, Any] = {"tokenizer": folder, "noise": noise, "validation_fraction": 0.0}
    alone = ready(tmp_path, talks(14), batch_size=1, **options)
    packed = ready(tmp_path, talks(14), packing=True, batch_size=2, **options)
    module = SFTModule(pretrained=folder, head=head, dtype="float32")
    module.configure_model()
    module.double().eval()
    loss, tokens, expected = gradient(module, alone.train_dataloader())
    found_loss, found_tokens, found = gradient(module, packed.train_dataloader())
    assert tokens == found_tokens > 100 and found_loss == pytest.approx(loss, rel=1e-7)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, grad in expected.items():  # some norms are taken in float32 whatever the weights are
        assert float((found[name] - grad).norm()) <= 1e-6 * float(grad.norm()), name
    # The same rows without their positions are another gradient: the comparison can fail.
    blind = [{k: v for k, v in batch.items() if k != "position_ids"} for batch in packed.train_dataloader()]
    wrong = gradient(module, blind)[2]
    assert any(float((wrong[name] - grad).norm()) > 0.01 * float(grad.norm()) for name, grad in expected.items())


class Deaf(LlamaForCausalLM):
    """Takes positions and does not use them."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, **options)


class Leaky(LlamaForCausalLM):
    """Uses positions, and lets packed examples see each other."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)


def in_one_line(model: Any, head: Any = "dense") -> str:
    """What training on a packed batch says."""
    module = SFTModule(architecture={"model_type": "llama"}, head=head)
    module.model, module.batch_loss = module.source.place(lambda: model, None)
    batch = TrainCollator(pad_id=0, packed=True)(packed_rows(97))
    with pytest.raises(UserError) as caught:
        module.loss_and_stats(batch)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "--data.packing" in message
    return message


@pytest.mark.parametrize("cls", [Deaf, Leaky])
def test_a_model_in_which_packed_examples_see_each_other_is_refused(cls: Any) -> None:
    torch.manual_seed(0)
    model = cls(LlamaConfig(**SIZES))
    assert cls.__name__ in in_one_line(model)
    # Not because of anything else about it: unpacked it trains.
    module = SFTModule(architecture={"model_type": "llama"}, head="dense")
    module.model, module.batch_loss = module.source.place(lambda: model, None)
    loss, *_ = module.loss_and_stats(TrainCollator(pad_id=0)([row[0] for row in packed_rows(97)]))
    assert torch.isfinite(loss)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
    in_one_line(AutoModelForCausalLM.from_config(config))


def test_a_recurrent_model_is_refused() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    in_one_line(AutoModelForCausalLM.from_config(config))


def test_a_model_that_keeps_examples_apart_is_not_refused() -> None:
    module = SFTModule(architecture={"model_type": "llama"}, head="dense")
    module.model, module.batch_loss = module.source.place(lambda: built("llama"), None)
    loss, stats, _ = module.loss_and_stats(TrainCollator(pad_id=0, packed=True)(packed_rows(97)))
    assert torch.isfinite(loss) and len(stats.log_prob) == sum(n - 1 for n in (7, 1, 12, 5, 9, 8))


# --- a run -----------------------------------------------------------------------------------------------------------


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, list[float]]:
    """Scalars of a fit through the command line, by name."""
    monkeypatch.setattr("sys.argv", [
        "deft_lightning", "fit", "--config", str(ROOT / "configs" / "from_scratch.yaml"),
        "--data.noise.ops", "[]", "--data.packing", "true", "--trainer.max_steps", "5",
        "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "5", "--trainer.num_sanity_val_steps", "0",
        "--model.architecture.hidden_size", "32", "--model.architecture.intermediate_size", "64",
        "--model.architecture.num_hidden_layers", "1", "--model.objective", "NLL", "--after_fit.test", "false",
        "--after_fit.export", "false", "--trainer.default_root_dir", str(folder), *options,
    ])  # fmt: skip
    main()
    (events,) = folder.rglob("events.*")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    return {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_a_packed_run_counts_the_tokens_it_learns_and_the_heads_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_length": 96, "batch_size": 2, "validation_fraction": 0.2, "tokenizer_size": 0}
    plain = ready(tmp_path, talks(60), **options)
    learnt = {id: sum(label != -100 for label in e["labels"]) for id, e in parts(plain.train_dataloader()).items()}
    packed = ready(tmp_path, talks(60), packing=True, **options)
    by_hand = [sum(learnt[id] for id in batch["example_id"]) for batch in packed.train_dataloader()][:5]
    flags = itertools.chain.from_iterable((f"--data.{name}", str(value)) for name, value in options.items())
    common = ["--data.source", str(tmp_path / "rows.jsonl"), *flags]
    runs = {head: run(tmp_path / head, monkeypatch, *common, "--model.head", head) for head in ("fused", "dense")}
    for scalars in runs.values():
        assert scalars["train/tokens"] == list(itertools.accumulate(by_hand)) and min(by_hand) > 20
        assert len(scalars["val/nll"]) == 1 and math.isfinite(scalars["val/nll"][0])
    for name in ("train/nll", "train/grad_norm", "val/nll", "val/token_accuracy"):
        assert runs["fused"][name] == pytest.approx(runs["dense"][name], rel=1e-4), name


# --- how full rows are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "share"), [(1024, 0.96), (2048, 0.99), (4096, 0.995)])
def test_lengths_like_those_of_worked_answers_fill_their_rows(capacity: int, share: float) -> None:
    lengths = drawn(3000)
    assert sum(lengths) / (capacity * len(best_fit_decreasing(lengths, capacity))) >= share


@pytest.mark.slow
def test_rows_of_all_of_gsm8k_with_an_ordinary_vocabulary_are_full(tmp_path: Path) -> None:
    source = SHARED / "data" / "gsm8k_train.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not there; lengths like its are packed by the test before")
    data = InstructionDataModule(
        str(source), tokenizer_size=4096, packing=True, validation_fraction=0.0, max_length=1024, num_proc=2
    )
    data.setup("fit")
    rows = data.splits["train"]
    assert len(rows.examples) == 7473
    assert rows.examples.lengths().sum() / (1024 * len(rows)) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("capacity", "share"), [(1024, 0.97), (2048, 0.98)])
def test_rows_of_gsm8k_are_full(tmp_path: Path, capacity: int, share: float) -> None:
    # With 512 entries an example has 380 tokens: two or three a row of 1024, whose rest is too short for another.
    source, tokenizer = SHARED / "data" / "gsm8k_train.jsonl", stories()
    if not source.exists():
        pytest.skip(f"{source} is not there")
    with source.open(encoding="utf-8") as file:
        (tmp_path / "some.jsonl").write_text("".join(itertools.islice(file, 3000)), encoding="utf-8")
    data = InstructionDataModule(
        str(tmp_path / "some.jsonl"),
        tokenizer=str(tokenizer),
        packing=True,
        validation_fraction=0.0,
        max_length=capacity,
    )
    data.setup("fit")
    batches = list(data.train_dataloader())
    tokens, rows = sum(b["num_tokens"] for b in batches), sum(len(b["input_ids"]) for b in batches)
    assert len({id for b in batches for id in b["example_id"]}) == 3000
    assert tokens / (rows * capacity) >= share
