"""The parts of an optimizer step that are made cheap: the fused AdamW, one pass to divide and clip, the seed."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from worlds import adam, bare_trainer, constant, split_data, unit_sgd, weights

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.training.fused_adam import fuse
from deft_lightning.training.seeding import reseed


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(sides, generator=generator).to(dtype)) for sides in ((40, 30), (30,), ())]


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> list[Tensor]:
    """Make steps on random gradients and return the weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    fuse(optimizer)
    return optimizer


# --- the fused AdamW ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "amsgrad": True}, {"betas": (0.5, 0.6), "eps": 1e-3}])
def test_the_fused_step_is_that_of_torchs_loop_to_rounding(
    kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    one = fused(kind(parameters(dtype), lr=1e-2, **options))
    assert all(group["fused"] for group in one.param_groups)
    for a, b in zip(steps(one, 20), steps(kind(parameters(dtype), lr=1e-2, **options), 20), strict=True):
        torch.testing.assert_close(a, b, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_in_bfloat16_it_rounds_once_a_step_and_is_nearer_to_the_step_in_float64() -> None:
    low, exact = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = [nn.Parameter(weight.detach().double()) for weight in exact]
    truth = steps(torch.optim.AdamW(exact, lr=1e-2), 1)
    loop = steps(torch.optim.AdamW(parameters(torch.bfloat16), lr=1e-2), 1)
    kernel = steps(fused(torch.optim.AdamW(low, lr=1e-2)), 1)

    def error(of: list[Tensor]) -> float:
        return sum(float((a.double() - b).abs().sum()) for a, b in zip(of, truth, strict=True))

    assert 0 < error(kernel) <= error(loop)


class MyAdamW(torch.optim.AdamW):
    """Of a user, whose step may be another one."""


@pytest.mark.parametrize(
    ("make", "group"),
    [
        (partial(torch.optim.AdamW, fused=False), {"fused": False, "foreach": None}),
        (partial(torch.optim.AdamW, foreach=True), {"fused": None, "foreach": True}),
        (partial(torch.optim.AdamW, foreach=False), {"fused": None, "foreach": False}),
        (partial(torch.optim.AdamW, fused=True), {"fused": True, "foreach": None}),
        (partial(torch.optim.AdamW, differentiable=True), {"fused": None, "foreach": None}),
        (MyAdamW, {"fused": None, "foreach": None}),
        (torch.optim.NAdam, {"foreach": None}),
        (partial(torch.optim.SGD, lr=0.1), {"fused": None, "foreach": None}),
    ],
)
def test_what_was_asked_for_stays(make: Any, group: dict[str, Any]) -> None:
    optimizer = fused(make(parameters()))
    assert {name: optimizer.param_groups[0].get(name) for name in group} == group


def test_a_dtype_that_the_kernel_was_not_tested_with_keeps_the_loop() -> None:
    other = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = fused(torch.optim.AdamW([{"params": parameters()}, {"params": [other]}]))
    assert [group["fused"] for group in optimizer.param_groups] == [True, None]


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}])
def test_a_state_is_loaded_without_the_way_it_was_computed(options: dict[str, Any]) -> None:
    """That of an older version, of which no group is fused, too; and the other way round."""
    before, after = torch.optim.AdamW(parameters(), lr=1e-2, **options), fused(torch.optim.AdamW(parameters(), lr=1e-2))
    steps(before, 3)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["fused"] and not after.param_groups[0]["foreach"]
    for one, other in ((before, after), (after, fused(torch.optim.AdamW(parameters(), lr=1e-2, **options)))):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        with torch.no_grad():
            for target, weight in zip(other.param_groups[0]["params"], one.param_groups[0]["params"], strict=True):
                target.copy_(weight)
        for a, b in zip(steps(one, 3, seed=2), steps(other, 3, seed=2), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert {name: other.param_groups[0][name] for name in options} == options


def fit(root: Path, pretrained: str, source: str, *callbacks: Any, cls: Any = SFTModule, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("optimizer", "ckpt_path") if name in options}
    torch.manual_seed(0)
    module = cls(pretrained=pretrained, optimizer=own.pop("optimizer", adam), scheduler=constant)
    trainer = bare_trainer(root, *callbacks, **{"max_steps": 4, "max_epochs": -1, **options})
    trainer.fit(module, split_data(source, validation_fraction=0.0), **own)
    return module, trainer


def test_a_run_is_fused_and_clips_by_value_in_mixed_precision(pretrained: str, source: str, tmp_path: Path) -> None:
    """Lightning refuses to clip for an optimizer that says it unscales gradients itself."""
    options = {"precision": "bf16-mixed", "gradient_clip_algorithm": "value", "gradient_clip_val": 1e-3}
    _, trainer = fit(tmp_path, pretrained, source, **options)
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)


