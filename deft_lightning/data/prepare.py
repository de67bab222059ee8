"""From examples to prepared tokens: noise, template, tokens, truncation, and the count of what was lost on the way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.data.collate import IGNORE, Prepared, Prompt
from deft_lightning.data.noise import Noise, ResponseNoise, TokenNoise
from deft_lightning.data.noise.edits import Mark, apply_edits
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.data.records import Example
from deft_lightning.data.template import NOT_SUPERVISED, Encoded, Ints, encode, encode_marked, encode_prompt, markers
from deft_lightning.errors import UserError


@dataclass(frozen=True)
class Applied:
    """What an operation on responses did to a split.

    Attributes:
        name: Class of the operation.
        rate: Share of the examples it was asked for.
        eligible: Examples that were open to it: they end with a response and are not trusted.
        changed: Those whose response it changed. Less than the rate where it found nothing to corrupt.
    """

    name: str
    rate: float
    eligible: int
    changed: int

    def __str__(self) -> str:
        """Return a part of the line for the log."""
        return f"{self.name}: {self.changed / max(self.eligible, 1):.1%} of {self.eligible:,} examples changed"


@dataclass
class Report:
    """What became of the examples of a split."""

    name: str
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    noisy: int = 0
    noisy_examples: int = 0
    truncated: int = 0
    dropped: int = 0
    applied: list[Applied] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line for the log."""
        parts = [
            f"{self.name}: {self.examples} examples, {self.tokens} tokens,"
            f" {self.supervised / max(self.tokens, 1):.0%} supervised"
        ]
        if self.noisy:
            share = self.noisy / max(self.supervised, 1)
            parts.append(f"{self.noisy_examples} examples with noise ({share:.1%} of the supervised tokens)")
        parts += map(str, self.applied)
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped for want of a supervised token within max_length")
        return "; ".join(parts)


def corrupt_responses(
    examples: Sequence[Example], noise: Noise
) -> tuple[list[Example], list[list[Mark]], list[Applied]]:
    """Apply the operations on responses.

    Returns:
        The examples; of each, which letters of its response are noise, empty where it is clean; and what each
        operation did.
    """
    result = list(examples)
    marks: list[list[Mark]] = [[] for _ in examples]
    applied = []
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, ResponseNoise):
            continue
        name = type(op).__name__
        if all(e.response is None for e in result):
            rank_zero_warn(f"{name} does nothing: no example ends with a response (--data.noise.ops)")
        open_to = [i for i, e in enumerate(result) if e.response is not None and not noise.trusts(e.id)]
        answers = [result[i].response or "" for i in open_to]
        asked = [_last_user_turn(result[i]) for i in open_to]
        changed = 0
        for position, edits in op.edits(salt, [result[i].id for i in open_to], answers, asked).items():
            i = open_to[position]
            answer, moved = apply_edits(answers[position], edits, number, marks[i])
            if answer == answers[position]:
                continue
            end = [Mark(len(answer), len(answer), number)] if op.whole else []
            marks[i] = [*(mark for mark in moved if not end or mark.start < len(answer)), *end]
            messages = (*result[i].prompt, {"role": "assistant", "content": answer})
            result[i], changed = replace(result[i], messages=messages), changed + 1
        applied.append(Applied(name, op.rate, len(open_to), changed))
        if not changed and op.rate * len(open_to) > 20:  # by chance once in a hundred million times
            rank_zero_warn(
                f"{name} changed none of {len(open_to)} responses: they hold nothing that it looks for"
                " (--data.noise.ops)"
            )
    # An operation may have restored what an earlier one broke.
    for i, (new, old) in enumerate(zip(result, examples, strict=True)):
        marks[i] = [] if new.messages == old.messages else marks[i]
    return result, marks, applied


def _last_user_turn(example: Example) -> str:
    return next((turn["content"] for turn in reversed(example.prompt) if turn["role"] == "user"), "")


def _given_tokens(example: Example, vocab_size: int) -> Encoded:
    ids, labels = (np.array(values, dtype=np.int64) for values in example.tokens or ([], []))
    wrong = (ids < 0) | (ids >= vocab_size) | ((labels != IGNORE) & ((labels < 0) | (labels >= vocab_size)))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        field, token = ("input_ids", ids[at]) if not 0 <= ids[at] < vocab_size else ("labels", labels[at])
        raise UserError(
            f"{example.where}, field '{field}[{at}]': token {int(token)} is outside the tokenizer's vocabulary of"
            f" {vocab_size} (--data.tokenizer)"
        )
    return Encoded(ids, np.where(labels == IGNORE, NOT_SUPERVISED, 0))


