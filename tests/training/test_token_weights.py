"""Weights of tokens through real runs: the step is that of ``sum w l / sum w``, in float64, whatever carries it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_worker import Scales
from test_module import initial
from torch import Tensor
from torch.utils.data import DataLoader
from worlds import bare_trainer, constant, largest_difference, read_events, still, unit_sgd, weights

from deft_lightning import SFTModule
from deft_lightning.callbacks import GateMonitor, NoiseMonitor
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.objectives import (
    DEFT,
    DFT,
    EAFT,
    NLL,
    Cayley,
    Floored,
    Focal,
    Likelihood,
    Objective,
    Rescaled,
    Truncated,
    Tsallis,
)

Batch = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
heads = pytest.mark.parametrize("head", ["fused", "dense"])


# --- examples, runs -------------------------------------------------------------------------------------------------


def example(seed: int, learnt: int, weights: Sequence[float] | None = None) -> Prepared:
    """Random tokens of which the last ``learnt`` are supervised; each has a weight drawn from ``weights``."""
    rng, length = np.random.default_rng(seed), 6 + seed % 5 + learnt
    ids = rng.integers(6, 262, length)
    labels = np.where(np.arange(length) >= length - learnt, ids, -100)
    weight = None if weights is None else np.where(labels == -100, 0, rng.choice(weights, length)).astype(np.float32)
    return Prepared(f"p{seed}", ids, labels, np.zeros(length, dtype=np.int64), weight=weight)


def uneven_weighted(count: int, weights: Sequence[float] | None = (0.1, 0.5, 1.0, 3.0)) -> list[Prepared]:
    """From 1 to 9 supervised tokens; the third example has no weights, like a row of a file that names none."""
    found = [example(i, 1 + (3 * i * i) % 9, weights) for i in range(count)]
    return [replace(one, weight=None) if i == 2 else one for i, one in enumerate(found)]


def loader(examples: Sequence[Any], size: int, **options: Any) -> DataLoader[Any]:
    options = {"weighted": True, **options}
    return DataLoader(list(examples), batch_size=size, collate_fn=TrainCollator(0, **options))  # type: ignore[arg-type]


def as_they_are(batches: Sequence[Batch]) -> DataLoader[Any]:
    """Batches of one's own."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def seeded_module(pretrained: str, **options: Any) -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(**{"pretrained": pretrained, "optimizer": unit_sgd, "scheduler": constant, **options})


def trained_module(root: Path, pretrained: str, batches: DataLoader[Any], model: dict[str, Any], **options: Any) -> Any:
    """The module after a fit."""
    module = seeded_module(pretrained, **model)
    bare_trainer(root, **options).fit(module, batches)
    return module


def difference(one: Any, other: Any) -> float:
    """Largest difference of any weight of two modules."""
    return largest_difference(weights(one.model), weights(other.model))


# --- the oracle: dense logits in float64, formulas written out ------------------------------------------------------


