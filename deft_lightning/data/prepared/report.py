"""What became of the examples of a split, counted and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deft_lightning.data.examples import Prepared
from deft_lightning.data.noise.apply import Applied
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX


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
    weighted: int = 0
    sampled: bool = False
    applied: list[Applied] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

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
        for name in ("examples", "tokens", "supervised", "noisy", "noisy_examples", "truncated", "dropped", "weighted"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.count_notes(part.notes)

    def count_notes(self, notes: Mapping[str, int]) -> None:
        """Add what is to be said of rows, with how many they are."""
        for note, count in notes.items():
            self.notes[note] = self.notes.get(note, 0) + count

    def count_noise(self, examples: int, example: Callable[[int], Prepared]) -> None:
        """Count what token noise adds, on all examples, or on two thousand of more than twenty thousand.

        Args:
            examples: How many there are.
            example: Position to the example as it is trained on.
        """
        step = 1 if examples <= 20_000 else examples // 2000
        seen = [example(at) for at in range(0, examples, step)]
        self.noisy = step * sum(int((one.noise_code > 0).sum()) for one in seen)
        self.noisy_examples = step * sum(bool(one.noise_code.any()) for one in seen)
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

    def remarks(self) -> list[str]:
        """Return what is said of rows beside their numbers, one line for each kind."""
        return [f"{self.name}: in {count} row{'s' * (count > 1)}, {note}" for note, count in sorted(self.notes.items())]

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
        if self.weighted:
            parts.append(f"{self.weighted} examples with weights")
        parts += map(str, self.applied)
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped for want of a supervised token within max_length")
        return "; ".join(parts)
