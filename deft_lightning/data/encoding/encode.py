"""From examples to prepared tokens: noise, template, tokens, truncation, and the count of what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.data.encoding.bounds import TemplateCost
from deft_lightning.data.encoding.template import (
    NOT_SUPERVISED,
    Encoded,
    encode_many,
    encode_marked,
    encode_prompt,
    markers,
)
from deft_lightning.data.examples import Example, Ints, Prepared, Prompt
from deft_lightning.data.lazy import Lazy, Made
from deft_lightning.data.noise import Noise, ResponseNoise, TokenNoise
from deft_lightning.data.noise.edits import Mark, apply_edits
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

Supervise = Literal["assistant", "last", "all"]


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
    sampled: bool = False
    applied: list[Applied] = field(default_factory=list)

    def add(self, example: Prepared) -> bool:
        """Count an example; return whether it has a supervised token left."""
        supervised = int((example.labels != IGNORE_INDEX).sum())
        if not supervised:
            self.dropped += 1
            return False
        noisy = int((example.noise_code > 0).sum())
        self.examples += 1
        self.tokens += len(example.input_ids)
        self.supervised += supervised
        self.noisy += noisy
        self.noisy_examples += noisy > 0
        return True

    @classmethod
    def load(cls, fields: dict[str, Any]) -> Report:
        """Return the report that ``asdict`` took apart."""
        return cls(**{**fields, "applied": [Applied(**one) for one in fields["applied"]]})

    def merge(self, part: Report) -> None:
        """Add the counts of some of the examples."""
        for name in ("examples", "tokens", "supervised", "noisy", "noisy_examples", "truncated", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def count_noise(self, rows: Any) -> None:
        """Count what token noise adds, on all examples, or on two thousand of more than twenty thousand."""
        total = len(rows.examples)
        step = 1 if total <= 20_000 else total // 2000
        seen = [rows.example(at) for at in range(0, total, step)]
        self.noisy = step * sum(int((example.noise_code > 0).sum()) for example in seen)
        self.noisy_examples = step * sum(bool(example.noise_code.any()) for example in seen)
        self.sampled = step > 1

    def explain(self, examples: int, supervised_before: int, max_length: int, problems: Sequence[str]) -> None:
        """Raise the reason why no example is left."""
        if not examples:
            raise UserError(f"{self.name}: no usable row; the first problem: {problems[0]}")
        if not supervised_before:
            raise UserError(
                f"{self.name}: the chat template or the labels leave no supervised token in any of {examples}"
                " examples (--data.chat_template)"
            )
        raise UserError(
            f"{self.name}: all {examples} examples are fully masked at max_length {max_length}: raise --data.max_length"
        )

    def __str__(self) -> str:
        """Return one line for the log."""
        parts = [
            f"{self.name}: {self.examples} examples, {self.tokens} tokens,"
            f" {self.supervised / max(self.tokens, 1):.0%} supervised"
        ]
        if self.noisy:
            share = self.noisy / max(self.supervised, 1)
            about = "about " if self.sampled else ""
            parts.append(f"{about}{self.noisy_examples} examples with noise ({share:.1%} of the supervised tokens)")
        parts += map(str, self.applied)
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped for want of a supervised token within max_length")
        return "; ".join(parts)


Changed = dict[int, tuple[Example, list[Mark]]]


def corrupted(examples: Lazy[Example] | Sequence[Example], noise: Noise) -> tuple[Changed, list[Applied]]:
    """Apply the operations on responses.

    Memory holds the ids of the examples, and those that are changed.

    Returns:
        The examples that are changed, by position, each with the letters of its response that are noise; and what each
        operation did.
    """
    changed: Changed = {}
    applied: list[Applied] = []
    if not any(isinstance(op, ResponseNoise) for op in noise.ops):
        return changed, applied
    open_to, ids, responses = [], [], 0
    for i, example in enumerate(examples):
        if example.response is not None:
            responses += 1
            if not noise.trusts(example.id):
                open_to.append(i)
                ids.append(example.id)

    def now(position: int) -> Example:
        i = open_to[position]
        return changed[i][0] if i in changed else examples[i]

    answers = Made(len(ids), lambda position: now(position).response or "")
    asked = Made(len(ids), lambda position: _last_user_turn(now(position)))
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, ResponseNoise):
            continue
        name, count = type(op).__name__, 0
        if not responses:
            rank_zero_warn(f"{name} does nothing: no example ends with a response (--data.noise.ops)")
        fresh: Changed = {}
        for position, edits in op.edits(
            salt, ids, cast("Sequence[str]", answers), cast("Sequence[str]", asked)
        ).items():
            i, before = open_to[position], now(position)
            old = before.response or ""
            answer, moved = apply_edits(old, edits, number, changed[i][1] if i in changed else [])
            if answer == old:
                continue
            end = [Mark(len(answer), len(answer), number)] if op.whole else []
            marks = [*(mark for mark in moved if not end or mark.start < len(answer)), *end]
            fresh[i] = replace(before, messages=(*before.prompt, {"role": "assistant", "content": answer})), marks
            count += 1
        changed.update(fresh)
        applied.append(Applied(name, op.rate, len(open_to), count))
        if not count and op.rate * len(open_to) > 20:  # by chance once in a hundred million times
            rank_zero_warn(
                f"{name} changed none of {len(open_to)} responses: they hold nothing that it looks for"
                " (--data.noise.ops)"
            )
    # An operation may have restored what an earlier one broke.
    return {i: new for i, new in changed.items() if new[0].messages != examples[i].messages}, applied


def corrupt_responses(
    examples: Sequence[Example], noise: Noise
) -> tuple[list[Example], list[list[Mark]], list[Applied]]:
    """Apply the operations on responses to examples in memory.

    Returns:
        The examples; of each, which letters of its response are noise, empty where it is clean; and what each
        operation did.
    """
    changed, applied = corrupted(examples, noise)
    pairs = [changed.get(i, (example, [])) for i, example in enumerate(examples)]
    return [example for example, _ in pairs], [marks for _, marks in pairs], applied


def _last_user_turn(example: Example) -> str:
    return next((turn["content"] for turn in reversed(example.prompt) if turn["role"] == "user"), "")


def _given_tokens(example: Example, vocab_size: int) -> Encoded | UserError:
    ids, labels = (np.array(values, dtype=np.int64) for values in example.tokens or ([], []))
    wrong = (ids < 0) | (ids >= vocab_size) | ((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size)))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        field, token = ("input_ids", ids[at]) if not 0 <= ids[at] < vocab_size else ("labels", labels[at])
        return RowError(
            example.where,
            f"token {int(token)} is outside the tokenizer's vocabulary of {vocab_size} (--data.tokenizer)",
            f"{field}[{at}]",
            "unknown token",
        )
    return Encoded(ids, np.where(labels == IGNORE_INDEX, NOT_SUPERVISED, 0))


def tokenise(
    tokenizer: Any,
    examples: Sequence[Example],
    marks: Sequence[Sequence[Mark]],
    refused: list[UserError] | None = None,
    supervise: Supervise = "assistant",
) -> list[Prepared]:
    """Turn examples into tokens labelled with themselves; ``marks`` are the noise in the last turn of each.

    Rows that the template or the vocabulary refuses are told to ``refused`` and left out; without it they raise.
    """
    prepared = []
    size = len(tokenizer)
    plain = [e for e, noisy in zip(examples, marks, strict=True) if not e.tokens and not noisy]
    texts = iter(encode_many(tokenizer, plain))
    for example, noisy in zip(examples, marks, strict=True):
        codes: Ints | None = None
        encoded: Encoded | UserError
        if noisy:
            try:
                encoded, codes = encode_marked(tokenizer, example, noisy)
            except UserError as error:
                encoded = error
        else:
            encoded = _given_tokens(example, size) if example.tokens else next(texts)
        if isinstance(encoded, UserError):
            if refused is None or isinstance(encoded, TemplateCost):
                raise encoded
            refused.append(encoded)
            continue
        supervised = encoded.turn != NOT_SUPERVISED
        if example.messages and supervise == "last":
            supervised &= encoded.turn == encoded.turn.max(initial=NOT_SUPERVISED)
        if example.messages and supervise == "all":
            supervised = np.ones_like(supervised)
        supervised[:1] = False  # nothing predicts the first token
        source = np.array(example.tokens[1], dtype=np.int64) if example.tokens else encoded.input_ids
        labels = np.where(supervised, source, IGNORE_INDEX)
        noise_code = np.zeros_like(labels) if codes is None else np.where(supervised, codes, 0)
        prepared.append(Prepared(example.id, encoded.input_ids, labels, noise_code))
    return prepared


def label_counts(prepared: Iterable[Prepared], size: int) -> Ints:
    """Return how often each of ``size`` tokens is a label."""
    counts = np.zeros(size, dtype=np.int64)
    for example in prepared:
        counts += np.bincount(example.labels[example.labels != IGNORE_INDEX], minlength=size)
    return counts


def vocabulary(tokenizer: Any, counts: Ints) -> Vocabulary:
    """Return what token noise may draw from: every token that is not special, its count as a label, its spelling.

    Args:
        tokenizer: The tokenizer.
        counts: Shape ``(V,)``: how often each token is a label of the training split.
    """
    ids = np.setdiff1d(np.arange(len(tokenizer)), markers(tokenizer))
    return Vocabulary(ids, counts[ids], tuple(tokenizer.convert_ids_to_tokens(ids.tolist())))


def corrupt_tokens(prepared: Sequence[Prepared], noise: Noise, words: Vocabulary, epoch: int = 0) -> list[Prepared]:
    """Apply the operations on single tokens, as they are in an epoch."""
    return [corrupt_example(example, noise, words, epoch) for example in prepared]


def corrupt_example(example: Prepared, noise: Noise, words: Vocabulary, epoch: int = 0) -> Prepared:
    """Apply the operations on single tokens, as they are in an epoch, to one example."""
    if noise.trusts(example.id):
        return example
    at = np.flatnonzero(example.labels != IGNORE_INDEX)
    ids, labels, codes = example.input_ids.copy(), example.labels.copy(), example.noise_code.copy()
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, TokenNoise):
            continue
        before = labels[at]
        wrong = op.at_epoch(epoch).corrupt_tokens(salt, example.id, before, words, example.skipped)
        hit = at[wrong != before]
        labels[hit] = wrong[wrong != before]
        # An earlier operation may have broken what this one restores; a swapped response stays wrong.
        codes[hit] = np.where(labels[hit] == example.labels[hit], example.noise_code[hit], number)
        if op.target == "text":
            ids[hit] = labels[hit]
    clean = np.where(example.noise_code == 0, example.labels, IGNORE_INDEX)
    return Prepared(example.id, ids, labels, codes, clean, example.skipped)


def prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Prompt]:
    """Return what generation starts from, for every example that is a conversation."""
    result = []
    for example in examples:
        if example.messages is None:
            continue
        text, ids = encode_prompt(tokenizer, example)
        result.append(Prompt(example.id, ids, text, example.response))
    return result
