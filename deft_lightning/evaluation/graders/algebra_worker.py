r"""A process that compares answers with math-verify, each in a fork of its own that dies rather than hang.

``python -m deft_lightning.evaluation.graders.algebra_worker MIB`` writes a line once it is ready. Then it reads one
JSON list a line from standard input, ``[calls, seconds, what, ...]``, and answers each with a JSON list a line.
Questions: ``same`` (gold, said, digits), answered by true or false; ``form`` (said), by a text that is the same for
answers that parse to the same, or null. The lists: ``["found", answer]``; ``["gave_up", limit]`` where a limit ended
it; ``["failed", why]`` where the system gives no process. The limits that decide are of calls of Python functions and
of the size of integers. Each question has a new fork of this process, warmed up in the same way everywhere: its calls
do not depend on the questions before it, on other processes or on the clock. Counting doubles the time, so a question
is first given a time in which no machine reaches the limit of calls, uncounted; most are answered in it. One call may
compute for hours, and sympy swallows exceptions. So behind these limits stand the kernel's: processor time and wall
time end in a signal whose default is death, memory in MemoryError or death.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from deft_lightning.evaluation.graders.sizes import guard_sizes

WALL = 20  # times the processor seconds: for a machine that others work on too
FASTEST = 5_000_000  # calls of Python functions a second: more than any machine makes, in sympy about a million
UNCOUNTED = 0.05  # seconds at least: the kernel ends a shorter time late, by up to a tick of 10 ms
FORM = 4000  # letters of a form
# One of each kind, so that what parsers and sympy remember is there before the first question: it halves the calls of
# the longest ones. More of them would make the start longer.
WARM = [
    (r"\frac{\pi}{2}", r"\sqrt{2}+1"), ("x^2+2x+1", "(x+1)^2"), (r"(1,2)", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
    (r"\{1,2\}", r"[0,1)\cup(2,\infty)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1/2\\2\end{pmatrix}"),
    ("x>2", r"1 < x \le 3"), ("y=2x+3", "2x+3"), (r"\text{east}", "18 cm"), ("3+4i", "5!"), (r"\binom{5}{2}", "10.5"),
    (r"90^\circ", r"50\%"), ("52_8", "1, 2, 3"), ("1,000", r"2 \times 10^{-3}"), ("a = 3, b = 4", r"\pm 2"),
    (r"\left[ \frac{\pi^2}{6}, \frac{7 \pi^2}{3} \right]", r"\left( (1)/(2), -3 \right)"),
]  # fmt: skip


def same(gold: str, answer: str, digits: int) -> bool:
    """Return whether two answers in LaTeX are equal, symbolically or when rounded to so many decimals."""
    from math_verify import verify

    return bool(verify(_parsed(gold), _parsed(answer), float_rounding=digits, timeout_seconds=0))


def form(latex: str) -> str | None:
    """Return a text that is the same for answers that parse to the same; decimals are fractions."""
    from sympy import Basic, nsimplify

    parsed = _parsed(latex)
    if not parsed:
        return None
    number = isinstance(parsed[0], Basic) and getattr(parsed[0], "is_number", False)
    text = str(nsimplify(parsed[0], rational=True) if number else parsed[0])
    return text if len(text) <= FORM else None


def _parsed(answer: str) -> Any:
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=0)


KINDS: dict[str, tuple[Callable[..., Any], Any]] = {"same": (same, False), "form": (form, None)}


def main() -> None:
    """Answer requests until standard input ends."""
    # Only answers may go where they are read from: parsers print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    for gold, latex in WARM:
        _answer("same", gold, latex, 6)
        _answer("form", latex)
    guard_sizes(lambda size: _leave("gave_up", size))
    _limit_memory(int(sys.argv[1]))
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy all of this
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole terminal; this process ends with its input
    answers.write("true\n")
    answers.flush()
    for line in sys.stdin:
        calls, seconds, *question = json.loads(line)
        try:
            reply: list[Any] = ["gave_up", "time"]
            short = calls / FASTEST
            if short >= UNCOUNTED:
                reply = _forked(question, short)
            if reply == ["gave_up", "time"]:
                reply = _forked(question, seconds, calls)
        except OSError as error:  # no process to be had
            reply = ["failed", error.strerror]
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _answer(what: str, *arguments: Any) -> Any:
    ask, none = KINDS[what]
    try:
        return ask(*arguments)
    except MemoryError:
        _leave("gave_up", "memory")
    except Exception:  # whatever a parser makes of text that nobody has foreseen: no answer
        return none


def _forked(question: list[Any], seconds: float, calls: int | None = None) -> list[Any]:
    """Return what a new fork answers within so much processor time and, if they are counted, so many calls."""
    global _reply_pipe
    answers, _reply_pipe = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(answers)
        os.close(_reply_pipe)
        raise
    if not child:
        try:
            gc.collect()  # so that the next collection does not depend on what this process allocated before
            signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF; it does not depend on who else computes
            signal.setitimer(signal.ITIMER_REAL, WALL * seconds)  # SIGALRM
            if calls is not None:
                _count(calls)
            _leave("found", _answer(*question))
        finally:
            os._exit(1)
    os.close(_reply_pipe)
    line = b""
    # Standard input has nothing while an answer is waited for: it is ready once nobody waits any more.
    while not line.endswith(b"\n"):
        if answers not in select.select([answers, sys.stdin.fileno()], [], [])[0]:
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        if not (part := os.read(answers, 1 << 16)):
            break
        line += part
    os.close(answers)
    status = os.waitpid(child, 0)[1]
    if line.endswith(b"\n"):
        reply: list[Any] = json.loads(line)
        return reply
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
    return ["gave_up", "time" if late else "memory"]


_reply_pipe = -1  # where a fork writes its answer


def _leave(*reply: Any) -> NoReturn:
    """Write the answer, and end this fork whatever it is in the middle of."""
    sys.settrace(None)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(_reply_pipe, json.dumps(reply).encode() + b"\n")  # less than a pipe holds
    os._exit(0)


def _count(calls: int) -> None:
    """Give up after so many calls of Python functions."""
    left = calls

    def called(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            _leave("gave_up", "calls")

    sys.settrace(called)


def _limit_memory(mebibytes: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    except (ValueError, OSError):  # not on every system; the limit of time still holds
        pass


if __name__ == "__main__":
    main()
