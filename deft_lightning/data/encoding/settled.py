"""The tokenizer of a run: given as an object, loaded by its name, or built from the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deft_lightning.data.encoding.template import end_of_turn, set_template
from deft_lightning.data.encoding.tokenizer import load_tokenizer


class SettledTokenizer:
    """Holds the tokenizer of a data module, and where it comes from.

    Args:
        chat_template: Wins over the tokenizer's own; None keeps that.

    Attributes:
        current: The tokenizer; None until there is one.
        built: Whether it was built from the training rows.
    """

    def __init__(self, chat_template: str | None) -> None:
        self.current: Any = None
        self.built = False
        self._name: str | None = None
        self._chat_template = chat_template

    def use(self, tokenizer: Any) -> None:
        """Take a tokenizer object; a template that was asked for still wins over its own."""
        self.current, self._name, self.built = tokenizer, None, False
        if tokenizer is not None and self._chat_template is not None:
            set_template(tokenizer, self._chat_template)

    def serves(self, name: str | None) -> bool:
        """Return whether the current one is what is asked for by name, or nothing is."""
        return self.current is not None and name in (None, self._name)

    def load(self, name: str, trust: bool) -> None:
        """Load one by its hub id or folder; ``trust`` lets code of its own run."""
        tokenizer = load_tokenizer(name, trust)
        set_template(tokenizer, self._chat_template)
        self.current, self._name, self.built = tokenizer, name, False

    def load_built(self, folder: Path) -> None:
        """Load the one that was built from the training rows and kept beside them."""
        self.current, self._name, self.built = load_tokenizer(str(folder / "tokenizer")), None, True

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
