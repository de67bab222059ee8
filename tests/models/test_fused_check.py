"""The check of the first batch finds what nobody knows of, and refuses nothing that is right."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import (
    DENSE,
    adapted,
    fused,
    lent_forwards,
    loader,
    mixture,
    options_of,
    tokens,
    uneven_batches,
)
from peft import (
    LoraConfig,
    get_peft_model,
)
from tiny import (
    ARCHITECTURES,
    LLAMA,
    build,
    gradients,
    logits_of,
    move_adapters,
    one_line,
    prepare,
)
from torch import Tensor, nn
from worlds import bare_trainer, constant, sgd

from deft_lightning.errors import UserError
from deft_lightning.models import (
    LoRA,
    add_adapters,
    base_causal_lm,
    check_causal,
    check_head,
    find_head,
    from_architecture,
)
from deft_lightning.objectives import DEFT, EAFT
from deft_lightning.ops.torch_rows import TorchRows


def changed_model(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The model with a change to its logits that nobody knows of."""
    forward = model.forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = types.MethodType(wrapped, model)
    return model


def faint() -> Any:
    """A Llama with the weights transformers starts from: its logits are around 0.1."""
    return build({**LLAMA, "initializer_range": 0.02})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: 100 * torch.tanh(z / 100),
        lambda z: z.clamp(-20, 20),
        lambda z: 1.02 * z,
        lambda z: z / 1.02,
        lambda z: z + 0.5 * torch.arange(z.shape[-1]).remainder(2) if z.shape[-1] else z,
        lambda z: z * (1 + 0.05 * torch.arange(z.shape[1]).remainder(2)[:, None]) if z.shape[-1] else z,
    ],
    ids=["softcap 30", "softcap 100", "clamp", "scale up", "scale down", "bias", "scale by position"],
)
@pytest.mark.parametrize("lora", [False, True])
def test_what_nobody_knows_of_is_found_whatever_the_weights(change: Any, lora: bool) -> None:
    ids, _ = tokens()
    model = faint()
    if lora:
        model = move_adapters(add_adapters(model, LoRA(r=4, target_modules=["q_proj", "lm_head"])), std=0.02)
    check_head(model, find_head(model), ids, DEFT())
    before = logits_of(model, ids)
    assert float(before.abs().max()) < 0.5
    changed_model(base_causal_lm(model), change)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE, "LlamaForCausalLM", "logits")


def test_a_hidden_softcap_is_invisible_at_the_logits_themselves() -> None:
    """Why the check makes them larger."""
    ids, _ = tokens()
    before = logits_of(faint(), ids)
    after = logits_of(changed_model(faint(), lambda z: 30 * torch.tanh(z / 30)), ids)
    assert 0 < float((after - before).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "make",
    [faint, partial(build, options_of("gemma2")), partial(build, options_of("phi")), adapted],
    ids=["llama", "gemma2", "phi", "lora"],
)
def test_a_backend_with_a_wrong_gradient_is_found_and_named(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, _) = make(), tokens()
    check_head(model, find_head(model), ids, DEFT())
    right = TorchRows.gradient_

    def wrong(self: Any, product: Tensor, *args: Any) -> None:
        right(self, product, *args)
        product.mul_(1.01)

    monkeypatch.setattr(TorchRows, "gradient_", wrong)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, "gradient", "--model.head_backend", "--model.head dense")


def test_a_backend_with_wrong_statistics_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, _) = faint(), tokens()
    right = TorchRows.statistics
    monkeypatch.setattr(
        TorchRows, "statistics", lambda self, *args: (s := right(self, *args))._replace(entropy=s.entropy + 0.1)
    )
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE)


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": faint,
    "gemma2": partial(build, options_of("gemma2")),
    "phi": partial(build, options_of("phi")),
    "mixtral": partial(build, mixture("mixtral")),
    "lora": adapted,
    "lora tied": partial(adapted, True),
    "modules_to_save": partial(adapted, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MAKERS)
