"""The verb ``study``: objectives compared over regimes of prior and noise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deft_lightning.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from deft_lightning.cli.parser import DeftParser
    from deft_lightning.study.plan import Study
    from deft_lightning.study.pool import Workers


def study_parser() -> DeftParser:
    """Return the parser of the verb."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from deft_lightning.cli.parser import DeftParser
    from deft_lightning.study.plan import Study

    parser = DeftParser(
        prog="python -m deft_lightning study",
        description="Train every objective in every regime of prior and noise, and compare. Finished runs are "
        "kept: a stopped study resumes.",
    )
    parser.add_argument("--config", action="config", help="A study, for example deft:study/regimes.")
    parser.add_class_arguments(Study)
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder; default: logs/study/CONFIG, with --smoke logs/smoke/CONFIG.",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="Number of processes, each on one thread."
    )
    parser.add_argument(
        "--launcher", type=Literal["local", "submitit"], default="local",
        help="What runs the cells: processes of this machine, or jobs of a cluster.",
    )  # fmt: skip
    parser.add_argument(
        "--submitit", type=dict[str, Any], default={},
        help="Settings of a job, as for submitit, for example '{slurm_partition: gpu, gpus_per_node: 1, "
        "timeout_min: 120}'; `cluster: local` tries them on this machine. --workers jobs run at a time.",
    )  # fmt: skip
    parser.add_argument(
        "--smoke", type=bool, nargs="?", const=True, default=False,
        help="A small study of the same kind that takes minutes.",
    )  # fmt: skip
    return parser


def parsers() -> dict[str, list[DeftParser]]:
    """Return the parser of the verb, by its name."""
    return {"study": [study_parser()]}


def read_options(args: Sequence[str]) -> tuple[Study, Namespace]:
    """Return the study that a command line describes, and its other options."""
    from deft_lightning.study.plan import Study

    parser = study_parser()
    options = parser.parse_args(list(args))
    if options.output is None:
        named = Path(str(options.config[-1])).stem if options.config else ""
        options.output = str(Path("logs") / ("smoke" if options.smoke else "study") / named)
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}")
    if options.submitit and options.launcher != "submitit":
        raise UserError("--submitit has settings of jobs, which --launcher submitit starts")
    made = parser.instantiate_classes(options)
    return Study(**{name: made[name] for name in Study.__dataclass_fields__}), options


def _launcher(options: Namespace) -> Callable[[Path], Workers]:
    """Return what makes the workers that a command line asks for."""
    if options.launcher == "submitit":
        from deft_lightning.study.cluster import Jobs, check_settings

        check_settings(options.submitit)
        return partial(Jobs, options.workers, options=options.submitit)
    from deft_lightning.study.pool import Pool

    return partial(Pool, options.workers)


def main(args: Sequence[str] | None = None) -> None:
    """Run the verb; mistakes end with one line and status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        study, options = read_options(sys.argv[1:] if args is None else args)
        from deft_lightning.study.run import run_study
        from deft_lightning.study.tables import text

        root = Path(options.output)
        report = run_study(study.smoke() if options.smoke else study, root, _launcher(options))
    except (UserError, OSError) as error:  # OSError: a full disk, a folder not to write to
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the finished runs are kept, and the same command resumes\n")
        sys.exit(130)
    print(text(report))
    print(f"study: {root.resolve()}")


if __name__ == "__main__":
    main()
