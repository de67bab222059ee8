"""SFTModule under a real Trainer: what one optimizer step does, against float64 gradients of the whole window."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from worlds import UNEVEN, bare_trainer, constant, random_example, still, unit_sgd, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.collate import TrainCollator
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.functional import TokenStats
from deft_lightning.models import LoRA
from deft_lightning.objectives import DEFT, EAFT, NLL, Cayley, Likelihood, Objective
from deft_lightning.training.optim import CosineWithWarmup, adamw

Batch = dict[str, Any]
ROWS = UNEVEN
HELD_OUT = [{"question": "Say something long.", "answer": "something long"}, {"question": "2+2", "answer": "4"}]


# --- what the tests stand on ----------------------------------------------------------------------------------------


def data(source: str, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(source, **{"validation_fraction": 0.0, "batch_size": 8, **options})


def make_module(pretrained: str, **options: Any) -> SFTModule:
    return SFTModule(**{"pretrained": pretrained, "optimizer": unit_sgd, "scheduler": constant, **options})


def initial(pretrained: str, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype).eval()


def batches_of(pretrained: str, source: str, batch_size: int) -> list[Batch]:
    """The batches of epoch 0."""
    loaded = data(source, batch_size=batch_size, tokenizer=pretrained)
    loaded.setup("fit")
    return list(loaded.train_dataloader())


def deft(logits: Tensor, targets: Tensor) -> Tensor:
    """DEFT per token by its formula: (1 - p^C) / C with C = sum pi^2 held fixed."""
    pi = torch.softmax(logits, dim=-1)
    collision = pi.detach().square().sum(-1)
    p = pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (1 - p**collision) / collision


def supervised(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets of the supervised tokens, through the model's own forward with its attention mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return logits[targets != -100], targets[targets != -100]


def window_gradient(
    model: Any, window: Sequence[Batch], loss: Callable[[Tensor, Tensor], Tensor] = deft
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all supervised tokens of all micro-batches."""
    parts = [loss(*supervised(model, batch)) for batch in window]
    total = sum(part.sum() for part in parts) / sum(part.numel() for part in parts)
    model.zero_grad()
    assert isinstance(total, Tensor)
    total.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_step(before: Any, after: Any, gradient: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """SGD with rate 1: the weights moved by the negative gradient."""
    start, end = dict(before.named_parameters()), dict(after.named_parameters())
    scale = max(float(g.abs().max()) for g in gradient.values())
    assert scale > 1e-3, "a gradient of nothing shows nothing"
    worst = max(float((start[name] - end[name] - g).detach().abs().max()) for name, g in gradient.items())
    assert worst / scale < tolerance, worst / scale


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_nll_equals_transformers_own_loss(head: str, pretrained: str, source: str) -> None:
    (batch,) = batches_of(pretrained, source, 8)
    module = make_module(pretrained, objective=NLL(), head=head)
    module.configure_model()
    own = module.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    total, stats, keep = module.loss_and_stats(batch)
    assert (total / keep.sum()).item() == pytest.approx(own.item(), rel=1e-6)
    assert -stats.log_prob.mean().item() == pytest.approx(own.item(), rel=1e-6)
    with torch.no_grad():
        assert module.loss_and_stats(batch)[0].item() == pytest.approx(total.item(), rel=1e-6)


def test_fused_and_dense_heads_give_the_same_statistics(pretrained: str, source: str) -> None:
    (batch,) = batches_of(pretrained, source, 8)
    found = {}
    for head in ("fused", "dense"):
        module = make_module(pretrained, objective=EAFT(k=5), head=head)
        module.configure_model()
        found[head] = module.loss_and_stats(batch)[1]
    for name, fused, dense in zip(TokenStats._fields, found["fused"], found["dense"], strict=True):
        torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-6, msg=name)


