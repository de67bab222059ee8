"""Before training: what the model believes of the data, what each objective would do, which examples are suspect."""

from deft_lightning.probe.audit import conflict, example_score
from deft_lightning.probe.run import probe_data, write

__all__ = ["conflict", "example_score", "probe_data", "write"]
