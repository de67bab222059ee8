"""Small cases in several chunks: a head of a small vocabulary would take all of their tokens at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deft_lightning.ops import plan


@pytest.fixture(scope="module", autouse=True)
def _chunks_of_512() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SMALL_CPU", 0)
        yield
