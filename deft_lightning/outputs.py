"""Whether a result can be written, asked before the work that it takes and not after it."""

from __future__ import annotations

from pathlib import Path

from deft_lightning.atomic import partial_name
from deft_lightning.errors import UserError


def check_output(path: str | Path, option: str, *, make: bool = True) -> None:
    """Refuse a file or folder that could not be written.

    Args:
        path: What is to be written.
        option: Who named it, for the message.
        make: Make the folder that it is to lie in.

    Raises:
        UserError: It lies below a file, or nothing can be written there.
    """
    target = Path(path)
    probe = partial_name(target.with_name(f"{target.name}.try"))
    try:
        if make:
            target.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def check_output_file(path: str | Path, option: str, *, make: bool = True) -> None:
    """Refuse as :func:`check_output` does, and a folder of that name."""
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder, not a file")
    check_output(path, option, make=make)
