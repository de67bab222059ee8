"""Preparation says how far it is, off a terminal too."""

from __future__ import annotations

import logging
import time

import pytest

from deft_lightning import progress as module


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.2)
    with caplog.at_level(logging.INFO):
        for _ in module.progress(range(12), "preparing train", 12):
            time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("preparing train: ") and " of 12 rows" in line for line in lines), lines


def test_what_is_quick_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), module.progress(None, "preparing train", 1000) as bar:
        for _ in range(10):
            bar.update(100)
    assert not caplog.records


def test_without_a_total_it_counts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.2)
    with caplog.at_level(logging.INFO):
        for _ in module.progress(iter(range(8)), "reading rows.jsonl"):
            time.sleep(0.1)
    assert any(record.getMessage().startswith("reading rows.jsonl: ") for record in caplog.records)
