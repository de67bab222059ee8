"""The estimate of memory: against numbers counted by hand, against real steps, and as a line of a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import MixedPrecision, Precision
from transformers import AutoModelForCausalLM, LlamaConfig
from worlds import ROOT, SHAPE, adam, fit_command, quiet_trainer, sums

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import ModelLine
from deft_lightning.data.loading.shape import BatchShape
from deft_lightning.models import LoRA, add_adapters, find_head
from deft_lightning.models.fused import fused_forward
from deft_lightning.models.load import load_pretrained, recompute_activations
from deft_lightning.objectives import DEFT, NLL, KLAnchor
from deft_lightning.ops import buffers, linear_loss
from deft_lightning.training.memory.advice import start_line, tell_memory
from deft_lightning.training.memory.estimate import MemoryEstimate, Setup, estimate
from deft_lightning.training.memory.fake_step import count_step
from deft_lightning.training.memory.head import HeadShape, head_bytes
from deft_lightning.training.memory.live import LiveBytes
from deft_lightning.training.memory.optimizer import optimizer_bytes
from deft_lightning.training.optim import MuonAdamW, adamw
from deft_lightning.training.recipe import device_precision, with_defaults

# A Llama whose numbers are easy to count: width, inner width, heads of 8, those of keys and values, vocabulary.
D, I, HEADS, KV, V = 32, 48, 4, 2, 100  # noqa: E741 - the names of the formula
BATCH = BatchShape(3, 8, 21)
TOKENS = BATCH.rows * BATCH.length
LAYER = (
    2 * D * D + 2 * D * 8 * KV + 3 * D * I + 2 * D
)  # weights of a layer: queries and output, keys, values, MLP, norms


def llama(layers: int, dtype: torch.dtype = torch.float32, checkpointing: bool = False, attention: str = "sdpa") -> Any:
    config = LlamaConfig(
        hidden_size=D, intermediate_size=I, num_attention_heads=HEADS, num_key_value_heads=KV, vocab_size=V,
        num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        recompute_activations(model)
    return model


def a_layer_keeps(**options: Any) -> float:
    """Floats of four bytes that one more layer keeps of a token."""
    few, more = (count_step(llama(layers, **options), BATCH, fused=True).activations for layers in (3, 5))
    return (more - few) / 2 / TOKENS / 4


def test_what_a_layer_keeps_is_what_is_counted_by_hand() -> None:
    # Both norms: input, normalised, times weight. Attention: queries, output, keys and values, a number a head. MLP:
    # gate, up, activation, product. And a root mean square of each norm.
    assert a_layer_keeps() == 3 * D + 3 * D + 2 * D + 2 * 8 * KV + HEADS + 4 * I + 2


def test_eager_attention_keeps_the_scores_of_all_pairs() -> None:
    extra = a_layer_keeps(attention="eager") - a_layer_keeps()
    pairs = HEADS * BATCH.length  # for each token, in each head
    assert pairs <= extra <= 4 * pairs + 4 * D


def test_with_checkpointing_a_layer_keeps_its_input_alone() -> None:
    assert a_layer_keeps(checkpointing=True) == D


def test_the_dense_head_keeps_the_logits_of_all_places() -> None:
    fused, dense = (count_step(llama(3), BATCH, fused=head) for head in (True, False))
    assert dense.activations - fused.activations >= 4 * TOKENS * V


def test_weights_gradients_and_state_are_those_counted_by_hand() -> None:
    found = estimate(llama(3), BATCH, Setup(adamw))
    weights = V * D + 3 * LAYER + D
    assert found.trained == found.gradients == 4 * weights
    assert found.weights == 4 * weights + 2 * 4 * 4  # frequencies of positions, and those they began with
    tensors = 1 + 3 * 9 + 1  # each of which has a step count
    assert found.optimizer == 2 * 4 * weights + 4 * tensors
    always = found.weights + found.optimizer
    assert found.peak >= always + max(found.gradients, found.activations)
    # Of earlier micro-batches there are gradients while the next one runs.
    again = estimate(llama(3), BATCH, Setup(adamw, accumulate=2))
    assert again.peak >= always + again.gradients + again.activations and again.peak > found.peak


def test_adapters_alone_have_gradients_and_state() -> None:
    model = add_adapters(llama(2, torch.bfloat16), LoRA(r=4))
    found = estimate(model, BATCH, Setup(adamw))
    # Rank 4 on the seven matrices of a layer, in float32 (peft), beside a base of two bytes a weight.
    adapters = 2 * 4 * (2 * (D + D) + 2 * (D + 8 * KV) + 3 * (D + I))
    assert found.trained == found.gradients == 4 * adapters
    assert found.weights == 2 * (V * D + 2 * LAYER + D) + 4 * adapters + 2 * 4 * 4
    assert abs(found.optimizer - 8 * adapters) <= 4 * 28


def test_ranks_share_everything_out_or_hold_gradients_twice() -> None:
    model, trained = llama(3), 4 * (V * D + 3 * LAYER + D)
    alone, ddp, fsdp = (
        estimate(model, BATCH, Setup(adamw, ranks=ranks, sharded=sharded))
        for ranks, sharded in ((1, False), (4, False), (4, True))
    )
    assert ddp.gradients == 2 * alone.gradients and ddp.peak == alone.peak + trained
    assert fsdp.gradients == alone.gradients // 4 and fsdp.optimizer == alone.optimizer // 4
    # Its quarter, two gathered layers, embedding and last norm.
    assert fsdp.weights == alone.weights // 4 + 4 * (2 * LAYER + V * D + D)


def test_an_anchor_holds_a_copy_of_the_weights_and_adapters_do_not() -> None:
    plain, anchored = (estimate(llama(2), BATCH, Setup(adamw, reference=reference)) for reference in (False, True))
    assert anchored.reference == plain.weights and anchored.peak >= plain.peak + plain.weights
    assert anchored.activations == plain.activations + 4 * TOKENS * D  # what its head will see
    adapted = add_adapters(llama(2), LoRA(r=4))
    assert estimate(adapted, BATCH, Setup(adamw, reference=True)).reference == 0


def measured_step(model: Any) -> tuple[int, int]:
    """Run a step with data; return the most bytes of its tensors in the forward pass, and after it."""
    seam, live = find_head(model, "torch"), LiveBytes()
    targets = torch.full((BATCH.rows, BATCH.length), -100)
    targets.view(-1)[: BATCH.supervised] = 1
    inputs = {"input_ids": torch.ones(BATCH.rows, BATCH.length, dtype=torch.int64), "use_cache": False}
    buffers.release()  # what a call before this one has left is not made anew
    with live:
        loss = fused_forward(model, seam, inputs, targets, NLL()).loss
        forward = live.restart()
        loss.backward()
    return forward, live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_real_step_holds_what_the_estimate_says(lora: bool, checkpointing: bool) -> None:
    """Five layers run with data, their tensors counted, against two layers that ran without."""
    model = llama(5, checkpointing=checkpointing)
    model = add_adapters(model, LoRA(r=4)) if lora else model
    said = count_step(model, BATCH, fused=True)
    forward, peak = measured_step(model)
    assert said.forward == pytest.approx(forward, rel=0.05)
    # Above it by what the first layer that is run backward holds more than the others: two hidden states of a batch.
    assert -0.05 <= max(said.backward, said.end) / peak - 1 <= 0.08


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_real_step_over_a_quantised_base_holds_what_the_estimate_says(
    kind: Any, checkpointing: bool, tmp_path: Path
) -> None:
    """Beside activations the weight that is made for a product; 8-bit layers keep their inputs, whatever is asked."""
    pytest.importorskip("bitsandbytes", reason="a quantised base needs the packages of deft-lightning[qlora]")
    llama(5).save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path), "float32", quantization=kind)
    if checkpointing:
        recompute_activations(model)
    model = add_adapters(model, LoRA(r=4))
    said = count_step(model, BATCH, fused=True)
    with torch.device("meta"):
        shapes = load_pretrained(str(tmp_path), "float32", quantization=kind)
        if checkpointing:
            recompute_activations(shapes)
        shapes = add_adapters(shapes, LoRA(r=4))
    assert count_step(shapes, BATCH, fused=True) == said
    assert estimate(shapes, BATCH, Setup(adamw)).weights == estimate(model, BATCH, Setup(adamw)).weights
    forward, peak = measured_step(model)
    assert said.forward == pytest.approx(forward, rel=0.05)
    assert -0.05 <= max(said.backward, said.end) / peak - 1 <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [300, 1300, 2100])
def test_the_head_holds_what_its_formula_says(tokens: int, dtype: torch.dtype) -> None:
    width, vocabulary = 64, 6000
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    said = head_bytes(HeadShape(tokens, width, vocabulary, dtype, dtype, dtype, trained=True))
    buffers.release()  # what a call before this one has left is not made anew
    live = LiveBytes()
    with live:
        loss, _ = linear_loss(hidden.clone(), weight, torch.ones(tokens, dtype=torch.int64), NLL(), ignore_index=None)
    assert said.forward == pytest.approx(live.peak, rel=0.05)
    assert said.kept == pytest.approx(live.now, rel=0.05)
    assert said.gradient == vocabulary * width * (4 if tokens > 2048 else dtype.itemsize)
    assert said.buffer == buffers._spare[0].nbytes()
    del loss


def test_the_head_fills_its_budget_on_a_gpu() -> None:
    tokens, width, vocabulary = 10**6, 896, 151_936
    low = torch.bfloat16
    for kernel, chunk, entry in (("torch", 1024, 2 + 4 + 4), ("triton", 3456, 2)):
        shape = HeadShape(tokens, width, vocabulary, torch.float32, low, low, False, device="cuda", kernel=kernel)
        # Beside hidden states and their gradient, and the weight in bfloat16. In torch no fewer than 1024 tokens.
        buffers = head_bytes(shape).forward - 2 * tokens * width * 2 - vocabulary * width * 2
        even = -(-tokens // -(-tokens // chunk))  # chunks of one size
        assert buffers == even * vocabulary * entry and 0 <= chunk - even < 8


def made(optimizer: Any, weights: Any = ((64, 48), (7, 48), (48,)), device: str = "cpu") -> Any:
    params = [torch.empty(sides, device="meta") for sides in weights]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return optimizer_bytes(optimizer, groups, device)


def test_an_optimizer_holds_what_it_makes_itself() -> None:
    numbers, largest = 64 * 48 + 7 * 48 + 48, 64 * 48
    assert made(adamw).state == 8 * numbers + 3 * 4
    assert made(adamw).step < 100, "fused, as in the run"
    assert made(adamw, device="cuda").step < 100
    loop = made(partial(torch.optim.AdamW, foreach=False)).step
    assert 4 * largest <= loop <= 3 * 4 * largest, "one weight after the other"
    matrices = 64 * 48 + 7 * 48
    lists = made(partial(torch.optim.AdamW, foreach=True), device="cuda").step
    assert lists == pytest.approx(4 * matrices, rel=0.02), "foreach copies a moment"
    assert made(partial(torch.optim.SGD, lr=0.1)).state == 0
    assert made(partial(torch.optim.SGD, lr=0.1, momentum=0.9)).state == 4 * numbers
    # Rows and columns of matrices, all of a vector, and a step count each.
    assert made(torch.optim.Adafactor).state == 4 * ((64 + 48) + (7 + 48) + 48) + 3 * 4


def test_muon_has_one_moment_for_the_matrices_of_layers() -> None:
    ends, rest = V * D, 3 * (LAYER - 2 * D)
    found = estimate(llama(3), BATCH, Setup(MuonAdamW)).optimizer
    vectors = 3 * 2 * D + D
    assert found == pytest.approx(4 * rest + 8 * (ends + vectors), rel=0.01)


def test_an_unknown_precision_is_said() -> None:
    with pytest.raises(ValueError, match=r"--trainer\.precision transformer-engine"):
        estimate(llama(1), BATCH, Setup(adamw, precision="transformer-engine"))


# --- as a line of a run ---------------------------------------------------------------------------------------------


class Told(Callback):
    """Asks for the line again when a fit begins, for a device of any size."""

    def __init__(self, room: int) -> None:
        self.room = room

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        tell_memory(pl_module, self.room)


def fit(tmp_path: Path, room: int | None = None, summary: bool = True, **options: Any) -> None:
    data = InstructionDataModule(sums(), tokenizer_size=0, validation_fraction=0.0, batch_size=4)
    callbacks = [*([ModelLine()] if summary else []), *([] if room is None else [Told(room)])]
    trainer = quiet_trainer(tmp_path, *callbacks, max_steps=1, monitors=False, enable_checkpointing=False)
    trainer.fit(SFTModule(**{"architecture": {**SHAPE, "num_hidden_layers": 4}, "optimizer": adam, **options}), data)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("memory:")]


def test_parts_that_are_more_than_the_peak_are_said_to_be_there_one_after_the_other() -> None:
    mib = 1 << 20
    need = MemoryEstimate(8 * mib, 8 * mib, 8 * mib, 16 * mib, 20 * mib, 0, peak=46 * mib)
    assert need.buffers == 0
    line = start_line(need, BATCH, None)
    assert line == (
        "memory: a step of 3 x 8 tokens takes about 46.0 MiB (weights 8.0 MiB, gradients 8.0 MiB, optimizer 16.0 MiB,"
        " activations 20.0 MiB; not all at a time)"
    )


@pytest.mark.slow
def test_a_run_that_fits_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(tmp_path, room=1 << 40)
    (line,) = lines(caplog)
    assert re.fullmatch(
        r"memory: a step of 4 x \d+ tokens takes about [\d.]+ MiB \(weights [\d.]+ MiB, gradients [\d.]+ MiB, optimizer"
        r" [\d.]+ MiB, activations [\d.]+ MiB, buffers [\d.]+ MiB\); the device has [\d.,]+ GiB",
        line,
    ), line
    fit(tmp_path, room=1 << 40, summary=False)
    assert len(lines(caplog)) == 1, "one of the start lines, left out with them"
    fit(tmp_path)
    assert len(lines(caplog)) == 1, "a small model on a CPU"


@pytest.mark.slow
def test_on_a_device_too_small_it_names_what_needs_less(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, room=600 << 10)
    (line,) = [str(w.message) for w in recwarn if str(w.message).startswith("memory:")]
    start = r"memory: a step of 4 x \d+ tokens needs about ([\d.]+) MiB, the device has 0\.6 MiB: "
    assert (match := re.match(start, line)), line
    told = dict(re.findall(r"(--\S+ \S+(?: --\S+ \S+)*) needs ([\d.]+) MiB", line))
    assert set(told) >= {
        "--model.gradient_checkpointing true",
        "--data.batch_size 1 --trainer.accumulate_grad_batches 4",
    }
    assert all(float(size) < float(match[1]) for size in told.values()), line
    assert ("too much as well" in line) == any(float(size) > 0.6 for size in told.values())


@pytest.mark.slow
def test_an_estimate_that_cannot_be_made_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WantsItsWeights(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            params = list(params)
            if all(p.numel() < 1000 for group in params for p in group["params"]):
                raise RuntimeError("too small for me")
            super().__init__(params, lr=0.0)

    caplog.set_level("INFO")
    fit(tmp_path, room=1 << 40, optimizer=WantsItsWeights)
    assert lines(caplog) == ["memory: no estimate for this run (RuntimeError: too small for me)"]


@pytest.mark.slow
def test_it_draws_nothing_that_the_run_would_draw(tmp_path: Path) -> None:
    """Weights after a step with dropout are the same with the line and without."""
    ends = []
    for summary in (True, False):
        torch.manual_seed(0)
        data = InstructionDataModule(sums(), tokenizer_size=0, validation_fraction=0.0, batch_size=4)
        callbacks = [ModelLine(), Told(1)] if summary else []
        trainer = quiet_trainer(tmp_path, *callbacks, max_steps=1, monitors=False, enable_checkpointing=False)
        module = SFTModule(architecture={**SHAPE, "attention_dropout": 0.5}, optimizer=adam)
        trainer.fit(module, data)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.slow
def test_an_anchor_and_accumulation_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(tmp_path, room=1 << 40, objective=KLAnchor(DEFT(), 0.1))
    assert "reference" in lines(caplog)[0]


@pytest.mark.slow
def test_two_ranks_say_it_once(tmp_path: Path) -> None:
    words = fit_command(
        tmp_path, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "1",
        "--after_fit.export", "false", "--model.architecture.hidden_size", "512",
        "--model.architecture.num_hidden_layers", "20",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "deft_lightning", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("memory: a step of") == 1


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


CHOICES: list[tuple[dict[str, Any], str | None]] = [
    ({}, "bf16-mixed"),
    ({"accelerator": "gpu"}, "bf16-mixed"),
    ({"accelerator": CUDAAccelerator()}, "bf16-mixed"),
    ({"accelerator": "cpu"}, None),
    ({"plugins": Precision()}, None),
    ({"plugins": [MixedPrecision("bf16-mixed", "cuda")]}, None),
]


@pytest.mark.parametrize(("options", "precision"), CHOICES)
def test_a_gpu_with_bfloat16_trains_in_it(gpu: None, options: dict[str, Any], precision: str | None) -> None:
    assert device_precision(options) == precision


@pytest.mark.usefixtures("gpu")
def test_what_was_asked_for_wins_and_the_default_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for asked in ("32-true", "16-mixed", 32):
        assert with_defaults({"precision": asked})["precision"] == asked
    assert not caplog.records
    assert with_defaults({"precision": None})["precision"] == "bf16-mixed"
    (record,) = caplog.records
    assert "bf16-mixed" in record.message and "--trainer.precision 32-true" in record.message


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_emulates_bfloat16_is_left_at_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert device_precision({}) is None


def test_without_a_gpu_nothing_is_set() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert device_precision({}) is None and with_defaults({}).get("precision") is None
