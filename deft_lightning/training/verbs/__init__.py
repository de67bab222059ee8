"""What a trainer does beside training: export, preview and probe."""

from deft_lightning.training.verbs.export import export
from deft_lightning.training.verbs.preview import preview
from deft_lightning.training.verbs.probe import probe

__all__ = ["export", "preview", "probe"]
