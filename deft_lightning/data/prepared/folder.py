"""The folder of prepared data: found in the cache under all that changes it, or filled now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deft_lightning._version import __version__
from deft_lightning.data.encoding.template import template_text
from deft_lightning.data.encoding.tokenizer import tokenizer_identity
from deft_lightning.data.prepared.build import build
from deft_lightning.data.prepared.cache import cached, source_identity, source_state
from deft_lightning.data.prepared.recipe import Recipe, title
from deft_lightning.data.sources.read import weights
from deft_lightning.errors import UserError

FORMAT = 6  # of the files in a folder; another number is another folder


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
    before = source_state(named)
    sources = [source_identity(name) for name in named]

    def fill(folder: Path) -> None:
        build(recipe, tokenizer, chat_template, folder, num_proc)
        if source_state(named) != before:  # it would be kept as what the files held before
            name = title(recipe.source)
            raise UserError(f"{name}: has changed while it was read; start again once nobody writes to it")

    return cached(root, [__version__, FORMAT, recipe, sources, about, template], fill)
