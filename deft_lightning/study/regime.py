"""A regime of a study: a task, and what the model knows of it before it is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from deft_lightning.data import known_noise
from deft_lightning.data.prepared.audit_file import Top
from deft_lightning.errors import UserError, did_you_mean
from deft_lightning.models.lora import LoRA

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")  # as Lightning names them


@dataclass(frozen=True)
class Base:
    """The model a regime starts from: trained with NLL, one for each seed of the cells.

    Args:
        source: Its rows, as for `--data.source`.
        steps: Optimizer steps.
        rate: Learning rate.
        batch_size: Examples per step.
        op: Noise operation that changes all of its answers, for a model that is sure of another rule; default: none.
    """

    source: str
    steps: int
    rate: float = 4e-3
    batch_size: int = 32
    op: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        check_positive("base", steps=self.steps, rate=self.rate, batch_size=self.batch_size)
        if self.op is not None:
            _check_op("base", self.op)


@dataclass(frozen=True)
class Regime:
    """A task, and what the model knows of it before it is fine-tuned.

    Args:
        source: Rows, as for `--data.source`, split into training, validation and test by a hash of the prompt.
        steps: Optimizer steps of fine-tuning.
        rate: Learning rate that all objectives share.
        base: Training before the study, of the model that a run starts from; default: random weights.
        pretrained: Hub id or folder of the model to start from, instead of a base; default: the study's.
        lora: Train low-rank adapters only.
        op: Noise operation that corrupts the training answers.
        split_by: Field to hash: the `prompt`, or the `answer` where several prompts ask for the same answer.
        judge: Score of a cell on test rows: `exact_match` of greedy answers, or `nll`, nats per token.
        rates: Learning rates to choose from for each objective, on the validation split.
        noise: Rates of the noise operation.
        headline: Noise rates on which the objectives are ranked.
        batch_size: Examples per step.
        tokenizer_size: Vocabulary of the tokenizer that random weights get; at most 262 means one token per byte.
        max_length: Longest example in tokens.
        max_new_tokens: Longest answer in tokens.
        rows: Training rows; default: the rows of the study. Few rows and many steps are many epochs.
        max_characters: Longest prompt and answer together; longer rows are left out. Default: no limit.
        looks: Validations in a run, evenly spaced, the last at its end.
        forgetting: Rows of another kind, as for `--data.source`, for the KL divergence between predictions before and
            after training, in nats per token. Costs a second forward pass in each validation.
        exclude_top: Training rows to leave out, the worst by an audit of the model that a cell starts from: a share
            such as 10%, or a count; default: none.
        accelerator: Where cells run: `cpu`, where small models are fastest, or as for `--trainer.accelerator`.
    """

    source: str
    steps: int
    rate: float
    base: Base | None = None
    pretrained: str | None = None
    lora: LoRA | None = None
    op: str = "ResponseSwap"
    split_by: Literal["prompt", "answer"] = "prompt"
    judge: Literal["exact_match", "nll"] = "exact_match"
    rates: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6])
    headline: list[float] = field(default_factory=list)
    batch_size: int = 32
    tokenizer_size: int = 0
    max_length: int = 1024
    max_new_tokens: int = 12
    rows: int | None = None
    max_characters: int | None = None
    looks: int = 4
    forgetting: str | None = None
    exclude_top: int | str | None = None
    accelerator: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        check_positive("regime", steps=self.steps, rate=self.rate, batch_size=self.batch_size, looks=self.looks)
        if self.base is not None and self.pretrained is not None:
            raise UserError("regime: base and pretrained are two models to start from; leave one out")
        if self.judge not in ("exact_match", "nll"):
            raise UserError(f"regime: judge must be exact_match or nll, not {self.judge!r}")
        if self.split_by not in ("prompt", "answer"):
            raise UserError(f"regime: split_by must be prompt or answer, not {self.split_by!r}")
        _check_op("regime", self.op)
        if self.accelerator not in ACCELERATORS:
            raise UserError(f"study: accelerator must be one of {', '.join(ACCELERATORS)}, not {self.accelerator!r}")
        limits = {"rows": self.rows, "max_characters": self.max_characters}
        check_positive("regime", **{name: limit for name, limit in limits.items() if limit is not None})
        for rate in self.rates:
            check_positive("regime", rates=rate)
        if self.exclude_top is not None:
            try:
                Top.read(self.exclude_top)
            except UserError as error:
                raise UserError(str(error).replace("--data.", "regime: ")) from None
        if not self.noise:
            raise UserError("regime: noise must hold at least one rate; 0 is none")
        for rate in self.noise:
            if not 0 <= rate < 1:
                raise UserError(f"noise must be in [0, 1), got {rate}")
        if unknown := [rate for rate in self.headline if rate not in self.noise]:
            raise UserError(f"headline noise {unknown} is not among the noise {self.noise}")

    @property
    def candidates(self) -> list[float]:
        """Return learning rates to choose from, the shared one among them, in order."""
        return sorted({self.rate, *self.rates})


DEFAULTS = {option.name: option.default for option in fields(Regime)}


def _check_op(what: str, op: str) -> None:
    if op not in known_noise():
        raise UserError(f"{what}: op {op!r} is unknown.{did_you_mean(op, known_noise())}")


def check_positive(what: str, **values: float) -> None:
    """Refuse numbers that are not above 0.

    Raises:
        UserError: Names the setting.
    """
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{what}: {name} must be above 0, got {value}")
