"""Memory for the logits of a chunk. On a CPU one such buffer is kept for the next call.

The system hands fresh memory out page by page, as each page is first written. That took a quarter of the product that
fills the buffer, on the machine that was measured, so the buffer of the call before is written over instead.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# On CUDA a row of logits has room for a multiple of this many entries: where the vocabulary is odd, each row begins at
# an address that wide loads and the fast kernels of a product can take.
ALIGNED_CUDA = 64
# Bytes of the buffer that is kept on a CPU, at most: 512 rows of 152k entries in bfloat16 are 156 MB. It stands while
# the optimizer steps, too, which is the most that a step with few activations holds.
KEPT_CPU = 1 << 28

# At most one. A call takes it out and puts it back, so calls inside a call and in other threads have their own.
_spare: list[torch.UntypedStorage] = []


def row_buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return memory for logits, shape ``(rows, columns)``, in the dtype and on the device of ``like``.

    On CUDA its rows may lie further apart than they are long. What lies between is 0: a product in 16 bits may read
    it, as torch's does on a CPU, and not-a-number times 0 is no zero.
    """
    if not like.is_cpu:
        room = -(-columns // ALIGNED_CUDA) * ALIGNED_CUDA
        buffer = like.new_empty((rows, room))
        buffer[:, columns:].zero_()
        return buffer[:, :columns]
    wanted = rows * columns * like.dtype.itemsize
    # A tensor of inference mode could not be written in training.
    with torch.inference_mode(False):
        empty = like.new_empty(0)
        # Of a fake tensor, and in a mode that makes them, this one is fake too.
        if type(empty) is Tensor and wanted <= KEPT_CPU:
            with contextlib.suppress(IndexError):
                storage = _spare.pop()
                if storage.nbytes() >= wanted:
                    return empty.set_(storage, 0, (rows, columns), (columns, 1))
        return like.new_empty((rows, columns))


def give_back(buffer: Tensor) -> None:
    """Keep the memory of a buffer for the next call; nothing may look at it any longer.

    Memory of a device, of a fake tensor, or of more than :data:`KEPT_CPU` bytes is not kept.
    """
    if type(buffer) is Tensor and buffer.is_cpu and not _spare and buffer.untyped_storage().nbytes() <= KEPT_CPU:
        _spare.append(buffer.untyped_storage())


def release() -> None:
    """Free the buffer that is kept, if one is."""
    _spare.clear()
