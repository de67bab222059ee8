"""A step waits for the device once, before the optimizer: to know whether it is finite, and what all ranks counted."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from worlds import bare_trainer, split_data

import deft_lightning
from deft_lightning import SFTModule
from deft_lightning.models import LoRA
from deft_lightning.training.batch_checks import places_of
from deft_lightning.training.totals import StepTotals

# What gives the host a value, or a size, that the device has computed.
READS: set[Any] = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.nonzero, torch.nonzero, Tensor.masked_select,
    torch.masked_select, Tensor.unique, torch.unique, Tensor.equal, torch.equal, Tensor.allclose, torch.allclose,
    torch.is_nonzero, Tensor.repeat_interleave, torch.repeat_interleave, Tensor.argwhere, torch.argwhere,
}  # fmt: skip
PACKAGE = Path(deft_lightning.__file__).parent
# Functions that look at tensors of a CPU alone, where a look costs nothing, or that run before a batch is on a device.
ON_THE_HOST = {"check_places", "supervised_at", "__call__@loading/collate.py", "_without_empty"}


class Waits(TorchFunctionMode):
    """Counts reads of the package by the function that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A tensor made of numbers for a device is a copy that the device is waited for.
        copied = func is torch.tensor and (kwargs or {}).get("device") is not None
        if copied or func in READS or self._by_mask(func, args) or (func is torch.where and len(args) == 1):
            frames = traceback.extract_stack()[:-1]
            own = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), None)
            # What a library reads on its own account is not ours, unless we have called it for that.
            if own is not None and own.filename.startswith(str(PACKAGE)) and frames[-1] is own:
                place = str(Path(own.filename).relative_to(PACKAGE))
                if not ON_THE_HOST & {own.name, f"{own.name}@{'/'.join(place.split('/')[-2:])}"}:
                    self.found[f"{place}: {own.name}"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(func: Any, args: Any) -> bool:
        """Return whether a tensor is indexed by booleans, of which somebody has to know how many are true."""
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return False
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, Tensor) and one.dtype is torch.bool for one in index)


class AfterTheFirst(Callback):
    """Forgets what the first step has read, in which batch and model are checked."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.steps = waits, 0
        self.found: Counter[str] = Counter()

    def on_train_batch_end(self, trainer: Any, module: object, outputs: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step <= 1:
            self.waits.found.clear()
        self.steps, self.found = trainer.global_step - 1, Counter(self.waits.found)


@pytest.mark.parametrize(
    ("objective", "given", "accumulate"),
    [
        ("DEFT", {}, 1),
        ("DEFT", {}, 2),
        ("NLL", {"lora": LoRA(r=2)}, 1),
        ("Contaminated", {}, 1),
    ],
    ids=["DEFT", "two micro-batches", "LoRA", "noise model"],
)
def test_a_step_reads_once(
    objective: str, given: dict[str, Any], accumulate: int, pretrained: str, source: str, tmp_path: Path
) -> None:
    waits = Waits()
    after = AfterTheFirst(waits)
    trainer = bare_trainer(
        tmp_path, after, max_steps=5, log_every_n_steps=1000, accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    )  # fmt: skip
    data = split_data(source, tokenizer=pretrained)
    with waits:
        trainer.fit(SFTModule(objective, pretrained=pretrained, **given), data)
    assert after.steps >= 3 and after.found == {"training/totals.py: settle": after.steps}


def test_what_looks_at_a_batch_on_a_cpu_leaves_a_device_alone() -> None:
    labels = torch.zeros((2, 3), dtype=torch.int64, device="meta")
    places = torch.zeros(4, dtype=torch.int64, device="meta")
    assert places_of({"labels": labels, "supervised_at": places}) is places


def test_the_one_read_brings_all_there_is_to_know() -> None:
    totals = StepTotals()
    totals.count(torch.tensor(7))
    totals.watch(["a"], torch.tensor(1.0))
    totals.measure(torch.tensor([0.25, 3.0], dtype=torch.float64))
    totals.reduce(stop=True)
    totals.settle(torch.tensor(2.0))
    assert (totals.finite, totals.all_tokens, totals.stop, totals.measured) == (True, 7, True, [0.25, 3.0])
    totals.settle(torch.tensor(torch.inf))
    assert totals.finite is False
    totals.watch(["b"], torch.tensor(torch.nan))
    totals.reduce(stop=False)
    totals.settle(torch.tensor(2.0))
    assert totals.finite is False and not totals.stop


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA says itself what waits; the test above counts calls")
def test_cuda_is_waited_for_once_a_step(pretrained: str, source: str, tmp_path: Path) -> None:
    class Warned(Callback):
        def on_train_batch_start(self, trainer: object, module: object, batch: object, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if batch_idx else "default")

    trainer = bare_trainer(tmp_path, Warned(), max_steps=5, log_every_n_steps=1000, accelerator="gpu", devices=1)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.fit(SFTModule("DEFT", pretrained=pretrained), split_data(source, tokenizer=pretrained))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
    assert sum("totals.py" in place for place in waits) == 4
    assert [place for place in waits if str(PACKAGE) in place and "totals.py" not in place] == []
