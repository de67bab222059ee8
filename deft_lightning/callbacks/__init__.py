"""Callbacks watch; steps compute."""

from deft_lightning.callbacks.checkpoint import Checkpoint
from deft_lightning.callbacks.dashboard import Dashboard
from deft_lightning.callbacks.entropy import EntropyMonitor
from deft_lightning.callbacks.estimate import NoiseEstimate
from deft_lightning.callbacks.first_last import FirstLastValidation
from deft_lightning.callbacks.gate import GateMonitor
from deft_lightning.callbacks.monitor import TokenMonitor
from deft_lightning.callbacks.monitored import MetricCheck
from deft_lightning.callbacks.noise import NoiseMonitor
from deft_lightning.callbacks.predictions import PredictionWriter
from deft_lightning.callbacks.progress import SFTProgressBar
from deft_lightning.callbacks.ranks import RankWatch
from deft_lightning.callbacks.record import RunRecord
from deft_lightning.callbacks.stop import GracefulStop
from deft_lightning.callbacks.summary import ModelLine, RunSummary

__all__ = [
    "Checkpoint",
    "Dashboard",
    "EntropyMonitor",
    "FirstLastValidation",
    "GateMonitor",
    "GracefulStop",
    "MetricCheck",
    "ModelLine",
    "NoiseEstimate",
    "NoiseMonitor",
    "PredictionWriter",
    "RankWatch",
    "RunRecord",
    "RunSummary",
    "SFTProgressBar",
    "TokenMonitor",
]
