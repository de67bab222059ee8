"""The folder of prepared data: found in the cache under all that changes it, or filled now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deft_lightning._version import __version__
from deft_lightning.data.encoding.template import template_text
from deft_lightning.data.encoding.tokenizer import tokenizer_identity
from deft_lightning.data.prepared.build import build
from deft_lightning.data.prepared.cache import cached, file_identity, source_identity, source_state
from deft_lightning.data.prepared.recipe import Recipe, title
from deft_lightning.data.sources.read import weights
from deft_lightning.errors import UserError

FORMAT = 7  # of the files in a folder; another number is another folder


def prepared_folder(
    recipe: Recipe, tokenizer: Any | None, chat_template: str | None, root: Path, num_proc: int
) -> Path:  # fmt: skip
    """Return the folder of the prepared data, prepared now if nobody has.

    Args:
        recipe: What to prepare.
        tokenizer: None builds one from the training rows.
        chat_template: Template of a tokenizer that is built.
        root: Folder of caches.
        num_proc: Worker processes.

    Raises:
        UserError: A row that cannot be used, or files that change while they are read.
    """
    about = "built" if tokenizer is None else tokenizer_identity(tokenizer)
    template = template_text(chat_template) if tokenizer is None and chat_template else None
    named = [name for source in (recipe.source, recipe.validation_source) if source for name in weights(source)]
    audits = [Path(name).expanduser() for name in (recipe.exclude, recipe.weights_from) if name is not None]

    def state() -> list[tuple[Any, ...]]:
        return [*source_state(named), *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in audits)]

    for file in audits:
        if not file.is_file():
            raise UserError(f"{file}: no such file (--data.exclude, --data.weights_from)")
    before = state()
    sources = [*map(source_identity, named), *map(file_identity, audits)]

    def fill(folder: Path) -> None:
        build(recipe, tokenizer, chat_template, folder, num_proc)
        if state() != before:  # it would be kept as what the files held before
            name = ", ".join([title(recipe.source), *map(str, audits)])
            raise UserError(f"{name}: changed while it was being read; start again when nothing writes to it")

    return cached(root, [__version__, FORMAT, recipe, sources, about, template], fill)
