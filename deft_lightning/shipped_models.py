"""``deft:NAME`` for ``--model.pretrained``: the models that come with the package, wherever it is installed."""

from __future__ import annotations

from pathlib import Path

from deft_lightning.errors import UserError, did_you_mean

PREFIX = "deft:"
FOLDER = Path(__file__).resolve().parent / "pretrained"


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package, with their prefix."""
    return sorted(f"{PREFIX}{config.parent.name}" for config in FOLDER.glob("*/config.json"))


def model_path(name: str) -> Path:
    """Return the folder that the name of a model or tokenizer means; of a hub id, a path that need not exist.

    Args:
        name: ``deft:NAME``, a folder, or a hub id.

    Raises:
        UserError: The package has no model of this name.
    """
    if not name.startswith(PREFIX):
        return Path(name).expanduser()
    if name not in (known := shipped_models()):
        raise UserError(
            f"{name}: no model of this name comes with the package.{did_you_mean(name, known)} Known:"
            f" {', '.join(known)} (--model.pretrained, --data.tokenizer)"
        )
    return FOLDER / name.removeprefix(PREFIX)
