"""Examples as Markdown whose tokens are marked by gate."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from deft_lightning.annotations import Batch, Tokenizer
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.terminal import visible

# TensorBoard's Markdown knows no colours, and coloured characters need a font that not every machine has.
LEVELS = ((0.1, "█"), (0.5, "▓"), (0.9, "▒"), (float("inf"), "░"))
LEGEND = (
    "Each run of supervised tokens follows its mean gate; darker means more closed: █ below 0.1, ▓ below 0.5,"
    " ▒ below 0.9, ░ from there on. Labels known to be **noisy** are bold. Tokens that are only read are left out."
)


def marked(tokenizer: Tokenizer, batch: Batch, gate: Tensor, examples: int, tokens: int) -> str:
    """Return the first examples of a batch, the labels of their supervised tokens marked by gate.

    Args:
        tokenizer: Turns tokens into text.
        batch: ``labels`` of shape ``(B, T)``, -100 where nothing is learnt; ``noise_code`` and ``example_id`` if known.
        gate: Shape ``(N,)``, of the supervised tokens in order.
        examples: How many examples.
        tokens: How many tokens of each.
    """
    labels = batch["labels"][:, 1:].tolist()
    codes = batch["noise_code"][:, 1:].tolist() if "noise_code" in batch else [[0] * len(row) for row in labels]
    parts, start = [LEGEND], 0
    names = batch.get("example_id", ())
    if len(names) != len(labels):  # packed: a row is several examples
        names = [f"row {number}" for number in range(len(labels))]
    # Gates of rows that are not shown stay on the device.
    gates = gate[: sum(label != IGNORE_INDEX for row in labels[:examples] for label in row)].tolist()
    for number, (row, row_codes) in enumerate(zip(labels[:examples], codes, strict=False)):
        learnt = [(label, code > 0) for label, code in zip(row, row_codes, strict=True) if label != IGNORE_INDEX]
        own, start = gates[start : start + len(learnt)], start + len(learnt)
        name = code_span(str(names[number]))
        mean = f", mean gate {sum(own) / len(own):.2f}" if own else ""
        more = f" … {len(learnt) - tokens} more" if len(learnt) > tokens else ""
        parts.append(f"{name}: {len(learnt)} tokens{mean}\n\n{_runs(tokenizer, learnt[:tokens], own)}{more}")
    return "\n\n---\n\n".join(parts)


def _runs(tokenizer: Tokenizer, learnt: Sequence[tuple[int, bool]], gates: Sequence[float]) -> str:
    """Return tokens, neighbours of one level and kind together."""
    runs: list[tuple[tuple[str, bool], list[int], list[float]]] = []
    for (label, noisy), gate in zip(learnt, gates, strict=False):
        key = (level(gate), noisy)
        if not runs or runs[-1][0] != key:
            runs.append((key, [], []))
        runs[-1][1].append(label)
        runs[-1][2].append(gate)
    spans = []
    for (mark, noisy), ids, own in runs:
        text = code_span(tokenizer.decode(ids))
        spans.append(f"{mark} {sum(own) / len(own):.2f} {f'**{text}**' if noisy else text}")
    return " ".join(spans)


def level(gate: float) -> str:
    """Return the mark of a gate."""
    return next(mark for limit, mark in LEVELS if gate < limit or limit == float("inf"))


def code_span(text: str) -> str:
    """Return text as Markdown code, whatever it holds: nothing in it is markup or hidden, and it stays on its line."""
    # A line break would end the paragraph, and with it the span.
    flat = visible(re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", "↵", text))
    # Blanks at the ends of a span are not shown, and would join two words.
    start, end = len(flat) - len(flat.lstrip(" ")), len(flat.rstrip(" "))
    flat = "␣" * start + flat[start:end] + "␣" * (len(flat) - max(start, end))
    longest = max((len(ticks) for ticks in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {flat} {fence}" if longest or not flat.strip() else f"{fence}{flat}{fence}"
