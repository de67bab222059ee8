"""How large the batches of a run get, before any is made."""

from __future__ import annotations

from typing import NamedTuple

from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.data.protocols import Run
from deft_lightning.data.settings import DataSettings


class BatchShape(NamedTuple):
    """Shape of a micro-batch on one device.

    Attributes:
        rows: B, at least 1.
        length: T, tokens of a row, padding included.
        supervised: N, tokens of the B * T that are learnt.
        packed: Whether several examples share a row.
    """

    rows: int
    length: int
    supervised: int
    packed: bool = False


def largest_batch(rows: PreparedDataset, settings: DataSettings, run: Run, share: float) -> BatchShape | None:
    """Return the shape of the largest micro-batch that a run will train on; None where there are no rows.

    A batch is padded to its longest row, so the batch of the longest row is the largest; bounded by tokens, it is the
    one whose rows times longest row is most.

    Args:
        rows: To train on.
        settings: Of the data.
        run: Ranks, and how the model reads its batches.
        share: Supervised share of the tokens of the training rows, in [0, 1].
    """
    lengths, limit = rows.lengths(), settings.max_tokens_per_batch
    if not len(lengths):
        return None
    count, longest = settings.batch_size, int(lengths.max())
    if limit is not None and settings.packing:
        count = limit // settings.max_length
    elif limit is not None:
        batches = bounded_batches(lengths.tolist(), limit, settings.seed)
        shapes = [(len(batch), int(lengths[batch].max())) for batch in batches]
        count, longest = max(shapes, key=lambda shape: shape[0] * shape[1])
    count = max(1, min(count, len(lengths) // run.world))
    if settings.packing and (run.attention or "").startswith("flash"):  # one row of all of them
        count, longest = 1, count * longest
    supervised = max(1, min(round(share * count * longest), count * (longest - 1)))
    return BatchShape(count, longest, supervised, settings.packing)
