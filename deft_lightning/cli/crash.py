"""How the command line ends: a known cause in one line; anything else in a file, and one line that names the file."""

from __future__ import annotations

import errno
import os
import platform
import re
import select
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deft_lightning._version import __version__
from deft_lightning.errors import UserError
from deft_lightning.ranks import RANKS, is_lost_rank
from deft_lightning.terminal import GuardedStream, visible

ON_SCREEN = "DEFT_LIGHTNING_TRACEBACK"  # set to 1, tracebacks are printed as well
LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "datasets", "jsonargparse", "tensorboard")
TOLD = 300  # letters of an unexpected error that are shown on screen
MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|alloc_failed", re.I)
WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is )?([^.]*)|(?:bus error|shared memory)", re.I)
LESS = "lower --data.batch_size or --data.max_length, set --model.gradient_checkpointing true, or take a smaller model"


class Run:
    """What is known of the run in hand, for what is said at its end.

    Attributes:
        folders: Where a crash file may go, the best first; each is asked when it is needed.
        config: Returns the configuration as text.
        saved: Returns where the run's state stands, such as `checkpoint FILE`; an empty text where nothing is saved.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.folders: list[Callable[[], str | Path | None]] = []
        self.config: Callable[[], str] = str
        self.saved: Callable[[], str] = str


RUN = Run()


def explain(error: BaseException) -> str | None:
    """Return in one line what a known error means and what to change; None for one that nobody foresaw."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":
        return text
    if is_lost_rank(error):
        return RANKS.line()
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"the package {error.name} is not installed: pip install deft-lightning brings all that training needs"
    if isinstance(error, RuntimeError) and (match := WORKER.search(str(error))):
        how = f" ({match[1].strip()})" if match[1] else ""
        return (
            f"a loader process died{how}, perhaps because memory or /dev/shm ran out: lower"
            " --data.num_workers; 0 loads in the training process"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _is(error, MEMORY):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|you tried to allocate (\d+ bytes)", text)
        wanted = f" ({next(filter(None, asked.groups()))} more were requested)" if asked else ""
        return f"out of memory{wanted}: {LESS}"
    if type(error).__name__ == "BrokenProcessPool":
        return "a process that prepares data was killed, perhaps because memory ran out: lower --data.num_proc"
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return f"out of memory: {LESS}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or text or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return None


def _is(error: BaseException, pattern: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and pattern.search(str(error)) is not None


def tell(error: BaseException) -> int:
    """Write the line of an error to stderr, and what was not foreseen to a file; return the exit status.

    Of several ranks that end for one reason, one writes.
    """
    line, status, lost = explain(error), 2, is_lost_rank(error)
    try:
        if not RANKS.may_tell(lost):
            return status
        if line is None:
            line, status = _unexpected(error), 1
        if os.environ.get(ON_SCREEN, "") not in ("", "0"):
            sys.stderr.write(visible("".join(traceback.format_exception(error))))
        saved = "" if lost else RUN.saved()
        rank = f"rank {RANKS.number}: " if RANKS.number and not lost else ""
        sys.stderr.write(f"error: {rank}{visible(' '.join(line.split()))}{visible(saved)}\n")
        sys.stderr.flush()
        return status
    finally:
        RANKS.end()


def _unexpected(error: BaseException) -> str:
    """Write a crash file; return the line that names it."""
    reason = " ".join(str(error).split())
    headline = f"unexpected {type(error).__name__}{f': {reason[:TOLD]}' if reason else ''}"
    path = _write(error)
    if path is None:
        sys.stderr.write(visible("".join(traceback.format_exception(error))))
        return f"{headline}: the details above could not be written to a file: please report them"
    return f"{headline}: please report it with the file {path}, which says where it happened"


def _write(error: BaseException) -> Path | None:
    rank = f"-rank{RANKS.number}" if RANKS.number else ""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{rank}.txt"
    text = visible(_details(error))
    for ask in (*RUN.folders, tempfile.gettempdir):
        with suppress(Exception):  # the folder may be what has failed
            folder = ask()
            if folder is not None and Path(folder).is_dir():
                path = Path(folder).resolve() / name
                path.write_text(text, encoding="utf-8")
                return path
    return None


def _details(error: BaseException) -> str:
    lines = [f"deft_lightning {__version__}", f"python {platform.python_version()}, {platform.platform()}"]
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            lines.append(f"{library} {version(library)}")
    config = "none yet"
    with suppress(Exception):
        config = RUN.config() or config
    return (
        f"{chr(10).join(lines)}\n\ncommand: {' '.join(sys.argv)}\nfolder: {Path.cwd()}\n\n"
        f"{''.join(traceback.format_exception(error))}\nconfiguration:\n{config}\n"
    )


@contextmanager
def ended() -> Iterator[None]:
    """End the process as a command line does: known and unknown errors by :func:`tell`, an interrupt in silence."""
    hook, threading.excepthook = threading.excepthook, _thread_failed
    RUN.forget()
    try:
        yield
        sys.stdout.flush()
        for name, stream in (("output", sys.stdout), ("error", sys.stderr)):
            if isinstance(stream, GuardedStream) and stream.lost is not None:  # told once all is done, not in its place
                raise OSError(stream.lost.errno, stream.lost.strerror, f"standard {name}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except SystemExit as error:
        if error.code == 1 and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's way to end
            sys.exit(130)
        raise
    except BaseException as error:  # the panics of libraries in Rust are no Exception
        if isinstance(error, BrokenPipeError) and _unread():
            sys.exit(141)  # as a shell says of a program that wrote to a closed pipe
        sys.exit(tell(error))
    finally:
        threading.excepthook = hook


@contextmanager
def mistakes() -> Iterator[None]:
    """End with one line where the cause is known; let everything else pass."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if explain(error) is None:
            raise
        status = tell(error)
        sys.exit(status)


def _unread() -> bool:
    """Return whether nobody reads standard output any more, as in ``preview | head``; then nothing is written."""
    try:
        out = sys.stdout.fileno()
        poll = select.poll()
        poll.register(out, select.POLLOUT)
        closed = any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
        if closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False
    return closed


def _thread_failed(args: Any) -> None:
    """Write a file for what fails in a thread; TensorBoard's raises its error again where the log is used."""
    if type(args.thread).__name__ == "_AsyncWriterThread" or isinstance(args.exc_value, SystemExit):
        return
    line = explain(args.exc_value) or _unexpected(args.exc_value)
    sys.stderr.write(f"error: {visible(line)}\n")
