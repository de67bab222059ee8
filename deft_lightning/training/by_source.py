"""Objectives of sources: what `--data.objectives` asks for, checked against the sources that the data has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deft_lightning.data.sources.names import MOST, source_names
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.objectives import BySource, Objective
from deft_lightning.objectives.parse import parse_objective

OPTION = "--data.objectives"


def by_source(objective: Objective, prompts: Any) -> Objective:
    """Return the objective that trains: the one of the model, or one that has others for some sources of the data.

    Args:
        objective: The one of the model; a `BySource` made by hand is checked in the same way.
        prompts: The data module, set up; None, or one of the user's own, is asked for nothing.

    Raises:
        UserError: A name that is no source, an objective that is none, or nothing that tells sources apart.
    """
    asked: Mapping[str, str] = getattr(getattr(prompts, "settings", None), "objectives", {})
    made = asked and _made(objective, asked)
    if isinstance(objective, BySource) and asked and made != objective:
        raise UserError(f"{OPTION} and --model.objective BySource both name sources: leave one of them out")
    result = made or objective
    if result.sources and hasattr(prompts, "splits"):
        option = OPTION if asked else "--model.objective BySource"
        _check(result.sources, option, prompts.splits.sources["train"], prompts.settings)
    return result


def _made(objective: Objective, asked: Mapping[str, str]) -> BySource:
    base = objective.base if isinstance(objective, BySource) else objective
    own = {}
    for name, text in asked.items():
        try:
            own[name] = parse_objective(text)
        except UserError as error:
            raise UserError(f"{OPTION}.{name}: {error}") from None
    try:
        return BySource(base, own)
    except UserError as error:
        raise UserError(f"{OPTION}: {str(error).removeprefix('BySource: ')}") from None


def _check(wanted: Iterable[str], option: str, known: tuple[str, ...], settings: Any) -> None:
    if not known and len(source_names(settings.source)) > MOST:
        raise UserError(f"{option}: more than {MOST} sources are not supported")
    if not known:
        raise UserError(f"{option}: the data has one source; set --model.objective instead")
    for name in wanted:
        if name not in known:
            raise UserError(
                f"{option}: there is no source {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}"
            )
