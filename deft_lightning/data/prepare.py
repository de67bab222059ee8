"""From examples to prepared tokens: noise, template, tokens, truncation, and the count of what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from deft_lightning.data.collate import IGNORE, Prepared, Prompt
from deft_lightning.data.noise import Noise, ResponseNoise, TokenNoise
from deft_lightning.data.noise.base import Vocabulary
from deft_lightning.data.records import Example
from deft_lightning.data.template import NOT_SUPERVISED, Encoded, Ints, encode_many, encode_prompt, markers
from deft_lightning.errors import UserError

Supervise = Literal["assistant", "last", "all"]


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

    def add(self, example: Prepared) -> bool:
        """Count an example; return whether it has a supervised token left."""
        supervised = int((example.labels != IGNORE).sum())
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
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped for want of a supervised token within max_length")
        return "; ".join(parts)


def corrupt_responses(examples: Iterable[Example], noise: Noise) -> tuple[list[Example], list[int]]:
    """Apply the operations on whole responses; return the examples and the code of each (0: clean)."""
    clean = list(examples)
    result, codes = list(clean), [0] * len(clean)
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, ResponseNoise):
            continue
        if all(e.response is None for e in result):
            name = type(op).__name__
            rank_zero_warn(f"{name} does nothing: no example ends with a response (--data.noise.ops)")
        open_to = [i for i, e in enumerate(result) if e.response is not None and not noise.trusts(e.id)]
        answers = [result[i].response or "" for i in open_to]
        for position, answer in op.corrupt_responses(salt, [result[i].id for i in open_to], answers).items():
            i = open_to[position]
            messages = (*result[i].prompt, {"role": "assistant", "content": answer})
            result[i], codes[i] = replace(result[i], messages=messages), number
    # An operation may have restored what an earlier one broke.
    codes = [0 if new.messages == old.messages else code for new, old, code in zip(result, clean, codes, strict=True)]
    return result, codes


def _given_tokens(example: Example, vocab_size: int) -> Encoded | UserError:
    ids, labels = (np.array(values, dtype=np.int64) for values in example.tokens or ([], []))
    wrong = (ids < 0) | (ids >= vocab_size) | ((labels != IGNORE) & ((labels < 0) | (labels >= vocab_size)))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        field, token = ("input_ids", ids[at]) if not 0 <= ids[at] < vocab_size else ("labels", labels[at])
        return UserError(
            f"{example.where}, field '{field}[{at}]': token {int(token)} is outside the tokenizer's vocabulary of"
            f" {vocab_size} (--data.tokenizer)"
        )
    return Encoded(ids, np.where(labels == IGNORE, NOT_SUPERVISED, 0))


def tokenise(
    tokenizer: Any,
    examples: Sequence[Example],
    codes: Sequence[int],
    refused: list[str] | None = None,
    supervise: Supervise = "assistant",
) -> list[Prepared]:
    """Turn examples into tokens with clean-text labels; ``codes`` marks the last turn of corrupted responses.

    Rows that the template or the vocabulary refuses are told to ``refused`` and left out; without it they raise.
    """
    prepared = []
    size = len(tokenizer)
    texts = iter(encode_many(tokenizer, [example for example in examples if not example.tokens]))
    for example, code in zip(examples, codes, strict=True):
        encoded = _given_tokens(example, size) if example.tokens else next(texts)
        if isinstance(encoded, UserError):
            if refused is None:
                raise encoded
            refused.append(str(encoded))
            continue
        supervised = encoded.turn != NOT_SUPERVISED
        if example.messages and supervise == "last":
            supervised &= encoded.turn == encoded.turn.max(initial=NOT_SUPERVISED)
        if example.messages and supervise == "all":
            supervised = np.ones_like(supervised)
        supervised[:1] = False  # nothing predicts the first token
        source = np.array(example.tokens[1], dtype=np.int64) if example.tokens else encoded.input_ids
        labels = np.where(supervised, source, IGNORE)
        last = len(example.messages) - 1 if example.messages else 0
        noise_code = np.where(supervised & (encoded.turn == last), code, 0)
        prepared.append(Prepared(example.id, encoded.input_ids, labels, noise_code))
    return prepared


def vocabulary(tokenizer: Any, counts: Ints) -> Vocabulary:
    """Return what token noise may draw from: every token that is not special, with its count among the labels.

    Args:
        tokenizer: The tokenizer.
        counts: Shape ``(V,)``: how often each token is a label of the training split.
    """
    ids = np.setdiff1d(np.arange(len(tokenizer)), markers(tokenizer))
    return Vocabulary(ids, counts[ids])


def corrupt_tokens(prepared: Sequence[Prepared], noise: Noise, words: Vocabulary) -> list[Prepared]:
    """Apply the operations on single tokens."""
    return [corrupt_example(example, noise, words) for example in prepared]


def corrupt_example(example: Prepared, noise: Noise, words: Vocabulary) -> Prepared:
    """Apply the operations on single tokens to one example."""
    if noise.trusts(example.id):
        return example
    at = np.flatnonzero(example.labels != IGNORE)
    ids, labels, codes = example.input_ids.copy(), example.labels.copy(), example.noise_code.copy()
    for number, (op, salt) in enumerate(zip(noise.ops, noise.salts(), strict=True), 1):
        if not isinstance(op, TokenNoise):
            continue
        before = labels[at]
        wrong = op.corrupt_tokens(salt, example.id, before, words)
        hit = at[wrong != before]
        labels[hit] = wrong[wrong != before]
        # An earlier operation may have broken what this one restores; a swapped response stays wrong.
        codes[hit] = np.where(labels[hit] == example.labels[hit], example.noise_code[hit], number)
        if op.target == "text":
            ids[hit] = labels[hit]
    clean = np.where(example.noise_code == 0, example.labels, IGNORE)
    return Prepared(example.id, ids, labels, codes, clean)


def prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Prompt]:
    """Return what generation starts from, for every example that is a conversation."""
    result = []
    for example in examples:
        if example.messages is None:
            continue
        text, ids = encode_prompt(tokenizer, example)
        result.append(Prompt(example.id, ids, text, example.response))
    return result
