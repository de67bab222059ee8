"""The model that predictions are compared with: the trained one without its adapters, or a copy of how it began."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.models.checks import evaluating
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.models.fused import hidden_states
from deft_lightning.models.head import HeadSeam, find_head
from deft_lightning.models.merge import stand_alone
from deft_lightning.models.shard import is_sharded
from deft_lightning.models.sizes import available_memory, size_of
from deft_lightning.ops import ReferenceHead

ASKED = "KLAnchor, --model.forgetting"
ADAPTED = ("lora_", "modules_to_save.")  # in the name of what switching the adapters off leaves out


class Reference:
    """Predicts what the model did before it was trained. It runs without gradient and without dropout.

    Under adapters it is the model itself with them switched off, otherwise a frozen copy of the initial weights: no
    part of the module, so that neither checkpoint, optimizer nor data parallelism sees it.

    Args:
        model: The model, of its own or the one that is trained.
        seam: Its head, where that is fused; None for the model's own.
        frozen: Whether the model is a copy of its own.

    Attributes:
        fingerprint: Of the copy's weights; nothing without one.
        problem: Why it cannot be used, a line; nothing while it can.
    """

    def __init__(self, model: CausalLM, seam: HeadSeam | None, frozen: bool) -> None:
        self.model, self.seam, self.frozen = model, seam, frozen
        self.fingerprint = fingerprint(model) if frozen else ""
        self.problem = ""
        self._switches = [] if frozen else _switches(model)

    def check(self, known: str | None, pretrained: str | None) -> None:
        """Compare the copy with the weights that a run began from which is resumed now.

        What does not agree is told when the reference is first used: a module may be resumed without ever asking it.

        Args:
            known: Fingerprint of those weights; None where the checkpoint does not say.
            pretrained: Name of the model that this run was made with; None for random weights or a model itself.
        """
        if not self.frozen or known == self.fingerprint:
            return
        if known is None and pretrained is not None:
            rank_zero_info(
                f"reference: {pretrained} as it is now; the checkpoint does not say which weights its run began from"
            )
            return
        given = "this run was made with other weights"
        given = f"{pretrained} has other weights" if pretrained is not None else given
        what = "the checkpoint does not say which weights its run began from" if known is None else given
        self.problem = (
            f"{ASKED}: the reference is the model before training, and {what}; resume with the --model.pretrained that"
            " the run began from"
        )
        self.model = nn.Module()  # its memory

    def follow(self, model: CausalLM) -> None:
        """Put the copy where the trained model is, in its dtype: Lightning moves and casts that alone.

        Raises:
            UserError: The copy is not what training began from.
        """
        if self.problem:
            raise UserError(self.problem)
        if not self.frozen:
            return
        own, other = _a_weight(self.model), _a_weight(model)
        if own.device == other.device and own.dtype == other.dtype:
            return
        if is_sharded(self.model):
            self.model.to(dtype=other.dtype)
            return
        for one, like in zip(_tensors(self.model), _tensors(model), strict=True):
            one.data = one.data.to(like.device, like.dtype)

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Return the logits of a batch, shape ``(B, T, V)``, from the model's own head."""
        with self._switched():
            output: Tensor = self.model(**inputs).logits
        return output

    @contextmanager
    def compared(self, inputs: dict[str, Any]) -> Iterator[Callable[[Tensor], ReferenceHead]]:
        """Run the reference on a batch, and give what its head sees of any tokens while another model runs.

        Args:
            inputs: Keywords of the model's forward.

        Returns:
            From positions among the ``B * T`` of the batch to the head and its hidden states of these tokens; weights
            that many ranks share are gathered as long as the context is open.
        """
        assert self.seam is not None
        seam = self.seam
        with torch.no_grad(), self._switched():
            hidden = hidden_states(self.model, seam, inputs).flatten(0, -2)

        @torch.no_grad()
        def head(index: Tensor) -> ReferenceHead:
            with self._switched():
                rows = hidden[index]
                low, up = seam.adapter(rows) or (None, None)
                return ReferenceHead(rows, *seam.weights(), low, up)

        with self._gathered():
            yield head

    @contextmanager
    def _switched(self) -> Iterator[None]:
        """Switch adapters and dropout off.

        peft's own switch also freezes the adapters for that time, which sharded weights would remember.
        """
        before = [switch._disable_adapters for switch in self._switches]
        for switch in self._switches:
            switch._disable_adapters = True
        try:
            with nullcontext() if self.frozen else evaluating(self.model):
                yield
        finally:
            for switch, was in zip(self._switches, before, strict=True):
                switch._disable_adapters = was

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Gather the weights of a sharded copy's head; the trained model's are gathered while it runs."""
        sharded: Any = self.model if self.frozen and is_sharded(self.model) else None
        if sharded is not None:
            sharded.unshard()
        try:
            yield
        finally:
            if sharded is not None:
                sharded.reshard()


def make_reference(model: CausalLM, seam: HeadSeam | None, copied: Callable[[], CausalLM] | None = None) -> Reference:
    """Return the reference of a model that is about to be trained, and say in a line what it costs.

    Args:
        model: With its initial weights.
        seam: Its head, where that is fused.
        copied: Makes the copy of a model whose weights are shared out; default: a plain copy.

    Raises:
        UserError: The adapters train weights that cannot be switched off, or there is no memory for a copy.
    """
    if hasattr(model, "get_base_model"):
        _check_adapters(model)
        rank_zero_info("reference: the model with its adapters switched off, which needs no extra weights")
        return Reference(model, seam, frozen=False)
    needed = sum(_local(tensor).numel() * tensor.element_size() for tensor in _tensors(model))
    free = available_memory() if next(model.parameters()).device.type == "cpu" else None
    if free is not None and needed > free:
        raise UserError(
            f"{ASKED}: a frozen copy of the initial weights needs {size_of(needed)} of memory, "
            f"{size_of(free)} is available; train adapters (--model.lora.r 16), whose reference costs none"
        )
    frozen = copy.deepcopy(model) if copied is None else copied()
    frozen.requires_grad_(False).eval()
    rank_zero_info(f"reference: a frozen copy of the initial weights, {size_of(needed)} more on every device")
    return Reference(frozen, None if seam is None else find_head(frozen, seam.backend), frozen=True)


def _check_adapters(model: CausalLM) -> None:
    """Refuse adapters without a switch, and those beside which other weights train; tell where they begin elsewhere."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    others = [name for name in trained if not any(part in name for part in ADAPTED)]
    if others or not _switches(model):
        what = f"train {others[0]} too" if others else "have no switch"
        raise UserError(f"{ASKED}: the adapters of the model {what}, so the model without them is not a reference")
    if not stand_alone(model):
        raise UserError(
            f"{ASKED}: the initialisation of the adapters changed the base weights, so the model without them "
            "is not a reference (--model.lora.init_lora_weights)"
        )
    moved = (bool(_local(w).detach().any()) for name, w in model.named_parameters() if ".lora_B." in name)
    if next(model.parameters()).device.type != "meta" and any(moved):
        rank_zero_info("reference: the adapters have been trained before; it is the model without them")


def _switches(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _tensors(model: nn.Module) -> list[Any]:
    return [*model.parameters(), *model.buffers()]


def _a_weight(model: nn.Module) -> Tensor:
    """Return a weight as it is stored; what is gathered may have the dtype of the products."""
    stored: list[Any] = list(model.parameters())
    return next((weight for weight in stored if hasattr(weight, "placements")), stored[0])


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
