"""The tokenizer's chat template: found, checked, and rendered within bounds."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deft_lightning.data.encoding.bounds import LETTERS, TEMPLATE, TemplateCost, bounded, check_length
from deft_lightning.data.encoding.compiled import Program, compiled, is_plain
from deft_lightning.data.encoding.tokenizer import markers
from deft_lightning.data.examples import Message, Tool
from deft_lightning.errors import UserError, did_you_mean

TRL = "trl:"


def chatml(tokenizer: Any) -> str:
    """Return the default template for tokenizers without one.

    ChatML. Where ``<|im_end|>`` is not a token of its own, turns end with the end-of-sequence token instead: a base
    model knows it, generation stops at it, and the embedding keeps its size. Tools are listed in the system turn, one
    JSON object a line; a call is the JSON of its name and arguments; reasoning stands before the answer, in think tags.
    """
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    bos = tokenizer.bos_token if _prepends_bos(tokenizer) else ""
    return (
        f"{{{{ {bos!r} }}}}{{% if tools %}}{{{{ '<|im_start|>system\\n' }}}}"
        "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
        "{{ '<tools>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
        f"{{{{ '</tools>' + {end!r} + '\\n' }}}}{{% endif %}}"
        "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['reasoning_content'] %}"
        "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}{{ message['content'] }}"
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
            the template itself; ``trl:NAME`` for one of an installed TRL.
    """
    if choice is None:
        tokenizer.chat_template = tokenizer.chat_template or chatml(tokenizer)
    elif choice == "chatml":
        tokenizer.chat_template = chatml(tokenizer)
    elif choice.startswith(TRL):
        tokenizer.chat_template = template_text(choice)
        tokenizer.template_origin = f"that of --data.chat_template {choice}"
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
    if choice.startswith(TRL):
        return trl_template(choice.removeprefix(TRL))
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--data.chat_template {choice!r} is not chatml, a file or a template ({error})") from None


def trl_template(name: str) -> str:
    """Return a chat template of an installed TRL: its variant for training, if there is one.

    Args:
        name: Of the template, such as ``qwen3``.

    Raises:
        UserError: TRL is not installed, or has no template of that name.
    """
    found = importlib.util.find_spec("trl")  # without importing it
    if found is None or found.origin is None:
        raise UserError(f"--data.chat_template {TRL}{name}: TRL is not installed (pip install trl)")
    folder = Path(found.origin).parent / "chat_templates"
    for file in (folder / f"{name}_training.jinja", folder / f"{name}.jinja"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    names = sorted({file.stem.removesuffix("_training") for file in folder.glob("*.jinja")})
    raise UserError(f"--data.chat_template {TRL}{name}: TRL has no such template.{did_you_mean(name, names)}")


TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def template_of(tokenizer: Any, tools: Sequence[Tool] | None) -> str:
    """Return the template as text: a tokenizer may have one for conversations with tools beside the other."""
    return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))


def is_tagged(tokenizer: Any, tools: Sequence[Tool] | None) -> bool:
    """Return whether the template marks what the assistant says with ``{% generation %}``."""
    return _tagged(template_of(tokenizer, tools))


@functools.lru_cache(maxsize=8)
def _tagged(template: str) -> bool:
    return TAG.search(template) is not None


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


class Renderer:
    """Renders conversations of one example, in a shape that the template can read.

    Args:
        tokenizer: With its chat template.
        tools: What the assistant may call.
        shape: Number in :data:`SHAPES`.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Tool] | None, shape: int = 0) -> None:
        self.tokenizer, self.tools, self.shape = tokenizer, tools, SHAPES[shape]

    def with_tools(self, tools: Sequence[Tool] | None) -> Renderer:
        """Return one for the same shape, with the tools written otherwise."""
        return Renderer(self.tokenizer, tools, SHAPES.index(self.shape))

    @functools.cached_property
    def _program(self) -> Program | None:
        return None if self.tools else compiled(self.tokenizer, template_of(self.tokenizer, None))

    def __call__(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the conversation as text."""
        if is_plain(messages) and self._program is not None:
            text = self._program(messages, prompt=prompt)
            check_proportion(text, messages, None)
            return text
        return render(self.tokenizer, self.shape(messages), prompt=prompt, tools=self.tools)


def _plain(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _json_arguments(messages: Sequence[Message]) -> Sequence[Message]:
    """Return arguments as the JSON that OpenAI's interface has, which some templates write as it is."""
    return [
        {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


# Shapes in which calls are given to a template; the first that it accepts counts.
SHAPES = (_plain, _json_arguments)


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