def test_the_check_runs_in_every_grad_mode_and_leaves_the_model_as_it_was(name: str, mode: Any) -> None:
    model, (ids, targets) = MAKERS[name](), tokens()
    seam = find_head(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        with mode():
            check_head(model, seam, ids, DEFT())
        assert all(module.training is training for module in model.modules())
    assert not gradients(model)
    assert not lent_forwards(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (seam.linear, seam.projection, seam.causal))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fused(model, ids, targets).loss.backward()
    assert gradients(model)


def test_the_check_leaves_parts_that_are_in_evaluation_mode_there() -> None:
    """Frozen parts may be evaluated while the rest trains."""
    model = build({**LLAMA, "num_hidden_layers": 2})
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    check_causal(model, tokens()[0])
    check_head(model, find_head(model), tokens()[0], DEFT())
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_hooks_of_others_survive_the_check_even_when_it_refuses() -> None:
    model, (ids, _) = changed_model(faint(), lambda z: 1.1 * z), tokens()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    own, lent = model.lm_head._forward_hooks.copy(), model.__dict__["forward"]
    with pytest.raises(UserError):
        check_head(model, find_head(model), ids, DEFT())
    assert model.lm_head._forward_hooks == own and not model.lm_head._forward_pre_hooks
    assert model.__dict__["forward"] is lent and seen


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj", "lm_head"])], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_run_that_validates_first_is_checked_there_and_then_trains(
    lora: LoRA | None, precision: Any, tmp_path: Path
) -> None:
    module = prepare(LLAMA, lora=lora, optimizer=sgd, scheduler=constant)
    module.objective = EAFT(k=5)
    trainer = bare_trainer(tmp_path, precision=precision)
    trainer.validate(module, loader(uneven_batches()[:2]), verbose=False)
    assert module.batch_loss.checked and trainer.callback_metrics["val/nll"] > 0
    trainer.fit(module, loader(uneven_batches()))
    assert trainer.callback_metrics["train/nll"] > 0


def wide(kind: str, seed: int, dtype: str, adapters: Any) -> Any:
    """A model with more tokens, where logits of 40 are rounded by an eighth in bfloat16."""
    options = options_of(kind, hidden_size=64, vocab_size=1000, num_attention_heads=2, tie_word_embeddings=False)
    options.update({"head_dim": 32} if "head_dim" in options else {})
    model = build(options, seed, dtype)
    if adapters is None:
        return model
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    return move_adapters(get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32"), seed, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "granite"])
def test_what_is_right_is_not_refused_for_its_rounding(kind: str, adapters: str | None) -> None:
    refused = []
    for seed in range(12):
        ids, _ = tokens(1, 20, seed)
        for autocast in (False, True):
            model = wide(kind, seed, "float32" if autocast else "bfloat16", adapters)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    check_head(model, find_head(model), ids, DEFT())
                except UserError as error:
                    refused.append((seed, autocast, str(error)))
    assert not refused


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("change", [lambda z: 30 * torch.tanh(z / 30), lambda z: 1.2 * z], ids=["softcap", "scale"])
def test_rounding_does_not_hide_what_nobody_knows_of(mode: str, change: Any) -> None:
    ids, _ = tokens()
    model = changed_model(
        build({**LLAMA, "initializer_range": 0.02}, 0, "bfloat16" if mode == "bf16" else "float32"), change
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), pytest.raises(UserError) as caught:
        check_head(model, find_head(model), ids, DEFT())
    one_line(caught, DENSE)


def test_products_of_fewer_digits_are_allowed_their_rounding() -> None:
    """In TF32 the head and the model's own logits differ by some thousandths: so much is a fault in float32 alone."""
    ids, _ = tokens()
    model = changed_model(faint(), lambda z: 1.005 * z)
    with pytest.raises(UserError):
        check_head(model, find_head(model), ids, DEFT())
    torch.set_float32_matmul_precision("high")
    try:
        check_head(model, find_head(model), ids, DEFT())
        with pytest.raises(UserError):
            check_head(changed_model(faint(), lambda z: 1.2 * z), find_head(model), ids, DEFT())
    finally:
        torch.set_float32_matmul_precision("highest")


def test_rows_too_short_to_predict_anything_pass(batch: dict[str, Tensor]) -> None:
    model = changed_model(faint(), lambda z: 2 * z)
    check_causal(model, torch.tensor([[5]]))
    check_head(model, find_head(model), torch.tensor([[5]]), DEFT())
    with pytest.raises(UserError):
        check_head(model, find_head(model), torch.tensor([[5, 6]]), DEFT())


def test_a_first_batch_of_one_token_is_no_way_past_the_check() -> None:
    module = prepare(LLAMA)
    changed_model(module.model, lambda z: 2 * z)
    with pytest.raises(UserError):
        module.loss_and_stats({"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[-100]])})


def test_a_head_of_zeros_is_no_reason_to_refuse() -> None:
    model, (ids, _) = faint(), tokens()
    nn.init.zeros_(model.lm_head.weight)
    check_head(model, find_head(model), ids, DEFT())


def test_float64_is_checked_too() -> None:
    for name in ("llama", "gemma2", "lora"):
        model = MAKERS[name]().double()
        check_head(model, find_head(model), tokens()[0], DEFT())


@pytest.mark.slow
def test_a_checked_model_of_every_known_architecture_is_not_refused_at_the_weights_it_starts_from() -> None:
    for kind in ARCHITECTURES:
        options = options_of(kind)
        options.pop("initializer_range", None)
        torch.manual_seed(0)
        model = from_architecture(options, None, "float32")
        check_head(model, find_head(model), tokens()[0], DEFT())
