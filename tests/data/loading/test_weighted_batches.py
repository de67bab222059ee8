"""Weights of labels from prepared examples to batches: each stays with its label, and without them nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import write
from torch import Tensor

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data import Noise, TokenReplace
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.data.loading.factory import LoaderFactory
from deft_lightning.data.loading.loader import EvenLoader
from deft_lightning.data.loading.packing import pack
from deft_lightning.data.noise.apply import corrupt_example
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.data.prepared.spool import TOKENS, Tokens, Writer, row_of_prepared
from deft_lightning.data.preview import sample
from deft_lightning.data.protocols import Run

quick = settings(deadline=None, max_examples=100, derandomize=True)
WORDS = Vocabulary(np.arange(300), np.ones(300, dtype=np.int64))


def weight_for(labels: Any) -> Any:
    """What a label counts here, so that a weight tells which label it belongs to; half of them count 1."""
    labels = np.asarray(labels)
    return np.where(labels == -100, 0, np.where(labels % 2, 1, labels / 64)).astype(np.float32)


def example(id: str, tokens: Sequence[int], context: int = 1, weighted: bool = True) -> Prepared:
    ids = np.array(tokens, dtype=np.int64)
    labels = np.where(np.arange(len(ids)) < context, -100, ids)
    return Prepared(id, ids, labels, np.zeros_like(ids), weight=weight_for(labels) if weighted else None)


@st.composite
def examples(draw: st.DrawFn) -> list[Prepared]:
    """Some with weights, some without."""
    rows = draw(st.lists(st.lists(st.integers(1, 300), min_size=2, max_size=20), min_size=1, max_size=8))
    return [example(f"e{i}", row, draw(st.integers(1, len(row))), draw(st.booleans())) for i, row in enumerate(rows)]


def stored(path: Path, rows: Iterable[Prepared]) -> Tokens:
    with Writer(path, TOKENS) as out:
        for one in rows:
            out.add(row_of_prepared(one, len(one.input_ids), one.input_ids[:0]))
    return Tokens(path)


def many(count: int, weighted: bool = True) -> list[Prepared]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 260, rng.integers(3, 24)) for _ in range(count)]
    return [example(f"e{i}", row, 1 + i % 2, weighted and i % 3 > 0) for i, row in enumerate(rows)]


def weight_by_id(rows: Iterable[Prepared]) -> dict[str, list[float]]:
    """What the supervised labels of each example count, written down from the examples."""
    return {
        one.id: [1.0 if one.weight is None else float(w) for w, label in zip(
            one.labels if one.weight is None else one.weight, one.labels, strict=True) if label != -100]
        for one in rows
    }  # fmt: skip


def found_by_id(batches: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """The same, cut out of batches along their segments; whatever is not supervised counts 0."""
    found: dict[str, list[float]] = {}
    for batch in batches:
        weight, learnt = batch["token_weight"], batch["labels"] != -100
        assert weight.dtype == torch.float32 and weight.shape == batch["labels"].shape
        assert not weight[~learnt].any() and (weight[learnt] > 0).all()
        for place, id in enumerate(batch["example_id"]):
            assert id not in found
            found[id] = weight[(batch["segment"] == place) & learnt].tolist()
    return found


# --- on disk --------------------------------------------------------------------------------------------------------


@given(rows=examples())
@quick
def test_weights_come_back_from_disk_to_the_bit(rows: list[Prepared], tmp_path_factory: Any) -> None:
    kept = stored(tmp_path_factory.mktemp("kept") / "rows.arrow", rows)
    for at, one in enumerate(rows):
        back = kept[at]
        assert back.labels.tolist() == one.labels.tolist() and back.input_ids.tolist() == one.input_ids.tolist()
        count_one = one.weight is None or (one.weight[one.labels != -100] == 1).all()
        assert (back.weight is None) == count_one
        if back.weight is not None and one.weight is not None:
            assert back.weight.dtype == np.float32 and back.weight.tolist() == one.weight.tolist()
    assert kept.weighted == any(kept[at].weight is not None for at in range(len(rows)))


def test_without_weights_the_file_has_an_empty_column_more_and_is_the_same_otherwise(tmp_path: Path) -> None:
    rows = many(30, weighted=False)
    ones = [replace(one, weight=(one.labels != -100).astype(np.float32)) for one in rows]
    plain, weighted = stored(tmp_path / "plain.arrow", rows), stored(tmp_path / "ones.arrow", ones)
    assert not plain.weighted and not weighted.weighted
    assert (tmp_path / "plain.arrow").read_bytes() == (tmp_path / "ones.arrow").read_bytes()
    (batch,) = plain.batches
    assert batch.column("weight").to_pylist() == [[]] * 30
    assert batch.column("input_ids").to_pylist() == [one.input_ids.tolist() for one in rows]
    assert batch.schema.names[:-1] == ["id", "input_ids", "labels", "noise_code", "length", "skipped", "source", "cut"]


def test_one_weight_among_many_makes_weighted_data(tmp_path: Path) -> None:
    rows = many(2500, weighted=False)
    rows[2400] = replace(rows[2400], weight=np.where(rows[2400].labels == -100, 0, 0.5).astype(np.float32))
    kept = stored(tmp_path / "rows.arrow", rows)
    assert kept.weighted and [at for at in range(2500) if kept[at].weight is not None] == [2400]


@pytest.mark.parametrize("wrong", [0.0, -0.5, np.nan, np.inf])
def test_a_weight_that_should_have_become_a_masked_label_is_not_written(wrong: float) -> None:
    one = example("e", [4, 6, 8])
    bad = replace(one, weight=np.array([0, 0.5, wrong], dtype=np.float32))
    with pytest.raises(ValueError, match="e: weights must be finite in float32"):
        row_of_prepared(bad, 3, one.input_ids[:0])
    masked = replace(bad, labels=np.array([-100, 6, -100]))
    row = row_of_prepared(masked, 3, one.input_ids[:0])
    assert row[-1].tolist() == [0, 0.5, 0], "what is not learnt counts 0, whatever was written there"


def test_a_file_of_before_is_not_read_as_one_of_now(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), pa.schema(list(TOKENS)[:-1])):
        pass
    with pytest.raises(ValueError, match="other columns"):
        Tokens(tmp_path / "old.arrow")


# --- what an example goes through -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["start", "end"])
@given(row=st.lists(st.integers(1, 300), min_size=1, max_size=30), length=st.integers(1, 30))
@quick
def test_truncation_keeps_each_weight_at_its_label(row: list[int], length: int, keep: str) -> None:
    short = example("e", row).truncate(length, keep)
    assert short.weight is not None
    assert short.weight.tolist() == weight_for(short.labels).tolist()
    assert example("e", row, weighted=False).truncate(length, keep).weight is None


@given(row=st.lists(st.integers(1, 299), min_size=2, max_size=30), target=st.sampled_from(["labels", "text"]))
@quick
def test_a_corrupted_token_counts_what_the_clean_one_did(row: list[int], target: Any) -> None:
    noise = Noise(ops=[TokenReplace(rate=0.7, target=target)])
    one = example("e", row)
    wrong = corrupt_example(one, noise, WORDS)
    assert wrong.weight is not None and one.weight is not None
    assert wrong.weight.tolist() == one.weight.tolist() == weight_for(wrong.clean).tolist()


class Bytes:
    """A tokenizer of letters, as far as a preview asks."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + id % 26) for id in ids)


