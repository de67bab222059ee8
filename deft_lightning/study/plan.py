"""What a study consists of: settings, and the cells that follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from deft_lightning._version import __version__
from deft_lightning.annotations import Settings
from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Cayley, Likelihood, Objective, Tsallis
from deft_lightning.objectives.parse import short_legend
from deft_lightning.study.files import digest, file_name, files_of
from deft_lightning.study.regime import DEFAULTS, Regime, check_positive

FIELD = (NLL(), Likelihood(), Tsallis(q=0.5), Cayley(), Cayley(floor=0.5), EAFT(), DFT(), DEFT())
TUNING = 1000  # seeds from here on choose learning rates; no reported cell has one
SMOKE = {"steps": 12, "rows": 320, "held_out": 32}


@dataclass(frozen=True)
class Cell:
    """One training run: all that its result depends on.

    Attributes:
        regime: Name of the regime.
        setting: The regime's settings.
        objective: The objective.
        noise: Rate of the noise operation.
        rate: Learning rate.
        seed: Of order, noise and random weights.
        architecture: Options of the model.
        rows: Training examples.
        held_out: Validation examples, and test examples.
        base_rows: Training rows of the model it starts from.
        files: Hash of the files that it reads; empty where it reads none.
        head: `fused`, or `dense` for a second rounding.
    """

    regime: str
    setting: Regime
    objective: Objective
    noise: float
    rate: float
    seed: int
    architecture: Settings
    rows: int
    held_out: int
    base_rows: int
    files: str = ""
    head: Literal["fused", "dense"] = "fused"

    @property
    def id(self) -> str:
        """Hash of everything but the name of the regime and what else is tried there.

        Settings at their defaults are left out: an option that is new tomorrow leaves today's results where they are.
        Without noise its operation does not matter.
        """
        given = {name: value for name, value in asdict(self.setting).items() if value != DEFAULTS[name]}
        beside = {"rate", "rates", "noise", "headline", *(() if self.noise else ("op",))}
        setting = {name: value for name, value in given.items() if name not in beside}
        return digest(
            [__version__, setting, repr(self.objective), self.noise, self.rate, self.seed, self.architecture,
             self.rows, self.held_out, *([self.files] if self.files else []),
             *([self.base_rows] if self.base_rows != self.rows else []),
             *([self.head] if self.head != "fused" else [])]
        )  # fmt: skip

    @property
    def split(self) -> str:
        """Return which rows it is judged on: those for choosing learning rates, or those for reporting."""
        return "validation" if self.seed >= TUNING else "test"

    @property
    def folder(self) -> str:
        """Name of the folder of its run: readable, and without that of the regime, which other cells may share."""
        name = file_name(short_legend(repr(self.objective)))
        return f"noise{self.noise:g}-{name}-lr{self.rate:g}-seed{self.seed}-{self.id}"

    @property
    def label(self) -> str:
        """Return what it is called in messages."""
        return f"{self.regime}-{self.folder}"


@dataclass(frozen=True)
class Study:
    """A grid of objectives, regimes, noise and seeds.

    Args:
        regimes: Regimes by name.
        architecture: `model_type` and options of a transformers config, for random weights.
        objectives: Objectives to compare.
        remedies: Objectives to try only in the headline cells, at the shared learning rate.
        seeds: Runs of a cell.
        headline_seeds: Runs of a headline cell.
        tuning_seeds: Runs of each learning rate when one is chosen for an objective in a headline cell.
        rows: Training examples of a task.
        held_out: Validation examples, and as many test examples.
        second_rounding: Run the headline cells again with the dense head, whose gradients agree with the fused head to
            rounding. A cell with two medians far apart is unstable, and proves nothing.
        pretrained: Hub id or folder of the model of every regime that names neither one nor a base.
        accelerator: Where the cells of all regimes run, such as `gpu`; default: each regime's own.
        first_seed: First seed. Report a method on seeds that were not used to develop it.
    """

    regimes: dict[str, Regime]
    architecture: Settings
    objectives: list[Objective] = field(default_factory=lambda: list(FIELD))
    remedies: list[Objective] = field(default_factory=list)
    seeds: int = 3
    headline_seeds: int = 5
    tuning_seeds: int = 1
    rows: int = 4000
    held_out: int = 400
    first_seed: int = 0
    second_rounding: bool = False
    pretrained: str | None = None
    accelerator: str | None = None

    def __post_init__(self) -> None:
        """Refuse a study of nothing, and the same objective twice."""
        check_positive(
            "study", seeds=self.seeds, headline_seeds=self.headline_seeds, tuning_seeds=self.tuning_seeds,
            rows=self.rows, held_out=self.held_out,
        )  # fmt: skip
        if not 0 <= self.first_seed <= TUNING - max(self.seeds, self.headline_seeds):
            raise UserError(f"study: first_seed must be from 0, and seeds below {TUNING}, not {self.first_seed}")
        if not self.regimes or not self.objectives:
            raise UserError("a study needs at least one regime and one objective")
        if len(judges := {regime.judge for regime in self.regimes.values()}) > 1:
            raise UserError(f"study: judge must be one for all regimes, not {' and '.join(sorted(judges))}")
        for name, regime in self.regimes.items():
            if regime.lora is not None and (regime.base or regime.pretrained or self.pretrained) is None:
                raise UserError(f"study: regime {name}: lora needs a trained model; name pretrained or a base")
            if regime.exclude_top is not None and (regime.base or regime.pretrained or self.pretrained) is None:
                raise UserError(
                    f"study: regime {name}: exclude_top asks the model that a cell starts from, and random weights know"
                    " nothing; name pretrained or a base"
                )
        names = [repr(objective) for objective in self.everything]
        for objective in self.everything:
            cls = type(objective)
            if "__init__" in vars(cls) and "__dataclass_params__" not in vars(cls):
                raise UserError(f"study: {cls.__name__} must be a frozen dataclass: results are kept by its settings")
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"study: {', '.join(sorted(twice))} is listed twice")

    @property
    def judge(self) -> str:
        """Return what all cells are judged by."""
        return next(iter(self.regimes.values())).judge

    @property
    def everything(self) -> list[Objective]:
        """Return objectives and remedies."""
        return [*self.objectives, *self.remedies]

    def smoke(self) -> Study:
        """Return the same study in minutes: all its kinds of cells, too short to mean anything."""
        regimes = {
            name: replace(
                regime, steps=min(SMOKE["steps"], regime.steps), rates=regime.rates[:1],
                noise=sorted({0.0, *regime.headline[:1]}), headline=regime.headline[:1], batch_size=8,
                base=None if regime.base is None
                else replace(regime.base, steps=min(SMOKE["steps"], regime.base.steps), batch_size=8),
            )
            for name, regime in self.regimes.items()
        }  # fmt: skip
        few = [self.objectives[0], self.objectives[-1]] if len(self.objectives) > 1 else self.objectives
        return replace(
            self, regimes=regimes, objectives=few, remedies=self.remedies[:1], seeds=1, headline_seeds=2,
            rows=min(SMOKE["rows"], self.rows), held_out=min(SMOKE["held_out"], self.held_out),
        )  # fmt: skip

    def cell(self, regime: str, objective: Objective, noise: float, rate: float, seed: int) -> Cell:
        """Return a cell."""
        setting = self.regimes[regime]
        if setting.base is None and setting.pretrained is None:
            setting = replace(setting, pretrained=self.pretrained)
        if self.accelerator is not None:
            setting = replace(setting, accelerator=self.accelerator)
        base = "" if setting.base is None else setting.base.source
        files = files_of(setting.source, base, setting.pretrained or "", *filter(None, [setting.forgetting]))
        sizes = (setting.rows or self.rows, self.held_out, self.rows)
        return Cell(regime, setting, objective, noise, rate, seed, self.architecture, *sizes, files)

    def _seeds(self, count: int) -> range:
        return range(self.first_seed, self.first_seed + count)

    def shared(self) -> Iterator[Cell]:
        """Yield the grid at the learning rate that all share, headline cells first."""
        for headline in (True, False):
            for name, regime in self.regimes.items():
                for noise in regime.noise:
                    if (noise in regime.headline) is not headline:
                        continue
                    for seed in self._seeds(self.headline_seeds if headline else self.seeds):
                        for objective in self.everything if headline else self.objectives:
                            yield self.cell(name, objective, noise, regime.rate, seed)

    def rounded(self) -> Iterator[Cell]:
        """Yield the headline cells at the shared rate with the other head."""
        for cell in self.shared():
            if self.second_rounding and cell.noise in cell.setting.headline:
                yield replace(cell, head="dense")

    def tuning(self) -> Iterator[Cell]:
        """Yield the cells that choose a learning rate for each objective in each headline cell."""
        for name, regime in self.regimes.items():
            if len(regime.candidates) < 2:
                continue
            for noise in regime.headline:
                for objective in self.objectives:
                    for rate in regime.candidates:
                        for seed in range(self.tuning_seeds):
                            yield self.cell(name, objective, noise, rate, TUNING + seed)

    def tuned(self, rates: dict[tuple[str, float, str], float]) -> Iterator[Cell]:
        """Yield the headline cells at the learning rates that were chosen, by regime, noise and objective."""
        for name, regime in self.regimes.items():
            for noise in regime.headline:
                for objective in self.objectives:
                    rate = rates.get((name, noise, repr(objective)))
                    for seed in self._seeds(self.headline_seeds) if rate is not None else ():
                        assert rate is not None
                        yield self.cell(name, objective, noise, rate, seed)
