"""The data as the model will see it, as a page, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning._lightning import attach
from deft_lightning.atomic import check_output_file, whole_file
from deft_lightning.data.prepared.recipe import title
from deft_lightning.data.preview import page
from deft_lightning.errors import UserError


def preview(trainer: Any, module: Any, datamodule: Any | None, output: str, split: str, examples: int) -> Path:
    """Write the page and return it; arguments as those of :meth:`deft_lightning.Trainer.preview`.

    Raises:
        UserError: There is nothing to show, or the page cannot be written.
    """
    if datamodule is None or examples < 1:
        raise UserError("preview: needs data and at least one example (--examples)")
    check_output_file(output, "preview: --output")
    attach(trainer, None, datamodule)
    attach(trainer, module)  # names the tokenizer; its weights are not loaded
    datamodule.prepare_data()
    datamodule.setup("fit")
    samples = datamodule.samples(split, examples)
    if not samples:
        raise UserError(f"preview: there are no {split} examples (--split, --data.validation_fraction)")
    reports = [*datamodule.audited, *(str(report) for report in datamodule.reports.values())]
    path = Path(output)
    with whole_file(path) as partial:
        partial.write_text(page(f"{title(datamodule.source)}: {split}", samples, reports), encoding="utf-8")
    rank_zero_info(f"preview: {path.resolve()}")
    return path
