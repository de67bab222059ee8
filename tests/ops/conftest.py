"""Small cases in several chunks, and a test's memory its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deft_lightning.ops import buffers, plan


@pytest.fixture(scope="module", autouse=True)
def _chunks_of_512() -> Iterator[None]:
    """A head of a small vocabulary would take all of their tokens at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SMALL_CPU", 0)
        patch.setattr(plan, "KEPT_CPU", 0)
        yield


@pytest.fixture(autouse=True)
def _no_buffer_of_another_test() -> None:
    buffers.release()