def log_p_of(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def power(logits: Tensor, targets: Tensor, alpha: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``(1 - p^alpha) / alpha``, alpha of the whole prediction and p."""
    p = log_p_of(logits, targets).exp()
    a = alpha(torch.softmax(logits, dim=-1).detach(), p.detach())
    return (1 - p**a) / a


def cayley_with_floor(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    def alpha(pi: Tensor, p: Tensor) -> Tensor:
        lift = 0.5 * (weight * p).sum() / weight.sum()
        return (lift + (1 - lift) * p / (2 - p)).clamp(1e-3, 1)

    return power(logits, targets, alpha)


def weighted_eaft(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    top = torch.softmax(logits, dim=-1).detach().topk(5, dim=-1).values
    top = top / top.sum(-1, keepdim=True)
    return (top * top.log()).sum(-1) / math.log(5) * log_p_of(logits, targets)


def kept_below(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """A mean over all tokens, by weight, is the mean over those that are kept."""
    p = log_p_of(logits, targets).exp()
    kept = p.detach() <= 0.01
    assert 0 < kept.sum() < kept.numel()
    return (1 - p) * kept * weight.sum() / (weight * kept).sum()


def floored(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """The value of ``Floored(Likelihood)`` is 1 - p and, where p is below the floor, what is missing to NLL."""
    log_p = log_p_of(logits, targets)
    return 1 - log_p.exp() - (0.02 - log_p.detach().exp()).clamp_min(0) * log_p


FAMILIES: dict[Objective, Loss] = {
    NLL(): lambda z, y, w: -log_p_of(z, y),
    Likelihood(): lambda z, y, w: 1 - log_p_of(z, y).exp(),
    Tsallis(q=0.3): lambda z, y, w: power(z, y, lambda pi, p: torch.full_like(p, 0.7)),
    Cayley(): lambda z, y, w: power(z, y, lambda pi, p: p / (2 - p)),
    Cayley(floor=0.5): cayley_with_floor,
    DEFT(): lambda z, y, w: power(z, y, lambda pi, p: pi.square().sum(-1)),
    DFT(): lambda z, y, w: -log_p_of(z, y).detach().exp() * log_p_of(z, y),
    EAFT(k=5): weighted_eaft,
    Focal(): lambda z, y, w: -((1 - log_p_of(z, y).exp()) ** 2) * log_p_of(z, y),
    Truncated(0.01): lambda z, y, w: -log_p_of(z, y) * (log_p_of(z, y).exp().detach() >= 0.01),
    Truncated(0.01, "below", Likelihood(), "kept"): kept_below,
    Floored(Likelihood(), 0.02): floored,
}
families = pytest.mark.parametrize("objective", FAMILIES, ids=repr)
LOOK_AT_THE_BATCH = (Cayley(floor=0.5), Truncated(0.01, "below", Likelihood(), "kept"))


def learnt(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and weights of the supervised tokens, through the model's own forward with its mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    keep = targets != -100
    return logits[keep], targets[keep], batch["token_weight"][:, 1:].double()[keep]


def wanted_step(pretrained: str, examples: Sequence[Prepared], loss: Loss) -> tuple[dict[str, Tensor], float]:
    """Weights after one step of rate 1 along ``sum w l / sum w`` over all examples, and that mean."""
    model = initial(pretrained)
    (batch,) = loader(examples, len(examples))
    logits, targets, weight = learnt(model, batch)
    mean = (weight * loss(logits, targets, weight)).sum() / weight.sum()
    mean.backward()
    return {n: (p - p.grad).detach() for n, p in model.named_parameters()}, mean.item()


def assert_stepped_to(module: Any, wanted: dict[str, Tensor], pretrained: str, tolerance: float = 2e-5) -> None:
    start, end = dict(initial(pretrained).named_parameters()), weights(module.model)
    scale = max(float((wanted[name] - start[name]).detach().abs().max()) for name in wanted)
    assert scale > 1e-4, "a gradient of nothing shows nothing"
    worst = max(float((end[name] - wanted[name]).abs().max()) for name in wanted)
    assert worst < tolerance * scale + 1.2e-7, (worst, scale)  # weights near 1 are kept to 6e-8


# --- one step -------------------------------------------------------------------------------------------------------


@families
@heads
def test_a_step_is_that_of_the_weighted_mean_for_every_family(
    objective: Objective, head: str, pretrained: str, tmp_path: Path
) -> None:
    examples = uneven_weighted(8)
    wanted, mean = wanted_step(pretrained, examples, FAMILIES[objective])
    module = trained_module(tmp_path, pretrained, loader(examples, 8), {"objective": objective, "head": head})
    assert_stepped_to(module, wanted, pretrained)
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(mean, rel=1e-5)
    plain, _ = wanted_step(pretrained, [replace(one, weight=None) for one in examples], FAMILIES[objective])
    start = dict(initial(pretrained).named_parameters())
    scale = max(float((wanted[name] - start[name]).detach().abs().max()) for name in wanted)
    assert max(float((plain[name] - wanted[name]).abs().max()) for name in plain) > 0.05 * scale, "weights do something"


@heads
@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (3, 3), (1, 8)])
def test_micro_batches_of_unequal_weight_are_one_step(
    size: int, accumulate: int, head: str, pretrained: str, tmp_path: Path
) -> None:
    examples = uneven_weighted(8)
    wanted, mean = wanted_step(pretrained, examples, FAMILIES[DEFT()])
    module = trained_module(
        tmp_path, pretrained, loader(examples, size), {"head": head}, accumulate_grad_batches=accumulate
    )
    assert module.trainer.global_step == 1
    assert_stepped_to(module, wanted, pretrained)
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("objective", [NLL(), DEFT(), *LOOK_AT_THE_BATCH], ids=repr)
@heads
def test_a_row_of_weight_two_is_the_row_twice(objective: Objective, head: str, pretrained: str, tmp_path: Path) -> None:
    plain = uneven_weighted(6, None)
    counts = [2, 1, 3, 1, 2, 1]
    weighted = [
        replace(one, weight=np.where(one.labels == -100, 0, count).astype(np.float32))
        for one, count in zip(plain, counts, strict=True)
    ]
    repeated = [one for one, count in zip(plain, counts, strict=True) for _ in range(count)]
    options = {"objective": objective, "head": head}
    one = trained_module(tmp_path, pretrained, loader(weighted, 6), options)
    other = trained_module(tmp_path, pretrained, loader(repeated, 10, weighted=False), options)
    assert difference(one, other) < 2e-6
    assert difference(one, trained_module(tmp_path, pretrained, loader(plain, 6, weighted=False), options)) > 1e-3


@pytest.mark.parametrize(
    ("weight", "tolerance"), [(2.0**-20, 0.0), (4.0, 0.0), (0.3, 1e-5), (1e-6, 1e-5), (777.0, 1e-5)]
)
@heads
def test_one_weight_for_all_is_no_weight(
    weight: float, tolerance: float, head: str, pretrained: str, tmp_path: Path
) -> None:
    """By powers of two to the bit: nothing is compared with 1, and nothing divided by less than it should be."""
    plain = uneven_weighted(8, None)
    weighted = [replace(one, weight=np.where(one.labels == -100, 0, weight).astype(np.float32)) for one in plain]
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    one = trained_module(tmp_path, pretrained, loader(weighted, 4), {"head": head}, **options)
    other = trained_module(tmp_path, pretrained, loader(plain, 4, weighted=False), {"head": head}, **options)
    assert difference(one, other) <= tolerance
    loss = one.trainer.callback_metrics["train/loss"].item()
    assert loss == pytest.approx(other.trainer.callback_metrics["train/loss"].item(), rel=1e-6)
    assert one.trainer.callback_metrics["train/weight"].item() == pytest.approx(weight, rel=1e-6)


@heads
def test_packed_rows_weigh_what_padded_ones_do(head: str, pretrained: str, tmp_path: Path) -> None:
    examples = uneven_weighted(8)
    wanted, _ = wanted_step(pretrained, examples, FAMILIES[DEFT()])
    for options in ({}, {"flatten": True}):
        rows = loader([examples[:3], examples[3:5], examples[5:]], 3, packed=True, **options)
        assert_stepped_to(trained_module(tmp_path, pretrained, rows, {"head": head}), wanted, pretrained)


@heads
@pytest.mark.parametrize("objective", [DEFT(), *LOOK_AT_THE_BATCH, Rescaled()], ids=repr)
def test_a_step_whose_weights_are_all_zero_changes_nothing(
    objective: Objective, head: str, pretrained: str, tmp_path: Path
) -> None:
    """Batches of one's own may hold such; the reader of rows masks what weighs nothing."""
    batches = list(loader(uneven_weighted(4), 2))
    for batch in batches:
        batch["token_weight"] = torch.zeros_like(batch["token_weight"])
    module = seeded_module(pretrained, objective=objective, head=head)
    bare_trainer(tmp_path, accumulate_grad_batches=2).fit(module, as_they_are(batches))
    assert module.trainer.global_step == 1
    for name, value in initial(pretrained).named_parameters():
        assert torch.equal(weights(module.model)[name].double(), value), name
    logged = module.trainer.callback_metrics
    assert logged["train/loss"] == logged["train/weight"] == logged["train/grad_norm"] == 0
    assert logged["train/nll"] > 0


def test_a_micro_batch_without_weights_counts_its_tokens(pretrained: str, tmp_path: Path) -> None:
    examples = uneven_weighted(6)
    examples[3:] = [replace(one, weight=None) for one in examples[3:]]
    wanted, _ = wanted_step(pretrained, examples, FAMILIES[DEFT()])
    one, other = *loader(examples[:3], 3), *loader(examples[3:], 3, weighted=False)
    for batches in ([one, other], [other, one]):
        module = seeded_module(pretrained)
        bare_trainer(tmp_path, accumulate_grad_batches=2).fit(module, as_they_are(batches))
        assert_stepped_to(module, wanted, pretrained)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, None])
