"""Generation settings that can be saved: those of real models contradict themselves, and transformers refuses them."""

from __future__ import annotations

import copy
from typing import Any

from deft_lightning.annotations import GenerationSettings

# Values that mean something while sampling alone, and what each is where nobody has set it.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0), "top_k": (None, 50), "top_p": (None, 1.0), "min_p": (None,), "top_h": (None,),
    "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
}  # fmt: skip
BEAMS: dict[str, tuple[Any, ...]] = {"early_stopping": (None, False), "length_penalty": (None, 1.0)}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def savable(config: GenerationSettings) -> tuple[GenerationSettings, list[str]]:
    """Return generation settings that transformers accepts when they are saved, and what was changed.

    Values for sampling are kept, and sampling is switched on for them; a temperature of 0 means none.

    Args:
        config: A ``GenerationConfig``; stays as it is.
    """
    settings = copy.deepcopy(config)
    changed: list[str] = []
    if _fault(settings) is None:
        return settings, changed
    temperature = vars(settings).get("temperature")
    if isinstance(temperature, int | float) and temperature <= 0:
        settings.temperature = None
        changed.append(f"temperature {temperature} is left out, it means do_sample false")
    elif settings.do_sample is not True:
        values = {name: vars(settings).get(name) for name in SAMPLING}
        kept = [f"{name} {value}" for name, value in values.items() if value not in SAMPLING[name]]
        if kept:
            settings.do_sample = True
            changed.append(f"do_sample is true now, for {', '.join(kept)}")
    if vars(settings).get("num_beams") in (None, 1):
        for name, neutral in BEAMS.items():
            if (value := vars(settings).get(name)) not in neutral:
                setattr(settings, name, neutral[0])
                changed.append(f"{name} {value} is left out, it needs num_beams")
    if settings.do_sample is not True and _fault(settings) is not None:
        for name, neutral in SAMPLING.items():
            if (value := vars(settings).get(name)) not in neutral:
                setattr(settings, name, neutral[0])
                changed.append(f"{name} {value} is left out, it needs do_sample")
    return _without_faults(settings, changed)


def _without_faults(settings: GenerationSettings, changed: list[str]) -> tuple[GenerationSettings, list[str]]:
    """Leave out the one setting that is refused; if it is more than one, all but the special tokens."""
    if _fault(settings) is None:
        return settings, changed
    neutral = vars(type(settings)())
    for name, value in sorted(vars(settings).items()):
        if name.startswith("_") or name in TOKENS or value == neutral.get(name):
            continue
        setattr(settings, name, neutral.get(name))
        if _fault(settings) is None:
            return settings, [*changed, f"{name} {value} is left out"]
        setattr(settings, name, value)
    kept = {name: vars(settings).get(name) for name in TOKENS}
    return type(settings)(**kept), ["all but the special tokens is left out, transformers refuses it"]


def _fault(config: GenerationSettings) -> Exception | None:
    try:
        config.validate(strict=True)
    except Exception as error:  # values of other types end in comparisons that fail
        return error
    return None
