"""What a run, or a checkpoint of it, knows for the card of its model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning._lightning import trainer_of
from deft_lightning.annotations import Checkpoint, Record
from deft_lightning.callbacks.record import record_of
from deft_lightning.models.base import BASE
from deft_lightning.models.base_facts import about_base
from deft_lightning.models.card import LORA, QUANTIZED, CardFacts
from deft_lightning.models.contents import KEY
from deft_lightning.training.card_data import facts_of_data
from deft_lightning.training.hyper_parameters import HYPER_PARAMETERS
from deft_lightning.training.protocols import precision_of

CARD = "card"  # of what a checkpoint says of itself
SHARE = "estimated share of wrong answers"
PACKAGES = ("deft-lightning", "torch", "lightning", "transformers", "peft", "datasets")
OF_DATA = ("batch_size", "max_tokens_per_batch", "max_length", "packing")
# Options of a run as they stand in its settings, and what a card calls them.
NAMES = {
    "trainer.precision": "precision", "trainer.strategy": "strategy", "trainer.world_size": "processes",
    "trainer.accumulate_grad_batches": "micro-batches per step", "trainer.gradient_clip_val": "gradients clipped at",
    "data.batch_size": "examples per process and micro-batch",
    "data.max_tokens_per_batch": "tokens per process and micro-batch, at most",
    "data.max_length": "tokens per example, at most", "data.packing": "packing", "seed_everything": "seed",
}  # fmt: skip
PLACE = {"total_steps", "last_epoch", "class"}  # of a schedule or an optimizer: no option


def facts_of_run(module: Any) -> CardFacts:
    """Return what is known of a module, and of the run in which it is or was trained.

    Args:
        module: An :class:`~deft_lightning.SFTModule`, with a trainer or without.
    """
    trainer = trainer_of(module)
    record = record_of(trainer)
    tests = {} if record is None else dict(record.tests)
    before: CardFacts | None = getattr(module, "card_facts", None)
    if before is not None and not getattr(trainer, "global_step", 0):  # made of a checkpoint, and not trained since
        return replace(before, tests={**before.tests, **tests})
    data = getattr(trainer, "datamodule", None)
    settings = getattr(data, "settings", None)
    about = {f"data.{name}": getattr(settings, name, None) for name in OF_DATA}
    noise: dict[str, float] = {}
    points: dict[str, tuple[int, float]] = {}
    if trainer is not None:
        about |= _of_trainer(trainer)
    if trainer is not None and record is not None:
        if (estimated := record.estimated(trainer)) is not None:
            noise[SHARE] = estimated
        named = {"first": record.first, "last": record.last, "best": record.best}
        points = {name: (point.step, point.nll) for name, point in named.items() if point is not None}
    held = dict(module.hparams)
    if getattr(module, "lr", None) is not None:  # what Lightning's search has found
        held["optimizer"] = {**held["optimizer"], "lr": module.lr}
    sources, lines = facts_of_data(data)
    return CardFacts(
        base=_base(module), sources=sources, data=tuple(lines), objective=repr(module.objective),
        training={**_reached(getattr(trainer, "global_step", 0), module.tokens_seen), **_training(held, about)},
        noise=noise, validations=points, tests=tests, versions=versions(),
    )  # fmt: skip


def facts_of_checkpoint(checkpoint: Checkpoint, base: str | None = None) -> CardFacts:
    """Return what a checkpoint knows; of one from before facts were kept, what its settings say.

    Args:
        checkpoint: As :func:`deft_lightning.models.load_checkpoint` returns it.
        base: Where the base of its adapters is now.
    """
    about = checkpoint[KEY]
    if about.get(CARD) is not None:
        try:
            return CardFacts.of(about[CARD])
        except ValueError as error:
            rank_zero_info(f"model card: facts in the checkpoint are left out: {error}")
    settings, held = _mapping(about.get("settings")), _mapping(checkpoint.get(HYPER_PARAMETERS))
    named = base or _mapping(about.get(BASE)).get("name") or held.get("pretrained")
    facts = {
        "base": dict(about_base(str(named))) if named else {"random": json.loads(about["config"])["model_type"]},
        "objective": str(about.get("objective", "")),
        "training": {**_reached(checkpoint.get("global_step", 0), about.get("tokens_seen", 0)),
                     **_training(held, settings)},
        "validations": {name: point for name, point in _state(checkpoint, "RunSummary").items() if point is not None},
    }  # fmt: skip
    if (estimate := _state(checkpoint, "NoiseEstimate")).get("counted"):
        facts["noise"] = {SHARE: estimate["rates"][0]}
    try:
        return CardFacts.of(facts)
    except ValueError as error:
        rank_zero_info(f"model card: the checkpoint's settings are left out: {error}")
        return CardFacts()


def versions() -> dict[str, str]:
    """Return the versions of what a run is made with; a package that is not installed as such is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _state(checkpoint: Checkpoint, callback: str) -> Mapping[str, Any]:
    return _mapping(_mapping(checkpoint.get("callbacks")).get(callback))


def _base(module: Any) -> dict[str, str]:
    files = module.base_weights.files
    if files is None and isinstance(module.pretrained, str):
        files = module.pretrained
    if files is not None:
        return dict(about_base(str(files)))
    kind = module.model.config.model_type if module.model is not None else "model"
    if module.source.given:
        return {"name": f"a model of the kind {kind} that was given in Python"}
    return {"random": str(kind)}


def _of_trainer(trainer: Any) -> Record:
    strategy = trainer.strategy
    name = {"SingleDeviceStrategy": "one device", "DDPStrategy": "ddp", "FSDP2Strategy": "fsdp2"}
    return {
        "trainer.precision": precision_of(trainer),
        "trainer.strategy": name.get(type(strategy).__name__, type(strategy).__name__),
        "trainer.world_size": trainer.world_size,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
    }


def _reached(steps: Any, tokens: Any) -> dict[str, str]:
    counts = {"optimizer steps": steps, "supervised tokens": tokens}
    return {name: f"{count:,}" for name, count in counts.items() if isinstance(count, int) and count}


def _training(held: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that a card names, as text.

    Args:
        held: Hyper-parameters of the module.
        about: Options of data and trainer by name.
    """
    rows = {}
    for name in ("optimizer", "scheduler"):
        described = _mapping(held.get(name))
        if described:
            kind = str(described.get("class")).rpartition(".")[2]
            rows[{"scheduler": "schedule"}.get(name, name)] = f"{kind}({_options(described)})"
        elif name == "scheduler" and "scheduler" in held:
            rows["schedule"] = "none: a constant rate"
    if lora := _mapping(held.get("lora")):
        rows[LORA] = _options(lora)
    if isinstance(held.get("quantization"), str):
        rows[QUANTIZED] = held["quantization"]
    for name, label in NAMES.items():
        if about.get(name) is not None and about[name] is not False:
            rows[label] = str(about[name])
    for name in ("dtype", "head"):
        if isinstance(held.get(name), str):
            rows[{"dtype": "weights in training"}.get(name, name)] = held[name]
    return rows


def _options(described: Mapping[str, Any]) -> str:
    unset: tuple[Any, ...] = (None, False, [], {})
    told = (name for name, value in described.items() if name not in PLACE and not any(value is u for u in unset[:2]))
    return ", ".join(f"{name}={described[name]}" for name in told if described[name] not in unset[2:])
