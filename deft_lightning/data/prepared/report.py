"""What became of the examples of a split, counted and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deft_lightning.data.examples import Prepared
from deft_lightning.data.noise.apply import Applied
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

COUNTS = ("examples", "tokens", "supervised", "noisy", "noisy_examples", "truncated", "cut", "dropped", "weighted")
MOST = 0.95  # of the examples, for which a length is named that leaves them whole


@dataclass
class Report:
    """What became of the examples of a split.

    Attributes:
        name: Of the split.
        examples: How many are left.
        tokens: Of them.
        supervised: Tokens of them that are learnt.
        noisy: Supervised tokens that are corrupted.
        noisy_examples: Examples with such a token.
        truncated: Examples that are cut.
        cut: Examples whose response is cut, wholly or in part.
        dropped: Examples without a supervised token, which are left out.
        weighted: Examples with weights.
        sampled: Whether noise is counted on some examples only.
        applied: What each operation of noise has changed.
        notes: What is to be said of rows, with how many they are.
        longer: Tokens of the examples that are cut, before they are, with how many have so many.
    """

    name: str
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    noisy: int = 0
    noisy_examples: int = 0
    truncated: int = 0
    cut: int = 0
    dropped: int = 0
    weighted: int = 0
    sampled: bool = False
    applied: list[Applied] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    longer: dict[int, int] = field(default_factory=dict)

    def truncate(self, example: Prepared, max_length: int, keep: str) -> Prepared:
        """Return an example cut to a length, and count what that does to it."""
        short = example.truncate(max_length, keep)
        if (length := len(example.input_ids)) > max_length:
            self.truncated += 1
            self.cut += bool((short.labels != IGNORE_INDEX).sum() < (example.labels != IGNORE_INDEX).sum())
            self.longer[length] = self.longer.get(length, 0) + 1
        return short

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
        # Keys of JSON are texts.
        longer = {int(length): count for length, count in fields["longer"].items()}
        return cls(**{**fields, "applied": [Applied(**one) for one in fields["applied"]], "longer": longer})

    def merge(self, part: Report) -> None:
        """Add the counts of some of the examples."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for length, count in part.longer.items():
            self.longer[length] = self.longer.get(length, 0) + count
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
            f"{self.name}: --data.max_length {max_length} cuts off every supervised token of all {examples} examples"
            f"{self._enough(max_length)}"
        )

    def too_long(self, max_length: int) -> list[str]:
        """Return the line on responses that are cut, with the lengths at which they would not be; none if none is."""
        if not self.cut:
            return []
        # An example that was left out for other reasons than its length would make no other length.
        total = max(self.examples + self.dropped, self.cut)
        responses = "response is" if self.cut == 1 else "responses are"
        return [
            f"{self.name}: {self.cut:,} of {total:,} {responses} cut by --data.max_length {max_length}"
            f" ({self.cut / total:.1%}){self._enough(max_length)}"
        ]

    def _enough(self, max_length: int) -> str:
        """Return which lengths leave most and all examples whole."""
        if not self.longer:
            return ""
        total = max(self.examples + self.dropped, self.truncated)
        whole, most = total - self.truncated, max_length
        for length, count in sorted(self.longer.items()):
            if whole >= MOST * total:
                break
            whole, most = whole + count, length
        longest = max(self.longer)
        share = f"; {most} leaves {MOST:.0%} of the examples whole" if max_length < most < longest else ""
        return f"{share}, {longest} all of them" if share else f"; {longest} leaves all of them whole"

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
            parts.append(f"{self.dropped} dropped without a supervised token within max_length")
        return "; ".join(parts)
