"""The row kernel in Triton, for CUDA: one read of the logits for the statistics, one read and write for the gradient.

Needs the package triton (torch for CUDA brings it). ``TRITON_INTERPRET=1`` runs both kernels in Python on any device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deft_lightning.ops.columns import ColumnSums
from deft_lightning.ops.torch_rows import Transform
from deft_lightning.tokens import TokenStats, topk_entropy_of

# Five accumulators of 16 lanes a thread are 80 registers: nothing spills.
BLOCK, WARPS = 4096, 8
ROWS_SUMMED = 128  # rows whose predictions are added up at once, in float32
# Below every logit, and finite: its difference to a logit is never infinity minus infinity.
LOWEST: Any = tl.constexpr(-3.0e38)


@triton.jit
def _logits(product, scale, cap, CAPPED: tl.constexpr):  # noqa: ANN001, ANN202
    """Return logits of a product, in float32."""
    z = product.to(tl.float32) * scale
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    return z


@triton.jit(do_not_specialize=["rows"])  # it differs from batch to batch: no second compilation for a multiple of 16
def _statistics_kernel(  # noqa: ANN202
    product, stride, targets, out, arg_max, vocabulary, rows, scale, cap,  # noqa: ANN001
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute of one row: log p, collision, entropy, maximum, log of the sum, and the first arg-max.

    Every lane keeps the maximum of its own columns and, relative to it, the sums of e, e^2 and z e over all its other
    entries; the lanes are merged once, at the end. A maximum is never part of a sum, so that 1 + (sum of the others)
    loses nothing where the prediction is nearly certain.
    """
    row = tl.program_id(0).to(tl.int64)
    start = product + row * stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    arg = lanes
    tail = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        columns = first + lanes
        there = columns < vocabulary
        z = _logits(tl.load(start + columns, mask=there, other=float("-inf")), scale, cap, CAPPED)
        z = tl.where(there, z, float("-inf"))
        above = z > top
        gap = -tl.abs(z - top)  # of the smaller to the larger; exactly one exponential an entry
        e = tl.exp(gap)
        shift = tl.where(e > 0, gap, 0.0)  # an entry without mass: 0 * -inf is 0 here
        weighted = tl.where(above, (weighted + shift * (tail + 1.0)) * e, weighted + shift * e)
        square = tl.where(above, (square + 1.0) * e * e, square + e * e)
        tail = tl.where(above, (tail + 1.0) * e, tail + e)
        arg = tl.where(above, columns, arg)
        top = tl.where(above, z, top)
    most = tl.max(top, axis=0)
    winner = tl.min(tl.where(top == most, arg, vocabulary), axis=0)
    gap = top - most
    e = tl.exp(gap)
    others = tl.where(arg == winner, 0.0, 1.0)  # the largest entry itself stays out of the sums
    sum_tail = tl.sum(e * (tail + others), axis=0)
    sum_square = tl.sum(e * e * (square + others), axis=0)
    shift = tl.where(e > 0, gap, 0.0)
    sum_weighted = tl.sum(e * (weighted + shift * (tail + others)), axis=0)
    target = tl.load(targets + row)
    # A target that does not exist reads nothing, and shows as not-a-number.
    inside = (target >= 0) & (target < vocabulary)
    at = _logits(tl.load(start + target, mask=inside, other=float("nan")), scale, cap, CAPPED)
    total = 1.0 + sum_tail
    # log(1 + x) without its cancellation for a small x: log(t) * x / (t - 1) with t = 1 + x rounded.
    rounded = total - 1.0
    log_sum = tl.where(rounded == 0.0, sum_tail, tl.log(total) * (sum_tail / tl.where(rounded == 0.0, 1.0, rounded)))
    tl.store(out + row, at - most - log_sum)
    tl.store(out + rows + row, (1.0 + sum_square) / (total * total))
    tl.store(out + 2 * rows + row, log_sum - sum_weighted / total)
    tl.store(out + 3 * rows + row, most)
    tl.store(out + 4 * rows + row, log_sum)
    tl.store(arg_max + row, winner)


