r"""The gradient of the logits by columns: few of them hold nearly all of it.

Of a chunk's gradient ``G``, shape ``(n, V)``, most columns hold next to nothing: tokens that no prediction puts mass
on. ``dX = G @ W`` and ``dW = G.T @ X`` run over the others alone. What is left out enters as a product of two vectors,

    G ~ G[:, kept] + r q^T,    r = row sums of the columns left out,    q = their column sums, scaled to sum to 1

so that every row still sums to what it did, and ``dX`` and ``dW`` change by a vector each.

Columns are left out, the smallest first, as long as

    sum over columns left out of  max_i |G_ij| * sum_i |G_ij|   <=   tolerance^2 * sum_i G_{i, y_i}^2

The left side is at least the energy of those columns, the sum of squares on the right at most that of ``G``: so the
columns left out are at most ``tolerance`` of the Frobenius norm of ``G``, whatever the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.ops.float16 import multiply
from deft_lightning.ops.gradient import WeightGradient

# On real hidden states dX is then off by half of what rounding its factors to bfloat16 costs, and dW by a sixth.
AUTO_TOLERANCE = 2.0**-11
# Below, the products are too small for the gain to show.
AUTO_VOCABULARY = 16_384
# Above this share of columns the two products as a whole are faster.
MOST_KEPT = 0.5
# So many rows of a chunk tell whether that will be so: flat predictions are not looked at any further.
ROWS_TELL = 64


class LeftOut(NamedTuple):
    """What a head left out of its gradients.

    Attributes:
        kept: Mean share of the columns that went into the products.
        bound: Largest bound on ``||G - G'|| / ||G||`` of a chunk, in Frobenius norms, where ``G'`` stands for ``G`` in
            the products; their rounding comes on top.
    """

    kept: float
    bound: float


class ColumnSparsity:
    """Asks a head to leave columns of the gradient of the logits out, and says what came of it.

    Args:
        tolerance: What may be left out, as a share of the Frobenius norm of a chunk's gradient, above 0 and below 1.

    Raises:
        UserError: Another tolerance.

    Example:
        >>> from deft_lightning.objectives import DEFT
        >>> from deft_lightning.ops import linear_loss
        >>> sparsity = ColumnSparsity(2**-11)
        >>> hidden, weight = torch.eye(2, 64).requires_grad_(), 20 * torch.eye(64, requires_grad=True)
        >>> loss, _ = linear_loss(hidden, weight, torch.tensor([0, 5]), DEFT(), sparsity=sparsity)
        >>> sparsity.taken().kept
        0.03125
    """

    def __init__(self, tolerance: float = AUTO_TOLERANCE) -> None:
        if not 0 < tolerance < 1:
            raise UserError(f"sparsity of the head: want a tolerance above 0 and below 1, got {tolerance:g}")
        self.tolerance = tolerance
        self._chunks = self._kept = self._dropped = 0.0

    def add(self, kept: float, dropped: float) -> None:
        """Count a chunk: the share of its columns that was kept, and a bound on the relative error of its gradient."""
        self._chunks += 1
        self._kept += kept
        self._dropped = max(self._dropped, dropped)

    def taken(self) -> LeftOut:
        """Return what was left out since the last call; nothing, of no chunk."""
        found = LeftOut(self._kept / self._chunks if self._chunks else 1.0, self._dropped)
        self._chunks = self._kept = self._dropped = 0.0
        return found


class AllColumns(NamedTuple):
    """A gradient ``(n, V)`` as it is.

    Attributes:
        product: The gradient, times a scale in float16.
        inverse: One over that scale; None where there is none.
    """

    product: Tensor
    inverse: Tensor | None

    def multiply(self, factor: Tensor, out: Tensor) -> None:
        """Write the product with ``factor``, shape ``(V, D)``, into ``out``, shape ``(n, D)``."""
        multiply(self.product, factor, out, self.inverse)

    def add_to(self, total: WeightGradient, rows: Tensor) -> None:
        """Add the product of the transpose with ``rows``, shape ``(n, D)``."""
        total.add(self.product, rows, self.inverse)


class KeptColumns(NamedTuple):
    """A gradient ``(n, V)`` as some of its columns and a product of two vectors.

    Attributes:
        kept: Columns that are kept, ascending, shape ``(k,)``.
        entries: Their entries, shape ``(n, k)``, in the dtype of the products.
        rows: Sum of each row over the other columns, shape ``(n,)``, in the accumulation dtype.
        columns: Their column sums, scaled to sum to 1, 0 where a column is kept; shape ``(V,)``, likewise.
    """

    kept: Tensor
    entries: Tensor
    rows: Tensor
    columns: Tensor

    def multiply(self, factor: Tensor, out: Tensor) -> None:
        """Write the product with ``factor``, shape ``(V, D)``, into ``out``, shape ``(n, D)``."""
        torch.mm(self.entries, factor.index_select(0, self.kept), out=out)
        mean = self.columns.to(factor.dtype) @ factor
        out.addr_(self.rows.to(out.dtype), mean.to(out.dtype))

    def add_to(self, total: WeightGradient, rows: Tensor) -> None:
        """Add the product of the transpose with ``rows``, shape ``(n, D)``."""
        total.add_rows(self.kept, self.entries.t() @ rows, self.columns, self.rows.to(rows.dtype) @ rows)


class ColumnSums:
    """Largest magnitude and sum of magnitudes of each column of a chunk, taken block by block while it is in cache.

    Args:
        like: Product that the chunk overwrites: device, dtype, vocabulary.
        wide: Dtype of the sums.
        sparsity: What is asked for; what came of it is added there.

    Attributes:
        flat: Whether the first rows of the chunk have shown that all of it is wanted.
    """

    def __init__(self, like: Tensor, wide: torch.dtype, sparsity: ColumnSparsity) -> None:
        self._sparsity = sparsity
        self._largest, self._sums = like.new_zeros((2, like.shape[1]), dtype=wide)
        self._row_sums: list[Tensor] = []
        self._own, self._rows, self.flat = like.new_zeros((), dtype=wide), 0, False

    def add(self, block: Tensor, targets: Tensor, signs: bool, sums_to_zero: bool) -> None:
        """Add rows of the gradient.

        Args:
            block: Shape ``(m, V)``.
            targets: Shape ``(m,)``.
            signs: Whether entries other than those of targets may be negative.
            sums_to_zero: Whether each row sums to 0, as without soft-capping.
        """
        if self.flat:
            return
        wide = self._own.dtype
        if not sums_to_zero:
            self._row_sums.append(block.sum(-1, dtype=wide))
        self._own += block.gather(1, targets.unsqueeze(1)).to(wide).square().sum()
        magnitude = block.abs() if signs else block
        torch.maximum(self._largest, magnitude.amax(0).to(wide), out=self._largest)
        self._sums += magnitude.sum(0, dtype=wide)
        before, self._rows = self._rows, self._rows + len(block)
        if before < ROWS_TELL <= self._rows:
            # The smaller half of the columns weighs at least half as many times the value a quarter of them is below.
            quarter = max(1, len(self._sums) // 4)
            least = quarter * (self._largest * self._sums).kthvalue(quarter).values
            self.flat = bool(least > self._budget)

    @property
    def _budget(self) -> Tensor:
        return self._sparsity.tolerance**2 * self._own

    def choose(self, gradient: Tensor, targets: Tensor) -> KeptColumns | None:
        """Return the columns of a chunk that are kept, None where leaving the others out is not worth it.

        The next block that is added begins another chunk. Columns of targets are kept: their own entries are no part
        of the sums, which have the sign of the others.

        Args:
            gradient: Shape ``(n, V)``: the whole chunk, rounded to the dtype of the products.
            targets: Shape ``(n,)``.
        """
        found = None if self.flat else self._few(gradient, targets)
        if found is None:
            self._sparsity.add(1.0, 0.0)
        for total in (self._largest, self._sums, self._own):
            total.zero_()
        self._row_sums.clear()
        self._rows, self.flat = 0, False
        return found

    def _few(self, gradient: Tensor, targets: Tensor) -> KeptColumns | None:
        bound = (self._largest * self._sums).index_fill_(0, targets, torch.inf)
        ordered, order = bound.sort()
        left = ordered.cumsum(0)
        count = int((left <= self._budget).sum())
        kept = len(bound) - count
        if kept > MOST_KEPT * len(bound):
            return None
        index = order[count:].sort().values
        entries = gradient.index_select(1, index)
        rows = -entries.sum(-1, dtype=bound.dtype)
        if self._row_sums:
            rows += torch.cat(self._row_sums)
        columns = self._sums.index_fill(0, index, 0.0)
        columns /= columns.sum().clamp_min(torch.finfo(columns.dtype).tiny)
        # The triangle inequality: what is left out, and what stands for it.
        dropped = left[count - 1].sqrt() + rows.norm() * columns.norm()
        self._sparsity.add(kept / len(bound), float(dropped / self._own.sqrt()) if count and self._own > 0 else 0.0)
        return KeptColumns(index, entries, rows, columns)
