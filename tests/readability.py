"""Measure how long the sentences of README and docs are: the median and the longest of each page, in words.

    python tests/readability.py [PAGE ...] [--longest 35]

Prose alone counts: code, tables, headings, pictures and comments are left out, and a piece of code within a sentence
counts as one word. A sentence ends at `.`, `!` or `?` before a blank, or with its paragraph or item. ``--longest N``
prints every sentence of more than N words, and the status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 35
ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+|^\s*(?:>\s*)+")
FENCE = re.compile(r"^\s*(```|~~~)")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|cf|vs|etc|no|ep)\.(?=\s)", re.IGNORECASE)
END = re.compile(r"""(?<=[.!?])["')*_\]]*\s+(?=["'(*_\[`A-Z0-9\x00])""")


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs and items of a Markdown page, each on one line, without what is no prose."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    found: list[str] = []
    current: list[str] = []
    fenced, indented_code = False, False

    def close() -> None:
        if current:
            found.append(" ".join(current))
            current.clear()

    for line in text.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
            close()
            continue
        bare = line.strip()
        if fenced or bare.startswith(("|", "#", "<", ":::", "!!!", "???", "===", "--8<--")) or not bare:
            close()
            indented_code = False if bare and not fenced else indented_code
            continue
        starts_item = ITEM.match(line) is not None
        if line.startswith("    ") and not current and not starts_item:
            indented_code = True  # a formula; an item goes on with the same indentation only while it is open
            continue
        if starts_item:
            close()
        current.append(ITEM.sub("", line).strip() if starts_item else bare)
    close()
    return found


def prose(paragraph: str) -> str:
    """Return a paragraph with pictures taken out, links as their text and each piece of code as one word."""
    paragraph = re.sub(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?", "", paragraph)
    paragraph = re.sub(r"(`+).+?\1", "\x00code", paragraph)
    paragraph = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    return ABBREVIATIONS.sub(r"\1", paragraph)


def sentences(text: str) -> list[str]:
    """Return the sentences of a Markdown page."""
    parts = [part.strip() for paragraph in paragraphs(text) for part in END.split(prose(paragraph))]
    return [part for part in parts if words(part)]


def words(sentence: str) -> int:
    """Return the number of words: runs between blanks that hold a letter or a digit."""
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def pages() -> list[Path]:
    """Return README and all pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Print a line for each page, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--longest", type=int, help="print sentences of more words than this")
    given = parser.parse_args()
    everything: list[int] = []
    too_long = False
    for page in given.pages or pages():
        said = sentences(page.read_text(encoding="utf-8"))
        lengths = [words(sentence) for sentence in said]
        everything += lengths
        if lengths:
            over = sum(length > LONGEST for length in lengths)
            sys.stdout.write(
                f"{median(lengths):5.1f} median  {max(lengths):3} longest  {over:3} over {LONGEST}"
                f"  {len(lengths):4} sentences  {page}\n"
            )
        for sentence, length in zip(said, lengths, strict=True):
            if given.longest is not None and length > given.longest:
                too_long = True
                sys.stdout.write(f"    {length}: {sentence.replace(chr(0), '`')}\n")
    if everything:
        over = sum(length > LONGEST for length in everything)
        sys.stdout.write(
            f"{median(everything):5.1f} median  {max(everything):3} longest  {over:3} over {LONGEST}"
            f"  {len(everything):4} sentences  all\n"
        )
    sys.exit(too_long)


if __name__ == "__main__":
    main()
