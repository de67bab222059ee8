"""A model outside of the fused call is as it was; one that runs its head otherwise is refused; odd batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import DENSE, adapted, assert_fused_is_dense, fused, lent_forwards, mixture, options_of, tokens
from tiny import (
    LLAMA,
    TINY,
    VOCAB,
    build,
    gradients,
    one_line,
    prepare,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from deft_lightning.errors import UserError
from deft_lightning.models import LoRA, base_causal_lm, check_head, find_head
from deft_lightning.objectives import DEFT


def generated(model: Any, ids: Tensor) -> list[list[int]]:
    training = model.training
    model.eval()
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True)
    model.train(training)
    return found.tolist()


class Broken(RuntimeError):
    pass


def broken(*_: Any) -> Any:
    raise Broken


@pytest.mark.parametrize(
    "make", [partial(build, LLAMA), partial(build, options_of("gemma2")), adapted], ids=["llama", "gemma2", "lora"]
)
def test_logits_and_generation_are_real_before_after_and_after_an_error(make: Callable[[], Any]) -> None:
    model = make()
    untouched = copy.deepcopy(model)
    ids, targets = tokens()
    expected, words = untouched(input_ids=ids).logits, generated(untouched, ids[:, :5])
    assert expected.shape == (2, 17, VOCAB)

    def assert_real() -> None:
        assert not lent_forwards(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert generated(model, ids[:, :5]) == words

    fused(model, ids, targets).loss.backward()
    assert_real()
    with pytest.raises(Broken):
        fused(model, ids, targets, broken)
    assert_real()
    handle = base_causal_lm(model).model.norm.register_forward_hook(broken)  # before the head is reached
    with pytest.raises(Broken):
        fused(model, ids, targets)
    handle.remove()
    assert_real()
    with torch.no_grad():
        fused(model, ids, targets)
    assert_real()


def test_hooks_on_the_head_run_and_what_they_do_to_the_hidden_states_counts() -> None:
    model, seen = build(LLAMA).double(), []

    def double(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append("pre")
        return (2 * args[0],)

    handles = [
        model.lm_head.register_forward_pre_hook(double),
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append("post")),
        model.register_forward_hook(lambda module, args, output: seen.append("model")),
        model.model.register_forward_hook(lambda module, args, output: seen.append("body")),
    ]
    assert_fused_is_dense(model)
    assert seen == ["body", "pre", "post", "model"] * 3, "dense, fused, and fused without a graph"
    ids, targets = tokens()
    hooked = fused(model, ids, targets).loss.item()
    for handle in handles:
        handle.remove()
    assert abs(fused(model, ids, targets).loss.item() - hooked) > 0.1


def test_hooks_that_accelerate_hangs_on_a_forward_run_and_are_still_there() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        count = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return args, kwargs

    model, counts = build(LLAMA).double(), Counts()
    add_hook_to_module(model, counts)
    add_hook_to_module(model.lm_head, Counts())
    before = {name: module.__dict__["forward"] for name, module in model.named_modules() if name in ("", "lm_head")}
    assert lent_forwards(model) == ["", "lm_head"]
    assert_fused_is_dense(model)
    assert counts.count == 3
    for name, forward in before.items():
        assert model.get_submodule(name).__dict__["forward"] is forward
    with pytest.raises(Broken):
        fused(model, *tokens(), broken)
    assert all(model.get_submodule(name).__dict__["forward"] is forward for name, forward in before.items())


class Odd(LlamaForCausalLM):
    """A Llama whose forward turns hidden states into logits in a way of its own."""

    way: Callable[[Any, Tensor], Tensor]

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=type(self).way(self, hidden))


def odd(way: Callable[[Any, Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    model = type("OddForCausalLM", (Odd,), {"way": way})(LlamaConfig(**TINY))
    return model.train()


def suppressed(self: Any, hidden: Tensor) -> Tensor:
    logits = self.lm_head(hidden)
    logits[..., 5] = -torch.inf
    return logits


WRONG_CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "twice": lambda self, hidden: self.lm_head(hidden) + self.lm_head(hidden.detach()),
    "not at all": lambda self, hidden: nn.functional.linear(hidden, self.lm_head.weight),
    "a slice": lambda self, hidden: nn.functional.pad(self.lm_head(hidden[:, 1:]), (0, 0, 1, 0)),
    "the last position": lambda self, hidden: self.lm_head(hidden[:, -1:]).expand(-1, hidden.shape[1], -1),
    "flat": lambda self, hidden: self.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]),
    "transposed": lambda self, hidden: self.lm_head(hidden.transpose(0, 1)).transpose(0, 1),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_model_that_runs_its_head_otherwise_is_refused(call: str) -> None:
    model = odd(WRONG_CALLS[call])
    ids, targets = tokens()
    with pytest.raises(UserError) as caught:
        fused(model, ids, targets)
    one_line(caught, DENSE, "OddForCausalLM", "head")
    assert not lent_forwards(model)
    assert model(ids).logits.shape == (2, 17, VOCAB)


@pytest.mark.parametrize("call", ["twice", "not at all", "a slice"])
def test_the_check_of_the_first_batch_names_the_way_out_of_a_head_run_otherwise(call: str) -> None:
    model = odd(WRONG_CALLS[call])
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE, "OddForCausalLM")


def test_an_odd_model_that_runs_its_head_once_is_none_of_these() -> None:
    """Shows that the models above are refused for their calls."""
    model = odd(lambda self, hidden: self.lm_head(hidden))
    check_head(model, find_head(model), tokens()[0], DEFT())
    assert_fused_is_dense(model.double())


@pytest.mark.parametrize(
    "way",
    [
        suppressed,
        lambda self, hidden: self.lm_head(hidden) - self.lm_head.weight.new_ones(VOCAB),
        lambda self, hidden: self.lm_head(hidden)[..., torch.arange(VOCAB)],
        lambda self, hidden: self.lm_head(hidden).masked_fill(torch.arange(VOCAB) == 5, -1e4),
        lambda self, hidden: self.lm_head(hidden) / self.lm_head(hidden).max(),
        lambda self, hidden: (z := self.lm_head(hidden)) / z.abs().amax(-1, keepdim=True),
    ],
    ids=["suppressed", "shifted", "indexed", "filled", "twice", "normalised"],
)
def test_a_model_that_needs_its_logits_is_refused_on_the_first_batch(way: Any) -> None:
    """There are none while the fused head runs: whatever the model raises becomes one line."""
    model = odd(way)
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE, "OddForCausalLM")
    assert not lent_forwards(model) and model.training


@pytest.mark.parametrize("head", ["fused", "dense"])
@pytest.mark.parametrize(
    ("options", "lora"),
    [
        (LLAMA, None),
        (options_of("gemma2"), None),
        (options_of("phi"), None),
        (mixture("mixtral"), None),
        (LLAMA, LoRA(r=2, target_modules=["q_proj", "lm_head"])),
    ],
    ids=["llama", "gemma2", "phi", "mixtral", "lora"],
)
def test_a_batch_without_supervised_tokens_is_a_zero_that_reaches_every_parameter(
    options: dict[str, Any], lora: LoRA | None, head: Any, batch: dict[str, Tensor]
) -> None:
    module = prepare(options, head=head, lora=lora)
    module.loss_and_stats(batch)[0].backward()
    reached = gradients(module.model).keys()
    loss, stats, keep = module.loss_and_stats({**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss.item() == 0 and loss.requires_grad
    assert len(stats.log_prob) == 0 and not keep.any()
    loss.backward()
    found = gradients(module.model)
    assert found.keys() == reached and reached
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


@pytest.mark.parametrize("head", ["fused", "dense"])
def test_statistics_come_in_the_order_of_the_batch(head: Any, batch: dict[str, Tensor]) -> None:
    module = prepare(LLAMA, head=head)
    _, stats, keep = module.loss_and_stats(batch)
    logits = module.model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    places = [(row, t) for row in range(2) for t in range(8) if batch["labels"][row, t + 1] != -100]
    assert keep.nonzero().tolist() == [list(place) for place in places]
    by_hand = [float(logits[row, t, batch["labels"][row, t + 1]]) for row, t in places]
    assert stats.log_prob.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert len(set(by_hand)) == len(by_hand)
