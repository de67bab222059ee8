"""The seam: an objective turns token statistics into a loss per token, and autograd turns that into its gate."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from typing import Any, Self, final

import torch
from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats, deformed_log
from deft_lightning.objectives.run_state import Needs, RunState, Tracked, merged_needs
from deft_lightning.registry import concrete


class Objective(ABC):
    """A token objective: frozen dataclass, called with :class:`TokenStats`, returns one loss per token.

    A new objective is a subclass with ``__call__``; the command line, the fused head, the monitors and the property
    tests find it through the class tree.
    """

    @property
    def topk(self) -> int:
        """Return how many of the largest probabilities ``topk_entropy`` is to cover; 0 when it is not needed."""
        return 0

    @property
    def needs_batch(self) -> bool:
        """Return whether the loss of one token depends on the statistics of the others.

        The fused head then makes a pass for the statistics before it computes gradients.
        """
        return False

    @property
    def scheduled(self) -> bool:
        """Return whether :meth:`at` looks at :attr:`RunState.progress`: by default, whether one of its parts does."""
        return any(part.scheduled for part in self.parts().values())

    @property
    def tracks(self) -> Tracked | None:
        """Return what a run is to add up for :meth:`at`; by default what one of its parts wants, None for nothing."""
        wanted = [tracked for part in self.parts().values() if (tracked := part.tracks) is not None]
        if len(wanted) > 1:
            raise UserError(f"{self!r}: a run keeps one mean gate, but two parts need one; rescale the whole instead")
        return wanted[0] if wanted else None

    @property
    def needs(self) -> Needs:
        """Return what it looks at beside the prediction; by default what its parts do.

        Raises:
            UserError: Two parts want different chances.
        """
        merged = Needs()
        for part in self.parts().values():
            merged = merged_needs(self, merged, part.needs)
        return merged

    @property
    def deformed(self) -> DeformedLog | None:
        """Return the objective itself."""
        return None

    @property
    def sources(self) -> tuple[str, ...]:
        """Return names of the sources of data that it tells apart: :attr:`TokenStats.source` is a place among them."""
        names = [name for part in self.parts().values() for name in part.sources]
        return tuple(dict.fromkeys(names))

    def parts(self) -> dict[str, Objective]:
        """Return the objectives among its settings, by name."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        return {name: value for name, value in values.items() if isinstance(value, Objective)}

    def at(self, state: RunState) -> Objective:
        """Return the objective in force for the next optimizer step; by default itself, its parts as they are then.

        A subclass that overrides this says in :attr:`scheduled` and :attr:`tracks` what it has to be told. Its own
        :attr:`topk` must not change, and ``at(RunState())`` is what the objective is when it is called outright.
        """
        return self.with_(**{name: part.at(state) for name, part in self.parts().items()})

    @final
    def with_(self, **values: Any) -> Self:
        """Return a copy with other values of some fields, those that are no settings included; itself without any."""
        if not values:
            return self
        # dataclasses.replace sets nothing that is not an argument.
        changed = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(changed, name, value)
        return changed

    @abstractmethod
    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of each token, in the shape of ``stats.log_prob``.

        It is differentiable in that, and in ``reference_kl`` where it looks at it; everything else is detached.
        """

    @final
    def gate(self, stats: TokenStats) -> Tensor:
        """Return the gate of each token, ``-dl/d(log p)``, by autograd: the factor on the error ``pi - onehot``.

        What a loss adds of :attr:`TokenStats.reference_kl` pulls towards the reference and is no part of the gate;
        where the statistics lack it, the model counts as not moved.

        Args:
            stats: Statistics of the tokens; their graph, if any, is left alone.

        Returns:
            A detached tensor in the shape of ``stats.log_prob``; 1 for NLL.

        Example:
            >>> from deft_lightning.functional import token_stats
            >>> from deft_lightning.objectives import NLL
            >>> NLL().gate(token_stats(torch.zeros(2, 5), torch.tensor([0, 1])))
            tensor([1., 1.])
        """
        # inference_mode(False) and the clones let validation, which Lightning runs under inference mode, ask too.
        with torch.inference_mode(False), torch.enable_grad():
            frozen = stats.map(lambda field: field.detach().clone())
            if frozen.reference_kl is None and self.needs.reference:
                frozen = frozen._replace(reference_kl=torch.zeros_like(frozen.log_prob))
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
            if field.init and (value or value != field.default):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


class DeformedLog(Objective):
    r"""Deformed-log family, ``l = (1 - p^alpha) / alpha`` with gate ``p^alpha`` (arXiv 2602.11424).

    A member states its focus index ``alpha``. ``alpha = 0`` is NLL (every token counts alike), ``alpha = 1`` the
    likelihood ``1 - p`` (only what the model already believes is sharpened).
    """

    @property
    def deformed(self) -> DeformedLog:
        """Return the objective itself."""
        return self

    @abstractmethod
    def focus(self, stats: TokenStats) -> Tensor:
        """Return the focus index ``alpha`` of each token; called under ``no_grad``."""

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return ``(1 - p^alpha) / alpha`` per token."""
        with torch.no_grad():
            alpha = self.focus(stats)
        return deformed_log(stats.log_prob, alpha)


class Wrapper(Objective):
    """An objective over another one, its ``base``: needs what that needs, and has the focus index that it has."""

    base: Objective

    @property
    def topk(self) -> int:
        """Return what the base needs."""
        return int(self.base.topk)

    @property
    def needs_batch(self) -> bool:
        """Return whether the base looks at the batch."""
        return bool(self.base.needs_batch)

    @property
    def deformed(self) -> DeformedLog | None:
        """Return the objective itself."""
        return self.base.deformed


def known_objectives() -> dict[str, type[Objective]]:
    """Return every concrete objective imported so far by name, a user's own included."""
    return concrete(Objective)  # type: ignore[type-abstract]
