"""The largest batch that is planned is the largest that the loader gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds import split_data, write_rows

from deft_lightning.functional import IGNORE_INDEX


def rows(path: Path) -> str:
    return write_rows(path, ({"question": "q" * (i % 7 + 1), "answer": "a" * (3 * i % 50 + 1)} for i in range(1, 40)))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 1}, {"group_by_length": True}, {"packing": True, "max_length": 128},
     {"max_tokens_per_batch": 300}, {"max_tokens_per_batch": 300, "packing": True, "max_length": 100},
     {"batch_size": 500}],
    ids=str,
)  # fmt: skip
def test_the_largest_batch_is_the_largest_of_an_epoch(tmp_path: Path, options: dict[str, Any]) -> None:
    data = split_data(rows(tmp_path / "rows.jsonl"), tokenizer_size=0, cache_dir=str(tmp_path), **options)
    assert data.largest_batch is None
    data.prepare_data()
    data.setup("fit")
    planned = data.largest_batch
    assert planned is not None
    batches = list(data.train_dataloader())
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert planned.rows * planned.length == max(sizes)
    assert planned.packed is options.get("packing", False)
    learnt = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    tokens = sum(int(batch["num_tokens"]) for batch in batches)
    assert planned.supervised == pytest.approx(planned.rows * planned.length * learnt / tokens, abs=planned.rows + 1)
