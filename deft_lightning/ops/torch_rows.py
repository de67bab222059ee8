"""Element-wise work on a chunk of logits, in torch on any device: statistics, and the gradient in place of the logits.

A row kernel is given the product of a chunk, ``hidden @ weight.T``, and does everything between the matrix products.
:class:`TorchRows` is the one in torch; :mod:`deft_lightning.ops.triton_rows` has the one for CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deft_lightning.ops.columns import ColumnSums
from deft_lightning.tokens import TokenStats, accumulation_dtype, topk_entropy_of

LN2 = math.log(2)
# Elements of a block of rows on the CPU: two float32 buffers of 4 MB stay in a shared cache of 16 MB or more. Of 4, 8,
# 16 and 32 rows of 152k entries, 4 and 8 were fastest (16 rows: +15 %, 32: +60 %).
BLOCK_CPU = 1 << 20
# Entries whose maximum is found first. The arg-max then searches the maxima: 0.1 instead of 0.6 ns an entry.
STRIPE = 128
# Stripes from which on that pays where no more than the maximum is wanted.
STRIPES = 24


@dataclass(frozen=True)
class Transform:
    """What turns a product into logits: ``cap * tanh(scale * product / cap)``, and what else is asked of them.

    Attributes:
        logit_scale: Factor on the product.
        softcap: Final soft-capping, or None.
        topk: How many largest probabilities to take the entropy of; 0 for none.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    topk: int = 0


