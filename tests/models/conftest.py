"""What the tests of models share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB
from torch import Tensor
from worlds import byte_tokenizer


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two right-padded rows with scattered labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :2] = labels[0, 6] = labels[1, 6:] = -100
    ids[1, 6:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.tensor([[9], [6]]) > torch.arange(9)).long()}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()
