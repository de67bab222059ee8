"""Weights that wait in host memory under fsdp2, while everything else is where they compute."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from worlds import tiny_llama

from deft_lightning.models import shard
from deft_lightning.models.shard import Sharding, build_sharded, sharded_copy
from deft_lightning.training import fsdp2
from deft_lightning.training.fsdp2 import FSDP2Strategy

ELSEWHERE = torch.device("meta")  # instead of a GPU


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_the_module_is_where_batches_are(cpu_offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSDP2Strategy, "root_device", ELSEWHERE)
    strategy = FSDP2Strategy(cpu_offload=cpu_offload)
    module: Any = LightningModule()
    module.model = torch.nn.Linear(2, 2)
    strategy.connect(module)
    strategy.model_to_device()
    assert module.device == ELSEWHERE
    assert module.model.weight.device == (torch.device("cpu") if cpu_offload else ELSEWHERE)


@pytest.fixture
def sharding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sharding]:
    """One rank whose weights are in host memory, which nothing pins without a GPU."""
    monkeypatch.setattr(torch.distributed.fsdp, "CPUOffloadPolicy", lambda pin_memory: CPUOffloadPolicy(False))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)), ELSEWHERE, cpu_offload=True)
    dist.destroy_process_group()


def with_a_saved_buffer() -> Any:
    model = tiny_llama(0.3, num_hidden_layers=1)[0]
    model.model.layers[0].register_buffer("scale", torch.full((3,), 0.5))
    return model


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Where what torch hands out is, each time: it takes one device alone, and does not count meta."""
    found: list[set[str]] = []
    original = state_dict.set_model_state_dict

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        found.append({value.device.type for value in model.state_dict().values()})
        return original(model, *args, **options)

    monkeypatch.setattr(state_dict, "set_model_state_dict", watched)
    monkeypatch.setattr(fsdp2, "set_model_state_dict", watched)
    return found


def test_a_model_that_saves_buffers_is_handed_out(sharding: Sharding, devices: list[set[str]]) -> None:
    model = build_sharded(with_a_saved_buffer, sharding)
    assert devices == [{"cpu"}]
    assert {buffer.device for buffer in model.buffers()} == {ELSEWHERE}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    copied = sharded_copy(model, with_a_saved_buffer, sharding)
    assert {buffer.device for buffer in copied.buffers()} == {ELSEWHERE}


def test_a_checkpoint_with_buffers_is_handed_out(
    sharding: Sharding, devices: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 reads a file; what the checks of its content look at is not what this is about."""

    def moved(model: Any, device: torch.device) -> None:  # from meta as well, where there is nothing to copy
        for part in model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty_like(buffer, device=device))

    monkeypatch.setattr(shard, "move_buffers", moved)
    module: Any = LightningModule()
    module.model = build_sharded(with_a_saved_buffer, sharding)
    module.base_weights = SimpleNamespace(check=lambda *_: None)
    weights = {f"model.{name}": value for name, value in with_a_saved_buffer().state_dict().items()}
    content = {"state_dict": {name: torch.full_like(value, 0.25) for name, value in weights.items()}, fsdp2.KEY: {}}
    monkeypatch.setattr(fsdp2, "load_checkpoint", lambda _: content)
    monkeypatch.setattr(fsdp2, "check_state", lambda *_: None)
    monkeypatch.setattr(FSDP2Strategy, "broadcast", lambda _, one: one)
    monkeypatch.setattr(FSDP2Strategy, "is_global_zero", True)
    strategy: Any = FSDP2Strategy(cpu_offload=True)
    monkeypatch.setattr(strategy, "_any", bool)
    strategy.sharding = sharding
    strategy.connect(module)
    strategy.load_checkpoint("one.ckpt")
    assert devices == [{"cpu"}, {"cpu"}]
    assert {buffer.device for buffer in module.model.buffers()} == {ELSEWHERE}
    assert all(bool((weight.full_tensor() == 0.25).all()) for weight in module.parameters())
