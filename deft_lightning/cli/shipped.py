"""``--config deft:NAME``: the configurations that come with the package, wherever it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from deft_lightning.errors import UserError
from deft_lightning.shipped_models import PREFIX

OPTIONS = ("--config", "-c")
PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Return where the configurations lie: inside an installed package, beside the package in a clone.

    Raises:
        UserError: They are in neither place: the package was copied without them.
    """
    for place in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise UserError(f"--config {PREFIX}NAME: the package in {PACKAGE} was installed without its configurations")


def names() -> list[str]:
    """Return the names that ``deft:`` knows: paths below ``configs``, without ``.yaml``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))


def path_of(value: str) -> str:
    """Return the file that the value of ``--config`` means; a value without the prefix is returned as it is.

    Args:
        value: ``deft:NAME``, a file, or options as ``{NAME: VALUE}``.

    Raises:
        UserError: There is no such configuration; says which are close, and which there are.
    """
    if value.startswith(PREFIX):
        name = value.removeprefix(PREFIX).removesuffix(".yaml")
        if name not in (known := names()):
            raise UserError(f"--config {value} is unknown.{_close(name, known)} Known: {', '.join(known)}")
        return str(folder() / f"{name}.yaml")
    if value.startswith("configs/") and not Path(value).exists():
        name = value.removeprefix("configs/").removesuffix(".yaml")
        if name in names():
            raise UserError(f"--config {value} does not exist here; the package has it as --config {PREFIX}{name}")
    return value


def _close(name: str, known: list[str]) -> str:
    """Return a suggestion: of the whole name, or of its last part, for ``lora`` means ``model/lora``."""
    by_last: dict[str, list[str]] = {}
    for one in known:
        by_last.setdefault(one.rpartition("/")[2], []).append(one)
    lasts = get_close_matches(name.rpartition("/")[2].lower(), by_last, n=2, cutoff=0.6)
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    meant = dict.fromkeys([*close, *(one for last in lasts for one in by_last[last])])
    return f" Did you mean {' or '.join(PREFIX + one for one in list(meant)[:3])}?" if meant else ""


def resolved(arguments: Sequence[str]) -> list[str]:
    """Return a command line with files in place of the names that ``--config`` was given.

    Raises:
        UserError: A name is unknown.
    """
    words = [str(word) for word in arguments]
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in OPTIONS and equals:
            words[at] = f"{option}={path_of(value)}"
        elif at and words[at - 1] in OPTIONS:
            words[at] = path_of(word)
    return words
