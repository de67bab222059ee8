"""The tokenizer's chat template: found, checked, and rendered within bounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deft_lightning.data.encoding.bounds import LETTERS, TEMPLATE, TemplateCost, bounded, check_length
from deft_lightning.data.encoding.tokenizer import markers
from deft_lightning.data.examples import Message, Tool
from deft_lightning.errors import UserError


def chatml(tokenizer: Any) -> str:
    """Return the default template for tokenizers without one.

    ChatML. Where ``<|im_end|>`` is not a token of its own, turns end with the end-of-sequence token instead: a base
    model knows it, generation stops at it, and the embedding keeps its size. Tools are listed in the system turn, one
    JSON object a line; a call is the JSON of its name and arguments.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if _prepends_bos(tokenizer) else ""
    return (
        f"{{{{ {bos!r} }}}}{{% if tools %}}{{{{ '<|im_start|>system\\n' }}}}"
        "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
        "{{ '<tools>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
        f"{{{{ '</tools>' + {end!r} + '\\n' }}}}{{% endif %}}"
        "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{% for call in message['tool_calls'] or [] %}"
        "{{ '\\n' if message['content'] or not loop.first }}"
        "{{ '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
        f"{{{{ {end!r} + '\\n' }}}}{{% endif %}}{{% endfor %}}"
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
    else:
        tokenizer.chat_template = template_text(choice)
        tokenizer.template_origin = f"that of --data.chat_template{'' if '{' in choice else f' {choice}'}"
    templates = tokenizer.chat_template
    for text in templates.values() if isinstance(templates, dict) else [templates]:
        if len(text) > TEMPLATE:
            raise UserError(f"the chat template has {len(text):,} letters; it is {origin(tokenizer)}")


def origin(tokenizer: Any) -> str:
    """Return where a tokenizer's chat template comes from, for messages."""
    given = getattr(tokenizer, "template_origin", None)
    if given is not None:
        return str(given)
    name = str(tokenizer.name_or_path)
    return f"the tokenizer's own{f' of {name}' if name else ''}; another is chosen with --data.chat_template"


def template_text(choice: str) -> str:
    """Return a chosen template as text: what a file holds, or the choice itself."""
    if choice == "chatml" or "{" in choice:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--data.chat_template {choice!r} is neither chatml, a file, nor a template ({error})"
        ) from None


TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def template_of(tokenizer: Any, tools: Sequence[Tool] | None) -> str:
    """Return the template as text: a tokenizer may have one for conversations with tools beside the other."""
    return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))


def is_tagged(tokenizer: Any, tools: Sequence[Tool] | None) -> bool:
    """Return whether the template marks what the assistant says with ``{% generation %}``."""
    return TAG.search(template_of(tokenizer, tools)) is not None


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that the template writes after what the assistant says; None if it is an ordinary one."""
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "zqz"}]
    try:
        with bounded(origin(tokenizer)):
            text = render(tokenizer, conversation, prompt=False)
    except TemplateCost:
        raise
    except Exception:  # a template may insist on more, such as a system message
        return None
    after = tokenizer(text.rpartition("zqz")[2], add_special_tokens=False).input_ids[:1]
    return after[0] if after and after[0] in markers(tokenizer) else None


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool, tools: Sequence[Tool] | None = None) -> str:
    """Return the conversation as text, with the assistant's header at the end for a prompt."""
    # As a batch of one: transformers cannot tell an empty conversation from an empty batch.
    (text,) = tokenizer.apply_chat_template(
        [list(messages)], tokenize=False, add_generation_prompt=prompt, tools=list(tools) if tools else None
    )
    assert isinstance(text, str)
    check_proportion(text, messages, tools)
    return text


def check_proportion(text: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Refuse a rendering out of all proportion to the conversation."""
    if len(text) > LETTERS:
        check_length(text, len(json.dumps([list(messages), list(tools or ())], default=str)))
