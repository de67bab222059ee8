"""Bounds of time and memory around chat templates: a template is a program, and often a stranger's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from deft_lightning.errors import UserError

SECONDS = 2.0  # of processor time between two looks at the clock; a rendering takes well under a millisecond
MEMORY = 256  # MiB that rendering may add to the process
LETTERS = 1 << 23  # a longer text has to be in proportion to the messages
TEMPLATE = 1 << 20  # letters of a template; those of real models have some 10 kB


class Exhausted(BaseException):
    """A rendering went beyond its bounds. No ``Exception``: Jinja swallows those while it folds constants."""


class TemplateCost(UserError):
    """A template that needs too much for one row: preparation ends, also where rows that are bad are skipped."""


class Clock:
    """Tells whether the same rendering is still under way when the timer fires again."""

    def __init__(self) -> None:
        self.where, self._row, self._seen, self._running = "", 0, -1, True

    def next(self, where: str) -> None:
        """Begin with a row; what was spent on the ones before it does not count."""
        self.where, self._row = where, self._row + 1

    def fired(self, _signal: int, _frame: FrameType | None) -> None:
        """Stop a rendering that was under way when the timer fired the last time."""
        if self._running and self._seen == self._row:
            raise Exhausted(f"takes more than {SECONDS:.0f} s of processor time")
        self._seen = self._row

    def stop(self) -> None:
        """Let a signal that is on its way arrive without effect."""
        self._running = False


@contextmanager
def bounded(origin: str, where: str = "") -> Iterator[Clock]:
    """Bound what rendering costs: some seconds of processor time a row, 256 MiB of memory beyond what is in use.

    Time is looked at twice: a row ends after :data:`SECONDS` to twice that. Both bounds hold on POSIX in the main
    thread of a process, where rows are prepared; elsewhere the length of the text alone is bounded. Inside the block
    nothing but templates should run: other code meets the same limits.

    Args:
        origin: Where the template comes from, for the error.
        where: File and row; many rows in one block announce themselves with :meth:`Clock.next`.

    Raises:
        TemplateCost: A bound was met.
    """
    clock = Clock()
    clock.next(where)
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    limits = _Limits(clock) if possible else None
    try:
        yield clock
    except (Exhausted, MemoryError) as error:
        clock.stop()
        problem = str(error) if isinstance(error, Exhausted) else f"needs more than {MEMORY} MiB of memory"
        row = f"{clock.where}: " if clock.where else ""
        raise TemplateCost(f"{row}the chat template {problem}; it is {origin}") from None
    finally:
        clock.stop()
        if limits is not None:
            limits.restore()


class _Limits:
    """Timer and memory limit of this process, until what was there is put back."""

    def __init__(self, clock: Clock) -> None:
        self._memory: tuple[int, int] | None = None
        self._handler = signal.signal(signal.SIGVTALRM, clock.fired)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)
        with suppress(ImportError, OSError, ValueError, IndexError):
            import resource

            with open("/proc/self/statm", encoding="ascii") as file:
                limit = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE") + (MEMORY << 20)
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if (soft == resource.RLIM_INFINITY or limit < soft) and (hard == resource.RLIM_INFINITY or limit < hard):
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
                self._memory = (soft, hard)

    def restore(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, self._handler if self._handler is not None else signal.SIG_DFL)
        if self._memory is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, self._memory)


def check_length(text: str, given: int) -> None:
    """Refuse a text out of all proportion to the messages, before anything is done with it.

    Args:
        text: What a template wrote.
        given: Letters of what it was given.
    """
    if len(text) > max(LETTERS, 16 * given):
        raise Exhausted(f"writes {len(text):,} letters for a row of {given:,}")
