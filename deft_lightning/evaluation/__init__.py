"""Generation and graders of what was generated."""

from deft_lightning.evaluation.exact_match import exact_match
from deft_lightning.evaluation.generate import Completion, Generation, complete

__all__ = ["Completion", "Generation", "complete", "exact_match"]
