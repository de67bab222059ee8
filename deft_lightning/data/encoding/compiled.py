"""The compiled chat template of a tokenizer, called without what transformers does around it for every rendering."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from deft_lightning.data.examples import Message

Program = Callable[..., str]
# Rendered both ways before a template is called directly; a template may refuse either.
SAMPLES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
)


def compiled(tokenizer: Any, template: str) -> Program | None:
    """Return the function that renders messages for which :func:`is_plain` holds as ``apply_chat_template`` would.

    It is the template that transformers has compiled, in transformers' sandbox. None where transformers must be asked
    every time: a tokenizer has a way of its own, this version keeps its compiler elsewhere, or the two ways differ.

    Args:
        tokenizer: With its special tokens.
        template: The one that ``tokenizer.get_chat_template()`` gives for conversations without tools.
    """
    return _checked(tokenizer, template, tuple(tokenizer.special_tokens_map.items()))


def is_plain(messages: Sequence[Message]) -> bool:
    """Return whether transformers would give messages to a template as they are: their values are nothing but text.

    Reasoning, which it gives under more names, and calls of tools, which it copies to the depth, are not plain.
    """
    for message in messages:
        if type(message) is not dict or len(message) != 2 or "role" not in message or "content" not in message:
            return False
        if type(message["content"]) is not str or type(message["role"]) is not str:
            return False
    return bool(messages)


@functools.lru_cache(maxsize=8)
def _checked(tokenizer: Any, template: str, special: tuple[tuple[str, str], ...]) -> Program | None:
    compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
    own = type(tokenizer)
    if compile_template is None or own.apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    try:
        ready = compile_template(template)
    except MemoryError:
        raise
    except Exception:  # it is said with the row that meets it
        return None
    fixed = {**ready.globals, "tools": None, "documents": None, **dict(special)}
    program = functools.partial(_render, ready, fixed)
    for sample in SAMPLES:
        for prompt in (False, True):
            asked = functools.partial(
                tokenizer.apply_chat_template, [sample], chat_template=template, tokenize=False,
                add_generation_prompt=prompt,
            )  # fmt: skip
            if _outcome(asked) != _outcome(lambda: [program(sample, prompt=prompt)]):  # noqa: B023 - called here
                return None
    return program


def _render(template: Any, fixed: dict[str, Any], messages: Sequence[Message], *, prompt: bool) -> str:
    # Copies, as transformers makes them: what a template is given is its own.
    given = {**fixed, "messages": [dict(message) for message in messages], "add_generation_prompt": prompt}
    # What Template.render does, but for the globals, which it copies anew each time.
    return str(template.environment.concat(template.root_render_func(template.new_context(given, shared=True))))


def _outcome(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except MemoryError:
        raise
    except Exception as error:
        return type(error), str(error)
