"""Examples become tokens and labels, with the code of the noise in each; prompts become tokens to go on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_lightning.data.encoding.bounds import TemplateCost, bounded
from deft_lightning.data.encoding.markup import as_letters, forging, without_doubles
from deft_lightning.data.encoding.notes import notes_of_conversation, notes_of_text
from deft_lightning.data.encoding.offsets import Spelt, before, encodings
from deft_lightning.data.encoding.spans import Rendering, lay_out, lay_out_prompt
from deft_lightning.data.encoding.supervise import (
    NOT_SUPERVISED,
    Teaching,
    learnt,
    noise_codes,
    reaches_across,
    turns,
    weights_of,
)
from deft_lightning.data.encoding.template import origin
from deft_lightning.data.encoding.tokenizer import markers
from deft_lightning.data.examples import Example, Ints, Prepared, Prompt
from deft_lightning.data.noise.edits import Mark
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX

ALL = Teaching()


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: Shape ``(T,)``.
        turn: Shape ``(T,)``: number of the message a supervised token belongs to, -1 elsewhere.
        noise_code: Shape ``(T,)``: operation that corrupted the token, 0 where it is clean.
        thought: Shape ``(T,)``: whether the token belongs to the reasoning before an answer.
        notes: What is to be said of rows like this one.
    """

    input_ids: Ints
    turn: Ints
    noise_code: Ints
    thought: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


def encode(tokenizer: Any, example: Example, marks: Sequence[Mark] = (), teaching: Teaching = ALL) -> Encoded:
    """Tokenise an example that has messages or text.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is supervised, up to and including the turn's last special
    token, so that a separator after the end of the turn is not.

    Args:
        tokenizer: With its chat template.
        example: The example; with marks, a conversation that ends with a response.
        marks: Noise in that response.
        teaching: What of it is learnt.

    Raises:
        UserError: The place of a turn that is learnt is unknown, or the template leaves out a message, the reasoning
            of such a turn, a call of a tool, or the tools.
    """
    (encoded,) = encode_many(tokenizer, [example], [marks], teaching)
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


def encode_many(
    tokenizer: Any, examples: Sequence[Example], marks: Sequence[Sequence[Mark]], teaching: Teaching = ALL
) -> list[Encoded | UserError]:
    """Tokenise examples as :func:`encode` does, in one call of the tokenizer; a refused one gives its error."""
    plain = {at: _text(tokenizer, example.text) for at, example in enumerate(examples) if example.text is not None}
    results: list[Encoded | UserError | Rendering] = []
    special = forging(tokenizer) if teaching.special_tokens == "text" else None
    with bounded(origin(tokenizer)) as clock:
        for at, example in enumerate(examples):
            if at in plain:
                results.append(plain[at])
                continue
            clock.next(example.where)
            try:
                results.append(
                    lay_out(
                        tokenizer, list(example.messages or ()), example.where, example.tools,
                        needed=teaching.turns(example), reasoning=teaching.reasoning, special=special,
                    )
                )  # fmt: skip
            except UserError as error:
                results.append(error)
    written = encodings(tokenizer, [item.text for item in results if isinstance(item, Rendering)])
    ends = frozenset(markers(tokenizer).tolist())
    return [
        _conversation(tokenizer, example, item, next(written), ends, noise, teaching)
        if isinstance(item, Rendering)
        else item
        for example, item, noise in zip(examples, results, marks, strict=True)
    ]


def _text(tokenizer: Any, text: str) -> Encoded:
    bare, doubled = without_doubles(tokenizer, text)
    ids = tokenizer(bare).input_ids
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    zeros = np.zeros(len(ids), dtype=np.int64)
    notes = notes_of_text(bare, tokenizer, doubled=doubled)
    return Encoded(np.array(ids, dtype=np.int64), zeros, zeros, zeros.astype(bool), notes)


def _conversation(
    tokenizer: Any, example: Example, rendering: Rendering, encoding: Spelt, ends: frozenset[int],
    marks: Sequence[Mark], teaching: Teaching,
) -> Encoded:  # fmt: skip
    ids, offsets = encoding
    # Generation would begin at the start of a span: a token that reaches across it is taken apart.
    if reaches_across(rendering, offsets):
        array, starts, stops = _tokens(tokenizer, rendering.text, [start for start, _, _ in rendering.spans])
        ids, offsets = array.tolist(), list(zip(starts.tolist(), stops.tolist(), strict=True))
    spelt: list[str] | None = None if teaching.special_tokens == "token" else []
    if rendering.places:
        ids, offsets, spelt = as_letters(tokenizer, ids, offsets, rendering.text, rendering.places)
    notes = notes_of_conversation(example, tokenizer, spelt, thoughts=teaching.reasoning != "drop")
    if rendering.left_out:
        notes.append("the template leaves out the reasoning of turns that are not supervised")
    turn = turns(rendering, ids, offsets, ends)
    last = len(example.messages or ()) - 1
    codes = noise_codes(rendering, offsets, turn, example.response or "", last, marks)
    thought = np.zeros(len(ids), dtype=bool)
    for start, end in rendering.thoughts.values():
        thought[before(offsets, start) : before(offsets, end)] = True
    return Encoded(np.array(ids, dtype=np.int64), turn, codes, thought, tuple(notes))


