"""The second pass of a probe: what the model says of the answers without their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deft_lightning.annotations import Batch
from deft_lightning.data.examples import Floats, Unprompted
from deft_lightning.data.loading.collate import unprompted_fields
from deft_lightning.data.loading.company import Company
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.evaluation.generate import positions as positions_of
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.models.unprompted import UnpromptedReader
from deft_lightning.probe.kept import Kept
from deft_lightning.probe.pace import Pace

BATCH_TOKENS = 4096  # of a batch, padding included; nothing is kept for a gradient
TRIED = 32  # answers that are read both ways


class Bare(NamedTuple):
    """Log-probabilities of answers without their prompts.

    Attributes:
        log_prob: By position of the example: of each of its labels, in nats, shape ``(n,)``.
        whole: Positions of examples that have no prompt to leave out.
        read: Tokens that the pass has read, padding included.
    """

    log_prob: dict[int, Floats]
    whole: frozenset[int]
    read: int

    def of(self, position: int) -> Floats | None:
        """Return the values of an example; None where it has no prompt, so that they say nothing of chance."""
        return None if position in self.whole else self.log_prob.get(position)

    def spread(self, labels: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the values of a batch at its labels, NaN elsewhere and where there is no prompt; shape ``(B, T)``.

        Args:
            labels: Shape ``(B, T)``.
            positions: Position of each row's example.
        """
        values = torch.full(labels.shape, torch.nan)
        for row, at in enumerate(positions):
            if (found := self.of(at)) is not None:
                values[row, 1:][labels[row, 1:] != IGNORE_INDEX] = torch.from_numpy(found)
        return values


def _batches(answers: Sequence[Unprompted]) -> list[list[int]]:
    return bounded_batches([len(answer.ahead) + len(answer.input_ids) for answer in answers], BATCH_TOKENS, 0)


def bare_pass(
    module: Any,
    data: Any,
    split: str,
    positions: Sequence[int],
    device: torch.device,
    kept: Kept | None = None,
) -> Bare:
    """Run the model over answers without their prompts, behind a few others where it reads them better so.

    Args:
        module: SFTModule with its model built, not training; gradients are off.
        data: InstructionDataModule, set up.
        split: Whose examples.
        positions: Of the examples.
        device: Where the model is.
        kept: What a killed probe has read is not read again.
    """
    rows = data.splits[split].examples
    company = Company(data.size(split), partial(data.example, split), rows.lengths(), positions_of(module.model))
    answers = {at: company.of(at, data.example(split, at)) for at in positions}
    asked = [at for at in positions if len(answers[at].input_ids)]
    reader = UnpromptedReader(module.model, module.batch_loss.seam)

    def collated(own: Sequence[int]) -> tuple[Batch, Batch]:
        """Return a batch, on the host and where the model is."""
        batch = unprompted_fields([answers[at] for at in own], data.tokenizer.pad_token_id)
        return batch, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    drawn = np.random.default_rng([len(asked), 1]).permutation(len(asked))[:TRIED].tolist()
    few = [asked[place] for place in drawn]
    reader.settle([collated([few[i] for i in batch])[1] for batch in _batches([answers[at] for at in few])])
    values, read = dict[int, Floats](), 0
    tokens = sum(len(answers[at].input_ids) for at in asked)
    done = (kept or Kept(None)).of("bare", tokens)
    with Pace("probe: reading the answers without their prompts", len(asked), tokens) as pace:
        for places in _batches([answers[at] for at in asked]):
            own = [asked[place] for place in places]
            batch, moved = collated(own)
            named = _named(batch, bool(reader.alone))
            found = done.take(named)
            if found is None:
                log_prob = reader(moved).cpu()
                done.add(named, {"log_prob": log_prob})
            else:
                log_prob = found["log_prob"]
            counts = (batch["unprompted_labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
            values |= {at: row.numpy() for at, row in zip(own, log_prob.split(counts), strict=True)}
            once = batch["unprompted_ids"].numel() + batch["ahead_ids"].numel()
            read += once if reader.once else named["input_ids"].numel()
            pace.update(len(own), sum(len(answers[at].input_ids) for at in own), found is None)
    done.write()
    return Bare(values, frozenset(positions) - frozenset(asked), read)


def _named(batch: Batch, alone: bool) -> Batch:
    """Return what a batch asks of the model, as the first pass names it."""
    ahead = batch["ahead_ids"][batch["ahead"], : batch["frame"] if alone else None]
    return {"input_ids": torch.cat([ahead, batch["unprompted_ids"]], 1), "labels": batch["unprompted_labels"]}
