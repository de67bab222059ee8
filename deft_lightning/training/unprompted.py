"""The chance of an answer: how probable the model finds it, before training, without the prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from deft_lightning._version import __version__
from deft_lightning.data import InstructionDataModule
from deft_lightning.data.examples import Floats
from deft_lightning.data.loading.dataset import PreparedDataset
from deft_lightning.data.loading.unprompted import Unprompted
from deft_lightning.data.prepared.cache import cache_root
from deft_lightning.data.progress import progress
from deft_lightning.errors import UserError
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.probe.bare import AnswerReader
from deft_lightning.training.distributed import gather, ranks

WINDOW = 64  # groups of answers whose rows are put into batches of like length


class UnpromptedPass:
    """Computes ``log q`` of every label of the prepared rows, once for a model and its data, and keeps it.

    Args:
        module: Has the model, and ``statistics`` of a batch.
        folder: Where results are kept; None keeps none.
        about: What the rows are, in words that change with them.
    """

    def __init__(self, module: Any, folder: Path | None, about: object) -> None:
        self.module, self.folder, self.about = module, folder, about

    def key(self, split: str, model: str) -> str:
        """Return the name of the result for a split and the fingerprint of a model."""
        return hashlib.sha256(repr([__version__, "better read", self.about, split, model]).encode()).hexdigest()[:16]

    def attach(self, split: str, rows: PreparedDataset, model: str, pad_id: int, now: bool) -> None:
        """Give rows the chance of their labels; every rank has to call it.

        Args:
            split: Their name.
            rows: The rows.
            model: Fingerprint of the model that training began with.
            pad_id: Token that fills rows up.
            now: Whether the model is still that one, so that what is not kept can be computed.

        Raises:
            UserError: Token noise changes from epoch to epoch, or the result of a run that goes on is gone.
        """
        if rows.changes:
            raise UserError(
                "chance unprompted: no pass before training knows the labels of TokenReplace when its rates change from"
                " epoch to epoch (--data.noise.ops); give one rate, or use chance unigram"
            )
        file = None if self.folder is None else self.folder / f"{self.key(split, model)}.npz"
        kept = None if file is None else Unprompted.load(file, len(rows.examples))
        if all(gather(kept is not None)):  # machines may have caches of their own
            rows.unprompted = kept
            return
        if not now:
            raise UserError(
                f"chance unprompted: what the model said before training is not kept any more ({file}); start the run"
                " anew, or give the folder back (--data.cache_dir, --data.cache)"
            )
        rows.unprompted = self._compute(split, rows, pad_id)
        if file is not None and self.module.global_rank == 0:
            rows.unprompted.save(file)

    def _compute(self, split: str, rows: PreparedDataset, pad_id: int) -> Unprompted:
        count, world, rank = len(rows.examples), ranks(), self.module.global_rank
        reader = AnswerReader(self.module, (count, rows.example), pad_id, self.module.device)
        values, whole = dict[int, Floats](), 0
        was_training = self.module.training
        self.module.eval()
        try:
            groups = reader.groups(range(count))
            own = groups[rank::world]
            windows = [own[at : at + WINDOW] for at in range(0, len(own), WINDOW)]
            with progress(None, f"{split}: answers without their prompts", sum(len(g.members) for g in own)) as bar:
                for step in range(max(gather(len(windows)))):  # ranks that share weights run the model together
                    fresh = step < len(windows)  # a rank without examples reads the first ones again
                    chains, without = reader.chains(windows[step] if fresh else groups[:1])
                    whole += len(without) if fresh else 0
                    batches = reader.batches(chains)
                    for turn in range(max(gather(len(batches)))):
                        batch = batches[min(turn, len(batches) - 1)]
                        values |= reader.read(batch)
                        new = fresh and turn < len(batches)
                        bar.update(sum(len(chain.members) for chain in batch) if new else 0)
        finally:
            self.module.train(was_training)
        merged = {at: row for part in gather(values) for at, row in part.items()}
        whole = sum(gather(whole))
        way = "one after another" if any(len(group.members) > 1 for group in groups) else "each alone"
        rank_zero_info(
            f"{split}: chance of {count:,} answers without their prompts, read {way}; {reader.frame.before} tokens in"
            f" front and {reader.frame.after} before each answer stay"
        )
        if whole:
            rank_zero_warn(
                f"{split}: {whole:,} of {count:,} examples have no prompt that could be left out: their"
                " chance is what the model says of them"
            )
        return Unprompted.of([merged[at] for at in range(count)])


def settle_unprompted(module: Any, prompts: Any, start: str | None) -> str:
    """Give all prepared rows the chance of their labels, computed now if it is not kept; every rank has to call it.

    Args:
        module: An SFTModule whose model is where it trains.
        prompts: Its data module.
        start: Fingerprint of the model that training began with; None where it begins now.

    Returns:
        That fingerprint.

    Raises:
        UserError: There is no data module of this package, or a result that was computed before is gone.
    """
    if not isinstance(prompts, InstructionDataModule):
        raise UserError("chance unprompted needs the rows of InstructionDataModule")
    now = fingerprint(module.model)
    work = UnpromptedPass(module, _folder(prompts), _identity(prompts))
    for split, rows in prompts.splits.items():
        if len(rows) and rows.unprompted is None:
            work.attach(split, rows, start or now, prompts.tokenizer.pad_token_id, start in (None, now))
    return start or now


def _folder(prompts: InstructionDataModule) -> Path | None:
    """Return where results are kept, beside the prepared data; None where nothing is."""
    settings = prompts.settings
    return cache_root(settings.cache_dir) / "unprompted" if settings.cache else None


def _identity(prompts: InstructionDataModule) -> str:
    """Return what the rows are known by, token noise that is applied as they are read included."""
    return f"{prompts.splits.folder.name} {prompts.noise!r}"
