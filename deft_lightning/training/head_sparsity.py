"""The option `head_sparsity`: what the fused head may leave out of the gradient of the logits, and what it left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.errors import UserError
from deft_lightning.models import HeadSeam
from deft_lightning.ops import ColumnSparsity
from deft_lightning.ops.columns import AUTO_TOLERANCE, AUTO_VOCABULARY

Sparsity = float | Literal["off", "auto"] | bool  # YAML reads `off` as false
OPTION = "--model.head_sparsity"


def check_sparsity(sparsity: object) -> None:
    """Refuse what is not a tolerance.

    Raises:
        UserError: Names the option.
    """
    number = isinstance(sparsity, float | int) and not isinstance(sparsity, bool) and 0 < sparsity < 1
    if not number and sparsity not in ("off", "auto"):
        raise UserError(f"{OPTION} must be off, auto, or a tolerance above 0 and below 1, not {sparsity!r}")


def sparsity_of(setting: Sparsity, seam: HeadSeam, device: str) -> ColumnSparsity | None:
    """Return what the head of a run is asked to leave out, None for nothing.

    `auto` leaves columns out on a CPU, where a vocabulary is large enough for that to be faster.

    Args:
        setting: The option.
        seam: The head.
        device: ``cpu`` or ``cuda``.
    """
    small = seam.projection.weight.shape[0] < AUTO_VOCABULARY
    if setting == "off" or (setting == "auto" and (device != "cpu" or small)):
        return None
    return ColumnSparsity(AUTO_TOLERANCE if setting == "auto" else float(setting))


def tell_head(sparsity: ColumnSparsity | None, anchored: bool) -> None:
    """Say that a training leaves columns out, or why it does not.

    Args:
        sparsity: Of the head; None where nothing was to be left out.
        anchored: Whether the objective compares predictions with those of a reference model.
    """
    if sparsity is not None and anchored:
        rank_zero_info(f"{OPTION} is not used: beside a reference model the whole gradient is taken")
    elif sparsity is not None:
        share = f"{sparsity.tolerance:.2%}"
        rank_zero_info(f"head: leaves columns of the gradient out, up to {share} of its norm ({OPTION} off: none)")


def log_head(log: Callable[..., Any], sparsity: ColumnSparsity | None) -> None:
    """Log what the head left out since the last call, over all ranks.

    Args:
        log: Of the module.
        sparsity: Of the head; None where it leaves nothing out.
    """
    if sparsity is None:
        return
    kept, bound = sparsity.taken()
    log("head/kept_columns", kept, sync_dist=True)
    log("head/dropped", bound, sync_dist=True, reduce_fx="max")
