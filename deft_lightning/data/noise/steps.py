"""Noise on the reasoning: steps left out, out of order, or out of another solution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from deft_lightning.answers.locate import answer_box
from deft_lightning.data.noise.base import ResponseNoise
from deft_lightning.data.noise.edits import Edit
from deft_lightning.hashing import stream

LINE = re.compile(r"[^\n]+")
# Where one sentence ends and the next begins; a decimal point has no blank behind it.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])\s*(?=[^\s。！？])")  # noqa: RUF001


class Step(NamedTuple):
    """One step of a response: where it stands, what it says, and whether it gives the final answer."""

    start: int
    text: str
    answer: bool


@dataclass(frozen=True)
class StepEdit(ResponseNoise):
    r"""Break the reasoning and keep the answer.

    Steps are the lines that are not blank, or the sentences where there is one line. The last step, and any with
    ``####``, ``\boxed`` or ``\fbox``, gives the answer and is never touched. Flagged is what was inserted or moved to
    a place where the clean text says something else, and the first token behind what was left out.

    Args:
        rate: Share of examples, in ``[0, 1]``.
        op: ``delete`` leaves steps out; ``shuffle`` moves steps among their places; ``insert`` puts steps of other
            examples in between, none that the solution has itself.
        fraction: Share of the steps before the answer that is left out, moved (at least two) or added (at least one).
        exact: Corrupt exactly ``floor(rate * n)`` of the ``n`` responses that have steps to spare.
    """

    rate: float = 0.2
    op: Literal["delete", "shuffle", "insert"] = "delete"
    fraction: float = 0.33
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse shares and words that mean nothing."""
        super().__post_init__()
        known = self.op in ("delete", "shuffle", "insert")
        self._refuse_unless(known, f"op must be delete, shuffle or insert, not {self.op!r}")
        self._refuse_unless(0.0 < self.fraction <= 1.0, f"fraction {self.fraction} is outside (0, 1]")

    def edits(
        self, salt: str, ids: Sequence[str], responses: Sequence[str], prompts: Sequence[str]
    ) -> dict[int, list[Edit]]:
        """Return the edits of the selected responses."""
        selected = range(len(ids)) if self.exact else self.select(salt, ids, range(len(ids)))
        pool: list[str] = []
        if self.op == "insert":
            # Of all responses, so that what is inserted at one rate is inserted at a higher one too.
            pool = sorted({s.text.strip() for text in responses for s in steps(text) if not s.answer})
        made = {i: self._edit(salt, ids[i], responses[i], pool) for i in selected}
        changed = {i: edits for i, edits in made.items() if edits}
        return {i: changed[i] for i in self.select(salt, ids, changed)} if self.exact else changed

    def _edit(self, salt: str, example_id: str, response: str, pool: Sequence[str]) -> list[Edit]:
        all_steps = steps(response)
        free = [i for i, step in enumerate(all_steps) if not step.answer]
        draws = stream(salt, example_id, self.op)
        if self.op == "insert":
            return self._insert(response, all_steps, len(free), pool, draws)
        order = [free[j] for j in draws.permutation(len(free))]
        if self.op == "delete":
            # A free step is never the last, so it goes with the blanks up to the next one.
            gone = sorted(order[: self._share(len(free))])
            return [Edit(all_steps[i].start, all_steps[i + 1].start, "") for i in gone]
        return self._shuffle(all_steps, order)

    def _share(self, steps: int) -> int:
        return max(round(self.fraction * steps), 1)

    def _shuffle(self, all_steps: Sequence[Step], order: Sequence[int]) -> list[Edit]:
        count = max(self._share(len(order)), 2)
        other = next((i for i in order if all_steps[i].text != all_steps[order[0]].text), None)
        if other is None:
            return []
        moved = list(order[:count])
        if len({all_steps[i].text for i in moved}) == 1:
            moved[-1] = other
        # Everyone takes the text of the next in a circle, so each moves; equal texts in a row are no change.
        pairs = sorted([*pairwise(moved), (moved[-1], moved[0])])
        return [
            Edit(all_steps[i].start, all_steps[i].start + len(all_steps[i].text), all_steps[j].text)
            for i, j in pairs
            if all_steps[i].text != all_steps[j].text
        ]

    def _insert(
        self, response: str, all_steps: Sequence[Step], free: int, pool: Sequence[str], draws: np.random.Generator
    ) -> list[Edit]:
        own = {step.text.strip() for step in all_steps}
        if not all_steps or not pool:
            return []
        edits: dict[int, str] = {}
        lines = "\n" in response.strip()
        for _ in range(self._share(free)):
            before = int(draws.integers(len(all_steps)))
            at = int(draws.integers(len(pool)))
            # Its own steps are few, so a foreign one is near; what was inserted counts as its own from then on.
            new = next((text for k in range(len(pool)) if (text := pool[(at + k) % len(pool)]) not in own), "")
            if not new:
                break
            own.add(new)
            # A line goes before the next one, a sentence behind the last one: tokens hold the blank before a word, and
            # the break after a line, so that the clean ones stay whole.
            place, text = all_steps[before].start, new + ("\n" if lines else " ")
            if before and not lines:
                place, text = all_steps[before - 1].start + len(all_steps[before - 1].text), f" {new}"
            edits[place] = edits.get(place, "") + text
        return [Edit(place, place, text) for place, text in sorted(edits.items())]


def steps(response: str) -> list[Step]:
    """Return the steps of a response in order: lines that are not blank, or sentences if there is but one."""
    spans = [hit.span() for hit in LINE.finditer(response) if hit[0].strip()]
    if len(spans) == 1:
        ((start, end),) = spans
        cuts = list(SENTENCE_END.finditer(response, start, end))
        spans = list(zip([start, *(cut.end() for cut in cuts)], [*(cut.start() for cut in cuts), end], strict=True))
    texts = [(start, response[start:end].rstrip("\r")) for start, end in spans]
    return [
        Step(start, text, i == len(texts) - 1 or "####" in text or answer_box(text) is not None)
        for i, (start, text) in enumerate(texts)
    ]
