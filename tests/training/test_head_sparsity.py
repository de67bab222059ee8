"""The option `head_sparsity`: what it takes, where it is in force, and what a run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from worlds import adam, bare_trainer, constant, random_example, save_tiny_llama

from deft_lightning import SFTModule
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, KLAnchor

LINE = "head: leaves columns of the gradient out, up to 3.12% of its norm"


@pytest.fixture(autouse=True)
def _lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def module(folder: Path, **options: Any) -> SFTModule:
    """A model whose predictions are peaked."""
    path = save_tiny_llama(folder / "peaked", 1.0, num_hidden_layers=1)
    return SFTModule(pretrained=path, optimizer=adam, scheduler=constant, **{"head_sparsity": 2**-5, **options})


def rows() -> Any:
    return DataLoader([random_example(i, 16, 8) for i in range(8)], 4, collate_fn=TrainCollator(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [0.0, 1.0, True, "on", None])
def test_an_option_that_is_none_is_named(sparsity: Any) -> None:
    with pytest.raises(UserError, match=r"--model.head_sparsity must be off, auto, or a tolerance"):
        SFTModule(architecture={"model_type": "llama"}, head_sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["off", False])
def test_off_is_off_also_as_yaml_reads_it(sparsity: Any) -> None:
    made = SFTModule(architecture={"model_type": "llama"}, head_sparsity=sparsity)
    assert made.hparams["head_sparsity"] == made.source.head_sparsity == "off"


def test_a_fit_says_what_it_leaves_out_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = bare_trainer(tmp_path)
    trainer.fit(module(tmp_path), rows())
    assert LINE in caplog.text
    assert 0 < trainer.callback_metrics["head/kept_columns"] < 0.9
    assert 0 < trainer.callback_metrics["head/dropped"] <= 2 * 2**-5


def test_a_validation_leaves_nothing_out_and_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare_trainer(tmp_path).validate(module(tmp_path), rows(), verbose=False)
    assert "head:" not in caplog.text


@pytest.mark.parametrize(("objective", "forgetting", "leaves"), [
    (DEFT(), False, True), (DEFT(), True, True), (KLAnchor(DEFT(), 0.1), False, False),
])  # fmt: skip
def test_a_reference_counts_where_training_compares_with_it(
    tmp_path: Path, objective: Any, forgetting: bool, leaves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = module(tmp_path, objective=objective, forgetting=forgetting)
    trainer = bare_trainer(tmp_path)
    trainer.fit(made, rows())
    assert (trainer.callback_metrics["head/dropped"] > 0) == leaves
    assert ("is not used: beside a reference" in caplog.text) != leaves
