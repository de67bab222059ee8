"""The verb ``figures``: a parser of its own, so that drawing does not wait for Lightning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from deft_lightning.errors import UserError, did_you_mean

PROG = "python -m deft_lightning figures"
OBJECTIVES = ("NLL", "Likelihood", "Cayley", "DEFT")
OUTPUT = "without a format in the name, both PNG and SVG are written; several files are allowed"
RUN = "folder with TensorBoard event files (logs/version_0), or a folder that contains one such folder"


class FigureParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        words = message.partition("unrecognized arguments: ")[2].split() or message.partition("choice: ")[2].split()
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known = [*action.choices]
                known += [option for parser in action.choices.values() for option in parser._option_string_actions]
        hint = did_you_mean(words[0].strip("'\""), known) if words else ""
        sys.stderr.write(f"error: figures: {message}{'.' if hint else ''}{hint}\n")
        self.exit(2)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    top = FigureParser(prog=PROG, description="Draw figures of runs, objectives and probes; needs matplotlib.")
    kinds = top.add_subparsers(metavar="KIND", required=True, dest="kind")

    def kind(name: str, draw: Callable[[argparse.Namespace], list[Path]], says: str, more: str = "") -> FigureParser:
        subparser = kinds.add_parser(name, prog=f"{PROG} {name}", help=says, description=f"{says}.\n{more}".strip())
        subparser.set_defaults(draw=draw)
        subparser.add_argument("--output", required=True, nargs="+", metavar="FILE", help=OUTPUT)
        return subparser

    one = kind("run", _run, "one run: NLL, focus, and the gate on clean and noisy labels")
    one.add_argument("run", metavar="RUN", help=RUN)

    focus = kind(
        "focus", _focus, "mean focus alpha and mean p over training, one panel per run",
        f"\n  {PROG} focus weak=logs/version_0 strong=logs/version_1 --output focus",
    )  # fmt: skip
    focus.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help=f"{RUN}; runs of one label are averaged")
    focus.add_argument("--progress", choices=("steps", "share"), default="steps", help="to the right; default: steps")
    focus.add_argument("--together", action="store_true", help="one panel for all runs")

    for name, draw in (("gates", _gates), ("losses", _losses)):
        curves = kind(name, draw, f"{name[:-1] if name == 'gates' else 'loss'} of objectives against p")
        _objectives(curves)
        curves.add_argument(
            "--collision", nargs="+", type=float, default=[0.1, 0.5, 0.9], metavar="C",
            help="collision probabilities, one line each where the objective depends on them; default: 0.1 0.5 0.9",
        )  # fmt: skip
        curves.add_argument(
            "--chance", nargs="+", type=float, default=[0.01], metavar="U",
            help="chances of the label, one line each where the objective compares p with them; default: 0.01",
        )  # fmt: skip

    scatter = kind("scatter", _scatter, "tokens by p and entropy, shaded by their gradient, one panel per objective")
    scatter.add_argument("probe", metavar="PROBE", help="folder that the verb probe wrote to (its --output)")
    _objectives(scatter)
    scatter.add_argument("--tokens", type=int, default=2000, metavar="N", help="points per panel; default: 2000")

    bars = kind(
        "bars", _bars, "values of methods in groups: mean, standard error, and every seed",
        '\nFrom a file {"group": {"method": [values]}}, or from a scalar of runs:\n'
        f"  {PROG} bars results.json --output bars\n"
        f"  {PROG} bars --tag val/nll noisy/NLL=logs/version_0 noisy/DEFT=logs/version_1 --output bars",
    )  # fmt: skip
    bars.add_argument("sources", nargs="+", metavar="SOURCE", help="a JSON file; with --tag: [GROUP/]METHOD=RUN ...")
    bars.add_argument("--tag", help="scalar of the runs, such as val/nll; equal names are seeds of one method")
    bars.add_argument("--take", choices=("last", "min", "max"), default="last", help="of its values; default: last")
    bars.add_argument("--value", help="beside the axis; default: the tag")
    bars.add_argument("--title", default="", help="of the figure")
    return top


def parsers() -> dict[str, list[argparse.ArgumentParser]]:
    """Return the parsers of all kinds of figures."""
    (kinds,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {"figures": list(kinds.choices.values())}


def _objectives(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), metavar="NAME",
        help=f"'Tsallis(q=0.3)' sets options, my_pkg.Mine is your own; default: {' '.join(OBJECTIVES)}",
    )  # fmt: skip


def _split(text: str, mark: str) -> tuple[str, str] | None:
    """Cut at the first mark that is not inside brackets: `Tsallis(q=0.3)=logs/version_0`."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            return text[:at], text[at + 1 :]
    return None


def _run(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.trajectories import run_figure

    return run_figure(args.run, args.output)


def _focus(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.runs import labels
    from deft_lightning.figures.trajectories import focus_trajectories

    # A folder whose own name has an equals sign is a run without label.
    parts = [None if Path(text).exists() else _split(text, "=") for text in args.runs]
    plain = iter(labels([text for text, part in zip(args.runs, parts, strict=True) if part is None]))
    named: dict[str, list[str | Path]] = {}
    for text, part in zip(args.runs, parts, strict=True):
        label, run = part or (next(plain), text)
        named.setdefault(label, []).append(run)
    return focus_trajectories(named, args.output, progress=args.progress, together=args.together)


def _curves(args: argparse.Namespace) -> dict[str, list[float]]:
    return {"collision": args.collision, "chance": args.chance}


def _gates(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.curves import gate_curves
    from deft_lightning.objectives.parse import parse_objective

    return gate_curves([parse_objective(text) for text in args.objectives], args.output, **_curves(args))


def _losses(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.curves import loss_curves
    from deft_lightning.objectives.parse import parse_objective

    return loss_curves([parse_objective(text) for text in args.objectives], args.output, **_curves(args))


def _scatter(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.scatter import gradient_scatter
    from deft_lightning.objectives.parse import parse_objective

    objectives = [parse_objective(text) for text in args.objectives]
    return gradient_scatter(args.probe, objectives, args.output, most=args.tokens)


def _bars(args: argparse.Namespace) -> list[Path]:
    from deft_lightning.figures.bars import comparison_bars, read_table
    from deft_lightning.figures.runs import scalar

    if args.tag is None:
        if len(args.sources) != 1:
            raise UserError(f"figures: bars reads one JSON file, got {len(args.sources)}; for runs, set --tag")
        table = read_table(args.sources[0])
        return comparison_bars(table, args.output, value=args.value or "value", title=args.title)
    table = {}
    for source in args.sources:
        if (part := _split(source, "=")) is None:
            raise UserError(f"figures: --tag {args.tag} must be [GROUP/]METHOD=RUN, got {source}")
        group, method = _split(part[0], "/") or ("", part[0])
        values = scalar(part[1], args.tag)[1]
        taken = {"last": values[-1], "min": min(values), "max": max(values)}[args.take]
        table.setdefault(group, {}).setdefault(method, []).append(taken)
    return comparison_bars(table, args.output, value=args.value or args.tag, title=args.title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb: draw, and print the files; a user's mistake ends with one line on stderr and status 2."""
    args = parser().parse_args(arguments)
    try:
        for path in args.draw(args):
            print(path)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