def test_weights_that_are_none_are_refused_in_the_first_batch(
    wrong: float | None, pretrained: str, tmp_path: Path
) -> None:
    (batch,) = loader(uneven_weighted(2), 2)
    batch["token_weight"] = batch["token_weight"][:, 1:] if wrong is None else batch["token_weight"] * wrong
    with pytest.raises(UserError, match="token_weight of the batch") as refused:
        bare_trainer(tmp_path).fit(seeded_module(pretrained), as_they_are([batch]))
    assert "\n" not in str(refused.value)


def test_lora_and_gradient_checkpointing_and_bfloat16_know_weights(pretrained: str, tmp_path: Path) -> None:
    """A weight of 2 is the row twice there too."""
    plain = uneven_weighted(6, None)
    weighted = [
        replace(one, weight=np.where(one.labels == -100, 0, 2 - i % 2).astype(np.float32))
        for i, one in enumerate(plain)
    ]
    repeated = [one for i, one in enumerate(plain) for _ in range(2 - i % 2)]
    runs: list[tuple[dict[str, Any], dict[str, Any], float]] = [
        ({"lora": LoRA(r=2)}, {}, 2e-6), ({"gradient_checkpointing": True}, {}, 2e-6),
        ({}, {"precision": "bf16-mixed"}, 5e-3), ({"dtype": "bfloat16"}, {"precision": "bf16-true"}, 2e-2),
    ]  # fmt: skip
    for model, options, tolerance in runs:
        one = trained_module(tmp_path, pretrained, loader(weighted, 6), model, **options)
        other = trained_module(tmp_path, pretrained, loader(repeated, 9, weighted=False), model, **options)
        assert difference(one, other) < tolerance, model


