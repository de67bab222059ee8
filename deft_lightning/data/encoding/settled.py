"""The tokenizer of a run: given as an object, loaded by its name, or built from the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deft_lightning.data.encoding.template import end_of_turn, set_template
from deft_lightning.data.encoding.tokenizer import add_tokens, load_tokenizer
from deft_lightning.errors import UserError


class SettledTokenizer:
    """Holds the tokenizer of a data module, and where it comes from.

    Args:
        chat_template: Wins over the tokenizer's own; None keeps that.

    Attributes:
        current: The tokenizer; None until there is one.
        built: Whether it was built from the training rows.
        added: Ids of the tokens that were added to it for the model of the run.
    """

    def __init__(self, chat_template: str | None) -> None:
        self.current: Any = None
        self.built = False
        self.added: tuple[int, ...] = ()
        self._asked: tuple[str, ...] = ()
        self._name: str | None = None
        self._chat_template = chat_template

    def use(self, tokenizer: Any) -> None:
        """Take a tokenizer object; a template that was asked for still wins over its own."""
        self.current, self._name, self.built = tokenizer, None, False
        self.added, self._asked = (), ()
        if tokenizer is not None and self._chat_template is not None:
            set_template(tokenizer, self._chat_template)

    def settle(self, name: str | None, trust: bool, tokens: tuple[str, ...], prepared: Callable[[], Path]) -> bool:
        """Have the tokenizer that a run asks for; return whether it is another one than before.

        Args:
            name: Hub id or folder; None keeps what was given as an object, or builds one from the training rows.
            trust: Code of its own may run.
            tokens: Spellings that are to be tokens of it.
            prepared: Gives the folder of the prepared data, where one that was built is kept.

        Raises:
            UserError: Tokens are to be added to one that is built.
        """
        if self.current is not None and name in (None, self._name) and tokens == self._asked:
            return False
        if name is not None:
            self.current = load_tokenizer(name, trust)
            self._name, self.built = name, False
            set_template(self.current, self._chat_template)
        elif self.current is None or self.built:
            if tokens:
                raise UserError(
                    "--model.add_tokens: the tokenizer is built from the training rows; name one with --data.tokenizer"
                )
            self.current, self._name, self.built = load_tokenizer(str(prepared() / "tokenizer")), None, True
        self.added, self._asked = add_tokens(self.current, tokens), tokens
        return True

    def stops(self, turn_ends: list[int]) -> list[int]:
        """Return the tokens at which generation ends, in order.

        Args:
            turn_ends: Special tokens that end the responses of the data.
        """
        ends = {self.current.eos_token_id, *turn_ends}
        if "<|im_end|>" in (self.current.chat_template or ""):
            ends |= {self.current.get_vocab().get("<|im_end|>", self.current.eos_token_id)}
        if (end := end_of_turn(self.current)) is not None:
            ends |= {end}
        return sorted(ends)
