"""How much of the loss a row, a turn or a token has: the names under which exporters write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deft_lightning.data.sources.rows import Row, absent

# OpenAI, Azure and Mistral write weight; Axolotl train and loss; others loss_mask and loss_weight.
TURN_KEYS = ("weight", "train", "loss", "loss_mask", "loss_weight")
# Of a row of tokens, one number a token.
TOKEN_COLUMNS = ("weights", "token_weights", "loss_weights", "loss_mask", "completion_mask", "assistant_masks")
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


def as_weight(value: Any) -> float | None:
    """Return a weight as a finite number of at least 0; None if it is no such number."""
    if isinstance(value, str):
        word = value.strip().lower()
        try:
            value = WORDS[word] if word in WORDS else float(word)
        except ValueError:
            return None
    if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
        return None
    return float(value)


def turn_weight(row: Row, at: str, turn: Mapping[str, Any]) -> float | None:
    """Return how much of the loss a turn has, None where nothing says so.

    Args:
        row: For error messages.
        at: Place of the turn.
        turn: As the row has it.

    Raises:
        UserError: No finite number of at least 0, or two keys that say different things.
    """
    said: dict[str, float] = {}
    for key in TURN_KEYS:
        if absent(turn.get(key)):
            continue
        weight = as_weight(turn[key])
        if weight is None:
            problem = f"expected true, false, or a finite number of at least 0, got {str(turn[key])[:40]!r}"
            problem += f"; --data.ignore_columns '{row.key(at, key)}' leaves it out"
            raise row.fail(f"{at}.{key}", problem, "weight")
        said[key] = weight
    if len(set(said.values())) > 1:
        advice = f"--data.ignore_columns '{row.key(at, list(said)[-1])}' leaves one out"
        raise row.fail(at, f"the keys {' and '.join(said)} disagree; {advice}", "weight")
    return next(iter(said.values()), None)


def row_weight(row: Row, asked: str | None) -> float:
    """Return how much of the loss a row has.

    Args:
        row: The row; its column ``weight`` counts if it holds a number.
        asked: The column that ``--data.weight_column`` names, which every row must have.

    Raises:
        UserError: The column that was asked for is missing, or holds no finite number of at least 0.
    """
    if asked is None:
        value = row.look("weight")
        weight = None if value is None or isinstance(value, bool) else as_weight(value)
        if weight is None:
            return 1.0  # a weight that is no number is a column like any other
        row.read[row.name("weight")] = "weight"
        return weight
    value = row.column(asked)
    if value is None:
        raise row.fail(asked, "is missing, though --data.weight_column names it", "missing")
    weight = as_weight(value)
    if weight is None:
        raise row.fail(asked, f"expected a finite number of at least 0, got {str(value)[:40]!r}", "weight")
    row.read[asked] = "weight"
    return weight


def token_weights(row: Row, count: int) -> list[float] | None:
    """Return the weights beside the tokens of a row, None where it has none.

    Args:
        row: The row.
        count: How many tokens it has.

    Raises:
        UserError: Another number of entries, or one that is no finite number of at least 0.
    """
    product: list[float] | None = None
    for name in TOKEN_COLUMNS:
        values = row.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != count:
            problem = f"has {len(values)} entries" if isinstance(values, list) else f"is not a list but {values!r:.40}"
            raise row.fail(name, f"{problem}, input_ids has {count}", "length")
        weights = [as_weight(value) for value in values]
        if None in weights:
            at = weights.index(None)
            raise row.fail(f"{name}[{at}]", f"expected a number of at least 0, got {values[at]!r:.40}", "weight")
        known = [weight for weight in weights if weight is not None]
        product = known if product is None else [a * b for a, b in zip(product, known, strict=True)]
    return product
