"""Figures are drawn from real runs and look different for different data."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from deft_lightning.errors import UserError
from deft_lightning.figures import gate_curves, read_run, run_figure
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley


def test_gate_curves_draws_every_objective(tmp_path: Path) -> None:
    one = imread(gate_curves([NLL()], tmp_path / "one.png"))
    four = imread(gate_curves([NLL(), DEFT(), Cayley(), EAFT()], tmp_path / "four.png"))
    assert one.shape == four.shape and (one != four).any()
    assert gate_curves([DEFT()], tmp_path / "deft.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("noisy", [True, False])
def test_run_figure_reads_what_tensorboard_wrote(noisy: bool, tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path / "run"))
    tags = ["train/nll", "val/nll", "focus/mean", "prob/mean", "gate/mean", "gate/ess"]
    tags += ["nll/noisy", "gate/clean", "gate/noisy"] if noisy else []
    for step in range(5):
        for i, tag in enumerate(tags):
            writer.add_scalar(tag, (i + 1) / (step + 1), step)
    writer.close()
    steps, values = read_run(tmp_path / "run")["prob/mean"]
    assert steps == [0, 1, 2, 3, 4] and values == pytest.approx([4, 2, 4 / 3, 1, 0.8])
    image = imread(run_figure(tmp_path / "run", tmp_path / "run.png"))
    assert image.shape[:2] == (450, 1500) and (image[..., :3] < 0.5).any()


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TensorBoard event files"):
        run_figure(tmp_path, tmp_path / "x.png")
