"""Generation and its grader: a batch of padded prompts says what transformers says of each prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deft_lightning.data.examples import Prompt
from deft_lightning.data.loading.collate import PromptCollator
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation, complete, exact_match, generate
from deft_lightning.evaluation.evaluator import Evaluator

SPREAD = 0.4
PROMPTS = ["ab", "hello there, ", "x", "12345678"]


@pytest.mark.parametrize(
    ("completion", "gold", "same"),
    [
        ("42", "42", True),
        ("  42\n", "42", True),
        ("a\r\nb  \nc", "a\nb\nc", True),
        ("", "  \n ", True),
        ("Yes", "yes", False),
        ("a b", "a  b", False),
        ("a\n b", "a\nb", False),
        ("a\n\nb", "a\nb", False),
        ("42.", "42", False),
        ("42", "", False),
    ],
)
def test_exact_match_ignores_outer_blanks_and_line_ends_only(completion: str, gold: str, same: bool) -> None:
    assert exact_match(completion, gold) is same
    assert exact_match(gold, completion) is same


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"samples": 0},
        {"samples": 2},
        {"samples": 2, "temperature": 0.0},
    ],
    ids=str,
)
def test_generation_refuses_settings_that_contradict_each_other_in_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--model\.generation") as caught:
        Generation(**settings)
    assert "\n" not in str(caught.value)


def test_generation_takes_the_ends_of_its_ranges() -> None:
    Generation(temperature=0.0, top_p=1.0, max_new_tokens=1, samples=1)
    Generation(temperature=2.0, top_p=1e-3, samples=64)


def prompt_batch(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    collate = PromptCollator(tokenizer.pad_token_id)
    return collate([Prompt(f"id-{t}", tokenizer(t).input_ids, t, None) for t in texts])


def generated_alone(model: Any, tokenizer: Any, text: str, new_tokens: int, stops: list[int]) -> list[int]:
    """New tokens of one unpadded prompt by transformers' own greedy generation."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("padding", ["<|pad|>", "<|end|>"])
