"""Check files as a commit hook: their syntax, ends and size; git keeps whatever this does not name.

    python tests/check_files.py FILE ...

Prints a line for each file and what is wrong with it; the status is 1 if there is any.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import yaml

LARGEST = 1_000_000  # bytes
MARKS = ("<<<<<<< ", ">>>>>>> ")  # of a merge that nobody has finished
BLANKS_AT_ENDS = {".svg"}  # as matplotlib writes them


def faults(path: Path) -> list[str]:
    """What is wrong with a file."""
    content = path.read_bytes()
    lines = [f"has {len(content):,} bytes, at most {LARGEST:,}"] if len(content) > LARGEST else []
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return lines  # an image, an archive
    if "\0" in text or not text:
        return lines
    if not text.endswith("\n") or text.endswith("\n\n"):
        lines.append("does not end in one line break")
    if "\r" in text:
        lines.append("has line ends that are not \\n")
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip(" \t") and path.suffix not in BLANKS_AT_ENDS:
            lines.append(f"line {number}: ends in blanks")
        if line.startswith(MARKS):
            lines.append(f"line {number}: is a mark of a merge")
    try:
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".toml":
            tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml", ".cff"):
            list(yaml.parse(text))  # events: tags of other programs are none of our business
    except (ValueError, yaml.YAMLError) as error:
        lines.append(" ".join(str(error).split()))
    return lines


def main() -> None:
    """Check the files of the command line."""
    complaints = [f"{name}: {fault}" for name in sys.argv[1:] for fault in faults(Path(name))]
    sys.stdout.writelines(f"{line}\n" for line in complaints)
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
