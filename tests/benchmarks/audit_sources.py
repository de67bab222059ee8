"""Rows of public files as question and answer, for the benchmarks of the audit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FORMS = ("rows", "svamp", "pubmedqa", "solutions")


def rows_of(path: Path, form: str) -> list[Row]:
    """Return the rows of a file.

    Args:
        path: As it is published.
        form: ``rows``: lines of JSON as they are. ``svamp``: the equation with its result, ``87 - 15 = 72``.
            ``pubmedqa``: the abstracts and the question, and the long answer. ``solutions``: every solution that a
            model has written to a problem, with ``wrong`` beside it (GSM8K's ``example_model_solutions.jsonl``).
    """
    text = path.read_text(encoding="utf-8")
    if form == "pubmedqa":
        return [
            {"question": "\n\n".join((*row["CONTEXTS"], row["QUESTION"])), "answer": row["LONG_ANSWER"]}
            for row in json.loads(text).values()
        ]
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if form == "svamp":
        return [{"question": f"{row['Body']} {row['Question']}", "answer": equation(row)} for row in lines]
    if form == "solutions":
        return [
            {"question": row["question"], "answer": value["solution"], "wrong": not value["is_correct"]}
            for row in lines
            for value in row.values()
            if isinstance(value, dict)
        ]
    return lines


def equation(row: Row) -> str:
    """Return the equation of a row of SVAMP with its result, whole numbers without a point."""
    left = re.sub(r"(\d)\.0\b", r"\1", row["Equation"]).strip()
    left = left.removeprefix("( ").removesuffix(" )").replace("( ", "(").replace(" )", ")")
    return f"{left} = {row['Answer']:g}"
