"""Rows that come and go: each completion is that of its prompt alone, token for token; in float64 where that works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer
from worlds import byte_tokenizer

from deft_lightning.evaluation import Generation, complete, continuous, slots
from deft_lightning.evaluation.completions import Ask, Completions
from deft_lightning.evaluation.continuous import why_not
from deft_lightning.evaluation.generate import completions_of
from deft_lightning.evaluation.sampling import gumbel, stream_key
from deft_lightning.evaluation.slots import Slots

VOCABULARY, STOPS, LIMIT = 211, [1, *range(150, 160)], 16
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "initializer_range": 0.25, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
OLD_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "n_inner": 48}
# Grouped heads, absolute positions, windows shorter than the prompts, capped scores, linear biases.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": OLD_NAMES,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 7, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gptj": {**OLD_NAMES, "rotary_dim": 4},
}
# In float64 the attention that transformers writes out ("eager") makes NaN of a padded batch, by `generate` too.
SINGLE = {"bloom", "gemma2"}
GREEDY, SAMPLED = Generation(LIMIT), Generation(LIMIT, temperature=1.0, top_p=0.9, samples=3, seed=4)


class Numbers:
    """A tokenizer whose text is the numbers of the tokens."""

    pad_token_id = 0

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def model_of(family: str, **shape: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **shape})
    return AutoModelForCausalLM.from_config(config).to(torch.float32 if family in SINGLE else torch.float64).eval()


def asks(count: int, longest: int = 24) -> list[Ask]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [Ask(f"r{i}", torch.randint(2, VOCABULARY, (n,), generator=draw).tolist()) for i, n in enumerate(lengths)]


@torch.no_grad()
def alone(model: Any, ask: Ask, settings: Generation, sample: int) -> tuple[str, bool]:
    """One sample of one prompt, read whole again for each token: no batch, no padding, no cache."""
    ids, made = list(ask.input_ids), list[int]()
    stream = torch.tensor([stream_key(settings.seed, ask.id, sample)])
    while len(made) < settings.max_new_tokens:
        scores = model(torch.tensor([ids]), use_cache=False).logits[:, -1].float()
        if settings.temperature:
            scores = TopPLogitsWarper(settings.top_p)(None, scores / settings.temperature)
            scores = scores + gumbel(stream, len(made), VOCABULARY)
        token = int(scores.argmax())
        if token in STOPS:
            return " ".join(map(str, made)), False
        made.append(token)
        ids.append(token)
    return " ".join(map(str, made)), True


def each_alone(model: Any, prompts: list[Ask], settings: Generation) -> list[list[tuple[str, bool]]]:
    return [[alone(model, ask, settings, n) for n in range(settings.samples)] for ask in prompts]


@torch.no_grad()
def together(model: Any, prompts: list[Ask], settings: Generation, places: int, **how: Any) -> Completions:
    return completions_of(model, Numbers(), prompts, settings, STOPS, places=places, **how)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_each_prompt_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "AHEAD", 3)  # the room is used up every few tokens
    monkeypatch.setattr(continuous, "READ", 40)
    model, prompts = model_of(family), asks(9)
    assert why_not(model) == ""
    ends = list[bool]()
    for settings in (GREEDY, SAMPLED):
        expected = each_alone(model, prompts, settings)
        ends += [cut for samples in expected for _, cut in samples]
        for places in (1, 4, 9):
            with torch.no_grad():
                assert together(model, prompts, settings, places).take(range(9)) == expected, (settings, places)
    assert any(ends) and not all(ends), "some end by themselves and some at the limit"


def test_prompts_may_be_asked_for_in_parts_and_in_any_order() -> None:
    model, prompts = model_of("llama"), asks(9)
    expected = each_alone(model, prompts, GREEDY)
    known = together(model, prompts, GREEDY, 2)
    with torch.no_grad():
        for part in (["r8", "r1"], ["r0"], ["r7", "r6", "r5", "r4", "r3", "r2"]):
            numbers = known.numbers(part)
            assert numbers is not None and known.take(numbers) == [expected[int(id[1:])] for id in part]
    assert known.numbers(["r0"]) is None and known.numbers(["elsewhere"]) is None
    assert known.done == known.total == 9 and known.tokens == sum(
        len(text.split()) + (not cut) for samples in expected for text, cut in samples
    )


def test_places_are_filled_as_rows_end_and_no_ended_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows go through the model than whole batches would read, and never more than there are places."""
    model, prompts = model_of("llama"), asks(16)
    shapes: list[tuple[int, int]] = []
    plain = model.forward

    def forward(*args: Any, **given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return plain(*args, **given)

    with torch.no_grad():
        known = together(model, prompts, GREEDY, 4)
        monkeypatch.setattr(model, "forward", forward)
        known.take(range(16))
    written = [rows for rows, width in shapes if width == 1]
    assert max(rows for rows, _ in shapes) <= 4
    assert sum(written) <= known.tokens, "a row is read for each token it says, and once it has ended no more"
    assert sum(rows == 4 for rows in written) > len(written) // 2


def test_duplicate_ids_in_a_batch_are_two_prompts() -> None:
    model, (first, second) = model_of("llama"), asks(2)
    ids = torch.tensor([[0] * (30 - len(ask.input_ids)) + ask.input_ids for ask in (first, second)])
    mask = torch.tensor([[0] * (30 - len(ask.input_ids)) + [1] * len(ask.input_ids) for ask in (first, second)])
    batch = {"input_ids": ids, "attention_mask": mask, "example_id": ["same", "same"]}
    assert complete(model, Numbers(), batch, GREEDY, STOPS) == each_alone(model, [first, second], GREEDY)


def test_adapters_generate_like_the_model_they_are_laid_around() -> None:
    from deft_lightning.models import LoRA
    from deft_lightning.models.lora import add_adapters

    model, prompts = model_of("llama"), asks(5)
    plain = each_alone(model, prompts, GREEDY)
    adapted = add_adapters(model, LoRA(r=2, init_lora_weights=False)).double().eval()
    assert type(adapted).__name__.startswith("Peft") and why_not(adapted) == ""
    expected = each_alone(adapted, prompts, GREEDY)
    assert expected != plain, "adapters that change nothing show nothing"
    with torch.no_grad():
        assert together(adapted, prompts, GREEDY, 3).take(range(5)) == expected


STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REASONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": ("mamba", {"state_size": 4}, "recurrent state"),
    "its own inputs": ("phi3", {"original_max_position_embeddings": 96}, "prepares its own inputs"),
    "stretched": (
        "llama",
        {"rope_parameters": STRETCHED},
        "positions",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REASONS)
def test_models_whose_rows_cannot_come_and_go_generate_whole_batches(name: str) -> None:
    family, shape, reason = REASONS[name]
    model, prompts = model_of(family, **shape), asks(5)
    assert reason in why_not(model)
    with torch.no_grad():
        assert together(model, prompts, SAMPLED, 2).take(range(5)) == each_alone(model, prompts, SAMPLED)


def test_a_generation_config_that_steers_the_search_is_named() -> None:
    model = model_of("llama")
    model.generation_config.repetition_penalty = 1.2  # overruled in each call
    assert why_not(model) == ""
    model.generation_config.suppress_tokens = [7]
    assert why_not(model) == "its generation config sets suppress_tokens"
    (sample,) = together(model, asks(1), GREEDY, 1).take([0])[0]
    assert "7" not in sample.text.split()


def test_slots_hold_each_row_right_before_the_common_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against lists of tokens, through growth, moves and rows of others that were not finite."""
    monkeypatch.setattr(slots, "AHEAD", 2)
    draw = torch.Generator().manual_seed(3)
    held, rows = Slots(5), list[list[float]]()

    def add(lengths: list[int], value: float | None = None) -> None:
        new = [torch.rand(n, generator=draw).tolist() if value is None else [value] * n for n in lengths]
        width = max(lengths) + 1
        padded = torch.tensor([[9.0] * (width - len(row)) + row for row in new])[:, None, :, None]
        prefilled = Cache(layers=[DynamicLayer()])
        prefilled.update(padded, -padded, 0)
        held.add(prefilled, lengths, 1)
        rows.extend(new)

    def write() -> None:
        token = torch.rand(len(rows), generator=draw)
        held.open()
        keys, values = held.cache.update(token[:, None, None, None], -token[:, None, None, None], 0)
        held.close()
        for row, one in zip(rows, token.tolist(), strict=True):
            row.append(one)
        assert keys.shape == (len(rows), 1, max(map(len, rows)), 1) and torch.equal(keys, -values)
        for i, row in enumerate(rows):
            assert keys[i, 0, keys.shape[2] - len(row) :, 0].tolist() == row
        assert bool(keys.isfinite().all()), "masked is not enough: 0 times NaN is NaN"
        assert held.cache.get_seq_length() == max(map(len, rows)) - 1

    def drop(row: int) -> None:
        held.drop(row)
        rows[row] = rows[-1]
        rows.pop()

    add([3, 1])
    for _ in range(4):
        write()
    add([9, 2])  # longer than any before
    write()
    drop(2)
    drop(0)
    for _ in range(7):
        write()
    add([6, 6], float("nan"))
    drop(3)
    drop(2)
    add([1])
    write()
    while rows:
        drop(0)
    add([2])
    for _ in range(9):
        write()


def test_a_tokenizer_without_padding_pads_with_zero() -> None:
    tokenizer, model = byte_tokenizer(), model_of("llama")
    tokenizer.pad_token_id = None
    with torch.no_grad():
        made = completions_of(model, tokenizer, asks(3), GREEDY, STOPS, places=3).take(range(3))
    assert len(made) == 3