def test_a_preview_says_what_counts_more_or_less_than_one() -> None:
    one = replace(example("e", [1, 2, 3, 4]), weight=np.array([0, 0.25, 1, 2.5], dtype=np.float32))
    shown = sample(Bytes(), one, [], 4, [], "start")
    assert [(piece.text, piece.note) for piece in shown.pieces] == [
        ("b", ""), ("c", "weight 0.25"), ("d", ""), ("e", "weight 2.5"),
    ]  # fmt: skip


# --- batches --------------------------------------------------------------------------------------------------------


@given(rows=examples(), flatten=st.booleans())
@quick
def test_collation_lays_weights_out_as_it_does_labels(rows: list[Prepared], flatten: bool) -> None:
    wanted = weight_by_id(rows)
    assert found_by_id([TrainCollator(0, weighted=True)(rows)]) == wanted
    packed = [[rows[at] for at in row] for row in pack([len(one.input_ids) for one in rows], 40)]
    batch = TrainCollator(0, packed=True, flatten=flatten, weighted=True)(packed)
    assert found_by_id([batch]) == wanted
    bare = TrainCollator(0, packed=True, flatten=flatten)(packed)
    assert set(batch) - set(bare) == {"token_weight"}


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True, "max_length": 48},
    "grouped": {"group_by_length": True},
    "bounded": {"max_tokens_per_batch": 60},
    "bounded and packed": {"packing": True, "max_length": 24, "max_tokens_per_batch": 48},
    "workers": {"num_workers": 2},
}


