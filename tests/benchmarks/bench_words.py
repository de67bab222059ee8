"""Measure how long the sentences are that a user meets: README, site, help, messages, comments of configurations.

    python tests/benchmarks/bench_words.py [--source TREE] [--longest]

For each kind: the median and the longest sentence in words, the share above 35 words, and how many phrases the
glossary has a better word for; then the share of docstrings whose first line is a full statement. ``--source``
measures another checkout by the rules of this one.

The rules of what is a sentence, and of what is left out, are in ``tests/wording.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from readability import LONGEST, words  # noqa: E402
from wording import against, kinds, statements  # noqa: E402


def main() -> None:
    """Print a line for each kind, and with --longest the sentences above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout to measure; default: this one")
    parser.add_argument("--longest", action="store_true", help="print the sentences above the limit")
    given = parser.parse_args()
    for name, parts in kinds(given.source.resolve()).items():
        lengths = [words(part) for part in parts]
        over = [part for part, length in zip(parts, lengths, strict=True) if length > LONGEST]
        sys.stdout.write(
            f"{name:28} {len(lengths):5} sentences   median {median(lengths):4.1f}   longest {max(lengths):3}"
            f"   above {LONGEST}: {len(over) / len(lengths):.1%}"
            f"   against the glossary: {sum(len(against(part)) for part in parts)}\n"
        )
        for part in over if given.longest else []:
            sys.stdout.write(f"    {words(part)}: {part}\n")
    found, full = statements(given.source / "deft_lightning")
    sys.stdout.write(f"docstrings: {full} of {found} begin with a full statement ({full / found:.1%})\n")


if __name__ == "__main__":
    main()
