"""Command line: one table of verbs, one parser for each, errors of one line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from deft_lightning.cli.crash import ended
from deft_lightning.cli.dispatch import dispatch
from deft_lightning.terminal import guarded

if TYPE_CHECKING:
    from deft_lightning.data.module import InstructionDataModule
    from deft_lightning.training.module import SFTModule


def run(module: type[SFTModule] | None = None, data: type[InstructionDataModule] | None = None) -> None:
    """Run the command line of ``sys.argv``; a user's mistake ends with one line and status 2.

    A script with a module of one's own has every verb and option of ``python -m deft_lightning``, and those that its
    classes add below ``--model.`` and ``--data.``::

        from deft_lightning.cli import run
        from my_package import MyModule

        if __name__ == "__main__":
            run(MyModule)

    Args:
        module: A subclass of :class:`~deft_lightning.SFTModule`; default: that class.
        data: A subclass of :class:`~deft_lightning.InstructionDataModule`; default: that class.
    """
    with guarded(), ended():
        dispatch(sys.argv[1:], module, data)


__all__ = ["run"]
