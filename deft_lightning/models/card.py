"""The card of an exported model: README.md with metadata for the hub, filled from what is known of its training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from deft_lightning.annotations import Record
from deft_lightning.atomic import whole_file
from deft_lightning.models.card_text import code, number, paths_shortened, table
from deft_lightning.trust import read_settings

FILE = "README.md"
LORA = "LoRA"  # the setting of adapters
QUANTIZED = "base quantised to"  # that of a base in few bits
Saved = Literal["adapters", "merged", "dequantised", "whole"]
SAVED: dict[Saved, str] = {
    "adapters": "low-rank adapters, to be loaded on top of the base",
    "merged": "the base with the adapters merged into it, in {dtype}",
    "dequantised": "the base, quantised for training and dequantised, with the adapters merged into it, in {dtype}",
    "whole": "all weights, in {dtype}",
}
LONGEST, MOST = (
    2_000,
    100,
)  # characters of an entry, entries of a part: of a stranger's checkpoint nothing more is taken


@dataclass(frozen=True)
class CardFacts:
    """What a card says, as plain values; what is not known is empty, and left out of the card.

    Attributes:
        base: `name`; `hub_id`, `license`, `license_name`, `license_link` where they are known; `random` is the kind of
            a model that started from random weights.
        sources: Names of the sources of the training rows, each with what it is: `hub`, `file`, `address` ...
        data: Lines on rows, injected noise and audits.
        objective: Its legend.
        training: Settings, as they are to be read, by name.
        noise: Shares in [0, 1] by name: what was estimated, what was injected.
        validations: `first`, `last`, `best`: optimizer steps before it, and the plain NLL in nats per token.
        tests: Figures of `test` by tag.
        versions: Of the packages, by name.
    """

    base: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    objective: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    validations: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    tests: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the facts as a checkpoint keeps them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["validations"] = {name: list(point) for name, point in self.validations.items()}
        return {name: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v
                for name, v in values.items()}  # fmt: skip

    @classmethod
    def of(cls, values: Record) -> Self:
        """Return the facts that a checkpoint keeps.

        Raises:
            ValueError: An entry is not what it should be; the message names the part.
        """
        readers = {"base": _texts, "sources": _texts, "training": _texts, "versions": _texts,
                   "noise": _numbers, "tests": _numbers, "validations": _points}  # fmt: skip
        read: dict[str, Any] = {}
        try:
            for name, reader in readers.items():
                read[name], part = {}, name
                for key, value in _few(dict(values.get(name, {})).items()):
                    read[name][_text(key)] = reader(value)
            part = "data"
            read["data"] = tuple(_text(line) for line in _few(values.get("data", ())))
            part = "objective"
            read["objective"] = _text(values.get("objective", ""))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{part!r} is not what it should be") from None
        return cls(**read)


def _few(values: Any) -> list[Any]:
    return list(values)[:MOST]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value[:LONGEST]


_texts = _text


def _numbers(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _points(value: Any) -> tuple[int, float]:
    step, nll = value
    return int(_numbers(step)), _numbers(nll)


def write_card(folder: str | Path, facts: CardFacts, name: str | None = None) -> None:
    """Write or replace the card of an exported model.

    Args:
        folder: Of the model, complete but for the card.
        facts: What is known of it.
        name: Hub id, where it has one.
    """
    place = Path(folder)
    saved: Saved = "merged" if LORA in facts.training else "whole"
    saved = "dequantised" if QUANTIZED in facts.training else saved
    if (place / "adapter_config.json").is_file():
        saved = "adapters"
    settings = read_settings(str(place), "config.json")
    chat = (place / "chat_template.jinja").is_file()
    text = card(facts, saved, str(settings.get("dtype", "the dtype of its weights")), chat, name)
    with whole_file(place / FILE) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o644)


def card(facts: CardFacts, saved: Saved, dtype: str, chat: bool, name: str | None = None) -> str:
    """Return the text of a card, metadata first.

    Args:
        facts: What is known of the model.
        saved: What lies in its folder.
        dtype: Of the weights.
        chat: Whether a tokenizer with a chat template lies beside them.
        name: Hub id, where it has one.
    """
    from huggingface_hub import ModelCard

    title = name or default_name(facts)
    parts = [
        f"# {title.rpartition('/')[2]}", _sentence(facts), "## Loading", _loading(saved, chat, name), "## Model",
        table({"saved": SAVED[saved].format(dtype=dtype), **_base(facts)}),
    ]  # fmt: skip
    sources = [f"{code(name)} ({kind})" for name, kind in facts.sources.items()]
    lines = [*([f"Sources: {', '.join(sources)}"] if sources else []), *(code(line) for line in facts.data)]
    parts += ["## Data", "\n".join(f"- {line}" for line in lines)] if lines else []
    settings = {"objective": code(facts.objective)} if facts.objective else {}
    settings |= {key: code(value) for key, value in facts.training.items()}
    parts += ["## Training", table(settings)] if settings else []
    if facts.noise:
        parts += ["## Label noise", table({key: f"{value:.3f}" for key, value in facts.noise.items()})]
    if figures := _figures(facts):
        parts += ["## Figures", table(figures)]
    parts += ["## Versions", table({key: code(v) for key, v in facts.versions.items()})] if facts.versions else []
    content = f"---\n{_metadata(facts, saved, title)}\n---\n\n" + paths_shortened("\n\n".join(parts)) + "\n"
    return str(ModelCard(content))


def default_name(facts: CardFacts) -> str:
    """Return a name for a model: that of its base, and of the objective."""
    base = facts.base.get("name") or facts.base.get("random") or "model"
    words = [base.rpartition("/")[2], re.match(r"\w*", facts.objective)[0]]  # type: ignore[index]  # matches anything
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, words))).strip("-.") or "model"


def _sentence(facts: CardFacts) -> str:
    how = f" under the objective {code(facts.objective)}" if facts.objective else ""
    if name := facts.base.get("name"):
        begin = f"{code(name)}, fine-tuned"
    else:
        begin = f"A model of the kind {code(facts.base.get('random', 'unknown'))}, trained from random weights"
    return f"{begin} with deft_lightning{how}."


def _base(facts: CardFacts) -> dict[str, str]:
    known, rows = facts.base, dict[str, str]()
    if known.get("name"):
        rows["base"] = code(known["name"])
        licence = ", ".join(code(known[key]) for key in ("license", "license_name", "license_link") if known.get(key))
        unknown = "not known: neither a card nor a licence lies beside the base"
        rows["licence of the base"] = licence or known.get("license_file", unknown)
    if known.get("its_base"):
        rows["base of the base"] = code(known["its_base"])
    return rows


def _figures(facts: CardFacts) -> dict[str, str]:
    rows = {}
    for key, (step, nll) in facts.validations.items():
        where = "before training" if step == 0 else f"at step {step:,}"
        rows[f"val/nll, {key}"] = f"{nll:.4f} nats per token {where}"
    for tag, value in facts.tests.items():
        if not tag.endswith("_se"):
            error = facts.tests.get(f"{tag}_se")
            rows[tag] = number(value) + ("" if error is None else f" ± {number(error)} (standard error)")
    return rows


def _loading(saved: Saved, chat: bool, name: str | None) -> str:
    place = name or "."
    cls, package = ("AutoPeftModelForCausalLM", "peft") if saved == "adapters" else (
        "AutoModelForCausalLM", "transformers")  # fmt: skip
    imports = [f"from {package} import {cls}", "from transformers import AutoTokenizer"]
    if saved != "adapters":
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines = [
        *(imports if chat else [f"from {package} import {cls}"]), "",
        f'folder = "{place}"' + ("" if name else "  # this folder"),
        f'model = {cls}.from_pretrained(folder, dtype="auto")',
    ]  # fmt: skip
    if chat:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            'messages = [{"role": "user", "content": "Hello"}]',
            'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, '
            'return_tensors="pt")',
            "answer = model.generate(**prompt, max_new_tokens=64)",
            'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]  # fmt: skip
    return "```python\n" + "\n".join(lines) + "\n```"


def _metadata(facts: CardFacts, saved: Saved, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base, optional = facts.base, dict[str, Any]()
    if base.get("hub_id"):
        optional = {
            "base_model": base["hub_id"],
            "base_model_relation": "adapter" if saved == "adapters" else "finetune",
        }
    for key in ("license", "license_name", "license_link"):
        if base.get(key):
            optional[key] = base[key]
    optional["datasets"] = [name for name, kind in facts.sources.items() if kind == "hub"] or None
    data = ", ".join(facts.sources) or "training rows"
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="held-out", dataset_name=_plain(f"held out of {data}"),
            metric_type="nll", metric_name=f"val/nll, {key}", metric_value=nll,
        )
        for key, (_, nll) in facts.validations.items() if key == "last"
    ]  # fmt: skip
    for tag, value in facts.tests.items():
        head, _, figure = tag.rpartition("/")
        if not tag.endswith(("_se", "/truncated", "/examples")):
            kind = _plain(head.removeprefix("test/") or "held out")
            results.append(
                EvalResult(
                    task_type="text-generation", dataset_type=kind, dataset_name=kind, metric_type=_plain(figure),
                    metric_name=_plain(tag), metric_value=value,
                )
            )  # fmt: skip
    tags = ["deft-lightning", "sft", *(["lora"] if saved != "whole" else [])]
    data_of_card = ModelCardData(
        library_name="peft" if saved == "adapters" else "transformers", pipeline_tag="text-generation",
        tags=tags, model_name=title.rpartition("/")[2], eval_results=results or None, **optional,
    )  # fmt: skip
    return str(data_of_card.to_yaml())


def _plain(text: str) -> str:
    return paths_shortened(" ".join(text.split()))[:200]
