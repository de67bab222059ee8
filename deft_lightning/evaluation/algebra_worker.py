r"""A process that compares answers with math-verify, and dies rather than hang.

``python -m deft_lightning.evaluation.algebra_worker SECONDS MIB`` writes a line once it is ready. Then it reads one
JSON list a line from standard input and answers each with a line of JSON: ``["same", gold, said, digits]`` with true
or false, ``["form", said]`` with a text that is the same for answers that parse to the same, or null.

Nothing is caught in time by Python itself: sympy swallows exceptions, and a power of ten million digits is computed
inside one call. So the kernel keeps the limits: processor time and wall time end in a signal whose default is death,
memory in MemoryError or death.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import IO, Any

WALL = 20  # times the processor seconds: for a machine that others work on too


def same(gold: str, said: str, digits: int) -> bool:
    """Whether two answers in LaTeX are equal, symbolically or when rounded to so many decimals."""
    from math_verify import verify

    return bool(verify(_parsed(gold), _parsed(said), float_rounding=digits, timeout_seconds=0))


def form(said: str) -> str | None:
    """Return a text that is the same for answers that parse to the same; decimals are fractions."""
    from sympy import Basic, nsimplify

    found = _parsed(said)
    if not found:
        return None
    number = isinstance(found[0], Basic) and getattr(found[0], "is_number", False)
    return str(nsimplify(found[0], rational=True) if number else found[0])


def _parsed(answer: str) -> Any:
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=0)


def main() -> None:
    """Answer requests until standard input ends."""
    seconds, mebibytes = int(sys.argv[1]), int(sys.argv[2])
    # Only answers may go where they are read from: parsers print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401 - before the memory is limited and the clock runs

    _limit_memory(mebibytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole terminal; this process ends with its input
    _answer(answers, True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        _limit_time(seconds)
        try:
            answer: Any = (same if what == "same" else form)(*arguments)
        except Exception:  # whatever a parser makes of text that nobody has foreseen: no answer
            answer = False if what == "same" else None
        _limit_time(0)
        _answer(answers, answer)


def _answer(file: IO[str], answer: Any) -> None:
    file.write(json.dumps(answer) + "\n")
    file.flush()


def _limit_time(seconds: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF; unlike wall time it does not depend on who else computes
    signal.setitimer(signal.ITIMER_REAL, WALL * seconds)  # SIGALRM


def _limit_memory(mebibytes: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    except (ValueError, OSError):  # not on every system; the limit of time still holds
        pass


if __name__ == "__main__":
    main()