@pytest.mark.slow
def test_a_checkpoint_of_the_loop_goes_on_fused_and_one_of_a_fused_run_in_the_loop(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    loop = partial(adam, fused=False)
    whole = {made: weights(fit(tmp_path / str(made), pretrained, source, optimizer=made)[0]) for made in (adam, loop)}
    for first, second in ((loop, adam), (adam, loop), (adam, adam), (loop, loop)):
        folder, save = tmp_path / f"{first}-{second}", Checkpoint()
        fit(folder, pretrained, source, save, optimizer=first, max_steps=2)
        given = {"optimizer": second, "ckpt_path": save.last_model_path}
        module, trainer = fit(folder, pretrained, source, **given)
        assert trainer.optimizers[0].param_groups[0]["fused"] is (second is adam)
        apart = max(
            float((a - b).abs().max()) for a, b in zip(weights(module).values(), whole[second].values(), strict=True)
        )
        assert apart == 0 if first is second else 0 < apart < 1e-6


# --- dividing and clipping ------------------------------------------------------------------------------------------


class Norms(Callback):
    """Keeps the norm of the gradient that a hook sees before it is clipped."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(norm_of(pl_module))


class Looking(SFTModule):
    """Looks at gradients by the module's own hook."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        seen.append(norm_of(self))


class Clipping(SFTModule):
    """Clips in its own way."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(norm_of(self))


seen: list[float] = []


def norm_of(module: Any) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("who", ["callback", "lambda", "module", "clipping"])
def test_who_looks_at_gradients_before_they_are_clipped_sees_them_divided(
    who: str, accumulate: int, pretrained: str, source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"optimizer": unit_sgd, "max_steps": 1, "accumulate_grad_batches": accumulate}
    _, plain = fit(tmp_path / "plain", pretrained, source, **options)
    logged = plain.callback_metrics["train/grad_norm"].item()
    seen.clear()
    norms, lambdas = (
        Norms(),
        LambdaCallback(on_before_optimizer_step=lambda _, module, __: seen.append(norm_of(module))),
    )
    given = {"callback": [norms], "lambda": [lambdas]}.get(who, [])
    cls = {"module": Looking, "clipping": Clipping}.get(who, SFTModule)
    _, trainer = fit(tmp_path / "looking", pretrained, source, *given, cls=cls, gradient_clip_val=1e-3, **options)
    assert (norms.seen or seen) == [pytest.approx(logged, rel=1e-5)]
    assert logged > 0.1
    if who != "clipping":
        assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_one_pass_divides_and_clips_as_two_did(
    limit: float | None, pretrained: str, source: str, tmp_path: Path
) -> None:
    """The first seen by a hook, so that it is divided before: then the norm is taken, and the rest multiplied."""
    options: dict[str, Any] = {
        "optimizer": unit_sgd,
        "gradient_clip_val": limit,
        "accumulate_grad_batches": 2,
        "max_steps": 1,
    }
    two, one = (
        fit(tmp_path / "two", pretrained, source, Norms(), **options),
        fit(tmp_path / "one", pretrained, source, **options),
    )
    for a, b in zip(weights(two[0]).values(), weights(one[0]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    norms = [float(trainer.callback_metrics["train/grad_norm"]) for _, trainer in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# --- the seed -------------------------------------------------------------------------------------------------------


def test_the_seed_of_a_micro_batch_is_that_of_torch_manual_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: given.append(seed) or real(seed))
    reseed(3, 14, 1, torch.device("meta"))  # no CPU: what torch does for every device it has
    (seed,) = given
    expected = torch.rand(5)
    torch.rand(2)
    reseed(3, 14, 1, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
    assert len(given) == 1, "nothing is queued for CUDA"
    torch.default_generator.manual_seed(seed)
    assert torch.equal(torch.rand(5), expected)


# --- where labels are, and what is known of noise -------------------------------------------------------------------


class Facts(Callback):
    """Keeps what a step says of noise."""

    def __init__(self) -> None:
        self.known: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.known.append(outputs["noise_code"] is not None)
        if self.known[-1]:
            assert outputs["noise_code"].shape == outputs["clean_labels"].shape == outputs["stats"].log_prob.shape


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_known_of_noise_is_looked_up_on_logged_steps(
    accumulate: int, pretrained: str, source: str, tmp_path: Path
) -> None:
    facts, options = Facts(), {"log_every_n_steps": 3, "max_steps": 6, "accumulate_grad_batches": accumulate}
    fit(tmp_path, pretrained, source, facts, **options)
    logged = [step in (3, 6) for step in range(1, 7)]
    assert facts.known == [known for known in logged for _ in range(accumulate)]


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_places_of_labels_are_those_of_the_batch_or_found(head: Any, pretrained: str, source: str) -> None:
    module = SFTModule("Tsallis", pretrained=pretrained, head=head)
    module.configure_model()
    loaded = split_data(source, validation_fraction=0.0, tokenizer=pretrained)
    loaded.setup("fit")
    batch = next(iter(loaded.train_dataloader()))
    without = {name: value for name, value in batch.items() if name != "supervised_at"}
    for one, other in zip(module.loss_and_stats(batch)[1], module.loss_and_stats(without)[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    for stale in (batch["supervised_at"] - 1, batch["supervised_at"][1:]):
        with pytest.raises(UserError, match="supervised_at of the batch is not where its labels are"):
            module.loss_and_stats({**batch, "supervised_at": stale})


# --- gradients of the last step -------------------------------------------------------------------------------------


class Seen(Callback):
    """Notes whether there are gradients: before a batch, while the model runs, in validation."""

    def __init__(self) -> None:
        self.before: list[bool] = []
        self.running: list[bool] = []
        self.validating: list[bool] = []

    @staticmethod
    def there(module: Any) -> bool:
        return any(weight.grad is not None for weight in module.parameters())

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def look(model: Any, *_: object) -> None:
            (self.running if model.training else self.validating).append(self.there(model))

        pl_module.model.register_forward_pre_hook(look)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: object, batch_idx: int) -> None:
        self.before.append(self.there(pl_module))


def test_gradients_of_a_step_are_freed_before_the_next_forward_pass(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    seen = Seen()
    trainer = bare_trainer(
        tmp_path, seen, max_steps=3, accumulate_grad_batches=2, val_check_interval=2, num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(SFTModule(pretrained=pretrained), split_data(source, tokenizer=pretrained))
    # The model is run once more, before the first step, to check its head.
    assert seen.running[-6:] == [False, True] * 3, "of an earlier micro-batch they stay"
    assert seen.before[:6] == [False, True, False, True, False, True], "a validation has freed them"
    assert seen.validating and not any(seen.validating)


def test_whoever_looks_at_gradients_between_two_steps_finds_them(pretrained: str, source: str, tmp_path: Path) -> None:
    seen, module = Seen(), SFTModule(pretrained=pretrained)
    trainer = bare_trainer(tmp_path, seen, max_steps=3, limit_val_batches=0)
    trainer.fit(module, split_data(source, tokenizer=pretrained))
    assert seen.before == [False, True, True] and not any(seen.running)
    assert seen.there(module), "those of the last step stay"
