"""No attack runs code or writes outside its folder; each ends in one line, through every verb that opens its files."""

from __future__ import annotations

import pytest
from attacks import ATTACKS, BEGIN, DOCS, END, outcome, table

pytestmark = pytest.mark.slow

PAIRS = [(name, verb) for name, attack in ATTACKS.items() for verb in attack.verbs]


@pytest.mark.parametrize(("name", "verb"), PAIRS)
def test_an_attack_does_no_harm_and_is_told_in_one_line(name: str, verb: str) -> None:
    found = outcome(name, verb)
    assert not found.harmed, "code has run, or a file was written outside"
    assert "Traceback" not in found.err + found.out
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(found.err + found.out)
    if not ATTACKS[name].shown:
        assert (found.code, bool(found.line)) == (2, True), found.err[-2000:]


def test_the_table_of_the_documentation_is_what_happens() -> None:
    _, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    told, _, _ = rest.partition(END)
    assert told == table(), "run: python tests/security/attacks.py --write"
