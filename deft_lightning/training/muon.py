"""Muon for the matrices of the layers, AdamW for the rest: two rules in one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from deft_lightning.annotations import CausalLM


class MuonAdamW(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for full fine-tuning: an orthogonal step for each matrix.

    Embedding, head, biases and norms are trained by AdamW. One optimizer holds the state of both: schedules, clipping
    and checkpoints see groups of parameters as of any other. Muon's step is scaled to the size of AdamW's
    (``match_rms_adamw``), so that one rate serves both.

    Args:
        params: Parameters, or groups; a group with ``muon: True`` has matrices alone and is trained by Muon, others by
            AdamW. The module makes the groups.
        lr: Learning rate of both.
        weight_decay: Of both, decoupled.
        momentum: Of Muon.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: A value that Muon or AdamW refuses, or a group for Muon that is not of matrices.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        betas = (betas[0], betas[1])
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps, "muon": False,
        }  # fmt: skip
        super().__init__(params, defaults)
        matrix, vector = torch.zeros(1, 1), torch.zeros(1)
        # They hold no parameters and no state of their own: each step lends them this one's.
        self._muon = Muon([matrix], lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW([vector], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        self._rest = {
            True: {name: value for name, value in self._muon.param_groups[0].items() if name not in defaults},
            False: {name: value for name, value in self._adamw.param_groups[0].items() if name not in defaults},
        }
        for group in self.param_groups:
            if group["muon"] and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon trains only matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, muon in ((self._muon, True), (self._adamw, False)):
            groups = [group for group in self.param_groups if group["muon"] is muon]
            rest = {name: value for name, value in self._rest[muon].items() if name != "params"}
            own = {"eps": 1e-7} if muon else {}  # Muon's eps stands in the division by a norm, and is another one
            rule.param_groups = [{**rest, **group, **own} for group in groups]
            rule.state = self.state
            rule.step()
        return loss


def for_muon(model: CausalLM, trained: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return the groups of a model's parameters: matrices of the layers, other matrices, vectors.

    Args:
        model: A Hugging Face causal language model.
        trained: Its parameters that are trained.
    """
    ends = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()}
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in ends]
    others = [p for p in trained if p.ndim >= 2 and (p.ndim > 2 or id(p) in ends)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "muon": True},
        {"params": others},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return groups
