"""What a call of the head is made of: its tensors, its options, and how many tokens a chunk has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deft_lightning.functional import LossFn, TokenContext, accumulation_dtype
from deft_lightning.ops.buffers import KEPT_CPU
from deft_lightning.ops.columns import ColumnSparsity
from deft_lightning.ops.reference import ReferenceHead
from deft_lightning.ops.torch_rows import RowKernel, TorchRows, Transform

# Tokens a chunk on the CPU: enough rows to keep the products efficient, few enough that a chunk of bfloat16 logits
# over 152k entries stays at 150 MB.
CHUNK_CPU = 512
# Of a small vocabulary a chunk has more tokens, this many logits: below that the calls of a chunk cost more than its
# arithmetic.
SMALL_CPU = 1 << 18
# Of so many chunks one is made where that spares a sum of dW in float32 and the buffer of logits has room: beyond, the
# sum is a small part of the work, and memory would grow for little.
FEW_CHUNKS = 4
# On CUDA a chunk fills a budget, and has at least 1024 tokens: summing dW in float32 costs about 250 / chunk.
CHUNK_CUDA, BUDGET_CUDA = 1024, 1 << 30
NOTHING = TokenContext()


class CallShape(NamedTuple):
    """What the size of a chunk follows from.

    Attributes:
        tokens: N, supervised tokens.
        width: D, of a hidden state.
        vocabulary: V.
        dtype: Of the products.
        cpu: Whether they are made on a CPU.
        narrow_weight: Whether the weight gets a gradient in the dtype of the products.
    """

    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    cpu: bool
    narrow_weight: bool


class Inputs(NamedTuple):
    """The tensors of a head; all tokens are supervised.

    Attributes:
        hidden: Shape ``(N, D)``, in the dtype of the products.
        weight: Shape ``(V, D)``, in the dtype of the parameter.
        bias: Shape ``(V,)``.
        low: Low-rank update of the product, shape ``(N, r)``.
        up: Its other factor, shape ``(V, r)``: the product is ``hidden @ weight.T + low @ up.T + bias``.
        targets: Shape ``(N,)``.
        token_weight: Shape ``(N,)``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    up: Tensor | None
    targets: Tensor
    token_weight: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The part of a call that is not a tensor.

    Attributes:
        objective: Statistics to loss, per token; None for statistics alone.
        transform: What turns a product into logits.
        kernel: ``torch`` or ``triton``.
        context: What is known of the N tokens beside the prediction, their weights left out: those are an input.
        prediction_sum: Shape ``(V,)``; the predictions of all tokens are added to it, where it is there.
        reference: What predictions are compared with, in the dtype of the products; None for nothing.
        sparsity: How much of the gradient of the logits may be left out, by columns; None for nothing.
    """

    objective: LossFn | None
    transform: Transform
    kernel: str
    context: TokenContext = NOTHING
    prediction_sum: Tensor | None = None
    reference: ReferenceHead | None = None
    sparsity: ColumnSparsity | None = None

    def chunk(self, shape: CallShape) -> int:
        """Return the number of tokens of a chunk: all chunks of a call have nearly as many.

        One chunk in 16 bits needs no sum of ``dW`` in float32, which is ``4 V D`` bytes. Where the logits of all tokens
        take less than that beyond those of a chunk, there is one chunk: it is faster, and smaller up to ``D`` tokens
        more than a chunk has. Beyond, ``dW`` stands beside more logits than the sum would have taken. On a CPU up to
        four chunks are made one as well, where their logits fit into the buffer that is kept.
        """
        tokens, width, vocabulary, dtype, cpu, narrow_weight = shape
        # On CUDA in torch the softmax and the wide logits stand beside the product; on the CPU those of a few rows.
        wide = 0 if cpu or self.kernel == "triton" else 2 * accumulation_dtype(dtype).itemsize
        heads = 1 if self.reference is None else 2
        row = max(1, heads * vocabulary * (dtype.itemsize + wide))
        most = max(CHUNK_CPU, SMALL_CPU // max(vocabulary, 1))
        size = most if cpu else max(CHUNK_CUDA, BUDGET_CUDA // row // 128 * 128)
        if narrow_weight and dtype == torch.bfloat16:
            one = size + 4 * vocabulary * width // row
            size = tokens if tokens <= max(one, min(FEW_CHUNKS * size, KEPT_CPU // row) if cpu else 0) else size
        if tokens <= size:
            return max(1, tokens)
        return -(-tokens // -(-tokens // size))

    def rows(self, product: Tensor) -> RowKernel:
        """Make the row kernel for chunks like this one."""
        if self.kernel == "triton":
            from deft_lightning.ops.triton_rows import TritonRows

            return TritonRows(product, self.transform)
        return TorchRows(product, self.transform, len(product), self.reference is not None, keep=self.needs_batch)

    @property
    def needs_batch(self) -> bool:
        """Return whether the objective wants the statistics of all tokens before its loss."""
        return bool(getattr(self.objective, "needs_batch", False))