# --- one optimizer step ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (3, 3), (1, 8)])
def test_a_step_follows_the_mean_over_all_supervised_tokens_of_its_window(
    size: int, accumulate: int, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    before = initial(pretrained)
    gradient = window_gradient(before, batches_of(pretrained, source, 8))
    module = make_module(pretrained, head=head)
    bare_trainer(tmp_path, accumulate_grad_batches=accumulate).fit(module, data(source, batch_size=size))
    assert module.trainer.global_step == 1
    assert_step(before, module.model, gradient)


def test_a_mean_of_means_would_be_something_else(pretrained: str, source: str) -> None:
    """Shows that the test above can fail."""
    model = initial(pretrained)
    exact = window_gradient(model, batches_of(pretrained, source, 8))
    parts = [window_gradient(model, [batch]) for batch in batches_of(pretrained, source, 2)]
    naive = {name: sum(part[name] for part in parts) / len(parts) for name in exact}
    scale = max(float(g.abs().max()) for g in exact.values())
    assert max(float((naive[name] - g).abs().max()) for name, g in exact.items()) / scale > 0.05


def test_a_short_last_window_weighs_its_own_tokens(pretrained: str, tmp_path: Path) -> None:
    """Seven examples in pairs, accumulated twice: windows of four and three examples."""
    source = write_rows(tmp_path / "seven.jsonl", ROWS[:7])
    batches = batches_of(pretrained, source, 2)
    assert [len(batch["example_id"]) for batch in batches] == [2, 2, 2, 1]
    expected = initial(pretrained)
    for window in (batches[:2], batches[2:]):
        gradient = window_gradient(expected, window)
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= gradient[name]
    module = make_module(pretrained)
    bare_trainer(tmp_path, accumulate_grad_batches=2).fit(module, data(source, batch_size=2))
    assert module.trainer.global_step == 2
    starts = dict(initial(pretrained).named_parameters())
    ends = dict(module.model.named_parameters())
    for name, value in expected.named_parameters():
        moved = (value - starts[name]).abs().max()
        # The second gradient is that of weights rounded to float32.
        assert (ends[name] - value).abs().max() / moved < 1e-4, name


def loader(examples: Sequence[Prepared], size: int) -> DataLoader[Any]:
    return DataLoader(list(examples), batch_size=size, collate_fn=TrainCollator(0))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_a_fully_masked_micro_batch_adds_nothing_and_is_counted(
    place: int, head: str, pretrained: str, tmp_path: Path
) -> None:
    examples = [random_example(1, 9, 5), random_example(2, 6, 1)]
    examples.insert(place, random_example(3, 7, 0))
    module = make_module(pretrained, head=head)
    bare_trainer(tmp_path, accumulate_grad_batches=3).fit(module, loader(examples, 1))
    before = initial(pretrained)
    gradient = window_gradient(before, list(loader([e for e in examples if (e.labels != -100).any()], 2)))
    assert module.trainer.global_step == 1 and module.tokens_seen == 6
    assert_step(before, module.model, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DEFT(), Cayley(floor=0.5), EAFT(k=5)], ids=repr)
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_a_window_without_any_supervised_token_leaves_the_weights_alone(
    objective: Objective, head: str, pretrained: str, tmp_path: Path
) -> None:
    module = make_module(pretrained, objective=objective, head=head)
    bare_trainer(tmp_path).fit(module, loader([random_example(1, 7, 0), random_example(2, 4, 0)], 2))
    assert module.trainer.global_step == 1
    for name, value in initial(pretrained, torch.float32).named_parameters():
        assert torch.equal(dict(module.model.named_parameters())[name], value), name
    logged = module.trainer.callback_metrics
    assert logged["train/loss"] == logged["train/nll"] == logged["train/grad_norm"] == 0


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_clipping_bounds_the_norm_of_the_mean_gradient_and_the_norm_before_it_is_logged(
    clip: float, pretrained: str, source: str, tmp_path: Path
) -> None:
    before = initial(pretrained)
    gradient = window_gradient(before, batches_of(pretrained, source, 8))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    assert 0.05 < norm < 1e6
    module = make_module(pretrained)
    trainer = bare_trainer(tmp_path, accumulate_grad_batches=4, gradient_clip_val=clip)
    trainer.fit(module, data(source, batch_size=2))
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    factor = min(1.0, clip / norm)
    # torch divides by the norm + 1e-6.
    assert_step(before, module.model, {name: g * factor for name, g in gradient.items()}, 5e-5)


@pytest.mark.parametrize(("algorithm", "clip"), [("value", 1e-3), (None, None)])
def test_clipping_by_value_or_not_at_all_still_logs_the_norm(
    algorithm: str | None, clip: float | None, pretrained: str, source: str, tmp_path: Path
) -> None:
    before = initial(pretrained)
    gradient = window_gradient(before, batches_of(pretrained, source, 8))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    module = make_module(pretrained)
    trainer = bare_trainer(tmp_path, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    trainer.fit(module, data(source))
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm, rel=1e-5)
    start = dict(before.named_parameters())
    for name, parameter in module.model.named_parameters():
        expected = gradient[name].clamp(-clip, clip) if clip else gradient[name]
        torch.testing.assert_close(start[name] - parameter.double(), expected, rtol=1e-4, atol=1e-6, msg=name)


