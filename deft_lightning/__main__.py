"""``python -m deft_lightning``: the version at once, everything else through the command line."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from deft_lightning._version import __version__
from deft_lightning.cli.crash import ended
from deft_lightning.terminal import guarded

# Verbs that are not Lightning's and have a command line of their own.
ALONE = {
    "figures": "deft_lightning.figures.command",
    "score": "deft_lightning.evaluation.score",
    "study": "deft_lightning.study.command",
}


def main() -> None:
    """Run the command line; mistakes end with one line and status 2."""
    if sys.argv[1:] in (["--version"], ["-V"]):  # before torch and Lightning are imported: it takes no time
        print(f"deft_lightning {__version__}")
        return
    with guarded(), ended():
        if sys.argv[1:2] and sys.argv[1] in ALONE:  # likewise: no model is needed, or not yet
            import_module(ALONE[sys.argv[1]]).main(sys.argv[2:])
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers deadlock in forked loader processes
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls the deprecated names
        from deft_lightning.cli.main import run

        run()


if __name__ == "__main__":
    main()
