"""Examples as the model will see them: learnt, noise, or cut off; in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from deft_lightning.annotations import Tokenizer
from deft_lightning.data.examples import Prepared
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.terminal import visible

Kind = Literal["context", "supervised", "noisy", "cut"]
Fate = tuple[Kind, str]
ORDER: tuple[Kind, ...] = ("noisy", "supervised", "cut", "context")
HALF = "\ufffd"  # what a decoder writes for bytes that are not yet a letter
MEANING: dict[Kind, str] = {
    "context": "context: read, not learnt",
    "supervised": "supervised: learnt",
    "noisy": "noisy: a corrupted label is learnt",
    "cut": "truncated: cut off by max_length",
}


@dataclass(frozen=True)
class Piece:
    """Tokens in a row of which the same becomes.

    Attributes:
        text: As text.
        kind: What becomes of them.
        note: Label that is learnt instead, where it is another one, and the operation that did it; a weight but 1.
    """

    text: str
    kind: Kind
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One example to look at."""

    id: str
    pieces: list[Piece]
    tokens: int
    supervised: int
    noisy: int
    cut: int


def sample(
    tokenizer: Tokenizer, example: Prepared, operations: Sequence[str], length: int, cut: Sequence[int], keep: str
) -> Sample:  # fmt: skip
    """Describe an example.

    Args:
        tokenizer: Turns tokens into text.
        example: As it is trained on.
        operations: Names of the noise operations, in the order of their codes.
        length: Tokens before truncation.
        cut: Some of the tokens that were cut off.
        keep: Which end was kept.
    """
    ids, labels, codes = (array.tolist() for array in (example.input_ids, example.labels, example.noise_code))
    first = list(cut) if keep == "end" else []
    shown, shift = [*first, *ids, *([] if keep == "end" else cut)], len(first)
    weights = [1.0] * len(ids) if example.weight is None else example.weight.tolist()

    def what(at: int) -> Fate:
        if not shift <= at < shift + len(ids):
            return "cut", ""
        token, label, code = ids[at - shift], labels[at - shift], codes[at - shift]
        if code:
            learnt = f"learnt as {tokenizer.decode([label])!r}, " if label != token else ""
            return "noisy", f"{learnt}{operations[code - 1]}{_counts(weights[at - shift], ', ')}"
        return ("context", "") if label == IGNORE_INDEX else ("supervised", _counts(weights[at - shift]))

    pieces: list[Piece] = []
    for start, end, text in letters(tokenizer, shown):
        kind, note = _together([what(at) for at in range(start, end)])
        if pieces and (pieces[-1].kind, pieces[-1].note) == (kind, note):
            pieces[-1] = Piece(pieces[-1].text + text, kind, note)
        else:
            pieces.append(Piece(text, kind, note))
    hidden = length - len(shown)
    if hidden:
        more = Piece(f" … {hidden} more tokens … ", "cut")
        pieces = [more, *pieces] if keep == "end" else [*pieces, more]
    supervised, noisy = int((example.labels != IGNORE_INDEX).sum()), int((example.noise_code > 0).sum())
    return Sample(example.id, pieces, len(ids), supervised, noisy, length - len(ids))


def _counts(weight: float, before: str = "") -> str:
    return "" if weight == 1 else f"{before}weight {weight:g}"


def letters(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Yield the fewest tokens that are whole letters together: first, end, text.

    A token alone may lose its space or be half a letter: its text is what it adds to that of the tokens before.
    """
    context, start = 0, 0
    for end in range(1, len(ids) + 1):
        before, after = tokenizer.decode(ids[context:start]), tokenizer.decode(ids[context:end])
        complete = after.startswith(before) and not after.endswith(HALF)
        if complete or end == len(ids):
            yield start, end, after[len(before) :] if after.startswith(before) else tokenizer.decode(ids[start:end])
            context, start = start, end


def _together(fates: Sequence[Fate]) -> Fate:
    """Return what is said of a letter of several tokens: the first of noisy, supervised, cut, context."""
    kind = next(kind for kind in ORDER if any(kind == of_token for of_token, _ in fates))
    return kind, "; ".join(dict.fromkeys(note for _, note in fates if note))


def as_text(sample: Sample) -> str:
    """Return a sample for a terminal or a log: ``[supervised]``, ``{noisy}``, ``~cut off~``, context as it is."""
    marks = {"context": ("", ""), "supervised": ("[", "]"), "noisy": ("{", "}"), "cut": ("~", "~")}
    parts: list[str] = []
    last: Kind = "context"
    for piece in sample.pieces:
        if piece.kind != last:
            parts += [marks[last][1], marks[piece.kind][0]]
            last = piece.kind
        parts.append(visible(piece.text))
    return "".join(parts) + marks[last][1]


STYLE = """
:root { color-scheme: light dark; --line: #8884; --learnt: #2e7d3226; --learnt-edge: #2e7d32; --wrong: #d5500030;
  --wrong-edge: #d55000; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } article { border: 1px solid var(--line); border-radius: 8px; margin: 1.2rem 0; }
header { padding: .5rem .9rem; border-bottom: 1px solid var(--line); font-size: .85rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .9rem; font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.supervised { background: var(--learnt); box-shadow: inset 0 -2px var(--learnt-edge); }
.noisy { background: var(--wrong); box-shadow: inset 0 -2px var(--wrong-edge); }
.cut { opacity: .5; text-decoration: line-through; }
.legend span { padding: .1rem .4rem; margin-right: .8rem; }
"""


def page(title: str, samples: Iterable[Sample], reports: Sequence[str]) -> str:
    """Return an HTML page of samples that needs nothing but itself."""
    legend = " ".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in MEANING.items())
    body = [f'<p class="legend">{legend}</p>', *(f"<p>{_shown(report)}</p>" for report in reports)]
    for sample in samples:
        counts = f"{sample.tokens} tokens, {sample.supervised} supervised"
        counts += f", {sample.noisy} noisy" if sample.noisy else ""
        counts += f", {sample.cut} cut off" if sample.cut else ""
        tokens = "".join(map(_span, sample.pieces))
        body.append(f"<article><header>{_shown(sample.id)}: {counts}</header><pre>{tokens}</pre></article>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_shown(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{_shown(title)}</h1>{''.join(body)}</body></html>\n"
    )


def _shown(text: str) -> str:
    """Return text of strangers as HTML, between tags or in an attribute: no markup, and nothing hidden."""
    return escape(visible(text), quote=True)


def _span(piece: Piece) -> str:
    title = f' title="{_shown(piece.note)}"' if piece.note else ""
    return f'<span class="{piece.kind}"{title}>{_shown(piece.text)}</span>'