@triton.jit
def _gradient_kernel(  # noqa: ANN202
    product, stride, targets, top, log_sum, slope, target_slope, vocabulary, scale, cap,  # noqa: ANN001
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write over one block of one row of the product: slope * (onehot - softmax) through soft-capping and scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < vocabulary
    at = product + row * stride + columns
    z = _logits(tl.load(at, mask=there, other=0.0), scale, cap, CAPPED)
    # Two subtractions: the sum of maximum and log would round away what the logits have beyond a common offset.
    error = -tl.load(slope + row) * tl.exp((z - tl.load(top + row)) - tl.load(log_sum + row))
    error = tl.where(columns == tl.load(targets + row), tl.load(target_slope + row), error)
    if CAPPED:
        error *= 1.0 - (z / cap) * (z / cap)
    tl.store(at, (error * scale).to(product.dtype.element_ty), mask=there)


class TritonRows:
    """The row kernel in Triton; a chunk is one block.

    Args:
        like: Buffer of products it will see.
        transform: Scale, soft-capping and top-k.
    """

    def __init__(self, like: Tensor, transform: Transform) -> None:
        self.block, self.transform = max(1, len(like)), transform
        self._top = self._log_sum = like.new_empty((0,), dtype=torch.float32)

    def _options(self, product: Tensor) -> dict[str, Any]:
        softcap = self.transform.softcap
        return {
            "vocabulary": product.shape[1], "scale": float(self.transform.logit_scale), "cap": float(softcap or 1.0),
            "CAPPED": bool(softcap), "BLOCK": min(BLOCK, triton.next_power_of_2(product.shape[1])),
            "num_warps": WARPS, "enable_fp_fusion": True,
        }  # fmt: skip

    def statistics(self, product: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenStats:
        """Return the statistics of a block; the product is left as it is."""
        assert reference is None, "a plan with a reference takes the rows in torch"
        n = len(product)
        out = product.new_empty((5, n), dtype=torch.float32)
        arg = torch.empty_like(targets)
        with _on(product):
            _statistics_kernel[(n,)](
                product, product.stride(0), targets, out, arg, rows=n, **self._options(product)
            )  # fmt: skip
        log_prob, collision, entropy, self._top, self._log_sum = out
        topk_entropy = None
        if self.transform.topk:
            largest = self._largest(product)
            topk_entropy = topk_entropy_of(largest - largest[:, :1], self.transform.topk)
        return TokenStats(log_prob, collision, entropy, arg == targets, topk_entropy, arg)

    def _largest(self, product: Tensor) -> Tensor:
        """Return the largest logits in descending order; scale and soft-capping keep the order of the products."""
        scale, cap = self.transform.logit_scale, self.transform.softcap
        k = min(self.transform.topk, product.shape[1])
        values = (product if scale > 0 else -product).topk(k, dim=-1).values.float() * abs(scale)
        return cap * torch.tanh(values / cap) if cap else values

    def prediction_sum(self, product: Tensor) -> Tensor:
        """Return the sum of the predictions of the block that :meth:`statistics` saw last, shape ``(V,)``."""
        scale, cap = self.transform.logit_scale, self.transform.softcap
        total = product.new_zeros(product.shape[1], dtype=torch.float32)
        for start in range(0, len(product), ROWS_SUMMED):
            rows = slice(start, start + ROWS_SUMMED)
            z = product[rows].float() * scale
            z = cap * torch.tanh(z / cap) if cap else z
            total += torch.exp(z - self._top[rows, None] - self._log_sum[rows, None]).sum(0)
        return total

    def gradient_(
        self,
        product: Tensor,
        targets: Tensor,
        stats: TokenStats,
        slope: Tensor,
        pull: Tensor | None = None,
        sums: ColumnSums | None = None,
    ) -> None:
        """Write ``slope * (onehot - pi)``, through soft-capping and scale, over the product."""
        assert pull is None, "a plan with a reference takes the rows in torch"
        options = self._options(product)
        grid = (len(product), triton.cdiv(options["vocabulary"], options["BLOCK"]))
        slope = slope.float().contiguous()
        with _on(product):
            _gradient_kernel[grid](
                product, product.stride(0), targets, self._top, self._log_sum, slope,
                -torch.expm1(stats.log_prob) * slope, **options,
            )  # fmt: skip
        if sums is not None:
            # Magnitudes whatever the signs: to look at them first would make the host wait.
            sums.add(product, targets, signs=True, sums_to_zero=not self.transform.softcap)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of a tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