def test_greedy_completions_of_a_left_padded_batch_are_those_of_each_prompt_alone(
    padding: str, model: Any, tokenizer: Any
) -> None:
    """Also where padding is the end token, which stands within prompts of several turns too."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = padding
    texts = [*PROMPTS, "one<|end|>two<|end|>!"]
    batch = prompt_batch(tokenizer, texts)
    assert batch["attention_mask"].sum(1).unique().numel() == len(texts), "every prompt is padded differently"
    stops = [tokenizer.eos_token_id]
    found = complete(model, tokenizer, batch, Generation(max_new_tokens=12), stops)
    alone = [generated_alone(model, tokenizer, text, 12, stops) for text in texts]
    assert len({tuple(ids) for ids in alone}) == len(texts), "a model that always says the same shows nothing"
    for (sample,), ids in zip(found, alone, strict=True):
        assert sample.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert sample.truncated


def test_a_completion_ends_before_its_first_stop_token_and_is_not_truncated(model: Any, tokenizer: Any) -> None:
    free = [generated_alone(model, tokenizer, text, 12, [tokenizer.eos_token_id]) for text in PROMPTS]
    # A token one prompt says midway becomes a stop token; others may never say it.
    stop = next(t for t in free[0][2:] if t not in free[0][:2])
    found = complete(
        model,
        tokenizer,
        prompt_batch(tokenizer, PROMPTS),
        Generation(max_new_tokens=12),
        [tokenizer.eos_token_id, stop],
    )
    for (sample,), ids in zip(found, free, strict=True):
        end = ids.index(stop) if stop in ids else None
        assert sample.text == tokenizer.decode(ids[:end], skip_special_tokens=True)
        assert sample.truncated is (end is None)
    assert not found[0][0].truncated


def test_a_stop_token_as_the_very_last_one_does_not_count_as_truncated(model: Any, tokenizer: Any) -> None:
    first = generated_alone(model, tokenizer, "ab", 1, [tokenizer.eos_token_id])[0]
    ((sample,),) = complete(model, tokenizer, prompt_batch(tokenizer, ["ab"]), Generation(max_new_tokens=1), [first])
    assert sample == ("", False)


def sampled(model: Any, tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[list[str]]:
    generation = Generation(**{"max_new_tokens": 8, "temperature": 1.0, **settings})
    found = complete(model, tokenizer, prompt_batch(tokenizer, texts), generation, [tokenizer.eos_token_id])
    return [[sample.text for sample in samples] for samples in found]


def test_sampling_repeats_for_the_same_ids_and_seed_whatever_was_drawn_before(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = sampled(model, tokenizer, PROMPTS, seed=5)
    torch.manual_seed(2)
    torch.rand(7)
    assert sampled(model, tokenizer, PROMPTS, seed=5) == first


def test_another_seed_or_other_ids_sample_something_else(model: Any, tokenizer: Any) -> None:
    first = sampled(model, tokenizer, PROMPTS, seed=5)
    assert sampled(model, tokenizer, PROMPTS, seed=6) != first
    batch = prompt_batch(tokenizer, PROMPTS)
    batch["example_id"] = [f"other-{i}" for i in range(len(PROMPTS))]
    settings = Generation(max_new_tokens=8, temperature=1.0, seed=5)
    renamed = complete(model, tokenizer, batch, settings, [tokenizer.eos_token_id])
    assert [[s.text for s in samples] for samples in renamed] != first


def test_samples_stay_with_their_prompt(model: Any, tokenizer: Any) -> None:
    """At a temperature near 0 every sample is the greedy completion of its own prompt."""
    found = sampled(model, tokenizer, PROMPTS, samples=3, temperature=1e-4)
    greedy = [generated_alone(model, tokenizer, text, 8, [tokenizer.eos_token_id]) for text in PROMPTS]
    assert found == [[tokenizer.decode(ids, skip_special_tokens=True)] * 3 for ids in greedy]


def test_samples_of_one_prompt_differ_when_hot(model: Any, tokenizer: Any) -> None:
    (samples,) = sampled(model, tokenizer, ["ab"], samples=6, temperature=1.5)
    assert len(samples) == 6 and len(set(samples)) > 1


def test_a_tiny_top_p_samples_the_likeliest_token(model: Any, tokenizer: Any) -> None:
    found = sampled(model, tokenizer, PROMPTS, top_p=1e-6)
    greedy = [generated_alone(model, tokenizer, text, 8, [tokenizer.eos_token_id]) for text in PROMPTS]
    assert found == [[tokenizer.decode(ids, skip_special_tokens=True)] for ids in greedy]


def test_sampling_draws_from_the_whole_vocabulary_and_not_from_the_fifty_likeliest(model: Any, tokenizer: Any) -> None:
    """The default of transformers is top_k = 50; first tokens drawn at a high temperature go beyond that."""
    ids = tokenizer("ab", return_tensors="pt").input_ids
    with torch.no_grad():
        ranks = model(ids).logits[0, -1].argsort(descending=True).argsort()
    printable = {tokenizer.decode([t]): int(ranks[t]) for t in range(len(tokenizer)) if tokenizer.decode([t]).isascii()}
    (samples,) = sampled(model, tokenizer, ["ab"], samples=64, temperature=50.0, max_new_tokens=1)
    assert max(printable.get(text, -1) for text in samples) >= 50


def test_greedy_is_plain_greedy_whatever_the_models_own_generation_config_asks_for(model: Any, tokenizer: Any) -> None:
    penalised = copy.deepcopy(model)
    penalised.generation_config.repetition_penalty = 5.0
    penalised.generation_config.num_beams = 3
    settings, stops = Generation(max_new_tokens=12), [tokenizer.eos_token_id]
    batch = prompt_batch(tokenizer, PROMPTS)
    assert complete(penalised, tokenizer, batch, settings, stops) == complete(model, tokenizer, batch, settings, stops)
    assert generated_alone(penalised, tokenizer, "ab", 12, stops) != generated_alone(model, tokenizer, "ab", 12, stops)


@pytest.mark.parametrize("why_not", ["", "rows of this model cannot come and go"])
def test_prompts_go_where_the_batch_is_and_not_where_the_weights_wait(
    model: Any, tokenizer: Any, why_not: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that fsdp2 keeps in host memory say that the model is there."""
    batch = prompt_batch(tokenizer, ["ab", "abc"])

    def texts() -> list[list[str]]:
        samples = Evaluator(Generation(max_new_tokens=4)).complete(model, tokenizer, batch, [tokenizer.eos_token_id])
        return [[one.text for one in completions] for completions in samples]

    monkeypatch.setattr(generate, "why_not", lambda _: why_not)
    wanted = texts()
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    assert texts() == wanted
