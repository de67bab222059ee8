"""Token objectives as values: frozen, defaulted, checked when made, found through the class tree."""

from deft_lightning.objectives.base import DeformedLog, Objective, RunState, TrackedGate, known_objectives
from deft_lightning.objectives.deformed import DEFT, NLL, Cayley, Likelihood, Tsallis
from deft_lightning.objectives.remedies import Floored, Schedule
from deft_lightning.objectives.rescaled import Rescaled
from deft_lightning.objectives.reweighted import DFT, EAFT, Focal, Truncated

__all__ = [
    "DEFT",
    "DFT",
    "EAFT",
    "NLL",
    "Cayley",
    "DeformedLog",
    "Floored",
    "Focal",
    "Likelihood",
    "Objective",
    "Rescaled",
    "RunState",
    "Schedule",
    "TrackedGate",
    "Truncated",
    "Tsallis",
    "known_objectives",
]
