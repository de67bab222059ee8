"""Token objectives as values: frozen, defaulted, checked when made, found through the class tree."""

from deft_lightning.objectives.anchor import KLAnchor
from deft_lightning.objectives.base import DeformedLog, Objective, known_objectives
from deft_lightning.objectives.by_source import BySource
from deft_lightning.objectives.contaminated import Contaminated
from deft_lightning.objectives.deformed import DEFT, NLL, Cayley, Likelihood, Tsallis
from deft_lightning.objectives.information import InfoSFT
from deft_lightning.objectives.mix import Mix
from deft_lightning.objectives.noise_rates import NoiseRates
from deft_lightning.objectives.remedies import Floored, Schedule
from deft_lightning.objectives.rescaled import Rescaled
from deft_lightning.objectives.reweighted import DFT, EAFT, Focal, Truncated
from deft_lightning.objectives.run_state import Needs, RunState, Tracked, TrackedGate

__all__ = [
    "DEFT",
    "DFT",
    "EAFT",
    "NLL",
    "BySource",
    "Cayley",
    "Contaminated",
    "DeformedLog",
    "Floored",
    "Focal",
    "InfoSFT",
    "KLAnchor",
    "Likelihood",
    "Mix",
    "Needs",
    "NoiseRates",
    "Objective",
    "Rescaled",
    "RunState",
    "Schedule",
    "Tracked",
    "TrackedGate",
    "Truncated",
    "Tsallis",
    "known_objectives",
]
