"""A model to generate with, and its tokenizer; what uses them says in ``SPREAD`` how sure the model is."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import tiny_llama


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny_llama(request.module.SPREAD, seed=3, hidden_size=32, intermediate_size=48, num_attention_heads=4)


@pytest.fixture(scope="module")
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return tiny[1]


@pytest.fixture(scope="module")
def model(tiny: tuple[Any, Any]) -> Any:
    return tiny[0].eval()