# --- objectives that follow the run ---------------------------------------------------------------------------------


def test_the_mean_gate_that_a_loss_is_rescaled_by_is_the_weighted_one(pretrained: str, tmp_path: Path) -> None:
    examples, scales = uneven_weighted(8), Scales()
    module = seeded_module(pretrained, objective=Rescaled(Tsallis(q=0.5), decay=0.5), optimizer=still)
    bare_trainer(tmp_path, scales, accumulate_grad_batches=2, max_epochs=2).fit(module, loader(examples, 4))
    with torch.no_grad():
        (batch,) = loader(examples, 8)
        logits, targets, weight = learnt(initial(pretrained), batch)
        gate = log_p_of(logits, targets).exp().sqrt()
        mean, plain = float((weight * gate).sum() / weight.sum()), float(gate.mean())
    assert scales.seen == pytest.approx([1, 1, 1 / mean, 1 / mean], rel=1e-5)
    assert abs(mean - plain) > 0.01 * mean, "the plain mean is another"


# --- what is logged -------------------------------------------------------------------------------------------------


def scalars_by_tag(trainer: Any) -> dict[str, list[float]]:
    events = read_events(trainer.log_dir)
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def noisy_examples(one: Prepared) -> Prepared:
    """Every second supervised token is known to be noisy."""
    return replace(one, noise_code=np.where(one.labels != -100, np.arange(len(one.labels)) % 2, 0))


def test_losses_and_shares_of_the_gradient_are_by_weight_and_the_rest_is_plain(pretrained: str, tmp_path: Path) -> None:
    examples = [noisy_examples(one) for one in uneven_weighted(8)]
    module = seeded_module(pretrained, optimizer=still)
    trainer = bare_trainer(tmp_path, GateMonitor(), NoiseMonitor(), accumulate_grad_batches=2, logger=None)
    held_out = uneven_weighted(5)
    trainer.fit(module, loader(examples, 4), loader(held_out, 2))
    found = {tag: values[-1] for tag, values in scalars_by_tag(trainer).items()}
    model = initial(pretrained)
    with torch.no_grad():
        (batch,), (other,) = loader(examples, 8), loader(held_out, 5)
        logits, targets, weight = learnt(model, batch)
        log_p, pi = log_p_of(logits, targets), torch.softmax(logits, -1)
        p, gate = log_p.exp(), log_p_of(logits, targets).exp() ** pi.square().sum(-1)
        loss, mass = (1 - gate) / pi.square().sum(-1), gate * (1 - p) * weight
        bad = batch["noise_code"][:, 1:][batch["labels"][:, 1:] != -100] > 0
        wanted = {
            "train/loss": (weight * loss).sum() / weight.sum(), "train/nll": -log_p.mean(),
            "train/token_accuracy": (logits.argmax(-1) == targets).double().mean(), "train/weight": weight.mean(),
            "train/tokens": torch.tensor(float(len(p))), "gate/mean": gate.mean(), "prob/mean": p.mean(),
            "gate/ess": gate.sum() ** 2 / (len(p) * gate.square().sum()),
            "gate/q50": gate.sort().values[math.ceil(len(p) / 2) - 1],
            "noise/gradient_share": mass[bad].sum() / mass.sum(), "gate/noisy": gate[bad].mean(),
            "gradient/p0_10": mass[p < 0.1].sum() / mass.sum(), "nll/clean": -log_p[~bad].mean(),
        }  # fmt: skip
        z, y, w = learnt(model, other)
        wanted |= {"val/loss": (w * FAMILIES[DEFT()](z, y, w)).sum() / w.sum(), "val/nll": -log_p_of(z, y).mean()}
    assert {tag: found[tag] for tag in wanted} == pytest.approx({t: v.item() for t, v in wanted.items()}, rel=2e-4)
    plain = gate * (1 - p)
    assert abs(found["noise/gradient_share"] - (plain[bad].sum() / plain.sum()).item()) > 0.01
    assert "val/weight" not in found


def test_a_mean_weight_is_logged_where_there_are_weights_alone(pretrained: str, tmp_path: Path) -> None:
    module = trained_module(tmp_path, pretrained, loader(uneven_weighted(4, None), 4, weighted=False), {})
    assert "train/loss" in module.trainer.callback_metrics and "train/weight" not in module.trainer.callback_metrics
