"""Order and place in it, in every way of batching: exact after a stop, on any number of workers and ranks."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_rows import on_rank

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data import Noise, TokenReplace
from deft_lightning.training.optim import CosineWithWarmup

pytestmark = pytest.mark.slow

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True, "batch_size": 1},
    "max_tokens": {"max_tokens_per_batch": 300},
    "packing, max_tokens": {"packing": True, "max_tokens_per_batch": 200},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
Batches = list[dict[str, Any]]


def rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(2)
    return [{"id": f"r{i}", "question": f"{i}?", "answer": "x" * rng.randint(1, 60)} for i in range(count)]


def ready(folder: Path, count: int = 96, *, rank: int = 0, world: int = 1, **options: Any) -> InstructionDataModule:
    path = folder / f"rows{count}.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    data = InstructionDataModule(
        str(path), **{"validation_fraction": 0.0, "batch_size": 2, "tokenizer_size": 0, "max_length": 100, **options}
    )
    on_rank(data, rank, world)
    data.setup("fit")
    return data


def loader(folder: Path, epoch: int, **options: Any) -> Any:
    found = ready(folder, **options).train_dataloader()
    found.sampler.set_epoch(epoch)
    return found


def ids(batches: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [batch["example_id"] for batch in batches]


def flat(groups: Iterable[Iterable[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(groups))


def assert_same(one: Iterable[dict[str, Any]], other: Iterable[dict[str, Any]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def taken_in_turns(ranks: list[list[list[str]]]) -> list[frozenset[str]]:
    """What all ranks saw in each step, in order."""
    return [frozenset(flat(step)) for step in zip(*ranks, strict=True)]


# --- order -----------------------------------------------------------------------------------------------------------


@every_mode
def test_the_order_is_one_of_the_seed_and_the_epoch(tmp_path: Path, mode: dict[str, Any]) -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 5)):
        found = ids(loader(tmp_path, epoch, seed=seed, **mode))
        assert found == ids(loader(tmp_path, epoch, seed=seed, **mode))
        assert sorted(flat(found)) == sorted(f"r{i}" for i in range(96))  # all of them, none twice
        orders[seed, epoch] = tuple(flat(found))
    assert len(set(orders.values())) == 6


@every_mode
def test_workers_change_neither_batches_nor_the_place_that_is_kept(tmp_path: Path, mode: dict[str, Any]) -> None:
    noise = Noise(ops=[TokenReplace(0.2)])
    alone, helped = (loader(tmp_path, 0, noise=noise, num_workers=workers, **mode) for workers in (0, 2))
    for epoch in (0, 1):
        for found in (alone, helped):
            found.sampler.set_epoch(epoch)
        seen = 0
        for one, other in zip(alone, helped, strict=True):
            assert_same([one], [other])
            # A worker has fetched ahead by now; what it fetched has not been handed out.
            assert alone.state_dict() == helped.state_dict()
            seen += 1
        assert seen > 5


def test_ranks_have_as_many_steps_and_share_no_example(tmp_path: Path) -> None:
    for mode in MODES.values():
        seen = [ids(loader(tmp_path, 0, rank=rank, world=3, **mode)) for rank in range(3)]
        assert len({len(found) for found in seen}) == 1
        everyone = flat(flat(seen))
        assert len(everyone) == len(set(everyone)) > 70


def test_the_longest_group_does_not_come_at_the_same_step_of_every_epoch(tmp_path: Path) -> None:
    found = ready(tmp_path, 1000, group_by_length=True, batch_size=64).train_dataloader()
    longest = set()
    for epoch in range(6):
        found.sampler.set_epoch(epoch)
        widths = [batch["input_ids"].shape[1] for batch in found]
        longest.add(widths.index(max(widths)))
    assert len(longest) > 2


# --- resuming --------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_an_epoch_is_exact(tmp_path: Path, mode: dict[str, Any], workers: int) -> None:
    whole = list(loader(tmp_path, 2, **mode))
    for done in (1, len(whole) // 2, len(whole) - 1) if not workers else (3,):
        left = loader(tmp_path, 2, num_workers=workers, **mode)
        assert_same(itertools.islice(left, done), whole[:done])
        state = json.loads(json.dumps(left.state_dict()))
        again = loader(tmp_path, 2, num_workers=workers, **mode)
        again.load_state_dict(state)
        assert_same(again, whole[done:])
        # The next epoch is a whole one.
        again.sampler.set_epoch(3)
        assert_same(again, loader(tmp_path, 3, **mode))


@every_mode
def test_after_the_last_batch_of_an_epoch_the_next_one_is_whole(tmp_path: Path, mode: dict[str, Any]) -> None:
    left = loader(tmp_path, 0, **mode)
    list(left)
    again = loader(tmp_path, 0, **mode)
    again.load_state_dict(left.state_dict())
    assert list(again) == []  # nothing of that epoch is left
    again.load_state_dict(left.state_dict())
    again.sampler.set_epoch(1)
    assert_same(again, loader(tmp_path, 1, **mode))


@every_mode
def test_a_run_that_is_stopped_twice_in_an_epoch_sees_everything_once(tmp_path: Path, mode: dict[str, Any]) -> None:
    expected, seen, state = ids(loader(tmp_path, 1, **mode)), [], None
    for steps in (2, 3, None):
        found = loader(tmp_path, 1, **mode)
        if state is not None:
            found.load_state_dict(state)
        seen += ids(itertools.islice(found, steps))
        state = found.state_dict()
    assert seen == expected


@every_mode
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_what_is_left_is_the_same_on_another_number_of_ranks(
    tmp_path: Path, mode: dict[str, Any], before: int, after: int
) -> None:
    # The batch of all ranks together stays as it is, as whoever changes the number of devices would have it.
    together = 4

    def loaders(world: int) -> list[Any]:
        size = {} if "max_tokens_per_batch" in mode else {"batch_size": together // world}
        return [loader(tmp_path, 1, rank=rank, world=world, **{**mode, **size}) for rank in range(world)]

    first, states = [], []
    for found in loaders(before):
        first.append(ids(itertools.islice(found, 2)))
        states.append(json.loads(json.dumps(found.state_dict())))
    assert all(state == states[0] for state in states)  # any rank may write the checkpoint
    rest = []
    for found in loaders(after):
        found.load_state_dict(states[0])
        rest.append(ids(found))
    seen = flat(flat(first))
    left = flat(flat(rest))
    assert len(seen + left) == len(set(seen + left))  # at most once an epoch
    # Nothing is passed over but what the ranks cannot share evenly at the end of the epoch.
    alone = {name: value for name, value in mode.items() if not (name == "max_tokens_per_batch" and "packing" in mode)}
    units = ids(loader(tmp_path, 1, **{**alone, "batch_size": 1}))
    skipped = [unit for unit in units if not set(unit) & set(seen + left)]
    assert len(skipped) == len(units) % after and sum(map(len, units)) == 96
    if "max_tokens_per_batch" not in mode:
        # In the order of one rank alone, step by step.
        steps = [frozenset(flat(units[i : i + together])) for i in range(0, len(units), together)]
        full = len(units) // together
        assert (taken_in_turns(first) + taken_in_turns(rest))[:full] == steps[:full] and full > 5


# --- from end to end -------------------------------------------------------------------------------------------------


def fit(
    folder: Path, name: str, steps: int, mode: dict[str, Any], *, workers: int = 0, resume: str | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    torch.manual_seed(0)
    module = SFTModule(
        architecture={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, total_steps=200),
    )
    data = InstructionDataModule(
        str(folder / "rows60.jsonl"), validation_fraction=0.0, tokenizer_size=0, max_length=100, num_workers=workers,
        noise=Noise(ops=[TokenReplace(0.2)]), **{"batch_size": 2, **mode},
    )  # fmt: skip
    checkpoint = Checkpoint()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, default_root_dir=str(folder / name), logger=False, callbacks=[checkpoint],
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    assert trainer.global_step == steps
    return module.model.state_dict(), str(checkpoint.last_model_path)


@pytest.mark.parametrize(("name", "workers"), [(name, 0) for name in MODES] + [("packing", 2)])
def test_a_run_that_is_cut_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, name: str, workers: int) -> None:
    mode = MODES[name]
    epoch = len(ids(loader(tmp_path, 0, count=60, **mode)))
    total = epoch + epoch // 2
    cuts = {"packing": (3, epoch, epoch + 2)}.get(name, (epoch + 2,)) if not workers else (3,)
    whole, _ = fit(tmp_path, "whole", total, mode)
    for cut in cuts:
        _, last = fit(tmp_path, f"cut{cut}", cut, mode, workers=workers)
        resumed, _ = fit(tmp_path, f"resumed{cut}", total, mode, workers=workers, resume=last)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    shorter, _ = fit(tmp_path, "shorter", total - 1, mode)
    assert not all(torch.equal(whole[key], shorter[key]) for key in whole)
