"""The words of the project: texts that a user meets keep to a glossary, and to sentences that can be read at once."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import pytest
from readability import LONGEST, pages, prose, words
from wording import CODE, FILLED, LISTED, Said, against, comments, kinds, messages, options, plain, statements
from worlds import ROOT

MEDIAN = 18


@pytest.fixture(scope="module")
def said() -> list[Said]:
    return messages()


@pytest.fixture(scope="module")
def measured() -> dict[str, list[str]]:
    return kinds(ROOT)


def test_messages_use_the_words_of_the_glossary(said: list[Said]) -> None:
    assert sum(message.kind == "error" for message in said) > 500
    assert sum(message.kind == "line" for message in said) > 80
    assert [(message.place, found) for message in said if (found := against(message.text))] == []


def test_help_uses_the_words_of_the_glossary(measured: dict[str, list[str]]) -> None:
    assert len(measured["help"]) > 150
    assert {text: found for text in measured["help"] if (found := against(text))} == {}


def test_comments_of_configurations_use_the_words_of_the_glossary() -> None:
    texts = comments()
    assert len(texts) > 30
    assert [(text, found) for text in texts if (found := against(text))] == []


def test_pages_use_the_words_of_the_glossary() -> None:
    wrong = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        wrong += [(name, found) for line in text.split("\n") if (found := against(prose(line)))]
    assert wrong == []


def test_half_of_all_sentences_are_short_and_none_is_long(measured: dict[str, list[str]]) -> None:
    for kind, parts in measured.items():
        assert median(map(words, parts)) <= MEDIAN, kind
        assert [part for part in parts if words(part) > LONGEST] == [], kind


def test_every_docstring_begins_with_a_full_statement() -> None:
    found, full = statements(ROOT / "deft_lightning")
    assert full == found > 2000


def test_the_collector_reads_both_ways_and_leaves_out_code(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "file.py").write_text(
        '''"""A docstring goes on and is not read."""
def f(x):
    """Another one that goes on."""
    if x:
        raise UserError(f"{x}: {'no' if x else 'some'} file" + (" here" if x else ""))
    rank_zero_info("three words are told")
    return "a heading of words", "{% for row in rows of words %}", "name"
'''
    )
    read = [(message.kind, message.text) for message in messages(package)]
    assert ("line", "three words are told") in read and ("text", "a heading of words") in read
    errors = {text for kind, text in read if kind == "error"}
    assert errors >= {f"{FILLED}: no file here", f"{FILLED}: some file"}
    assert len(read) == len(errors) + 2
    assert against("it goes on in a line a row, and is no file") == [
        "'goes on': resume, continue", "'is no ': is not a", "'line a row': per",
    ]  # fmt: skip
    assert against("there is no file, it is no longer read") == []


def test_sentences_of_messages_options_and_comments_are_counted() -> None:
    assert [words(part) for part in plain(f"{FILLED}, row {FILLED}: is not `a b`; use one. Or two.")] == [8, 2]
    assert [words(part) for part in plain("Known: one, two two, three, four")] == [2]
    assert LISTED.search("a: one, two") is None and CODE.search("body { font: 1px }")
    shown = "usage: x\n\nWords of it.\n\n  --name 1  What it does,\n            and more\n  --other   Other\n"
    assert options(shown) == ["Words of it.", "What it does, and more", "Other"]
