"""Examples become tokens and labels, with the code of the noise in each; prompts become tokens to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from deft_lightning.data.encoding.bounds import TemplateCost, bounded
from deft_lightning.data.encoding.spans import Rendering, lay_out, lay_out_prompt
from deft_lightning.data.encoding.supervise import NOT_SUPERVISED, Supervise, learnt, noise_codes, reaches_across, turns
from deft_lightning.data.encoding.template import origin
from deft_lightning.data.encoding.tokenizer import markers
from deft_lightning.data.examples import Example, Ints, Prepared, Prompt
from deft_lightning.data.noise.edits import Mark
from deft_lightning.data.sources.rows import RowError
from deft_lightning.errors import UserError
from deft_lightning.functional import IGNORE_INDEX


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: Shape ``(T,)``.
        turn: Shape ``(T,)``: number of the message a supervised token belongs to, -1 elsewhere.
        noise_code: Shape ``(T,)``: operation that corrupted the token, 0 where it is clean.
    """

    input_ids: Ints
    turn: Ints
    noise_code: Ints


def encode(tokenizer: Any, example: Example, marks: Sequence[Mark] = ()) -> Encoded:
    """Tokenise an example that has messages or text.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is supervised, up to and including the turn's last special
    token, so that a separator after the end of the turn is not.

    Args:
        tokenizer: With its chat template.
        example: The example; with marks, a conversation that ends with a response.
        marks: Noise in that response.

    Raises:
        UserError: The template rewrites earlier turns, or leaves out a message, a call of a tool, or the tools.
    """
    (encoded,) = encode_many(tokenizer, [example], [marks])
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


def encode_many(
    tokenizer: Any, examples: Sequence[Example], marks: Sequence[Sequence[Mark]]
) -> list[Encoded | UserError]:
    """Tokenise examples as :func:`encode` does, in one call of the tokenizer; a refused one gives its error."""
    plain = {at: _text(tokenizer, example.text) for at, example in enumerate(examples) if example.text is not None}
    results: list[Encoded | UserError | Rendering] = []
    with bounded(origin(tokenizer)) as clock:
        for at, example in enumerate(examples):
            if at in plain:
                results.append(plain[at])
                continue
            clock.next(example.where)
            try:
                results.append(lay_out(tokenizer, list(example.messages or ()), example.where, example.tools))
            except UserError as error:
                results.append(error)
    encodings = iter(_encodings(tokenizer, [item.text for item in results if isinstance(item, Rendering)]))
    ends = frozenset(markers(tokenizer).tolist())
    return [
        _conversation(tokenizer, example, item, next(encodings), ends, noise) if isinstance(item, Rendering) else item
        for example, item, noise in zip(examples, results, marks, strict=True)
    ]


def _text(tokenizer: Any, text: str) -> Encoded:
    ids = tokenizer(text).input_ids
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Encoded(np.array(ids, dtype=np.int64), zeros, zeros)


def _conversation(
    tokenizer: Any, example: Example, rendering: Rendering, encoding: Any, ends: frozenset[int], marks: Sequence[Mark]
) -> Encoded:
    ids, offsets = encoding.ids, encoding.offsets
    # Generation would begin at the start of a span: a token that reaches across it is taken apart.
    if reaches_across(rendering, offsets):
        array, starts, stops = _tokens(tokenizer, rendering.text, [start for start, _, _ in rendering.spans])
        ids, offsets = array.tolist(), list(zip(starts.tolist(), stops.tolist(), strict=True))
    turn = turns(rendering, ids, offsets, ends)
    last = len(example.messages or ()) - 1
    codes = noise_codes(rendering, offsets, turn, example.response or "", last, marks)
    return Encoded(np.array(ids, dtype=np.int64), turn, codes)


def _encodings(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Tokens and offsets of texts, without the lists of masks that nobody reads."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return list(tokenizer(texts, **options).encodings)


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
    return Encoded(ids, np.where(labels == IGNORE_INDEX, NOT_SUPERVISED, 0), np.zeros_like(labels))


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
    written = [at for at, example in enumerate(examples) if not example.tokens]
    texts = iter(encode_many(tokenizer, [examples[at] for at in written], [marks[at] for at in written]))
    for example in examples:
        encoded = _given_tokens(example, size) if example.tokens else next(texts)
        if isinstance(encoded, UserError):
            if refused is None or isinstance(encoded, TemplateCost):
                raise encoded
            refused.append(encoded)
            continue
        supervised = learnt(encoded.turn, supervise if example.messages else "assistant")
        supervised[:1] = False  # nothing predicts the first token
        source = np.array(example.tokens[1], dtype=np.int64) if example.tokens else encoded.input_ids
        labels = np.where(supervised, source, IGNORE_INDEX)
        prepared.append(Prepared(example.id, encoded.input_ids, labels, encoded.noise_code * supervised))
    return prepared


def encode_prompt(tokenizer: Any, example: Example) -> tuple[str, list[int]]:
    """Return what generation starts from: the prefix of the tokens that :func:`encode` would give."""
    with bounded(origin(tokenizer), example.where):
        text, cuts = lay_out_prompt(tokenizer, list(example.prompt), example.where, example.tools)
    return text, _tokens(tokenizer, text, cuts)[0].tolist()


def prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Prompt]:
    """Return what generation starts from, for every example that is a conversation."""
    result = []
    for example in examples:
        if example.messages is None:
            continue
        text, ids = encode_prompt(tokenizer, example)
        result.append(Prompt(example.id, ids, text, example.response))
    return result
