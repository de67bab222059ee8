"""The gate of Contaminated at the noise rates that the probe has estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from deft_lightning.functional import TokenStats
from deft_lightning.objectives import Contaminated, NoiseRates


def contaminated_gate(
    log_prob: Tensor, chance: Tensor, unprompted: Tensor, example: Tensor, rates: NoiseRates
) -> Tensor:
    """Return the gate of each token under the noise model of the probe.

    Chance is that of the probe's estimate: word frequencies for tokens; for an answer those, or the model without the
    prompt, whichever explains the answer better.

    Args:
        log_prob: ``log p`` in nats, shape ``(N,)``.
        chance: ``log u``, how frequent the token is among the training labels.
        unprompted: ``log q``, what the model says of it without the prompt; ``log u`` where it was not asked.
        example: Which answer each token is of, int64, in ``[0, N)``.
        rates: Of noise.

    Returns:
        Shape ``(N,)``, in ``[0, 1]``.
    """
    gain = torch.zeros_like(log_prob).index_add_(0, example, unprompted - chance)
    stats = TokenStats(
        log_prob, collision=torch.ones_like(log_prob), entropy=torch.zeros_like(log_prob),
        correct=torch.ones_like(example, dtype=torch.bool), chance=chance,
        answer_chance=torch.where(gain[example] > 0, unprompted, chance), example=example,
    )  # fmt: skip
    model = Contaminated(chance="unigram", answer_chance="unprompted")
    return model.with_(rates=rates).gate(stats)
