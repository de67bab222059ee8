"""Which row kernel runs: Triton on CUDA, torch everywhere."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

from deft_lightning.errors import UserError

Backend = Literal["auto", "torch", "triton"]


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Return whether Triton runs its kernels in Python, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_kernel(backend: str, device: str, dtype: torch.dtype) -> str:
    """Return ``torch`` or ``triton`` for tensors of a device type and dtype.

    Raises:
        UserError: An unknown backend, or one that cannot run on these tensors.
    """
    if backend not in ("auto", "torch", "triton"):
        raise UserError(f"linear head: unknown backend {backend!r}; known: auto, torch, triton")
    if backend == "torch":
        return "torch"
    why = None
    if dtype == torch.float64:
        why = "its kernels do not compute in float64"
    elif not _triton_installed():
        why = "the package triton is not installed"
    elif device != "cuda" and not _interpreted():
        why = f"it needs CUDA tensors, these are on {device}"
    if backend == "auto":
        return "torch" if why is not None or device != "cuda" else "triton"
    if why is not None:
        raise UserError(f"linear head: backend triton cannot run, {why}; use backend torch")
    return "triton"
