"""The chance of an answer: how probable the model finds it without the prompt, read anew in each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from deft_lightning._lightning import trainer_of
from deft_lightning.data import InstructionDataModule
from deft_lightning.data.loading.collate import unprompted_fields
from deft_lightning.data.loading.company import Company
from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.errors import UserError
from deft_lightning.evaluation.generate import positions
from deft_lightning.training.distributed import gather
from deft_lightning.training.protocols import computes_loss

TRIED = 32  # answers that are read alone and behind others, to see which the model does better
AT_ONCE = 8
MOST = 32  # labels of an answer that a step reads: on GSM8K they tell swapped answers as well as whole ones do


def put_in_company(module: Any, prompts: Any) -> None:
    """Have the rows of every split bring their answers without prompts along, where somebody asks for these.

    Args:
        module: An SFTModule with its model.
        prompts: Its data module.

    Raises:
        UserError: There is no data module of this package.
    """
    trainer = trainer_of(module)
    if not module.batch_loss.context.unprompted or trainer is None or not computes_loss(trainer):
        return
    if not isinstance(prompts, InstructionDataModule):
        raise UserError("chance unprompted needs the rows of InstructionDataModule")
    # A token that is judged by itself has to be read, wherever it stands.
    most = None if _judges_tokens(module) else MOST
    for split, rows in prompts.splits.items():
        if len(rows) and rows.company is None:
            count = len(rows.examples)
            limit = positions(module.model)
            rows.company = Company(count, rows.example, rows.examples.lengths(), limit, most)
            if rows.company.whole:
                rank_zero_warn(
                    f"{split}: {rows.company.whole:,} of {rows.company.looked:,} examples that were looked at have no"
                    " prompt that could be left out: chance of their answers is how frequent their tokens are"
                )


def settle_unprompted(module: Any, prompts: Any) -> None:
    """Find out whether the model reads answers better alone, unless the run knows; every rank has to call it.

    Args:
        module: An SFTModule whose model is where it trains.
        prompts: Its data module.
    """
    if not module.batch_loss.context.unprompted:
        return
    reader = module.batch_loss.unprompted
    if None not in (reader.alone, reader.once):
        return
    rows: PreparedDataset = prompts.splits["train"]
    if not len(rows):
        rows = next(rows for _, rows in prompts.splits.items() if len(rows))
    assert rows.company is not None
    reader.settle(_sample(rows, prompts.tokenizer.pad_token_id, module.device), lambda verdict: gather(verdict)[0])
    frame, tokens = rows.company.frame, 0 if reader.alone else rows.company.ahead
    first = "" if _judges_tokens(module) else f"{MOST} tokens of each at most, "
    rank_zero_info(
        f"chance unprompted: each step reads its answers again, {first}without their prompts"
        + (f" and behind {tokens} tokens of other answers" if tokens else ", each alone")
        + f". {frame.before} tokens in front and {frame.after} before each answer stay."
        + ("" if reader.once else " This model reads the tokens in front again before every answer.")
    )


def _judges_tokens(module: Any) -> bool:
    return str(module.batch_loss.context.needs.chance) == "unprompted"


def _sample(rows: PreparedDataset, pad_id: int, device: torch.device) -> list[dict[str, Any]]:
    """Return answers of some examples in batches, the same on every rank."""
    count = len(rows.examples)
    drawn = np.random.default_rng([count, 1]).permutation(count)[:TRIED].tolist()
    answers = [answer for at in drawn if (answer := rows.example(at).unprompted) is not None]
    parts = [unprompted_fields(answers[at : at + AT_ONCE], pad_id) for at in range(0, len(answers), AT_ONCE)]
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in part.items()} for part in parts]
