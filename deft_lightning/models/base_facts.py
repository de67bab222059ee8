"""What a base model tells of itself, for the card of what was trained on it: its name on the hub, and its licence."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.shipped_models import model_path
from deft_lightning.trust import find_file

LARGEST = 1 << 20  # bytes of a card that is read
CACHED = re.compile(r"models--([\w.-]+)--([\w.-]+)")  # folder of the hub's cache
LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)(\.\w+)?", re.IGNORECASE)
KEYS = ("license", "license_name", "license_link")


@lru_cache(maxsize=8)
def about_base(name: str) -> dict[str, str]:
    """Return what is known of a base: its name without folders, its hub id, its licence as its own card says it.

    Args:
        name: Folder or hub id. The card of a hub id is that in the hub's cache, or is fetched as the model was.

    Returns:
        `name`, and where it is known `hub_id`, `license`, `license_name`, `license_link`, `its_base`; without a licence
        in the card, `license_file` names the file of one.
    """
    folder = model_path(name)
    local = folder.is_dir()
    cached = next((match for part in folder.absolute().parts if (match := CACHED.fullmatch(part))), None)
    hub_id = f"{cached[1]}/{cached[2]}" if local and cached else None if local else name
    known = {"name": hub_id or folder.absolute().name}
    if hub_id:
        known["hub_id"] = hub_id
    for key, value in _card_of(name).items():
        if key in KEYS and isinstance(value, str) and (key != "license_link" or value.startswith("https://")):
            known[key] = value
        elif key == "base_model" and isinstance(value, str):
            known["its_base"] = value
    if "license" not in known and local:
        files = sorted(path.name for path in folder.iterdir() if LICENCE.fullmatch(path.name))
        if files:
            known["license_file"] = f"not named in a card; its text is the base's file {files[0]}"
    return known


def _card_of(name: str) -> dict[str, Any]:
    """Return the metadata of a model's card; nothing without one, or where it cannot be read, which is told."""
    from huggingface_hub import metadata_load

    path = find_file(name, "README.md")
    if path is None:
        return {}
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"has {path.stat().st_size:,} bytes")
        values = metadata_load(path)
    except Exception as error:  # YAML of a stranger fails in any way
        reason = " ".join(str(error).split())[:200]
        rank_zero_info(f"{name}: its card cannot be read, so its licence is unknown: {reason}")
        return {}
    return values if isinstance(values, dict) else {}