def _encoded(tokenizer: Any, example: Example, marks: Sequence[Mark]) -> tuple[Encoded, Ints]:
    if marks:
        return encode_marked(tokenizer, example, marks)
    encoded = _given_tokens(example, len(tokenizer)) if example.tokens else encode(tokenizer, example)
    return encoded, np.zeros(len(encoded.input_ids), dtype=np.int64)


def tokenise(
    tokenizer: Any, examples: Sequence[Example], marks: Sequence[Sequence[Mark]], refused: list[str] | None = None
) -> list[Prepared]:
    """Turn examples into tokens labelled with themselves; ``marks`` are the noise in the last turn of each.

    Rows that the template or the vocabulary refuses are told to ``refused`` and left out; without it they raise.
    """
    prepared = []
    for example, noisy in zip(examples, marks, strict=True):
        try:
            encoded, codes = _encoded(tokenizer, example, noisy)
        except UserError as error:
            if refused is None:
                raise
            refused.append(str(error))
            continue
        supervised = encoded.turn != NOT_SUPERVISED
        supervised[:1] = False  # nothing predicts the first token
        source = np.array(example.tokens[1], dtype=np.int64) if example.tokens else encoded.input_ids
        labels = np.where(supervised, source, IGNORE)
        prepared.append(Prepared(example.id, encoded.input_ids, labels, np.where(supervised, codes, 0)))
    return prepared


def vocabulary(tokenizer: Any, prepared: Sequence[Prepared]) -> Vocabulary:
    """Return what token noise may draw from: every token that is not special, its count as a label, its spelling."""
    size = len(tokenizer)
    counts = np.zeros(size, dtype=np.int64)
    for example in prepared:
        counts += np.bincount(example.labels[example.labels != IGNORE], minlength=size)
    ids = np.setdiff1d(np.arange(size), markers(tokenizer))
    return Vocabulary(ids, counts[ids], tuple(tokenizer.convert_ids_to_tokens(ids.tolist())))


def corrupt_tokens(
    prepared: Sequence[Prepared], noise: Noise, words: Vocabulary, epoch: int | None = None
) -> list[Prepared]:
    """Apply the operations on single tokens, as they are in an epoch; None is the first one, for all that follow."""
    result, truth = list(prepared), [example.labels for example in prepared]
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, TokenNoise):
            continue
        if epoch is None and op.at_epoch(0) != op.at_epoch(sys.maxsize):
            name = type(op).__name__
            rank_zero_warn(f"{name}: the rate of the first epoch holds for all of them (--data.noise.ops.rates)")
        op = op.at_epoch(epoch or 0)
        for i, example in enumerate(result):
            if noise.trusts(example.id):
                continue
            at = np.flatnonzero(example.labels != IGNORE)
            clean = example.labels[at]
            wrong = op.corrupt_tokens(salt, example.id, clean, words)
            hit = at[wrong != clean]
            if not hit.size:
                continue
            ids, labels, codes = example.input_ids.copy(), example.labels.copy(), example.noise_code.copy()
            labels[hit] = wrong[wrong != clean]
            # An earlier operation may have broken what this one restores; a swapped response stays wrong.
            codes[hit] = np.where(labels[hit] == truth[i][hit], prepared[i].noise_code[hit], number)
            if op.target == "text":
                ids[hit] = labels[hit]
            result[i] = Prepared(example.id, ids, labels, codes)
    return result


def finish(prepared: Sequence[Prepared], max_length: int, report: Report) -> list[Prepared]:
    """Truncate, drop what has no supervised token left, and count.

    Raises:
        UserError: Nothing is left; the message names the option that took it.
    """
    kept: list[Prepared] = []
    supervised_before = 0
    for example in prepared:
        supervised_before += int((example.labels != IGNORE).sum())
        short = example.truncate(max_length)
        report.truncated += len(example.input_ids) > max_length
        supervised = int((short.labels != IGNORE).sum())
        if not supervised:
            report.dropped += 1
            continue
        noisy = int((short.noise_code > 0).sum())
        report.examples += 1
        report.tokens += len(short.input_ids)
        report.supervised += supervised
        report.noisy += noisy
        report.noisy_examples += noisy > 0
        kept.append(short)
    if prepared and not supervised_before:
        raise UserError(
            f"{report.name}: the chat template or the labels leave no supervised token in any of {len(prepared)}"
            " examples (--data.chat_template)"
        )
    if prepared and not kept:
        raise UserError(
            f"{report.name}: all {len(prepared)} examples are fully masked at max_length {max_length}: raise"
            " --data.max_length"
        )
    return kept


def prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Prompt]:
    """Return what generation starts from, for every example that is a conversation."""
    result = []
    for example in examples:
        if example.messages is None:
            continue
        text, ids = encode_prompt(tokenizer, example)
        result.append(Prompt(example.id, ids, text, example.response))
    return result
