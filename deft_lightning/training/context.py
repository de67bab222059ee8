"""What is known of the tokens of a run's batches, from its data module and what its callbacks want."""

from __future__ import annotations

from deft_lightning.annotations import CausalLM
from deft_lightning.models import base_causal_lm
from deft_lightning.objectives import Needs, Objective
from deft_lightning.objectives.context import ContextSource, unigram_log_prob
from deft_lightning.training.protocols import PromptSource


def context_of(objective: Objective, model: CausalLM, prompts: PromptSource | None, watched: Needs) -> ContextSource:
    """Return what makes the context of a run's batches.

    Args:
        objective: The one that trains.
        model: The model, built.
        prompts: The data module; None, or one of the user's own, knows nothing of the training labels.
        watched: What callbacks want to know beside.
    """
    size = base_causal_lm(model).config.get_text_config().vocab_size
    counts = getattr(prompts, "label_counts", None)
    unigram = None if counts is None or not counts.sum() else unigram_log_prob(counts, size)
    return ContextSource(objective, unigram, size, watched)
