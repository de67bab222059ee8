"""Columns that became nothing: named with a count, and refused where leaving them out would change the meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deft_lightning.data.records.misfits import PREFERENCE, first_answer
from deft_lightning.data.records.turns import PICTURES, empty
from deft_lightning.data.sources.rows import Row

MEDIA = {*PICTURES, "pixel_values", "image_path", "image_url", "video_path", "audio_path"}
VERDICTS = ("label", "kto_tag")  # whether the answer is a good one
ANSWERS = ("answer", "solution", "output", "response", "completion", "final_answer")
SAYS = {
    "messages": "turns", "conversations": "turns", "prompt": "prompt", "completion": "response", "history": "turns",
    "instruction": "prompt", "input": "prompt", "context": "prompt", "question": "prompt", "output": "response",
    "passage": "prompt", "body": "prompt",
    "response": "response", "answer": "response", "answers": "response", "functions": "tools", "labels": "labels",
    "problem": "prompt", "solution": "response", "system_prompt": "system", "system_message": "system",
    "input_ids": "tokens",
}  # fmt: skip


@dataclass
class ColumnReport:
    """What became of the columns of all rows.

    Attributes:
        rows: How many rows were read.
        used: What each column became, and in how many rows.
        unused: In how many rows a column, or a key inside one, held something that became nothing.
        ignored: In how many rows there was something that the user leaves out on purpose, by its name.
    """

    rows: int = 0
    used: Counter[tuple[str, str]] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, ignore: Collection[str]) -> None:
        """Count a row; columns that the user left out on purpose are not named."""
        self.rows += 1
        self.used.update((name, SAYS.get(meaning, meaning)) for name, meaning in row.read.items())
        left = {*unused(row), *row.left}
        if ignore:
            self.ignored.update(dict.fromkeys(ignore, 0))  # a name that no row has is named too
            self.ignored.update((left & set(ignore)) | row.ignored)
            left -= set(ignore)
        self.unused.update(left)

    def lines(self) -> list[str]:
        """Return what is said: what became what, and what became nothing."""
        counted = [f"{name} → {meaning}{self._rows(count)}" for (name, meaning), count in sorted(self.used.items())]
        told = [f"columns: {', '.join(counted)}"] if counted else []
        if self.unused:
            told.append(f"not used: {_listed(self.unused)}")
        if self.ignored:
            told.append(f"left out on purpose: {_listed(self.ignored)}")
        return told

    def _rows(self, count: int) -> str:
        return "" if count == self.rows else f" ({count} of {self.rows} rows)"

    def state(self) -> dict[str, Any]:
        """Return the counts for a file."""
        used = [[*key, count] for key, count in self.used.items()]
        return {"rows": self.rows, "used": used, "unused": dict(self.unused), "ignored": dict(self.ignored)}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> ColumnReport:
        """Return the counts of a file."""
        used = Counter({(name, meaning): count for name, meaning, count in state["used"]})
        return cls(state["rows"], used, Counter(state["unused"]), Counter(state["ignored"]))


def _listed(counts: Mapping[str, int]) -> str:
    names = [f"{name} ({f'{n} row' + 's' * (n > 1) if n else 'no row has it'})" for name, n in sorted(counts.items())]
    return ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")


def unused(row: Row) -> Iterator[str]:
    """Yield the columns of a row that hold something and became nothing; dotted where a part of one was read."""
    yield from _unused(row.record, row.read, "")


def _unused(record: Mapping[Any, Any], read: Mapping[str, str], prefix: str) -> Iterator[str]:
    for key, value in record.items():
        name = f"{prefix}{key}"
        if name in read or empty(value):
            continue
        if not any(path.startswith(f"{name}.") for path in read):
            yield name
        elif isinstance(value, Mapping):
            yield from _unused(value, read, f"{name}.")


def refuse_leftovers(row: Row, ignore: Collection[str], taught: str | None) -> None:
    """Refuse a row whose meaning would change without a column that became nothing.

    Args:
        row: A row that was read.
        ignore: Columns that the user leaves out on purpose.
        taught: The response, where a column of its own holds it.

    Raises:
        UserError: Preferences, a verdict on the answer, pictures, or a second answer.
    """
    left = [name for name in {*unused(row), *row.left} if name not in ignore]
    for name in sorted(left):
        key = name.rpartition(".")[2].lower()
        value = row.column(name)
        advice = f"--data.ignore_columns {name} leaves it out"
        if PREFERENCE.search(key) and not any(PREFERENCE.search(used) for used in row.read):
            raise row.fail(
                name,
                "is one side of a preference, which supervised fine-tuning does not learn; to learn the better answer"
                f" name its column, for example --data.column_map.completion {_better(row)}",
                "preference",
            )
        if key in VERDICTS and isinstance(value, bool):
            raise row.fail(
                name,
                "says whether the answer is good; --data.weight_column"
                f" {name} learns only the rows where it is true, {advice}",
                "preference",
            )
        if taught is not None and key.startswith("correct") and _wrong(row, value):
            raise row.fail(
                name,
                f"says that the answer that is learnt, the first of {_response(row)!r}, is wrong; --data.weight_column"
                f" {name}.0 learns only the rows where it is right, {advice}",
                "preference",
            )
        if key in MEDIA:
            raise row.fail(name, f"holds pictures, sound or video, and only text is learnt; {advice}", "media")
        if taught is not None and not _chosen(row) and (first := first_answer(row, name, value)):
            problem = f"holds {len(value)} answers beside {_response(row)!r}; {first}, {advice}"
            raise row.fail(name, problem, "two answers")
        if taught is not None and key in ANSWERS and _differs(value, taught):
            if _chosen(row):
                continue
            read = _response(row)
            raise row.fail(
                name,
                f"is a second answer next to {read!r}; --data.column_map.{row.read.get(read, 'answer')} {name} learns"
                f" it instead, {advice}",
                "two answers",
            )


def _response(row: Row) -> str:
    """Return the column whose text is learnt."""
    return next((used for used, meaning in row.read.items() if SAYS.get(meaning) == "response"), "the response")


def _wrong(row: Row, verdicts: Any) -> bool:
    """Return whether verdicts on a list of answers call the first one wrong, which is learnt whatever it is worth."""
    answers = row.column(_response(row).removesuffix("[0]"))
    paired = isinstance(verdicts, list) and isinstance(answers, list) and len(verdicts) == len(answers)
    return paired and verdicts[0] is False and "weight" not in row.read.values()


def _chosen(row: Row) -> bool:
    """Return whether the user has said which column is the answer."""
    return row.read.get(_response(row)) in row.column_map


def _better(row: Row) -> str:
    names = [str(name) for name in row.record if PREFERENCE.search(str(name))]
    return next((name for name in names if "rejected" not in name and "dis" not in name), names[0] if names else "NAME")


def _differs(value: Any, taught: str) -> bool:
    return not isinstance(value, str | int | float) or str(value).strip() != taught.strip()
