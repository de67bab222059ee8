"""Long texts in pieces: the same tokens as in one go, in memory that does not grow by 170 bytes a letter."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 17  # letters of a piece; shorter texts are tokenised in one go
AROUND = 4000  # letters in front of the end of a piece in which a place to cut is looked for
OVERLAP = 500  # letters that two pieces have in common, at the least
CUT = re.compile(r"[a-z](?= [a-z])")

# Patterns of byte-level tokenizers, as alternatives of which none can hold a small letter and the blank behind it, and
# none looks back: GPT-2, Llama 3, Qwen, o200k, Tekken and their kin. What is left of such a blank, and what is right of
# it, is then split alike whether the other side is there or not.
_SHORT = r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\??|'s|'t|'re|'ve|'m|'ll|'d"
_LETTERS = r"(?:\\p\{L\}|\[(?:\\p\{(?:L|M|Lu|Lt|Lm|Lo|Ll)\})+\])[+*]"
_ALTERNATIVE = (
    rf"(?:{_SHORT}"
    rf"|(?:\[\^\\r\\n\\p\{{L\}}\\p\{{N\}}\]\?| \?)?(?:{_LETTERS}){{1,2}}(?:{_SHORT})?"
    r"| ?\??\\p\{N\}(?:\+|\{1,3\})?"
    r"| \?\[\^\\s\\p\{L\}(?:\\p\{M\})?\\p\{N\}\]\+(?:\[\\r\\n/?\]\*)?"
    r"|\\s\*\[\\r\\n\]\+|\\s\*\[\\r\\n\]|\\s\+\(\?!\\S\)|\\s\+)"
)
_PATTERN = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")


class Joined(Sequence[tuple[int, int]]):
    """Where the tokens of a text that was tokenised in pieces are.

    Args:
        starts: Shape ``(T,)``, first letter of each token.
        ends: Shape ``(T,)``, the one behind its last.
    """

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.starts)

    def __getitem__(self, at: Any) -> Any:
        """Return the place of one token."""
        if isinstance(at, slice):
            return list(Joined(self.starts[at], self.ends[at]))
        return int(self.starts[at]), int(self.ends[at])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the place of every token."""
        return zip(self.starts.tolist(), self.ends.tolist(), strict=True)

    def before(self, letter: int) -> int:
        """Return how many tokens begin before a letter."""
        return int(np.searchsorted(self.starts, letter))


class Tokens(NamedTuple):
    """Tokens of a long text.

    Attributes:
        ids: Shape ``(T,)``.
        places: Where each is.
    """

    ids: NDArray[np.int64]
    places: Joined


def in_pieces(tokenizer: Any, text: str) -> Tokens | None:
    """Return the tokens of a long text; None where it has to be tokenised in one go.

    Pieces overlap, and where they do they must agree; else, and where no place to cut is found, the answer is None.

    Args:
        tokenizer: A fast one, settled not to cut, pad or add special tokens.
        text: To encode.
    """
    if len(text) <= PIECE or not _divisible(tokenizer.backend_tokenizer):
        return None
    added = _added(tokenizer)
    parts: list[Tokens] = []
    start = last = 0  # where a piece begins; where the tokens of the one before it end
    while last < len(text):
        whole = len(text) - start <= PIECE
        stop = len(text) if whole else _cut(text, start + PIECE, added)
        following = stop if whole or stop is None else _cut(text, stop - OVERLAP, added)
        if stop is None or following is None or stop <= last or not last <= following:
            return None
        part = _encode(tokenizer, text, start, stop)
        shared = part.places.before(last)
        if parts:
            own = parts[-1].places.before(start)
            if not _agree(parts[-1], own, part, shared):
                return None
        parts.append(Tokens(part.ids[shared:], Joined(part.places.starts[shared:], part.places.ends[shared:])))
        start, last = following, stop
    ids, starts, ends = (
        np.concatenate(arrays)
        for arrays in zip(*((part.ids, part.places.starts, part.places.ends) for part in parts), strict=True)
    )
    return Tokens(ids, Joined(starts, ends))


def _encode(tokenizer: Any, text: str, start: int, stop: int) -> Tokens:
    (encoding,) = tokenizer.backend_tokenizer.encode_batch([text[start:stop]], add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
    return Tokens(np.array(encoding.ids, dtype=np.int64), Joined(offsets[:, 0].copy(), offsets[:, 1].copy()))


def _agree(one: Tokens, own: int, other: Tokens, shared: int) -> bool:
    """Return whether the last tokens of a piece are the first of the next; its very first may have lost its blank."""
    if len(one.ids) - own != shared or shared < 2:
        return False
    return bool(
        (one.ids[own:] == other.ids[:shared]).all()
        and (one.places.starts[own + 1 :] == other.places.starts[1:shared]).all()
        and (one.places.ends[own:] == other.places.ends[:shared]).all()
    )


def _cut(text: str, near: int, added: re.Pattern[str] | None) -> int | None:
    """Return a place before ``near`` at which a word ends and another begins, far from what special tokens spell."""
    first = max(0, near - AROUND)
    window = text[first:near]
    for match in reversed(list(CUT.finditer(window))):
        around = window[max(0, match.end() - 150) : match.end() + 150]
        # Normalisation changes nothing among ASCII.
        if len(around) == 300 and around.isascii() and (added is None or not added.search(around)):
            return first + match.end()
    return None


def _added(tokenizer: Any) -> re.Pattern[str] | None:
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


@functools.lru_cache(maxsize=8)
def _divisible(backend: Any) -> bool:
    """Return whether a tokenizer splits text at blanks between words, whatever stands elsewhere."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or any(
        len(token.content) > 100 for token in backend.get_added_tokens_decoder().values()
    ):  # fmt: skip
        return False
    normalizer = backend.normalizer
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return False
    if backend.pre_tokenizer is None:
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return any(_splits(step) for step in steps) and all(_splits(step) or _bytes(step) for step in steps)


def _bytes(step: dict[str, Any]) -> bool:
    return step["type"] == "Digits" or (step["type"] == "ByteLevel" and not step["add_prefix_space"])


def _splits(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"]) and not step["add_prefix_space"]
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    pattern = step["pattern"].get("Regex", "")
    alternatives = pattern.endswith(r"|\s+") and re.search(rf"{_LETTERS}", pattern)
    return bool(alternatives and _PATTERN.fullmatch(pattern))
