"""``Cayley(floor=0.5)`` wherever a configuration or an option takes an objective."""

from __future__ import annotations

from typing import Any

from deft_lightning.objectives.parse import settings_of

# Keys below which the value is an objective, or a list of them; of other keys a text stays a text.
KEYS = {"objective", "objectives", "remedies", "others", "base", "first", "then"}


def spell_out(value: Any, key: str | None = None) -> Any:
    """Return a parsed configuration, or the value of an option, with every such spelling as class and settings.

    Args:
        value: Anything that YAML gives.
        key: The key that it is the value of; None for the value of an option.
    """
    if isinstance(value, dict):
        return {name: spell_out(below, str(name)) for name, below in value.items()}
    if isinstance(value, list):
        return [spell_out(item, key) for item in value]
    if isinstance(value, str) and (key is None or key in KEYS):
        return settings_of(value) or value
    return value