def factory(folder: Path, run: Run | None = None, **options: Any) -> LoaderFactory:
    source = write(folder / "rows.jsonl", [{"question": "q", "answer": "a"}])
    options = {"max_length": 64, "batch_size": 4, "eval_batch_size": 3, **options}
    return LoaderFactory(InstructionDataModule(source, **options).settings, run or Run(), 0)


def dataset(folder: Path, rows: Iterable[Prepared], loaders: LoaderFactory, noise: Noise | None = None) -> Any:
    kept = PreparedDataset(stored(folder / "rows.arrow", rows), None, noise or Noise(), WORDS)
    if loaders.settings.packing:
        kept.rows = pack(kept.examples.lengths().tolist(), loaders.settings.max_length)
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_way_to_batch_brings_every_weight_to_its_label(layout: str, tmp_path: Path) -> None:
    rows, loaders = many(41), factory(tmp_path, **LAYOUTS[layout])
    wanted = weight_by_id(rows)
    kept = dataset(tmp_path, rows, loaders)
    assert found_by_id(loaders.train(kept)) == found_by_id(loaders.evaluate(kept)) == wanted
    assert found_by_id(batch for _, batch in loaders.some(kept, range(41))) == wanted
    noisy = dataset(tmp_path, rows, loaders, Noise(ops=[TokenReplace(rate=0.5)]))
    assert found_by_id(loaders.train(noisy)) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_data_without_weights_are_those_of_before(layout: str, tmp_path: Path) -> None:
    """The same tensors as with weights that are then left out, and no field for them."""
    loaders = factory(tmp_path, **LAYOUTS[layout])
    plain = list(loaders.train(dataset(tmp_path, many(41, weighted=False), loaders)))
    weighted = list(loaders.train(dataset(tmp_path, many(41), loaders)))
    assert len(plain) == len(weighted) > 1
    for one, other in zip(plain, weighted, strict=True):
        assert "token_weight" not in one
        del other["token_weight"]
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_every_batch_of_weighted_data_has_weights_on_every_rank(tmp_path: Path) -> None:
    """Ranks add the weights up together: one without any would wait for ever."""
    rows = many(24, weighted=False)
    rows[5] = replace(rows[5], weight=np.where(rows[5].labels == -100, 0, 2).astype(np.float32))
    for rank in range(2):
        loaders = factory(tmp_path, Run(rank=rank, world=2), batch_size=2)
        batches = list(loaders.train(dataset(tmp_path, rows, loaders)))
        assert all("token_weight" in batch for batch in batches)


def test_a_filler_counts_nothing() -> None:
    collate = TrainCollator(0, weighted=True)
    *real, filler = EvenLoader(many(4), batches=3, batch_size=2, collate_fn=collate)
    assert len(real) == 2 and all(batch["token_weight"].any() for batch in real)
    assert filler["filler"] and not filler["token_weight"].any() and (filler["labels"] == -100).all()


# --- resume ---------------------------------------------------------------------------------------------------------


def fit(folder: Path, loaders: LoaderFactory, steps: int, resume: str | None = None) -> tuple[dict[str, Tensor], str]:
    torch.manual_seed(0)
    module = SFTModule(
        architecture={
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 300,
        },
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), scheduler=None,
    )  # fmt: skip
    checkpoint = Checkpoint()
    trainer = Trainer(
        max_steps=steps, default_root_dir=str(folder), logger=False, callbacks=[checkpoint], monitors=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", accumulate_grad_batches=2,
    )  # fmt: skip
    folder.mkdir()
    trainer.fit(module, loaders.train(dataset(folder, many(41), loaders)), ckpt_path=resume)
    assert trainer.global_step == steps
    return module.model.state_dict(), str(checkpoint.last_model_path)


@pytest.mark.parametrize("layout", ["plain", "packed", "bounded"])
def test_a_run_of_weighted_data_goes_on_to_the_bit(layout: str, tmp_path: Path) -> None:
    loaders = factory(tmp_path, **LAYOUTS[layout])
    whole, _ = fit(tmp_path / "whole", loaders, 9)
    _, last = fit(tmp_path / "cut", loaders, 3)
    resumed, _ = fit(tmp_path / "resumed", loaders, 9, last)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0
