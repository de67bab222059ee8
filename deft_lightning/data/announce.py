"""What a run says of its data before it trains on it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning.atomic import whole_file
from deft_lightning.data.prepared.build import BAD_ROWS
from deft_lightning.data.prepared.recipe import title
from deft_lightning.data.preview import as_text
from deft_lightning.data.settings import DataSettings
from deft_lightning.data.splits import Splits
from deft_lightning.terminal import visible

SHOWN = 1200  # letters of an example in the log


def announce(splits: Splits, settings: DataSettings, trainer: Trainer | None) -> list[int]:
    """Tell what was decided, skipped, counted and will be learnt, with two examples.

    Args:
        splits: The prepared rows.
        settings: Of the data module.
        trainer: The list of skipped rows is put beside its logs.

    Returns:
        The special tokens that end the responses.
    """
    for remark in splits.remarks:
        rank_zero_info(remark)
    if splits.skipped:
        listed = _keep_bad_rows(splits.folder, trainer)
        rank_zero_warn(
            f"{title(settings.source)}: skipped {splits.skipped} rows, listed in {listed}; the first:"
            f" {splits.bad_rows[0]}"
        )
    if settings.validation_fraction and settings.validation_source is None and not splits.size("validation"):
        rank_zero_warn(f"{title(settings.source)}: too few rows to hold any out, so there is no validation")
    for line in splits.columns.lines():
        tell = rank_zero_warn if line.startswith("not used") or "(no row has it)" in line else rank_zero_info
        tell(f"{title(settings.source)}: {line}")
    for line in splits.audited["lines"]:
        rank_zero_info(line)
    for line in splits.audited["warnings"]:
        rank_zero_warn(line)
    for report in splits.reports.values():
        if report.examples:
            rank_zero_info(str(report))
        for remark in [*report.too_long(settings.max_length), *report.remarks()]:
            rank_zero_warn(remark)
    ends = splits.turn_ends()
    for sample in splits.samples("train", 2):
        text = as_text(sample)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
        id = visible(" ".join(sample.id.split()))
        rank_zero_info(f"example {id}, [supervised], {{noisy}}, ~cut off~:\n{shown}")
    return ends


def _keep_bad_rows(folder: Path, trainer: Trainer | None) -> Path:
    """Put the list of skipped rows beside the logs, if there are any, and return where it is."""
    log_dir = trainer.log_dir if trainer is not None else None
    if trainer is None or log_dir is None:
        return folder / BAD_ROWS
    target = Path(log_dir) / BAD_ROWS
    if trainer.is_global_zero:
        with whole_file(target) as partial:
            shutil.copyfile(folder / BAD_ROWS, partial)
    return target
