"""An anchor to where training began: any objective, plus the distance of the prediction from a reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import Objective, Wrapper
from deft_lightning.objectives.deformed import NLL
from deft_lightning.objectives.run_state import Needs


@dataclass(frozen=True, repr=False)
class KLAnchor(Wrapper):
    """An objective tied to the reference model, ``base + weight * KL(pi0 || pi)`` at every supervised token.

    ``pi0`` is what the reference predicts at the same position: under LoRA the model with its adapters switched off,
    otherwise a frozen copy of the initial weights. The KL is over the whole vocabulary, so that it holds what the model
    knew of every alternative, of which the label is one. By the logits its gradient is ``weight * (pi - pi0)``, added
    to ``gate * (pi - onehot)``; :meth:`gate` stays ``-d(loss)/d(log p)``, that of the base. A step costs one forward
    pass without gradient more, and the product of the reference's head; the frozen copy costs its weights.
    Source: ASFT (arXiv 2509.23753), which anchors DFT: ``KLAnchor(base=DFT(), weight=0.05)``.

    Args:
        base: The objective that is anchored.
        weight: Factor on the KL, finite and at least 0; 0 is the base itself, without a reference.
    """

    base: Objective = field(default_factory=NLL)
    weight: float = 0.05

    def __post_init__(self) -> None:
        """Refuse factors that mean nothing."""
        if not 0.0 <= self.weight < math.inf:
            raise UserError(f"KLAnchor: weight must be finite and at least 0, got {self.weight}")

    @property
    def needs(self) -> Needs:
        """Return what the base needs, and the reference."""
        needs = super().needs
        return needs._replace(reference=True) if self.weight else needs

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss of the base and the weighted KL per token.

        Raises:
            UserError: The statistics have no ``reference_kl``.
        """
        if not self.weight:
            return self.base(stats)
        if stats.reference_kl is None:
            raise UserError(
                f"{self!r} needs TokenStats.reference_kl, the KL to a reference model: train with SFTModule, or give"
                " reference_logits to token_loss"
            )
        return self.base(stats) + self.weight * stats.reference_kl


__all__ = ["KLAnchor"]
