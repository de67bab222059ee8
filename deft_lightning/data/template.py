"""Chat templates and exact supervision masks: conversation in, tokens with the assistant's turns marked out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deft_lightning.data.records import Example, Message
from deft_lightning.errors import UserError

Ints = NDArray[np.int64]
NOT_SUPERVISED = -1


def chatml(tokenizer: Any) -> str:
    """Return the default template for tokenizers without one.

    ChatML. Where ``<|im_end|>`` is not a token of its own, turns end with the end-of-sequence token instead: a base
    model knows it, generation stops at it, and the embedding keeps its size.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if _prepends_bos(tokenizer) else ""
    return (
        f"{{{{ {bos!r} }}}}{{% for message in messages %}}"
        f"{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end!r} + '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _prepends_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def set_template(tokenizer: Any, choice: str | None) -> None:
    """Settle the tokenizer's chat template.

    Args:
        tokenizer: Changed in place.
        choice: None keeps the tokenizer's own (ChatML if it has none); ``chatml``; a file with a Jinja template; or
            the template itself.
    """
    if choice is None:
        tokenizer.chat_template = tokenizer.chat_template or chatml(tokenizer)
    elif choice == "chatml":
        tokenizer.chat_template = chatml(tokenizer)
    elif "{" in choice:
        tokenizer.chat_template = choice
    elif Path(choice).is_file():
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    else:
        raise UserError(f"--data.chat_template {choice!r} is neither chatml, a file, nor a template")


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: Shape ``(T,)``.
        turn: Shape ``(T,)``: number of the message a supervised token belongs to, -1 elsewhere.
    """

    input_ids: Ints
    turn: Ints


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    """Return the conversation as text, with the assistant's header at the end for a prompt."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Tokenise an example that has messages or text.

    A template with ``{% generation %}`` marks its own spans. Any other is rendered turn by turn: what the assistant's
    turn adds to the prompt that generation would have seen is supervised, up to and including the turn's last special
    token, so that a separator after the end of the turn is not.

    Raises:
        UserError: The template rewrites earlier turns, or leaves out a message.
    """
    if example.text is not None:
        ids = tokenizer(example.text).input_ids
        ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
        return Encoded(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.int64))
    messages = list(example.messages or ())
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            return _by_generation_tags(tokenizer, messages)
        return _by_prefixes(tokenizer, messages, example.where)
    except UserError:
        raise
    except Exception as error:  # Jinja raises many kinds, raise_exception() of the template among them
        raise UserError(f"{example.where}: the chat template refuses it: {error} (--data.chat_template)") from None


def _by_generation_tags(tokenizer: Any, messages: list[Message]) -> Encoded:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(encoded["assistant_masks"], dtype=bool)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # The k-th run of supervised tokens is the k-th assistant turn.
    run = np.cumsum(np.diff(mask, prepend=False) & mask) - 1
    turn = np.where(mask, np.array(turns)[run.clip(0, len(turns) - 1)], NOT_SUPERVISED)
    return Encoded(np.array(encoded["input_ids"], dtype=np.int64), turn)


def _by_prefixes(tokenizer: Any, messages: list[Message], where: str) -> Encoded:
    whole = render(tokenizer, messages, prompt=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded.input_ids, dtype=np.int64)
    starts, ends = np.array(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(ids, tokenizer.all_special_ids)
    turn = np.full(len(ids), NOT_SUPERVISED, dtype=np.int64)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], prompt=True)
        after = whole if i == len(messages) - 1 else render(tokenizer, messages[: i + 1], prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the chat template writes message {i + 1} differently once more turns follow, so its span is"
                " unknown; use a template with generation tags (--data.chat_template), or chatml"
            )
        if message["content"].strip() not in after[len(before) :]:
            raise UserError(f"{where}: the chat template leaves out or changes message {i + 1} (--data.chat_template)")
        span = (starts >= len(before)) & (starts < len(after)) & (ends > starts)
        closing = np.flatnonzero(span & special)
        # Only blanks may follow the end of the turn: a template may put special tokens inside the turn as well.
        if closing.size and not whole[ends[closing[-1]] : len(after)].strip():
            span[closing[-1] + 1 :] = False
        turn[span] = i
    return Encoded(ids, turn)
