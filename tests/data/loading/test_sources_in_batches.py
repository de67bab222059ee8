"""The source of an example is with it in every batch, whatever became of it on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from worlds import write_rows

from deft_lightning import InstructionDataModule
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.noise import Noise, ResponseSwap, TokenReplace

NAMES = ("a", "b", "c")
NOISE = Noise(ops=[ResponseSwap(rate=0.5), TokenReplace(rate=0.2)], splits=["train", "validation"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("rows")
    return [
        write_rows(
            root / f"{name}.jsonl", ({"id": f"{name}{i}", "question": "?", "answer": name * (i + 1)} for i in range(20))
        )
        for name in NAMES
    ]


def batches(data: InstructionDataModule) -> Iterator[dict[str, Any]]:
    data.prepare_data()
    data.setup("fit")
    yield from data.train_dataloader()
    loaders: Any = data.val_dataloader()
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        yield from loader


@pytest.mark.parametrize(
    "options",
    [
        {}, {"noise": NOISE}, {"max_length": 14}, {"max_length": 14, "keep": "end", "noise": NOISE},
        {"packing": True, "max_length": 64}, {"max_tokens_per_batch": 120}, {"group_by_length": True}, {"num_proc": 2},
        {"packing": True, "max_length": 40, "noise": NOISE, "num_workers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_example_comes_from_the_source_that_its_id_says(sources: list[str], options: dict[str, Any]) -> None:
    given = {"tokenizer_size": 0, "batch_size": 4, "validation_fraction": 0.3, "cache": False, **options}
    seen = set()
    for batch in batches(InstructionDataModule(sources, **given)):
        assert tuple(batch["source_names"]) == NAMES
        assert [NAMES[place] for place in batch["source"].tolist()] == [id[0] for id in batch["example_id"]]
        seen |= set(batch["source"].tolist())
    assert seen == {0, 1, 2}


def test_rows_in_one_line_keep_their_sources(sources: list[str]) -> None:
    data = InstructionDataModule(sources, tokenizer_size=0, packing=True, max_length=64, cache=False)
    data.prepare_data()
    data.setup("fit")
    rows = [data.splits["train"][at] for at in range(3)]
    batch = TrainCollator(0, packed=True, flatten=True, sources=NAMES)(rows)
    assert batch["input_ids"].shape[0] == 1 and len(batch["example_id"]) > 3
    assert [NAMES[place] for place in batch["source"].tolist()] == [id[0] for id in batch["example_id"]]


def test_repeats_of_a_weight_stay_with_their_source(sources: list[str]) -> None:
    a, b, c = sources
    weights = {a: 0, c: 2, b: 0.5}
    given: dict[str, Any] = {"tokenizer_size": 0, "validation_fraction": 0.0, "cache": False}
    found = list(batches(InstructionDataModule(weights, **given)))
    pairs = [
        (place, id[0])
        for batch in found
        for place, id in zip(batch["source"].tolist(), batch["example_id"], strict=True)
    ]
    assert tuple(found[0]["source_names"]) == ("c", "b") and set(pairs) == {(0, "c"), (1, "b")}
    assert pairs.count((0, "c")) == 40 and 0 < pairs.count((1, "b")) < 20
