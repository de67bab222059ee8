"""``python -m deft_lightning study --config configs/study/regimes.yaml``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deft_lightning.errors import UserError


def main(args: Sequence[str] | None = None) -> None:
    """Run the verb; mistakes end with one line and status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from deft_lightning.cli import DeftParser
    from deft_lightning.study.plan import Study
    from deft_lightning.study.report import text
    from deft_lightning.study.run import run_study

    parser = DeftParser(
        prog="python -m deft_lightning study",
        description="Train every objective in every regime of prior and noise, and compare. Finished runs are kept: a"
        " study that was stopped goes on where it was.",
    )
    parser.add_argument("--config", action="config", help="A study, for example configs/study/regimes.yaml.")
    parser.add_class_arguments(Study)
    parser.add_argument("--output", type=str, default="logs/study", help="Folder of the study.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes, each on one thread.")
    parser.add_argument("--smoke", type=bool, default=False, help="The same kinds of runs in minutes, to try it out.")
    try:
        options = parser.parse_args(list(sys.argv[1:] if args is None else args))
        if options.workers < 1:
            raise UserError(f"--workers must be at least 1, got {options.workers}")
        made = parser.instantiate_classes(options)
        study = Study(**{name: made[name] for name in Study.__dataclass_fields__})
        root = Path(options.output)
        report = run_study(study.smoke() if options.smoke else replace(study), root, options.workers)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the finished runs are kept, the same command goes on\n")
        sys.exit(130)
    print(text(report))
    print(f"study: {root.resolve()}")


if __name__ == "__main__":
    main()
