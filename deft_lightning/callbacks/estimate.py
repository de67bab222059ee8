"""The noise rate without truth: a noise model watches whatever objective trains."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from deft_lightning.callbacks.monitor import TokenMonitor
from deft_lightning.callbacks.watched import WatchedModule, injects_noise, is_watched, tracked_tags, watched
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import Histogram, PackedHistogram
from deft_lightning.objectives import Contaminated, Needs, NoiseRates
from deft_lightning.objectives.contaminated import answers_of
from deft_lightning.objectives.noise_rates import LATEST, LOWEST, bounded

ANSWERS, TOKENS, TRUE_ANSWERS, TRUE_TOKENS = range(4)  # rows
STABLE, SPREAD = 5, 0.05  # reports within which the estimate has moved by less than this
ALARM = 1 / 3


class NoiseEstimate(TokenMonitor):
    """Logs how much of the labels is noise, as the noise model of `Contaminated` sees it, under any objective.

    `noise/estimated` is the share of answers that chance explains better than the model does, `noise/estimated_tokens`
    that of single tokens in the others: one step of EM for each logged step, a running mean over them. Under an
    objective that has noise rates itself these are its own. Where labels were corrupted on purpose, `noise/true` and
    `noise/true_tokens` are the shares that were, in the same steps; an answer counts with its first wrong token.

    It warns once, when the estimate has stayed above a third. What it cannot see: noise that agrees with itself, which
    a model learns like a rule; noise that the model has memorised; and a model that does not know the task yet takes
    right answers for noise.

    Args:
        chance: What a whole answer is compared with: `unigram`, the frequencies of its tokens in the training labels,
            suits short answers. `unprompted`, the model's probability of it behind other answers, without the prompt,
            suits real text; it costs one forward pass over the answers of logged steps.

    Raises:
        UserError: Another word.
    """

    def __init__(self, chance: Literal["unigram", "unprompted"] = "unigram") -> None:
        super().__init__(bins=1)
        if chance not in ("unigram", "unprompted"):
            raise UserError(f"noise_estimate.chance must be unigram or unprompted, not {chance!r}")
        self.chance = chance
        self.rates = NoiseRates(LOWEST, LOWEST)
        self.recent: deque[float] = deque(maxlen=STABLE)
        self.counted, self.warned = 0, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the chance of answers, before the model is built; say what word frequencies do not see."""
        if not is_watched(pl_module):
            return
        module = watched(pl_module)
        if self.chance == "unprompted":
            module.watched_needs = Needs(answer_chance="unprompted")
        elif stage == "fit" and getattr(module, "pretrained", None) and not _estimates(module):
            rank_zero_info(
                "noise/estimated compares answers with token frequencies, which miss wrong answers in the "
                "usual format; --noise_estimate.chance unprompted finds them, for one pass over the answers of logged"
                " steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate, for a run that goes on."""
        return {"rates": list(self.rates), "recent": list(self.recent), "counted": self.counted, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an estimate."""
        first, second = state_dict["rates"]
        self.rates, self.recent = NoiseRates(float(first), float(second)), deque(state_dict["recent"], maxlen=STABLE)
        self.counted, self.warned = int(state_dict["counted"]), bool(state_dict["warned"])

    def open(self, trainer: Trainer, module: WatchedModule) -> PackedHistogram:
        """Return rows of which the means are read: of answers and tokens, estimated and true."""
        return PackedHistogram([(0.0, 1.0)] * 4, 1)

    def observe(
        self,
        packed: PackedHistogram,
        module: WatchedModule,
        stats: TokenStats,
        noise_code: Tensor | None,
        clean_labels: Tensor | None,
    ) -> None:
        """Add the posterior of each answer and token; where chance is not known it says so once."""
        if stats.chance is None or stats.example is None:
            if not self.warned:
                rank_zero_info(
                    "noise/estimated is not logged: nothing is known of how frequent the training labels are, as"
                    " InstructionDataModule does"
                )
            self.warned = True
            return
        if not len(stats.log_prob):
            return
        if self.chance == "unprompted" and stats.answer_chance is None and not _estimates(module):
            return  # a last step that nobody knew to be logged: its answers were not read
        posterior = Contaminated().with_(rates=self.rates).posterior(stats)
        share = 1 / posterior.size
        packed.update(ANSWERS, 1 - posterior.answer, weight=share)
        packed.update(TOKENS, 1 - posterior.token, weight=posterior.answer)
        if noise_code is not None:
            wrong = (noise_code != 0).to(share)
            place = answers_of(stats.example)
            whole = torch.zeros_like(share).index_add_(0, place, wrong)[place] > 0
            packed.update(TRUE_ANSWERS, whole, weight=share)
            packed.update(TRUE_TOKENS, wrong)

    def report(self, trainer: Trainer, module: WatchedModule, rows: list[Histogram]) -> None:
        """Move the estimate, and log it."""
        if not rows[ANSWERS].total:
            return
        self.counted += 1
        latest = max(1 / self.counted, LATEST)
        means = (rows[ANSWERS].mean, rows[TOKENS].mean if rows[TOKENS].total else self.rates[1])
        self.rates = NoiseRates(
            *(bounded((1 - latest) * rate + latest * mean) for rate, mean in zip(self.rates, means, strict=True))
        )
        self.recent.append(self.rates[0])
        values = {}
        if injects_noise(trainer) and rows[TRUE_ANSWERS].total:
            values = {"noise/true": rows[TRUE_ANSWERS].mean, "noise/true_tokens": rows[TRUE_TOKENS].mean}
        if not _estimates(module):
            module.log("noise/estimated", self.rates[0], prog_bar=True)
            values["noise/estimated_tokens"] = self.rates[1]
        self.write_scalars(trainer, values)
        self._warn()

    def _warn(self) -> None:
        settled = len(self.recent) == STABLE and max(self.recent) - min(self.recent) < SPREAD
        if self.warned or not settled or min(self.recent) < ALARM:
            return
        self.warned = True
        rank_zero_warn(
            f"noise/estimated: chance explains {self.rates[0]:.0%} of the answers better than the model does. Either"
            " they are wrong, and --model.objective Contaminated leaves them out, or the model does not know the task"
            " yet. Systematic noise is not detected (docs/concepts/noise_model.md)"
        )


def _estimates(module: WatchedModule) -> bool:
    """Return whether the objective has noise rates itself."""
    return "noise/estimated" in tracked_tags(module.objective)
