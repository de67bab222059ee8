"""Resuming: which checkpoint is meant, whether it can be resumed, and what differs from what it was trained with."""

from deft_lightning.training.resume.find import CheckpointFinder
from deft_lightning.training.resume.last import Last, last_checkpoint, newest_checkpoint, run_folder
from deft_lightning.training.resume.refuse import refuse
from deft_lightning.training.resume.restore import Restoring
from deft_lightning.training.resume.settings import differences, settings

__all__ = [
    "CheckpointFinder",
    "Last",
    "Restoring",
    "differences",
    "last_checkpoint",
    "newest_checkpoint",
    "refuse",
    "run_folder",
    "settings",
]
