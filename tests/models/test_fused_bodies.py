"""The fused head in bfloat16, and over bodies that are checkpointed or compiled."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import (
    fused,
    head_of,
    loader,
    mixture,
    options_of,
    supervised,
    tokens,
    trained,
)
from peft import (
    LoraConfig,
    get_peft_model,
)
from tiny import (
    LLAMA,
    architecture,
    assert_same_gradients,
    build,
    deft_by_hand,
    gradients,
    logits_of,
    move_adapters,
    prepare,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worlds import bare_trainer, constant, sgd

from deft_lightning import SFTModule
from deft_lightning.models import LoRA, base_causal_lm, save_hugging_face

pytestmark = pytest.mark.slow


def all_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Distance of all gradients together, as a share of their length."""
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name].double() - value).square().sum()) for name, value in wanted.items())
    return (gap / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def small(kind: str) -> dict[str, Any]:
    more = {"vocab_size": 401, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    return options_of(kind, tie_word_embeddings=False, **more)


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "granite", "lora", "lora in bf16"])
def test_in_bfloat16_gradients_are_as_close_to_float64_as_the_dense_ones(kind: str, mode: str) -> None:
    def make(dtype: str) -> Any:
        if not kind.startswith("lora"):
            return build(small(kind), dtype=dtype)
        model = build(small("llama"), dtype=dtype)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        return move_adapters(get_peft_model(model, config, autocast_adapter_dtype=kind == "lora"), std=0.1)

    low = mode == "bf16 weights"
    if kind == "lora in bf16" and not low:
        pytest.skip("the adapters have the dtype of the weights there")
    model = make("bfloat16" if low else "float32")
    exact = make("bfloat16").double() if low else make("float32").double()  # the very weights the other has
    ids, targets = tokens(4, 33)
    deft_by_hand(*supervised(exact, ids, targets)).backward()
    wanted = gradients(exact)

    def cast() -> AbstractContextManager[Any]:
        return nullcontext() if low else torch.autocast("cpu", torch.bfloat16)

    with cast():
        own = deft_by_hand(*supervised(model, ids, targets))
    own.backward()
    dense_error = all_gradients(gradients(model), wanted)
    with cast():
        loss = fused(model, ids, targets).loss
    assert loss.dtype == torch.float32
    loss.backward()
    found = gradients(model)
    assert {name: g.dtype for name, g in found.items()} == {
        name: p.dtype for name, p in model.named_parameters() if name in found
    }
    fused_error = all_gradients(found, wanted)
    assert 1e-3 < dense_error < 0.2
    assert fused_error <= 2 * dense_error, (fused_error, dense_error)
    assert loss.item() == pytest.approx(own.item(), rel=1e-2)


BODIES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": {**LLAMA, "num_hidden_layers": 2}},
    "gemma2": {"architecture": options_of("gemma2", num_hidden_layers=2)},
    "gpt2": {"architecture": architecture("gpt2", num_hidden_layers=2)},
    "lora": {
        "architecture": {**LLAMA, "num_hidden_layers": 2},
        "lora": LoRA(r=4, target_modules=["q_proj", "lm_head"]),
    },
    "mixtral": {"architecture": mixture("mixtral", num_hidden_layers=2)},
}


def body(name: str, **settings: Any) -> SFTModule:
    options = BODIES[name]
    module = prepare(options["architecture"], lora=options.get("lora"), **settings)
    move_adapters(module.model)
    return module


def assert_trains_the_same(module: SFTModule, name: str, batch: dict[str, Tensor], tolerance: float) -> None:
    loss, wanted = trained(body(name, head="dense"), batch)
    for _ in range(2):
        found_loss, found = trained(module, batch)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(found, wanted, tolerance)


@pytest.mark.parametrize("name", BODIES)
def test_a_checkpointed_body_is_recomputed_and_gives_the_same(name: str, batch: dict[str, Tensor]) -> None:
    module = body(name, gradient_checkpointing=True)
    calls: list[int] = []
    causal = base_causal_lm(module.model)
    stack = next(m for m in causal.base_model.modules() if isinstance(m, nn.ModuleList))
    first = next(m for n, m in stack[0].named_modules() if "norm" in n or "ln_" in n)
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    heads: list[int] = []
    head_of(module.model).register_forward_pre_hook(lambda *_: heads.append(1))
    module.loss_and_stats(batch)  # with the checks of the first batch
    calls.clear()
    heads.clear()
    module.loss_and_stats(batch)[0].backward()
    assert len(calls) == 2 and len(heads) == 1, "the body runs again in backward, the head does not"
    module.model.zero_grad()
    assert_trains_the_same(module, name, batch, 1e-4)


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo and AOTAutograd without the minute that Inductor takes."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("llama", True), ("gemma2", False), ("gpt2", False), ("lora", False), ("mixtral", True)]
)
def test_compiled_layers_give_the_same(name: str, checkpointing: bool, batch: dict[str, Tensor]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    module = body(name, compile=True, gradient_checkpointing=checkpointing)
    # The check of the first batch has other shapes, compiled too; of the mixture nothing else is compiled.
    module.batch_loss.checked = name != "mixtral"
    assert list(module.state_dict()) == list(body(name).state_dict())
    assert_trains_the_same(module, name, batch, 1e-4)
    assert counters["stats"]["unique_graphs"] > 0, "something was compiled"


@pytest.mark.usefixtures("eager_backend")
def test_a_compiled_model_is_copied_checkpointed_and_exported(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    for name in ("llama", "lora"):
        module = body(name, compile=True, optimizer=sgd, scheduler=constant)
        trainer = bare_trainer(tmp_path)
        trainer.fit(module, loader([batch]))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        expected = logits_of(module.model, batch["input_ids"])
        copied = copy.deepcopy(module.model)
        torch.testing.assert_close(logits_of(copied, batch["input_ids"]), expected, rtol=1e-5, atol=1e-5)
        module.model.train()
        memory = save_hugging_face(module.model, None, [], tmp_path / f"{name} memory")
        file = trainer.export(ckpt_path=str(tmp_path / f"{name}.ckpt"), output=str(tmp_path / f"{name} file"))
        for folder in (memory, file):
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            torch.testing.assert_close(logits_of(loaded, batch["input_ids"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_layers_that_inductor_compiles_give_the_same(batch: dict[str, Tensor]) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = body("llama", compile=True)
    module.batch_loss.checked = True  # other shapes, which would be compiled too
    assert_trains_the_same(module, "llama", batch, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1, "layers alike share one compilation"
    torch._dynamo.reset()
