"""Rows of named benchmarks as prompts with their right answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deft_lightning.annotations import JsonObject, Tokenizer
from deft_lightning.data.encoding.encode import prompts
from deft_lightning.data.examples import Example, Prompt
from deft_lightning.data.prepared.ids import unique_ids
from deft_lightning.data.settings import Benchmarks
from deft_lightning.data.sources.read import read
from deft_lightning.data.sources.rows import Located, Row, RowError
from deft_lightning.errors import UserError
from deft_lightning.evaluation.benchmarks import Benchmark, TestSet, find_benchmark
from deft_lightning.evaluation.graders.choice import label_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def named_benchmarks(benchmarks: Benchmarks | None) -> list[tuple[Benchmark, str]]:
    """Return the benchmarks that ``--data.benchmarks`` names, each with where its rows are.

    Raises:
        UserError: One is unknown, or nothing says where its rows are.
    """
    if benchmarks is None:
        return []
    if isinstance(benchmarks, str):
        benchmarks = [benchmarks]
    named = benchmarks if isinstance(benchmarks, Mapping) else dict.fromkeys(benchmarks)
    pairs: list[tuple[Benchmark, str]] = []
    for name, source in named.items():
        benchmark = find_benchmark(name)
        where = source or benchmark.default
        if where is None:
            raise UserError(
                f"--data.benchmarks: {name} has no built-in rows; name their file: --data.benchmarks '{{{name}: FILE}}'"
            )
        pairs.append((benchmark, where))
    names = [benchmark.name for benchmark, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--data.benchmarks: {twice[0]} is named twice")
    return pairs


def read_benchmark(
    benchmark: Benchmark, source: str, tokenizer: Tokenizer, instruction: str | None
) -> tuple[TestSet, list[Prompt]]:
    """Return the prompts of a benchmark.

    Args:
        benchmark: Says which columns there are and what is asked.
        source: As ``--data.source``; for multiple choice also a ``.json`` object of rows by id, or of lists of rows by
            source, of which ``?ids=FILE.json`` chooses those whose ids are in a second object or list.
        tokenizer: With its chat template.
        instruction: In place of the benchmark's own.

    Raises:
        UserError: A row that cannot be used (file, row, field): a benchmark with a part of its rows is another one.
    """
    items = [_item(benchmark, Row(record, where, {}), instruction) for where, record in _rows(source)]
    renamed = unique_ids(lambda: (item.example.id for item in items), lambda at: items[at].example.digest)
    examples = [
        replace(item.example, id=renamed[at]) if at in renamed else item.example for at, item in enumerate(items)
    ]
    ready = [
        replace(prompt, gold=item.gold, record=item.record)
        for prompt, item in zip(prompts(tokenizer, examples), items, strict=True)
    ]
    named = {str(item.record["source"]) for item in items if "source" in item.record}
    if named and not all("source" in item.record for item in items):
        lacking = next(item.example.where for item in items if "source" not in item.record)
        raise UserError(f"{lacking}: has no source, but other rows do (--data.benchmarks)")
    return TestSet(benchmark, tuple(sorted(named))), ready


@dataclass(frozen=True)
class _Item:
    example: Example
    gold: str
    record: JsonObject


def _item(benchmark: Benchmark, row: Row, instruction: str | None) -> _Item:
    question = row.text(*_column(benchmark, row, "question"))
    options = {label: label for label in benchmark.options} or _options(benchmark, row)
    name, value = _column(benchmark, row, "gold")
    gold = label_of(value, options) if options else benchmark.gold(value).strip()
    if not gold:
        problem = f"{value!r} is not one of the options {', '.join(options)}" if options else "gives no answer"
        raise row.fail(name, problem, "answer")
    context = _optional(benchmark, row, "context")
    context = "\n".join(map(str, context)) if isinstance(context, list) else str(context or "")
    text = benchmark.prompt(question, context, options, instruction)
    record: JsonObject = {"options": options} if options else {}
    for field in ("source", "error"):
        value = _optional(benchmark, row, field)
        if value is not None and str(value).strip():
            record[field] = str(value)
    digest = hashlib.blake2b(json.dumps([text, gold]).encode(), digest_size=8).hexdigest()
    own = _optional(benchmark, row, "id")
    id = str(own) if isinstance(own, str | int) and str(own).strip() else digest
    return _Item(Example(id, digest, row.where, messages=({"role": "user", "content": text},)), gold, record)


def _column(benchmark: Benchmark, row: Row, field: str) -> tuple[str, Any]:
    """Return the first column that holds a field, and its value."""
    columns: Sequence[str] = benchmark.columns[field]
    for column in columns:
        if (value := row.get(column)) is not None:
            return column, value
    raise RowError(
        row.where,
        f"benchmark {benchmark.name} needs one of the columns {', '.join(columns)}; the row has"
        f" {', '.join(map(str, row.record)) or '(none)'}",
        columns[0],
        "missing",
    )


def _optional(benchmark: Benchmark, row: Row, field: str) -> Any:
    return next((v for column in benchmark.columns.get(field, ()) if (v := row.get(column)) is not None), None)


def _options(benchmark: Benchmark, row: Row) -> dict[str, str]:
    """Return the options of a row by label: an object, a list of texts, or lists of labels and texts."""
    if "options" not in benchmark.columns:
        return {}
    name, value = _column(benchmark, row, "options")
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        value = dict(zip(value["label"], value["text"], strict=False))
    if isinstance(value, list):
        value = dict(zip(LETTERS, value, strict=False))
    if not isinstance(value, Mapping) or len(value) < 2:
        raise row.fail(name, "expected at least two options, an object of label and text or a list of texts", "type")
    # Tables have every label in every row, empty where there is no such option.
    return {str(label): row.text(f"{name}.{label}", text) for label, text in value.items() if text is not None}


def _rows(source: str) -> Located:
    path, _, ids = source.partition("?ids=")
    file = Path(path).expanduser()
    if file.suffix.lower() != ".json" or not file.is_file():
        if ids:
            raise UserError(f"{source}: ?ids= needs a .json object with rows by id (--data.benchmarks)")
        yield from read(source)
        return
    content = _json(file)
    groups = list(content.values()) if isinstance(content, dict) else []
    if groups and all(isinstance(group, dict) for group in groups):
        yield from _by_id(file, content, _ids(Path(ids).expanduser()) if ids else None)
    elif len(groups) > 1 and all(isinstance(group, list) for group in groups) and not ids:
        for name, group in content.items():
            for number, record in enumerate(group, 1):
                with_source = {"source": name, **record} if isinstance(record, dict) else record
                yield f"{file}, {name}, row {number}", with_source
    elif ids:
        raise UserError(f"{source}: ?ids= needs a .json object with rows by id (--data.benchmarks)")
    else:
        yield from read(path)


def _by_id(file: Path, content: JsonObject, wanted: list[str] | None) -> Iterator[tuple[str, Any]]:
    for id in content if wanted is None else wanted:
        if id not in content:
            raise UserError(f"{file}: has no row {id!r}, which ?ids= names (--data.benchmarks)")
        yield f"{file}, row {id}", {"id": id, **content[id]}


def _ids(file: Path) -> list[str]:
    content = _json(file)
    if not isinstance(content, dict | list) or not content:
        raise UserError(f"{file}: expected a list of ids or an object with ids as keys (--data.benchmarks)")
    return [str(id) for id in content]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}) (--data.benchmarks)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error}) (--data.benchmarks)") from None