class RowKernel(Protocol):
    """Statistics of a block of rows, then the gradient by its product, written over it."""

    block: int
    """Rows a call takes at most."""

    def statistics(self, product: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenStats:
        """Return the statistics of a block ``(n, V)`` for targets ``(n,)``; the products may be used as scratch.

        ``reference``, of the same shape, is the product of the reference model: with it there is ``reference_kl``.
        """
        ...

    def prediction_sum(self, product: Tensor) -> Tensor:
        """Return the sum over the rows of the softmax that :meth:`statistics` saw last, shape ``(V,)``."""
        ...

    def gradient_(
        self,
        product: Tensor,
        targets: Tensor,
        stats: TokenStats,
        slope: Tensor,
        pull: Tensor | None = None,
        sums: ColumnSums | None = None,
    ) -> None:
        """Replace the product that :meth:`statistics` saw last by the gradient by it.

        It is ``slope * d(log p)/d(product)``, and ``pull * d(reference_kl)/d(product)`` where there is a reference;
        slope and pull of shape ``(n,)``. Without a reference its columns are added to ``sums``, where they are given.
        """
        ...


class TorchRows:
    """The row kernel in torch. Its buffers are made once a head, because fresh memory costs more than arithmetic.

    Args:
        like: Product it will see: device, dtype and vocabulary.
        transform: Scale, soft-capping and top-k.
        chunk: Rows of a chunk.
        reference: Whether it will see the products of a reference model too.
        keep: Whether statistics leave the products as they are.
    """

    def __init__(
        self, like: Tensor, transform: Transform, chunk: int, reference: bool = False, keep: bool = False
    ) -> None:
        vocabulary, wide = like.shape[1], accumulation_dtype(like.dtype)
        self.transform = transform
        self.block = min(chunk, max(1, BLOCK_CPU // max(vocabulary, 1))) if like.device.type == "cpu" else chunk

        def buffer(needed: bool) -> Tensor | None:
            return like.new_empty((self.block, vocabulary), dtype=wide) if needed else None

        self._pi = like.new_empty((self.block, vocabulary), dtype=wide)
        self._z = buffer(keep or wide != like.dtype)  # the product itself otherwise
        self._chain = buffer(bool(transform.softcap))
        self._share: Tensor | None = None
        # Of the reference: logits, and its prediction, which stays for the gradient.
        self._z0 = buffer(reference and (keep or wide != like.dtype))
        self._pi0 = buffer(reference)

    def _logits(self, product: Tensor) -> Tensor:
        """Return logits in the accumulation dtype; keeps d(logits)/d(scale * product) where it is not 1."""
        z = _widened(product, self._z)
        if self.transform.logit_scale != 1.0:
            z.mul_(self.transform.logit_scale)
        if self._chain is not None and self.transform.softcap:
            squashed = z.div_(self.transform.softcap).tanh_()
            torch.mul(squashed, squashed, out=self._chain[: len(z)]).neg_().add_(1)
            z.mul_(self.transform.softcap)
        return z

    def statistics(self, product: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenStats:
        """Return the statistics of a block; both softmaxes stay in their buffers for :meth:`gradient_`."""
        z, pi = self._logits(product), self._pi[: len(product)]
        top, arg, largest = _largest(z, self.transform.topk, pi)
        log_prob = z.gather(-1, targets.unsqueeze(-1)).sub_(top)
        others = _masses(z, top, arg, pi)
        log_peak = others.log1p().neg_()
        self._share = peak = log_peak.exp()
        # An entry without mass (a bias of -inf) has 0 * -inf in its products. The finite minimum keeps that a zero; a
        # plain tensor of the CPU is looked at behind the product instead, which saves a pass. A device would be waited
        # for, and a fake tensor has no values.
        plain = reference is None and z.is_cpu and type(z) is Tensor
        if not plain:
            z.clamp_min_(torch.finfo(z.dtype).min)
        divergence = None if reference is None else self._divergence(reference, z, log_peak.squeeze(-1))
        rest = torch.linalg.vector_norm(pi, dim=-1, keepdim=True).square_()
        weighted = z.mul_(pi).sum(-1, keepdim=True)
        weighted = _without_empty(weighted, z) if plain else weighted
        pi.scatter_(-1, arg, 1.0)
        collision, entropy = (rest + 1).mul_(peak.square()), torch.addcmul(log_peak, weighted, peak, value=LN2).neg_()
        entropy.clamp_min_(0)  # of a certain prediction it would be -0
        topk_entropy = None if largest is None else topk_entropy_of(largest - top, self.transform.topk)
        log_prob, collision, entropy, arg = (x.squeeze(-1) for x in (log_prob.add_(log_peak), collision, entropy, arg))
        stats = TokenStats(log_prob, collision, entropy, arg == targets, topk_entropy, arg)
        return stats._replace(reference_kl=divergence)

    def _divergence(self, reference: Tensor, z: Tensor, log_peak: Tensor) -> Tensor:
        """Return ``KL(pi0 || pi)`` for what :func:`_masses` makes of logits, finite; keeps ``pi0``."""
        assert self._pi0 is not None
        pi0, z0 = self._pi0[: len(reference)], self._reference_logits(reference)
        top, arg, _ = _largest(z0, 0, pi0)
        log_peak0 = _masses(z0, top, arg, pi0).log1p_().neg_()
        pi0.scatter_(-1, arg, 1.0).mul_(log_peak0.exp())
        # Differences first: where the two agree, so do their roundings.
        apart = z0.clamp_min_(torch.finfo(z0.dtype).min).sub_(z).mul_(pi0).sum(-1)
        return (apart * LN2 + (log_peak0.squeeze(-1) - log_peak)).clamp_min_(0)

    def _reference_logits(self, reference: Tensor) -> Tensor:
        """Return the logits of a product of the reference in the accumulation dtype."""
        z0, scale, cap = _widened(reference, self._z0), self.transform.logit_scale, self.transform.softcap
        if scale != 1.0:
            z0.mul_(scale)
        return z0.div_(cap).tanh_().mul_(cap) if cap else z0

    def predict(self, product: Tensor, reference: Tensor | None = None) -> None:
        """Make both softmaxes of a block as :meth:`statistics` leaves them, and nothing else."""
        z, pi = self._logits(product), self._pi[: len(product)]
        torch.exp2(z.sub_(z.amax(-1, keepdim=True)).mul_(1 / LN2), out=pi)
        self._share = pi.sum(-1, keepdim=True).reciprocal_()
        if reference is not None and self._pi0 is not None:
            torch.softmax(self._reference_logits(reference), dim=-1, out=self._pi0[: len(reference)])

    def settle(self) -> None:
        """Free what :meth:`gradient_` does not need, once no more rows are to be read."""
        self._z = self._z0 = None

    def prediction_sum(self, product: Tensor) -> Tensor:
        """Return the sum of the predictions of the block that :meth:`statistics` saw last, shape ``(V,)``."""
        return self._predictions(len(product)).sum(0)

    def _predictions(self, rows: int) -> Tensor:
        """Return the softmax of a block: what is in its buffer, times a number for each row."""
        pi = self._pi[:rows]
        if self._share is not None:
            pi.mul_(self._share)
            self._share = None
        return pi

    def gradient_(
        self,
        product: Tensor,
        targets: Tensor,
        stats: TokenStats,
        slope: Tensor,
        pull: Tensor | None = None,
        sums: ColumnSums | None = None,
    ) -> None:
        """Write ``slope * (onehot - pi) + pull * (pi - pi0)``, through soft-capping and scale, over the product."""
        pi, target = self._pi[: len(product)], targets.unsqueeze(-1)
        slope = slope * self.transform.logit_scale
        toward: Tensor | None = None
        if pull is not None and self._pi0 is not None:
            pi0 = self._pi0[: len(product)]
            toward = torch.sub(self._predictions(len(product)), pi0, out=pi0)
            toward.mul_((pull * self.transform.logit_scale).unsqueeze(-1))
        factor = -slope.unsqueeze(-1)
        pi.mul_(factor if self._share is None else factor * self._share)
        # The target entry is slope * (1 - p) through expm1, written last: no p - 1 cancellation.
        pi.scatter_(-1, target, (-torch.expm1(stats.log_prob) * slope).unsqueeze(-1))
        if toward is not None:
            pi.add_(toward)
        if self._chain is not None:
            pi.mul_(self._chain[: len(product)])
        if sums is not None:
            sums.add(pi, targets, signs=bool((slope > 0).any()), sums_to_zero=self._chain is None)
        product.copy_(pi)


def _widened(product: Tensor, buffer: Tensor | None) -> Tensor:
    """Return a product in the dtype of the buffer, in it; the product itself where none is needed."""
    return product if buffer is None else buffer[: len(product)].copy_(product)


def _without_empty(total: Tensor, products: Tensor) -> Tensor:
    """Return the sums of rows of products, 0 for those that are not a number; used up. On a CPU, which it looks at."""
    return products.nan_to_num_(nan=0.0).sum(-1, keepdim=True) if bool(total.isnan().any()) else total


def _masses(z: Tensor, top: Tensor, arg: Tensor, out: Tensor) -> Tensor:
    """Write ``exp(z - top)`` into ``out``, 0 at the largest entry, and leave ``(z - top) / ln 2`` in ``z``.

    Returns:
        The sum of each row, shape ``(n, 1)``: without the largest entry, which is 1, it keeps its relative accuracy
        where the prediction is nearly certain. It is not a number where an entry is none, or infinite.
    """
    # Powers of two: torch's softmax takes three times as long on the CPU that was measured, and exp longer still.
    torch.exp2(z.sub_(top).mul_(1 / LN2), out=out)
    out.scatter_(-1, arg, 0.0)
    return out.sum(-1, keepdim=True).add_(top - top)


def _largest(z: Tensor, k: int, scratch: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the maximum and first arg-max of each row, shape ``(n, 1)``, and the ``k`` largest values if ``k``.

    On the CPU both are looked for in the stripes of :data:`STRIPE` entries that can hold them: torch's ``max`` with
    indices takes ten times as long as ``amax``, and ``topk`` longer still. Where stripes are few, the first of the
    largest entries is that with the largest number, counted from the end; ``scratch`` has the shape and dtype of ``z``.
    """
    vocabulary = z.shape[1]
    stripes = vocabulary // STRIPE
    k = min(k, vocabulary)
    if z.device.type == "cpu" and stripes < STRIPES and not k:
        top = z.amax(-1, keepdim=True)
        from_end = torch.arange(vocabulary, 0, -1, dtype=z.dtype, device=z.device)
        # As floats: comparisons to booleans take six times as long. A row that is not a number has no largest entry.
        last = torch.eq(z, top, out=scratch) if scratch is not None else (z == top).to(z.dtype)
        return top, (vocabulary - last.mul_(from_end).amax(-1, keepdim=True).long()).clamp_max_(vocabulary - 1), None
    if z.device.type != "cpu" or stripes < max(k, 8):
        top, arg = z.max(dim=-1, keepdim=True)
        return top, arg, z.topk(k, dim=-1).values if k else None
    even = stripes * STRIPE
    maxima = z[:, :even].unflatten(1, (stripes, STRIPE)).amax(-1)
    top, stripe = maxima.max(dim=-1, keepdim=True)
    offsets = torch.arange(STRIPE, device=z.device)
    at = stripe * STRIPE + offsets
    arg = stripe * STRIPE + z.gather(-1, at).argmax(-1, keepdim=True)
    if even < vocabulary:
        last, where = z[:, even:].max(dim=-1, keepdim=True)
        arg = torch.where(last > top, where + even, arg)
        top = torch.maximum(top, last)
    if not k:
        return top, arg, None
    # Each of the k largest entries lies in one of the k stripes with the largest maxima, or behind the last stripe.
    at = (maxima.topk(k, dim=-1).indices.unsqueeze(-1) * STRIPE + offsets).flatten(1)
    candidates = torch.cat([z.gather(-1, at), z[:, even:]], dim=-1)
    return top, arg, candidates.topk(k, dim=-1).values
