"""Lines of libraries that say nothing to whoever trains: exactly these are left out, and nothing else.

Each is the beginning of a known text. What is not in these lists is shown. A warning of this package is its text,
without the file and line that Python puts before it: it is about a run and not about code.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

LOGGER = "lightning.pytorch.utilities.rank_zero"  # what Lightning's information goes through
# Advertisements for services, at the start of every run.
TIPS = (
    "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]",
    "💡 Tip: For seamless cloud uploads and versioning, try installing [litmodels]",
)
# For every product with an 8-bit base, in every step.
CASTS = ("MatMul8bitLt: inputs will be cast from",)
# Of a kernel that would be fetched from the hub; products without it are exact and slower.
KERNELS = ("Failed to load CPU gemm_4bit_forward from kernels-community",)
LOGGERS = {LOGGER: TIPS, "bitsandbytes.autograd._functions": CASTS, "bitsandbytes.backends.cpu.ops": KERNELS}
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Loader processes do not help tokens that are in memory already.
    (r".*does not have many workers.*", Warning),
    # Lightning's own use of torch.
    (r".*treespec.*", Warning),
    # Every run has a folder of its own, so a resumed one always checkpoints to another.
    (r"The dirpath has changed from.*", Warning),
    # The list of validation loaders of a run that asked for no validation.
    (r"Total length of `list` across ranks is zero\. Please make sure this was your intention\.", Warning),
    # peft asks transformers under the old name.
    (r"`is_gradient_checkpointing` is deprecated and will be removed in v6\.", FutureWarning),
)


class LeftOut(logging.Filter):
    """Leaves known lines out.

    Args:
        lines: How they begin.
    """

    def __init__(self, lines: tuple[str, ...]) -> None:
        super().__init__()
        self.lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return not record.getMessage().startswith(self.lines)


class PlainWarnings:
    """Writes a warning of this package as ``warning: text``, and any other as it was written before.

    Args:
        others: Formats those, as ``warnings.formatwarning``.
    """

    HOME = Path(__file__).resolve().parents[1]

    def __init__(self, others: Callable[..., str]) -> None:
        self.others = others

    def __call__(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        """Return what is written."""
        if self.HOME in Path(filename).resolve().parents:
            return f"warning: {message}\n"
        return self.others(message, category, filename, lineno, line)


def hush() -> None:
    """Leave the known lines out from here on, in this process, and the places before warnings of this package."""
    if not isinstance(warnings.formatwarning, PlainWarnings):
        warnings.formatwarning = PlainWarnings(warnings.formatwarning)
    for name, lines in LOGGERS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, LeftOut) for one in logger.filters):
            logger.addFilter(LeftOut(lines))
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)  # Python keeps one of each
