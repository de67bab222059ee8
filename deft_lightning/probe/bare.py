"""The second pass of a probe: what the model says of the answers without their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deft_lightning.annotations import Batch
from deft_lightning.data.examples import Floats, Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.data.loading.company import Chain, Group, better_read, by_member, chains_of, groups_of
from deft_lightning.data.loading.packing import bounded_batches
from deft_lightning.data.loading.unprompted import frame_of_split
from deft_lightning.evaluation.generate import positions as positions_of
from deft_lightning.functional import IGNORE_INDEX
from deft_lightning.probe.kept import Kept
from deft_lightning.probe.pace import Pace

BATCH_TOKENS = 4096  # of a batch, padding included; nothing is kept for a gradient


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
        """Return the values of a batch at its labels, 0 elsewhere; shape ``(B, T)``.

        Args:
            labels: Shape ``(B, T)``.
            positions: Position of each row's example.
        """
        values = torch.zeros(labels.shape)
        values[:, 1:][labels[:, 1:] != IGNORE_INDEX] = torch.from_numpy(
            np.concatenate([self.log_prob[at] for at in positions])
        )
        return values


def answer_log_prob(module: Any, batch: Batch, device: torch.device) -> list[Floats]:
    """Return what a model says of the labels of each row of a batch, in nats, shape ``(labels,)`` each.

    Args:
        module: SFTModule with its model built.
        batch: On the host.
        device: Where the model is.
    """
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    stats, keep = module.statistics(moved)
    return [row.numpy() for row in stats.log_prob.float().cpu().split(keep.sum(1).tolist())]


class AnswerReader:
    """Reads answers without their prompts, in batches of like length.

    Args:
        module: SFTModule with its model built, not training.
        split: How many examples there are, and what returns the one at a position.
        pad_id: Token that fills rows up.
        device: Where the model is.
    """

    def __init__(
        self, module: Any, split: tuple[int, Callable[[int], Prepared]], pad_id: int, device: torch.device
    ) -> None:
        self._module, self._device, self._example = module, device, split[1]
        self.collate, self.frame = TrainCollator(pad_id), frame_of_split(*split)
        self._limit = positions_of(module.model)

    def chains(self, groups: Sequence[Group]) -> tuple[list[Chain], set[int]]:
        """Return the rows of groups, and the positions of members without a prompt that could be left out."""
        parts = [chains_of(group, self._example, self.frame, self._limit) for group in groups]
        return [chain for chains, _ in parts for chain in chains], {at for _, whole in parts for at in whole}

    @staticmethod
    def batches(chains: Sequence[Chain]) -> list[list[Chain]]:
        """Return rows in batches of like length."""
        lengths = [len(chain.row.input_ids) for chain in chains]
        return [[chains[at] for at in batch] for batch in bounded_batches(lengths, BATCH_TOKENS, 0)]

    def read(self, batch: Sequence[Chain]) -> dict[int, Floats]:
        """Return ``log q`` of the labels of each member of a batch."""
        collated = self.collate([chain.row for chain in batch])
        return by_member(batch, answer_log_prob(self._module, collated, self._device))

    def groups(self, positions: Sequence[int]) -> list[Group]:
        """Return examples in groups as the model reads them better; ranks that share weights call it together."""

        def log_prob(groups: Sequence[Group]) -> float:
            values = [self.read(batch) for batch in self.batches(self.chains(groups)[0])]
            return sum(float(value.astype(np.float64).sum()) for part in values for value in part.values())

        return better_read(groups_of(positions), log_prob)


def bare_pass(
    module: Any,
    data: Any,
    split: str,
    positions: Sequence[int],
    device: torch.device,
    every: bool,
    kept: Kept | None = None,
) -> Bare:
    """Run the model over answers without their prompts, one after another where it reads them better so.

    Args:
        module: SFTModule with its model built, not training; gradients are off.
        data: InstructionDataModule, set up.
        split: Whose examples.
        positions: Of the examples.
        device: Where the model is.
        every: Whether examples without a prompt are read too: an objective that compares with these values wants them.
        kept: What a killed probe has read is not read again.
    """
    example = partial(data.example, split)
    reader = AnswerReader(module, (data.size(split), example), data.tokenizer.pad_token_id, device)
    chains, whole = reader.chains(reader.groups(positions) if positions else [])
    chains = [chain for chain in chains if every or chain.members[0] not in whole]
    values, read = dict[int, Floats](), 0
    tokens = sum(len(chain.row.input_ids) for chain in chains)
    answers = sum(len(chain.members) for chain in chains)
    done = (kept or Kept(None)).of("bare", tokens)
    with Pace("probe: reading the answers without their prompts", answers, tokens) as pace:
        for own in reader.batches(chains):
            batch = reader.collate([chain.row for chain in own])
            found = done.take(batch)
            if found is None:
                read_now = answer_log_prob(module, batch, device)
                done.add(batch, {"log_prob": torch.from_numpy(np.concatenate(read_now))})
            else:
                counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
                read_now = [row.numpy() for row in found["log_prob"].split(counts)]
            values |= by_member(own, read_now)
            read += batch["input_ids"].numel()
            pace.update(sum(len(chain.members) for chain in own), int(batch["attention_mask"].sum()), found is None)
    done.write()
    return Bare(values, frozenset(whole), read)
