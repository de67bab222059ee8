"""A run that is cut and continued ends with the weights of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from worlds import SHAPE

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data import Noise, ResponseSwap
from deft_lightning.objectives import DEFT, Floored, Likelihood, Objective, Rescaled, Schedule
from deft_lightning.training.optim import CosineWithWarmup

pytestmark = pytest.mark.slow

# With batch 4: five whole batches an epoch and a short one.
ROWS = [{"question": f"{i} + {i * 7}", "answer": str(8 * i)} for i in range(22)]


class Stop(Callback):
    """Ends a run that was planned for longer, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def fit(
    source: str, root: Path, steps: int, total: int, *, workers: int = 0, resume: str | None = None,
    objective: Objective | None = None, epochs: int = -1, **kw: Any,
) -> Any:  # fmt: skip
    torch.manual_seed(0)
    module = SFTModule(
        objective or DEFT(),
        architecture=SHAPE,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, total_steps=total if epochs == -1 else None),
    )
    data = InstructionDataModule(
        source, validation_fraction=0.0, tokenizer_size=0, batch_size=4, num_workers=workers,
        noise=Noise(ops=[ResponseSwap(0.5)]),
    )  # fmt: skip
    checkpoint = Checkpoint()
    trainer = Trainer(
        max_steps=total, max_epochs=epochs, default_root_dir=str(root), logger=False,
        callbacks=[Stop(steps), checkpoint],
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", monitors=False,
        gradient_clip_val=None, **kw,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    assert trainer.global_step == steps
    return module.model.state_dict(), str(checkpoint.last_model_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 4, 6, 7, 11, 12])  # 6 and 12 are the ends of epochs
def test_resume_is_bit_exact(cut: int, workers: int, source: str, tmp_path: Path) -> None:
    if workers and cut not in (4, 6):
        pytest.skip("starting worker processes is slow; the cuts that differ for them are covered by 4 and 6")
    whole, _ = fit(source, tmp_path / "whole", 14, 14)
    _, last = fit(source, tmp_path / "cut", cut, 14, workers=workers)
    resumed, _ = fit(source, tmp_path / "resumed", 14, 14, workers=workers, resume=last)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


@pytest.mark.parametrize("cut", [1, 4, 6, 7])  # 6 is the end of an epoch
def test_resume_is_bit_exact_where_the_schedule_is_planned_over_epochs(cut: int, source: str, tmp_path: Path) -> None:
    """The plan asks for the loader, which is made before the checkpoint has told it its place."""
    whole, _ = fit(source, tmp_path / "whole", 12, 12, epochs=2)
    _, last = fit(source, tmp_path / "cut", cut, 12, epochs=2)
    resumed, _ = fit(source, tmp_path / "resumed", 12, 12, epochs=2, resume=last)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


def test_resume_inside_an_accumulated_epoch_is_bit_exact(source: str, tmp_path: Path) -> None:
    whole, _ = fit(source, tmp_path / "whole", 7, 7, accumulate_grad_batches=2)
    _, last = fit(source, tmp_path / "cut", 4, 7, accumulate_grad_batches=2)
    resumed, _ = fit(source, tmp_path / "resumed", 7, 7, resume=last, accumulate_grad_batches=2)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


@pytest.mark.parametrize(
    "objective",
    [
        Rescaled(),
        Rescaled(decay=0.5),
        Schedule(switch=0.4),
        Schedule(switch=0.2, blend=0.6),
        Floored(base=Likelihood(), floor=0.9, decay="linear"),
        Rescaled(base=Schedule(switch=0.2, blend=0.6)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_exact_under_objectives_that_depend_on_the_run(
    objective: Objective, accumulate: int, source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"objective": objective, "accumulate_grad_batches": accumulate}
    whole, _ = fit(source, tmp_path / "whole", 9, 9, **options)
    _, last = fit(source, tmp_path / "cut", 4, 9, **options)
    resumed, _ = fit(source, tmp_path / "resumed", 9, 9, resume=last, **options)
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0
    # The plain objective ends elsewhere, and so does a run that forgets, though Adam hardly minds another scale.
    plain, _ = fit(source, tmp_path / "plain", 9, 9, accumulate_grad_batches=accumulate)
    assert max(float((whole[name] - plain[name]).abs().max()) for name in whole) > 1e-6
    if objective.tracks is None:
        return
    saved = torch.load(last, weights_only=True)
    del saved["deft_lightning"]["gates"]
    torch.save(saved, tmp_path / "forgetful.ckpt")
    other, _ = fit(source, tmp_path / "other", 9, 9, resume=str(tmp_path / "forgetful.ckpt"), **options)
    assert max(float((whole[name] - other[name]).abs().max()) for name in whole) > 1e-6


def test_different_data_would_be_noticed(source: str, tmp_path: Path) -> None:
    whole, _ = fit(source, tmp_path / "whole", 3, 14)
    other, _ = fit(source, tmp_path / "other", 4, 14)
    assert max(float((whole[name] - other[name]).abs().max()) for name in whole) > 0.0


def test_the_schedule_follows_the_new_limits_not_the_checkpoint(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    old = CosineWithWarmup(torch.optim.SGD([parameter], lr=1.0), total_steps=10)
    for _ in range(10):
        old.optimizer.step()
        old.step()
    assert old.get_last_lr() == [0.0]
    new = CosineWithWarmup(torch.optim.SGD([parameter], lr=2.0), total_steps=20)
    new.load_state_dict(old.state_dict())
    assert new.optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * new.factor(10))
    assert new.factor(10) > 0.5
