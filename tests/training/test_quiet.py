"""Lines of libraries that are left out: exactly the known ones, which the installed versions still write."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import pytest
import transformers
from worlds import ROOT, fit_command

from deft_lightning.training.quiet import LOGGER, TIPS, hush

PEFT = "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead."
SILENT: dict[str, type[Warning]] = {
    PEFT: FutureWarning,
    "Total length of `list` across ranks is zero. Please make sure this was your intention.": UserWarning,
    "The dirpath has changed from 'a' to 'b', therefore `best_model_score` won't be reloaded.": UserWarning,
    "The 'train_dataloader' does not have many workers which may be a bottleneck.": UserWarning,
}
SHOWN: dict[str, type[Warning]] = {
    "`is_gradient_checkpointing` is deprecated": UserWarning,
    "`use_cache` is deprecated and will be removed in v6.": FutureWarning,
    "Total length of `DataLoader` across ranks is zero. Please make sure this was your intention.": UserWarning,
    "`DataLoader` within local rank has zero length.": UserWarning,
    "The number of training batches (3) is smaller than the logging interval": UserWarning,
}


@pytest.mark.parametrize("message", [*SILENT, *SHOWN])
def test_a_warning_is_left_out_or_shown(message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush()
        warnings.warn(message, {**SILENT, **SHOWN}[message], stacklevel=1)
    assert bool(caught) == (message in SHOWN)


def test_advertisements_are_left_out_and_all_else_of_that_logger_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    hush()
    logger = logging.getLogger(LOGGER)
    kept = "💡 Tip: something that we do not know"
    with caplog.at_level(logging.INFO, logger=LOGGER):
        for tip in TIPS:
            logger.info("%s(https://pypi.example) to enable it", tip)
        logger.info(kept)
    assert [record.getMessage() for record in caplog.records] == [kept]


def test_it_is_set_up_once() -> None:
    def state() -> tuple[object, ...]:
        return len(warnings.filters), len(logging.getLogger(LOGGER).filters), warnings.formatwarning

    with warnings.catch_warnings():
        hush()
        before = state()
        hush()
        assert state() == before


def test_a_warning_of_this_package_is_written_without_its_place() -> None:
    hush()
    ours = str(ROOT / "deft_lightning" / "data" / "announce.py")
    assert warnings.formatwarning("rows.jsonl: 3 rows", UserWarning, ours, 54) == "warning: rows.jsonl: 3 rows\n"
    theirs = warnings.formatwarning("deprecated", UserWarning, str(ROOT / "my_lightning" / "model.py"), 7)
    assert "model.py:7: " in theirs and "deprecated" in theirs


def test_libraries_still_write_what_is_left_out() -> None:
    """Else an entry has lost its meaning, and is to be taken out."""
    pytorch = Path(lightning.__file__).parent / "pytorch"
    places = {
        "try installing [litlogger]": pytorch / "trainer/connectors/logger_connector/logger_connector.py",
        "try installing [litmodels]": pytorch / "trainer/connectors/callback_connector.py",
        "across ranks is zero.": pytorch / "utilities/data.py",
        "Please make sure this was your intention.": pytorch / "utilities/data.py",
        "The dirpath has changed from": pytorch / "callbacks/model_checkpoint.py",
        "does not have many workers": pytorch / "trainer/connectors/data_connector.py",
        "`is_gradient_checkpointing` is deprecated": Path(transformers.__file__).parent / "modeling_utils.py",
    }
    for text, file in places.items():
        assert text in file.read_text(encoding="utf-8"), f"{file}: no {text!r}"


@pytest.mark.slow
def test_the_log_of_a_run_has_its_lines_and_none_of_the_clutter(tmp_path: Path) -> None:
    words = fit_command(tmp_path, "--trainer.log_every_n_steps", "2", "--model.lora.r", "2")
    at = words.index("--trainer.enable_progress_bar")
    command = [sys.executable, "-m", "deft_lightning", *words[:at], *words[at + 2 :]]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    log = done.stdout
    for clutter in ("litlogger", "litmodels", "FLOPs", "Modules in", "across ranks is zero", "FutureWarning", "Sanity"):
        assert clutter not in log, clutter
    for line in ("model: ", "step 2/4  nll ", "step 4/4  nll ", "trained: 4 optimizer steps in ", "exported: ",
                 "checkpoint: ", "export: ", "look at it: tensorboard --logdir "):  # fmt: skip
        assert line in log, line
    assert log.index("exported: ") < log.index("trained: ") < log.index("export: ")