def _tokens(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[Ints, Ints, Ints]:
    """Return tokens with their first and last letter; none reaches across a cut, where generation would begin."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded.input_ids, dtype=np.int64)
    starts, ends = np.array(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
    for cut in cuts:
        if ((starts < cut) & (cut < ends)).any():
            head = _tokens(tokenizer, text[:cut], [c for c in cuts if c < cut])
            tail = _tokens(tokenizer, text[cut:], [c - cut for c in cuts if c > cut])
            ids, starts, ends = (np.concatenate([a, b]) for a, b in zip(head, tail, strict=True))
            starts[len(head[0]) :] += cut
            ends[len(head[0]) :] += cut
            break
    return ids, starts, ends


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
    zeros = np.zeros_like(labels)
    return Encoded(ids, np.where(labels == IGNORE_INDEX, NOT_SUPERVISED, 0), zeros, zeros.astype(bool))


def tokenise(
    tokenizer: Any,
    examples: Sequence[Example],
    marks: Sequence[Sequence[Mark]],
    refused: list[UserError] | None = None,
    teaching: Teaching = ALL,
    notes: Counter[str] | None = None,
) -> list[Prepared]:
    """Turn examples into tokens labelled with themselves; ``marks`` are the noise in the last turn of each.

    Rows that the template or the vocabulary refuses are told to ``refused`` and left out; without it they raise. What
    is to be said of rows is counted in ``notes``. A label of weight 0 is none.
    """
    prepared = []
    size = len(tokenizer)
    written = [at for at, example in enumerate(examples) if not example.tokens]
    texts = iter(encode_many(tokenizer, [examples[at] for at in written], [marks[at] for at in written], teaching))
    for example in examples:
        encoded = _given_tokens(example, size) if example.tokens else next(texts)
        if isinstance(encoded, UserError):
            if refused is None or isinstance(encoded, TemplateCost):
                raise encoded
            refused.append(encoded)
            continue
        if notes is not None:
            notes.update(encoded.notes)
        supervised = learnt(encoded.turn, teaching.supervise if example.messages else "assistant")
        if not teaching.supervise_reasoning:
            supervised &= ~encoded.thought
        weight = weights_of(example, encoded.turn)
        if weight is not None:
            with np.errstate(over="ignore"):  # what is too large is refused with its example
                weight = weight.astype(np.float32)  # what is too small is 0
            supervised &= weight > 0
        supervised[:1] = False  # nothing predicts the first token
        source = np.array(example.tokens[1], dtype=np.int64) if example.tokens else encoded.input_ids
        labels = np.where(supervised, source, IGNORE_INDEX)
        even = weight is None or bool((weight[supervised] == 1).all())
        factors = None if even or weight is None else np.where(supervised, weight, np.float32(0))
        codes = encoded.noise_code * supervised
        prepared.append(Prepared(example.id, encoded.input_ids, labels, codes, weight=factors, source=example.source))
    return prepared


def encode_prompt(tokenizer: Any, example: Example, teaching: Teaching = ALL) -> tuple[str, list[int]]:
    """Return what generation starts from: the prefix of the tokens that :func:`encode` would give."""
    special = forging(tokenizer) if teaching.special_tokens == "text" else None
    with bounded(origin(tokenizer), example.where):
        text, cuts, places = lay_out_prompt(
            tokenizer, list(example.prompt), example.where, example.tools, teaching.reasoning, special
        )
    array, starts, stops = _tokens(tokenizer, text, cuts)
    offsets = list(zip(starts.tolist(), stops.tolist(), strict=True))
    return text, as_letters(tokenizer, array.tolist(), offsets, text, places).ids


def prompts(tokenizer: Any, examples: Sequence[Example], teaching: Teaching = ALL) -> list[Prompt]:
    """Return what generation starts from, for every example that is a conversation."""
    result = []
    for example in examples:
        if example.messages is None:
            continue
        text, ids = encode_prompt(tokenizer, example, teaching)
        result.append(Prompt(example.id, ids, text, example.response))
    return result
