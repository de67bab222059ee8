"""Bounds on the size of integers that sympy computes: the same on every machine, and kept before the work is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

BITS = 100_000  # of an integer that a power computes, or of a float's precision; those of MATH500 have some 60
ROOT = 10_000  # bits of an integer whose root is sought
TERMS = 10_000  # of a power of a sum that is multiplied out
LARGEST = 5_000  # argument of a factorial, a double factorial or a binomial coefficient


def guard_sizes(give_up: Callable[[str], Any]) -> None:
    """Call a function, which does not return, where sympy is about to compute an integer beyond the bounds.

    An exception would not do: sympy and the parser go on after it, elsewhere.

    Args:
        give_up: Is called with the name of the bound.
    """
    from sympy import Add, Integer, Pow, Rational, binomial, factorial, factorial2, ff, rf, subfactorial
    from sympy.core import evalf

    def power(self: Any, exponent: Any) -> None:
        bits = max(self.p.bit_length(), self.q.bit_length())
        if abs(exponent.p) * bits > BITS if isinstance(exponent, Integer) else bits > ROOT:
            give_up("size")

    def product(self: Any, **options: Any) -> None:
        if isinstance(self.base, Add) and isinstance(self.exp, Rational):
            n, others = abs(int(self.exp)), len(self.base.args) - 1
            if n > TERMS or math.comb(n + others, others) > TERMS:
                give_up("size")

    def float_power(base: Any, exponent: Any, bits: int, *rounding: Any) -> None:
        if max(bits, exponent[2] + exponent[3]) > BITS:  # exponent: sign, mantissa, power of two, bits of the mantissa
            give_up("size")

    def arguments(*values: Any) -> None:
        if any(isinstance(value, Rational) and abs(value.p) > LARGEST * value.q for value in values):
            give_up("size")

    for kind in (Integer, Rational):
        kind._eval_power = _before(power, kind._eval_power)
    Pow._eval_expand_multinomial = _before(product, Pow._eval_expand_multinomial)
    evalf.mpf_pow = _before(float_power, evalf.mpf_pow)
    for function in (factorial, factorial2, subfactorial, binomial, rf, ff):
        function.eval = classmethod(_before(lambda _, *values, **options: arguments(*values), function.eval.__func__))


def _before(check: Callable[..., None], compute: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compute)
    def checked(*values: Any, **options: Any) -> Any:
        check(*values, **options)
        return compute(*values, **options)

    return checked
