"""The parser of a verb: Lightning's, with bounded configurations and errors of one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from deft_lightning.atomic import whole_file
from deft_lightning.cli.config_files import MODE, bounded
from deft_lightning.cli.help import WHOLE, short_help
from deft_lightning.cli.messages import one_line
from deft_lightning.cli.shipped import resolved
from deft_lightning.cli.short_names import named_classes
from deft_lightning.cli.verbs import PROGRAM, VERBS
from deft_lightning.data import known_noise
from deft_lightning.errors import UserError
from deft_lightning.evaluation import BENCHMARKS
from deft_lightning.objectives import known_objectives


def _choices() -> str:
    return (
        f"Objectives (--model.objective): {', '.join(known_objectives())}, or the class path of your own. "
        f"Label noise (--data.noise.ops+=): {', '.join(known_noise())}. "
        "Strategies (--trainer.strategy): auto (one device, or ddp over several), ddp (one process per device), fsdp2"
        " (sharded). "
        "Sources (--data.source): .jsonl, .json, .csv, .tsv, .parquet, .arrow (also .gz, .bz2, .xz, .zst), a folder or"
        " pattern of them, an address (https://, hf://, s3://), a hub id, reasoning_gym:<task>;"
        " several with --data.source '{a.jsonl: 1, b.jsonl: 0.5}'. "
        f"Benchmarks (--data.benchmarks, for test and predict): {', '.join(BENCHMARKS)}. "
        "Details of a class: --model.objective.help NAME, --data.noise.ops.help NAME. "
        "A subclass of your own: --model my_package.MyModule, --data my_package.MyData."
    )


class DeftParser(LightningArgumentParser):
    """A parser whose errors are one line that names the option and what comes close.

    Attributes:
        whole: Whether the help is to be Lightning's, with every word of each option.
    """

    whole = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # an abbreviation that is unique today is ambiguous tomorrow
        kwargs.setdefault("prog", PROGRAM)
        kwargs.setdefault("parser_mode", MODE)
        kwargs["description"] = f"{kwargs.get('description') or ''} {_choices()}".strip()
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line; files that it names are bounded, and no key in them is lost."""
        given = resolved(sys.argv[1:] if args is None else args)
        if self.prog == PROGRAM:  # that of a verb is called with the rest
            DeftParser.whole = WHOLE in given
        given = ["--help" if word == WHOLE else word for word in given]
        try:
            with bounded(), named_classes():
                namespace = super().parse_args(given, *rest, **kwargs)
        except ImportError as error:  # of what opens an address such as s3://
            raise UserError(f"{error} (named by an option or a configuration)") from None
        for group in self.groups or {}:
            if group in namespace and not isinstance(namespace[group], Namespace):
                raise UserError(f"{group}: expected options below it, as NAME: VALUE, not {namespace[group]!r}")
        return namespace

    def save(self, cfg: Namespace, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write a configuration; the file appears under its name once it is complete."""
        with whole_file(Path(path)) as partial:
            super().save(cfg, str(partial), *args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help of a verb, short unless the whole was asked for."""
        verb = VERBS.get(self.prog.split()[-1])
        if verb is not None and not DeftParser.whole:
            return short_help(self, f"{verb.help}.", _choices())
        # Without the backspace by which jsonargparse joins `--print_config` and its flags.
        return super().format_help(*args, **kwargs).replace(" \b", "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parsers: list[Any] = [getattr(ex, "subcommand_parser", None) or self]
        for action in parsers[0]._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
        options = {option for parser in parsers for option in parser._option_string_actions}
        sys.stderr.write(f"error: {UserError(one_line(message, sorted(options)))}\n")
        self.exit(2)
