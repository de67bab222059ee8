"""Where a run stands, as far as its objective has to know: how far it is, and what it keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from deft_lightning.objectives import Objective, RunState
from deft_lightning.training.optimizers import planned_steps


class Course:
    """The state of a run that is told to its objective; the same for all micro-batches of an optimizer step.

    Attributes:
        state: In force; outside a fit that of the end of a run, or of a checkpoint that was loaded.
    """

    def __init__(self) -> None:
        self.state, self._steps = RunState(), 0

    def begin(self, objective: Objective, fit: bool, memory: Sequence[float]) -> None:
        """Stand at the start of a fit, or at the end of a run. A checkpoint that is loaded after this knows better."""
        self._tell(objective, 0.0 if fit and objective.scheduled else 1.0, memory)

    def plan(self, trainer: Trainer, objective: Objective) -> None:
        """Find out how many optimizer steps there will be, if the objective wants to know."""
        if objective.scheduled:
            self._steps = planned_steps(trainer, repr(objective))

    def advance(self, objective: Objective, step: int, memory: Sequence[float]) -> None:
        """Stand before an optimizer step, of which there have been ``step``."""
        self._tell(objective, min(step / self._steps, 1.0) if objective.scheduled else 1.0, memory)

    def _tell(self, objective: Objective, progress: float, memory: Sequence[float]) -> None:
        tracked = objective.tracks
        self.state = RunState(progress) if tracked is None else tracked.told(memory, progress)

    def logged(self, objective: Objective) -> dict[str, float]:
        """Return what is logged of what the run keeps for its objective, by tag."""
        tracked = objective.tracks
        return {} if tracked is None else tracked.logged(self.state)

    def state_dict(self, objective: Objective) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        progress, mean_gate, rates = self.state
        return {"objective": repr(objective), "training": [progress, mean_gate], "rates": list(rates)}

    def load_state_dict(self, objective: Objective, about: Mapping[str, Any]) -> dict[str, Any]:
        """Go on from a checkpoint.

        Args:
            objective: Of this run.
            about: What the checkpoint says of its run.

        Returns:
            The same, without rates and gates where they are of another objective.
        """
        mine = dict(about)
        if about.get("objective") != repr(objective) and (about.get("rates") or self.state.rates):
            mine |= {"rates": (), "gates": ()}  # of another objective they say something else
        told = mine.get("training", self.state)[:2]
        self.state = RunState(*told)._replace(rates=tuple(mine.get("rates", ())))
        return mine
