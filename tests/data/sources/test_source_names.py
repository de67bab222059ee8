"""Names of sources in tags: short, safe for TensorBoard, no two alike."""

from __future__ import annotations

import re

import pytest

from deft_lightning.data.sources.names import LONGEST, source_names


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a.jsonl", "b.csv"], ["a", "b"]),
        (["data/a.jsonl.gz", "data/b.json.zst"], ["a", "b"]),
        (["org/alpha?subset=main&split=test", "hub:org/beta"], ["alpha", "beta"]),
        (["org/alpha[test]", "org/alpha"], ["alpha_test", "alpha"]),
        (["reasoning_gym:leg_counting?size=10", "reasoning_gym:letters"], ["leg_counting", "letters"]),
        (["data/*.jsonl", "more/part-*.jsonl"], ["data", "part"]),
        (["https://host.org/x/rows.jsonl?download=true", "s3://bucket/other.parquet"], ["rows", "other"]),
        (["x/rows.jsonl", "y/rows.jsonl", "z.jsonl"], ["x_rows", "y_rows", "z"]),
        (["/x/a/rows.jsonl", "/y/a/rows.jsonl"], ["a_rows", "a_rows_2"]),
        (["rows.jsonl", "rows.csv", "rows_2.csv"], ["rows", "rows_2", "rows_2_2"]),
        (["data/v1.5", "data/my rows (new).jsonl"], ["v1.5", "my_rows_new"]),
        (["*", "?"], ["source", "source_2"]),
    ],
)  # fmt: skip
def test_names(sources: list[str], names: list[str]) -> None:
    assert list(source_names(sources).values()) == names
    assert list(source_names(sources)) == sources


def test_a_source_that_is_named_twice_is_one_and_a_weight_of_nothing_none() -> None:
    assert source_names(["a.jsonl", "b.jsonl", "a.jsonl"]) == {"a.jsonl": "a", "b.jsonl": "b"}
    assert source_names({"b.jsonl": 0.5, "c.jsonl": 0, "a.jsonl": 2}) == {"b.jsonl": "b", "a.jsonl": "a"}
    assert source_names("a.jsonl") == {"a.jsonl": "a"}


def test_names_are_tags_whatever_the_sources_are_called() -> None:
    sources = [f"{'long' * 30}{end}.jsonl" for end in "abc"] + [
        "ü/日本.jsonl",
        "a b/c\td.json",
        "\\\\host\\share\\x.csv",
    ]
    names = list(source_names(sources).values())
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[\w.-]+", name) and len(name) <= LONGEST + 3
