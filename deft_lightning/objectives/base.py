"""The seam: an objective turns token statistics into a loss per token, and autograd turns that into its gate."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from deft_lightning.functional import TokenStats, deformed_log


class Objective(ABC):
    """A token objective: frozen dataclass, called with :class:`TokenStats`, returns one loss per token.

    A new objective is a subclass with ``__call__``; the command line, the fused head, the monitors and the property
    tests find it through the class tree.
    """

    @property
    def topk(self) -> int:
        """How many of the largest probabilities :attr:`TokenStats.topk_entropy` is to cover; 0 when not needed."""
        return 0

    @property
    def needs_batch(self) -> bool:
        """Whether the loss of one token depends on the statistics of the others.

        The fused head then makes a pass for the statistics before it computes gradients.
        """
        return False

    @abstractmethod
    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of each token, in the shape of ``stats.log_prob`` and differentiable in it alone."""

    @final
    def gate(self, stats: TokenStats) -> Tensor:
        """Gate of each token, ``-dl/d(log p)``: the factor on the error ``pi - onehot``. By autograd, never by hand.

        Args:
            stats: Statistics of the tokens; their graph, if any, is left alone.

        Returns:
            A detached tensor in the shape of ``stats.log_prob``; 1 for NLL.
        """
        # inference_mode(False) and the clones let validation, which Lightning runs under inference mode, ask too.
        with torch.inference_mode(False), torch.enable_grad():
            frozen = stats.map(lambda field: field.detach().clone())
            log_prob = frozen.log_prob.requires_grad_()
            loss = self(frozen._replace(log_prob=log_prob))
            (grad,) = torch.autograd.grad(loss.sum(), log_prob)
        return -grad

    def __repr__(self) -> str:
        """Return the legend: every setting, without the switches that are off."""
        shown: list[str] = []
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        for field in fields:
            value = getattr(self, field.name)
            if value or value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


class DeformedLog(Objective):
    r"""Deformed-log family, ``l = (1 - p^alpha) / alpha`` with gate ``p^alpha`` (arXiv 2602.11424).

    A member states its focus index ``alpha``. ``alpha = 0`` is NLL (every token counts alike), ``alpha = 1`` the
    likelihood ``1 - p`` (only what the model already believes is sharpened).
    """

    @abstractmethod
    def focus(self, stats: TokenStats) -> Tensor:
        """Return the focus index ``alpha`` of each token; called under ``no_grad``."""

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return ``(1 - p^alpha) / alpha`` per token."""
        with torch.no_grad():
            alpha = self.focus(stats)
        return deformed_log(stats.log_prob, alpha)


def known_objectives() -> dict[str, type[Objective]]:
    """Return every concrete objective imported so far by name, a user's own included."""
    found: dict[str, type[Objective]] = {}
    todo: list[type[Objective]] = [Objective]  # type: ignore[type-abstract]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if not inspect.isabstract(cls):
            found.setdefault(cls.__name__, cls)
    return dict(sorted(found.items()))
