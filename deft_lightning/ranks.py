"""Ranks that are lost: the others end soon, and one line says which it was and how to go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

from deft_lightning.terminal import visible

PARENT = os.getppid()  # of the ranks that Lightning starts: rank 0
GRACE = 5.0  # seconds in which the main thread ends by itself, once another rank is gone
AGAIN = "resume from the newest checkpoint with --ckpt_path last"
# What gloo, NCCL and the store of addresses say when the other side is no more.
GONE = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|closed by (?:remote )?peer|reset by peer|broken pipe|remote process"
    r"|remote worker|failed to recv|timed out waiting|recvvalue failed|pair closure",
    re.IGNORECASE,
)
_PLACES = re.compile(r"gloo|nccl|store|process group|rank", re.IGNORECASE)


class Ranks:
    """The processes of this run on this machine, as far as this one knows them."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.children: list[Any] = []
        self.watching = threading.Event()
        self._telling = threading.Lock()
        self._election: socket.socket | None = None

    @property
    def number(self) -> int:
        """Return the number of this process among those of the machine."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def started_by_first(self) -> bool:
        """Return whether Lightning has started this process from rank 0; torchrun and SLURM start all of them."""
        return self.number > 0 and not any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"))

    def watch(self, launcher: Any, world: int) -> None:
        """Watch the others, of ``world`` in all, from now on until :meth:`rest`.

        Lightning's own observer would kill every rank within five seconds, without a word to the user: it is left an
        empty list.
        """
        self.world = world  # Lightning takes it out of the environment before an error comes here
        procs = getattr(launcher, "procs", None)
        if procs:
            self.children = list(procs)
            launcher.procs = list(procs)
            procs.clear()
        if self.watching.is_set() or not (self.children or self.started_by_first):
            return
        self.watching.set()
        threading.Thread(target=self._follow, daemon=True, name="ranks").start()

    def rest(self) -> None:
        """Watch no more: from here on a rank may end before the others."""
        self.watching.clear()

    def lost(self) -> tuple[int, int] | None:
        """Return number and exit status of a rank that has failed, if this process can know."""
        codes = [(i, process.poll()) for i, process in enumerate(self.children, 1)]
        return next(((i, code) for i, code in codes if code), None)

    def _follow(self) -> None:
        while self.watching.is_set():
            time.sleep(0.2)
            gone = os.getppid() != PARENT if self.started_by_first else self.lost() is not None
            if gone:
                time.sleep(GRACE)
                with self._telling:
                    self._end_for_good()

    def _end_for_good(self) -> None:
        """End a process whose main thread waits for another that will never answer."""
        if not self.watching.is_set():
            return
        if self._first_to_tell(lost=True):
            sys.stderr.write(f"error: {visible(self.line())}\n")
            sys.stderr.flush()
        self.end()
        os._exit(2)

    def line(self) -> str:
        """Say which rank was lost."""
        lost_rank = self.lost()
        if lost_rank is None:
            who = "rank 0" if self.started_by_first and os.getppid() != PARENT else "another rank"
            return f"{who} was lost (killed, or its connection broke); the others have ended; {AGAIN}"
        number, code = lost_rank
        how = f"killed by {_signal(-code)}" if code < 0 else f"it ended with status {code}"
        return f"rank {number} was lost ({how}); the others have ended; {AGAIN}"

    def may_tell(self, lost: bool) -> bool:
        """Return whether this process tells an error: of many ranks that end for one reason, one speaks.

        Args:
            lost: Whether all that it knows is that another rank is gone.
        """
        with self._telling:
            self.rest()  # from here on the watching thread says nothing
        return self._first_to_tell(lost)

    def _first_to_tell(self, lost: bool) -> bool:
        if self.children:
            settled = self._settled() if lost else None
            # A rank that has ended by itself has told its own error.
            return settled is None or settled[1] not in (1, 2)
        if self.started_by_first:
            # Rank 0 tells what it meets too, and ends this process.
            deadline = time.monotonic() + (GRACE if lost else 1.0)
            while os.getppid() == PARENT and time.monotonic() < deadline:
                time.sleep(0.05)
            if lost and os.getppid() == PARENT:
                return False
        return not lost or self._elected()

    def _settled(self) -> tuple[int, int] | None:
        """Wait a moment for the exit status of the rank whose connection broke."""
        deadline = time.monotonic() + 2.0
        while self.children and self.lost() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.lost()

    def _elected(self) -> bool:
        """Return whether this is the first of the survivors on this machine: the name of a socket can be had once."""
        group = "-".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        self._election = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._election.bind(f"\0deft_lightning-{group}")
        except OSError:
            return False
        return True

    def end(self) -> None:
        """End the ranks that this process has started; whoever told the error holds its name until the others know."""
        for process in self.children:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # they may wait for this one, deaf to anything else
        if self._election is not None:
            time.sleep(1.0)


RANKS = Ranks()


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank is no more."""
    torch = sys.modules.get("torch")
    if torch is None or RANKS.world < 2 or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return GONE.search(text) is not None and (
        isinstance(error, getattr(torch.distributed, "DistError", ())) or _PLACES.search(text) is not None
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