# --- objectives -----------------------------------------------------------------------------------------------------


def cayley(logits: Tensor, targets: Tensor, floor: float = 0.5) -> Tensor:
    p = torch.softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    fixed = p.detach()
    lift = floor * fixed.mean()
    alpha = (lift + (1 - lift) * fixed / (2 - fixed)).clamp(1e-3, 1)
    return (1 - p**alpha) / alpha


def eaft(logits: Tensor, targets: Tensor, k: int = 5) -> Tensor:
    log_pi = torch.log_softmax(logits, dim=-1)
    top = log_pi.detach().exp().topk(k, dim=-1).values
    top = top / top.sum(-1, keepdim=True)
    gate = -(top * top.log()).sum(-1) / math.log(k)
    return -gate * log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, repr=False)
class Squared(Objective):
    """An objective of a user's own."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.log_prob.square()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize(
    ("objective", "loss"), [(Cayley(floor=0.5), cayley), (EAFT(k=5), eaft)], ids=["cayley", "eaft"]
)
def test_other_objectives_train_by_their_formula(
    objective: Objective, loss: Any, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    before = initial(pretrained)
    gradient = window_gradient(before, batches_of(pretrained, source, 8), loss)
    module = make_module(pretrained, objective=objective, head=head)
    bare_trainer(tmp_path).fit(module, data(source))
    assert_step(before, module.model, gradient)


def test_an_objective_of_the_users_own_trains(pretrained: str, source: str, tmp_path: Path) -> None:
    def by_hand(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).square()

    before = initial(pretrained)
    gradient = window_gradient(before, batches_of(pretrained, source, 8), by_hand)
    module = make_module(pretrained, objective=Squared())
    bare_trainer(tmp_path, accumulate_grad_batches=4).fit(module, data(source, batch_size=2))
    assert_step(before, module.model, gradient)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize(
    ("objective", "loss"),
    [(NLL(), nll), (DEFT(), deft), (Cayley(floor=0.5), cayley), (EAFT(k=5), eaft)],
    ids=["nll", "deft", "cayley", "eaft"],
)
def test_validation_nll_is_plain_and_its_perplexity_the_exponential(
    objective: Objective, loss: Any, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "val.jsonl", [*HELD_OUT, *ROWS[:3]])
    module = make_module(pretrained, objective=objective, head=head)
    loaded = data(source, validation_source=held_out, eval_batch_size=2)
    (found,) = bare_trainer(tmp_path).validate(module, loaded, verbose=False)
    model = initial(pretrained)
    losses, plain, right = [], [], []
    with torch.no_grad():
        for batch in loaded.val_dataloader():
            logits, targets = supervised(model, batch)
            losses.append(loss(logits, targets))
            plain.append(nll(logits, targets))
            right.append(logits.argmax(-1) == targets)
    mean = torch.cat(plain).mean().item()
    assert found["val/nll"] == pytest.approx(mean, rel=1e-5)
    assert found["val/ppl"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["val/loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["val/token_accuracy"] == pytest.approx(torch.cat(right).double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("sanity", [0, 2])
def test_each_validation_starts_afresh(sanity: int, pretrained: str, source: str, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "val.jsonl", HELD_OUT)
    module, loaded = make_module(pretrained), data(source, validation_source=held_out)
    trainer = bare_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=sanity)
    trainer.fit(module, loaded)
    model = copy.deepcopy(module.model).double().eval()
    with torch.no_grad():
        plain = torch.cat([nll(*supervised(model, batch)) for batch in loaded.val_dataloader()])
    assert trainer.callback_metrics["val/nll"].item() == pytest.approx(plain.mean().item(), rel=1e-4)


# --- modes, precision, adapters -------------------------------------------------------------------------------------


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "attention_dropout")


class Recorder(Callback):
    """Keeps what a training step says and the mode it ran in."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []
        self.training: list[bool] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append(all(module.training for module in pl_module.model.modules()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_probs.append(outputs["stats"].log_prob.clone())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.5, 0.0])
@pytest.mark.parametrize("loaded", [True, False])
def test_dropout_is_active_in_training_before_and_after_a_validation(
    dropout: float, loaded: bool, pretrained: str, source: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    config = LlamaConfig.from_pretrained(pretrained, attention_dropout=dropout)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(folder)
    options = {name: getattr(config, name) for name in SIZES}
    model: dict[str, Any] = {"pretrained": str(folder)} if loaded else {"architecture": options}
    held_out = write_rows(tmp_path / "val.jsonl", HELD_OUT)
    recorder = Recorder()
    same = write_rows(tmp_path / "same.jsonl", [ROWS[1]])
    module = SFTModule(optimizer=still, scheduler=constant, **model)
    bare_trainer(tmp_path, recorder, max_epochs=3, num_sanity_val_steps=1).fit(
        module, data(same, batch_size=1, validation_source=held_out)
    )
    assert recorder.training == [True] * 3
    assert len(recorder.log_probs) == 3
    for again in recorder.log_probs[1:]:
        assert torch.equal(recorder.log_probs[0], again) is (dropout == 0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(
    lora: LoRA | None, pretrained: str, source: str
) -> None:
    (batch,) = batches_of(pretrained, source, 8)
    gradients, calls = [], []
    for on in (False, True):
        torch.manual_seed(0)
        module = make_module(pretrained, gradient_checkpointing=on, lora=lora)
        module.configure_model()
        module.loss_and_stats(batch)  # checks the head, in eval mode
        times = 0

        def count(*_: Any) -> None:
            nonlocal times
            times += 1

        mlp = next(m for name, m in module.model.named_modules() if name.endswith("layers.0.mlp.act_fn"))
        mlp.register_forward_hook(count)
        module.loss_and_stats(batch)[0].backward()
        gradients.append({name: p.grad for name, p in module.model.named_parameters() if p.grad is not None})
        calls.append(times)
    assert calls == [1, 2]
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert any(float(g.abs().max()) > 1e-4 for g in gradients[1].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision", "kept"),
    [
        ("bfloat16", "32-true", torch.bfloat16),
        ("float32", "bf16-true", torch.bfloat16),
        ("float32", "bf16-mixed", torch.float32),
    ],
)
@pytest.mark.parametrize("head", ["fused", "dense"])
def test_bfloat16_trains_close_to_float32(
    dtype: str, precision: Any, kept: torch.dtype, head: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    found = {}
    for name, options in (("float32", ("float32", "32-true")), ("bfloat16", (dtype, precision))):
        module = make_module(pretrained, dtype=options[0], head=head)
        trainer = bare_trainer(tmp_path, precision=options[1], accumulate_grad_batches=2)
        trainer.fit(module, data(source, batch_size=4))
        found[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {p.dtype for p in module.model.parameters()} == {kept}
    assert all(p.isfinite().all() for p in module.model.parameters())
    for key in ("train/loss", "train/nll", "train/grad_norm"):
        assert found["bfloat16"][key] == pytest.approx(found["float32"][key], rel=0.03), key
    assert found["bfloat16"]["train/nll"] != found["float32"]["train/nll"]
    assert found["bfloat16"]["train/tokens"] == found["float32"]["train/tokens"]
    moved = max(float((p.float() - q).abs().max()) for p, q in zip(
        module.model.parameters(), initial(pretrained, torch.float32).parameters(), strict=True))  # fmt: skip
    assert moved > 1e-2


def test_rotary_frequencies_stay_float32_under_bf16_true(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained)
    bare_trainer(tmp_path, precision="bf16-true").fit(module, data(source))
    expected = [b for n, b in initial(pretrained, torch.float32).named_buffers() if n.endswith("inv_freq")]
    found = [b for n, b in module.model.named_buffers() if n.endswith("inv_freq")]
    assert found and all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


def test_lora_changes_adapters_and_nothing_else(pretrained: str, source: str, tmp_path: Path) -> None:
    module = make_module(pretrained, lora=LoRA(r=2))
    trainer = bare_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data(source))
    assert trainer.global_step == 2
    state = module.model.state_dict()
    for name, value in initial(pretrained, torch.float32).state_dict().items():
        found = [v for k, v in state.items() if k.replace(".base_layer", "").endswith(f"base_model.model.{name}")]
        assert len(found) == 1 and torch.equal(found[0], value), name
    moved = [v.abs().max() > 0 for k, v in state.items() if "lora_B" in k]
    assert len(moved) == 14 and all(moved), "B starts at zero"
    optimizer = trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in module.model.named_parameters() if ".lora_" in n}


# --- optimizer and schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_spares_vectors_and_takes_every_matrix_once(tied: bool, source: str, tmp_path: Path) -> None:
    module = SFTModule(
        architecture={"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied},
    )  # fmt: skip
    trainer = bare_trainer(tmp_path)
    trainer.fit(module, data(source))
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.95)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay), "none twice"
    named = dict(module.model.named_parameters())
    assert decay.keys() == {id(p) for p in named.values()}
    spared = {name for name, p in named.items() if decay[id(p)] == 0}
    assert spared == {name for name in named if "norm" in name or name.endswith(".bias")} and spared
    assert {decay[id(p)] for n, p in named.items() if n not in spared} == {0.01}


def cosine(t: int, total: int, warmup: int, floor: float) -> float:
    if t < warmup:
        return (t + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "size", "accumulate", "limits", "total"),
    [
        (8, 1, 1, {"max_epochs": 1}, 8),
        (8, 1, 2, {"max_epochs": 2}, 8),
        (7, 2, 2, {"max_epochs": 3}, 6),  # the short last window is a step as well
        (8, 2, 4, {"max_epochs": -1, "max_steps": 5}, 5),
        (8, 1, 2, {"max_epochs": 50, "max_steps": 6}, 6),
    ],
)
def test_the_schedule_counts_optimizer_steps(
    rows: int, size: int, accumulate: int, limits: dict[str, int], total: int, pretrained: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ROWS[:rows])
    recorder = Recorder()
    module = make_module(
        pretrained,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup=0.25, floor=0.1),
    )
    bare_trainer(tmp_path, recorder, accumulate_grad_batches=accumulate, **limits).fit(
        module, data(source, batch_size=size)
    )
    warmup = math.ceil(total / 4)
    assert recorder.rates == pytest.approx([0.3 * cosine(t, total, warmup, 0.1) for t in range(total)])
    logged = module.trainer.callback_metrics["train/lr"].item()
    assert logged == pytest.approx(recorder.rates[-1]), "the rate of the logged step, not of the next one"


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.0, 10, 0), (1.0, 4, 4), (0.1, 10, 1), (0.1, 30, 3), (0.1, 70, 7), (0.07, 100, 7), (0.1, 15, 2), (0.3, 1, 1)],
)
def test_warm_up_takes_its_share_of_the_steps(warmup: float, total: int, steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = CosineWithWarmup(optimizer, warmup=warmup, floor=0.2, total_steps=total)
    found = [schedule.factor(t) for t in range(total)]
    assert found == pytest.approx(
        [cosine(t, total, steps, 0.2) if steps < total or t < steps else 1 for t in range(total)]
    )
    if steps < total:
        assert schedule.factor(total) == schedule.factor(10 * total) == pytest.approx(0.2)


def test_each_group_keeps_its_own_peak() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    schedule = CosineWithWarmup(optimizer, warmup=0.5, total_steps=4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert [pair[1] / pair[0] for pair in seen] == pytest.approx([0.1] * 4)
    assert [pair[0] for pair in seen] == pytest.approx([cosine(t, 4, 2, 0.0) for t in range(4)])


@pytest.mark.parametrize("settings", [{"warmup": -0.1}, {"warmup": 1.5}, {"floor": 2.0}], ids=str)
def test_shares_outside_the_unit_interval_are_one_line(settings: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match=rf"--model\.scheduler\.{next(iter(settings))}"):
        CosineWithWarmup(optimizer, **settings)


def test_a_schedule_without_an_end_is_one_line(pretrained: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--trainer\.max_epochs or --trainer\.max_steps"):
        bare_trainer(tmp_path, max_epochs=-1).fit(make_module(pretrained, scheduler=CosineWithWarmup), data(source))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_no_model_at_all_is_one_line(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model\.pretrained .*--model\.architecture") as caught:
        bare_trainer(tmp_path).fit(SFTModule(), data(source))
    assert "\n" not in str(caught.value)


def test_an_architecture_beside_a_pretrained_model_is_named(
    pretrained: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    module = make_module(pretrained, architecture={"model_type": "llama", "hidden_size": 8})
    bare_trainer(tmp_path, max_steps=1).fit(module, data(source))
    said = [record.getMessage() for record in caplog.records if "--model.architecture" in record.getMessage()]
    assert said == [f"--model.architecture is not used: --model.pretrained {pretrained} brings its own"]


def test_a_pretrained_folder_that_does_not_exist_is_one_line_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such model folder \(--model\.pretrained\)") as caught:
        SFTModule(pretrained=str(tmp_path / "missing"))
    assert "\n" not in str(caught.value)


class FSDPStrategy(SingleDeviceStrategy):
    """Bears the name of a strategy that shards weights; the real one needs a GPU to be made."""


def test_a_strategy_that_shards_the_head_is_one_line(pretrained: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"FSDPStrategy is not supported.*--trainer\.strategy auto, ddp, or fsdp2"
    ) as caught:
        bare_trainer(tmp_path, strategy=FSDPStrategy(device=torch.device("cpu"))).fit(
            make_module(pretrained), data(source)
        )
    assert "\n" not in str(caught.value)


def test_an_unknown_head_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--model\.head must be fused or dense, not 'sparse'"):
        SFTModule(head="sparse")  # type: ignore[arg-type]


def test_a_vocabulary_too_small_for_the_data_is_one_line(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model\.architecture\.vocab_size 100"):
        bare_trainer(tmp_path).fit(SFTModule(architecture={"vocab_size": 100, "hidden_size": 16}), data(source))


def test_examples_longer_than_the_model_are_one_line(pretrained: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "long.jsonl", [{"question": "?", "answer": "a" * 200}])
    with pytest.raises(UserError, match=r"--data\.max_length 128"):
        bare_trainer(tmp_path).fit(make_module(pretrained), data(source))


def test_generation_without_a_data_module_is_one_line(pretrained: str) -> None:
    with pytest.raises(UserError, match="data module"):
        make_module(pretrained).generate({})


# --- export and resume ----------------------------------------------------------------------------------------------


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_trained_model_exports_from_memory_and_from_the_checkpoint_path_alone(
    lora: LoRA | None, pretrained: str, source: str, tmp_path: Path
) -> None:
    (batch,) = batches_of(pretrained, source, 8)
    module, loaded = make_module(pretrained, lora=lora), data(source)
    trainer = bare_trainer(tmp_path / "run", Checkpoint(dirpath=str(tmp_path / "run" / "checkpoints")))
    trainer.fit(module, loaded)
    (path,) = (p for p in (tmp_path / "run").rglob("*.ckpt") if not p.is_symlink())
    assert path.name == "step=1.ckpt"
    folders = [
        trainer.export(module, output=str(tmp_path / "memory"), datamodule=loaded),
        bare_trainer(tmp_path).export(ckpt_path=str(path), output=str(tmp_path / "file")),
        bare_trainer(tmp_path / "run").export(ckpt_path="last", output=str(tmp_path / "last")),
    ]
    expected = logits_of(module.model, batch)
    assert float((expected - logits_of(initial(pretrained, torch.float32), batch)).abs().max()) > 1e-2, "it has trained"
    for folder in folders:
        again = AutoModelForCausalLM.from_pretrained(folder)
        if lora is None:
            assert torch.equal(logits_of(again, batch), expected)
        else:
            torch.testing.assert_close(logits_of(again, batch), expected, rtol=1e-4, atol=1e-4)
        words = AutoTokenizer.from_pretrained(folder)
        assert words.chat_template == loaded.tokenizer.chat_template
        assert words("red").input_ids == loaded.tokenizer("red").input_ids
        assert again.generation_config.eos_token_id == loaded.stop_token_ids
        assert again.generation_config.pad_token_id == loaded.tokenizer.pad_token_id


def test_export_without_an_output_or_a_checkpoint_is_one_line(pretrained: str, tmp_path: Path) -> None:
    trainer = bare_trainer(tmp_path)
    with pytest.raises(UserError, match="--output DIR"):
        trainer.export(ckpt_path="a.ckpt")
    with pytest.raises(UserError, match="--ckpt_path FILE"):
        trainer.export(make_module(pretrained), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--ckpt_path last: no checkpoint under"):
        trainer.export(ckpt_path="last", output=str(tmp_path / "out"))


def quick_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def trained(
    pretrained: str, source: str, root: Path, resume: Path | None = None, held_out: str | None = None, **options: Any
) -> tuple[SFTModule, list[Path]]:
    module = make_module(pretrained, optimizer=quick_adam, scheduler=CosineWithWarmup)
    saver = Checkpoint(dirpath=str(root / "checkpoints"), save_top_k=-1)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, **options}
    trainer = bare_trainer(root, saver, **settings)
    trainer.fit(
        module,
        data(source, batch_size=1, validation_source=held_out),
        ckpt_path=None if resume is None else str(resume),
    )
    files = sorted((root / "checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    return module, files


@pytest.mark.slow
@pytest.mark.parametrize("validate", [False, True])
def test_resuming_at_an_epoch_boundary_changes_no_bit(
    validate: bool, pretrained: str, source: str, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "val.jsonl", HELD_OUT) if validate else None
    whole, files = trained(pretrained, source, tmp_path / "whole", held_out=held_out)
    assert [path.name for path in files] == ["step=4.ckpt", "step=8.ckpt"]
    again, _ = trained(pretrained, source, tmp_path / "again", files[0], held_out)
    assert again.trainer.global_step == whole.trainer.global_step == 8
    middle = torch.load(files[0], weights_only=True)["state_dict"]
    for name, value in whole.model.named_parameters():
        difference = float((dict(again.model.named_parameters())[name] - value).abs().max())
        assert difference == 0.0, (name, difference)
        assert not torch.equal(middle[f"model.{name}"], value), "the second epoch has trained"
    assert again.trainer.callback_metrics["train/nll"] == whole.trainer.callback_metrics["train/nll"]
    assert again.tokens_seen == whole.tokens_seen


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 50])
def test_a_checkpoint_counts_every_token_seen_however_often_is_logged(
    every: int, pretrained: str, source: str, tmp_path: Path
) -> None:
    _, files = trained(pretrained, source, tmp_path, max_epochs=1, log_every_n_steps=every)
    (batch,) = batches_of(pretrained, source, 8)
    saved = torch.load(files[-1], weights_only=True)
    assert saved["deft_lightning"]["tokens_seen"] == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.slow
def test_going_on_for_more_epochs_than_planned_still_learns_or_is_refused(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    """A schedule that ended at 0 must not make the added epochs a silent no-op."""
    _, files = trained(pretrained, source, tmp_path / "first", max_epochs=1)
    try:
        module, _ = trained(pretrained, source, tmp_path / "second", files[-1], max_epochs=2)
    except UserError:
        return
    before = torch.load(files[-1], weights_only=True)["state_dict"]
    assert module.trainer.global_step == 8
    assert any(not torch.equal(before[f"model.{name}"], p) for name, p in module.model.named_parameters())


def test_a_test_run_reports_the_share_of_completions_that_equal_their_gold(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    """Two of four gold responses are what the model says by itself."""
    model = initial(pretrained, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    rows = []
    for i in range(4):
        question = "abcd"[: i + 1]
        ids = torch.tensor([tokenizer(f"<|user|>{question}<|end|><|assistant|>").input_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"question": question, "answer": said if i % 2 else said + "!"})
    module = make_module(pretrained, generation=Generation(max_new_tokens=5))
    loaded = data(source, test_source=write_rows(tmp_path / "test.jsonl", rows), eval_batch_size=3)
    (found,) = bare_trainer(tmp_path).test(module, loaded, verbose=False)
    expected = {"exact_match": 0.5, "exact_match_se": math.sqrt(0.25 / 3), "truncated": 1.0, "examples": 4.0}
    assert found == pytest.approx({f"test/{name}": value for name, value in expected.items()})


def test_default_optimizer_is_that_of_the_recipe() -> None:
    optimizer = adamw([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")}
    assert settings == {"lr": 5e-5, "betas": (0.9, 0.95), "weight_decay": 0.01}


def test_the_objective_asked_for_is_the_one_that_trains(pretrained: str, source: str, tmp_path: Path) -> None:
    losses = {}
    for objective in (NLL(), Likelihood()):
        module = make_module(pretrained, objective=objective, optimizer=still)
        trainer = bare_trainer(tmp_path)
        trainer.fit(module, data(source))
        losses[repr(objective)] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    nll, likelihood = losses["NLL()"], losses["Likelihood()"]
    assert nll["train/loss"] == pytest.approx(nll["train/nll"]) and nll["train/nll"] == likelihood["train/nll"]
    assert likelihood["train/loss"] < 1 < nll["train/loss"]
    assert likelihood["train/grad_norm"] != pytest.approx(nll["train/grad_norm"], rel=1e-2)
