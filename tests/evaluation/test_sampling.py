"""Sampling: the known stream, the softmax it draws from, and completions that depend on nothing but their prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deft_lightning.data.examples import Prompt
from deft_lightning.data.loading.collate import PromptCollator
from deft_lightning.evaluation import Generation, complete
from deft_lightning.evaluation.sampling import GAMMA, KeyedGumbel, gumbel, splitmix

pytestmark = pytest.mark.slow

MASK = 2**64 - 1


def scalar_splitmix(state: int) -> int:
    """SplitMix64 in whole numbers without a sign."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix_gives_the_published_numbers_of_its_seed() -> None:
    stream = splitmix(torch.tensor([1234567]) + torch.arange(1, 6) * GAMMA)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(x) % 2**64 for x in stream] == expected


@pytest.mark.parametrize("state", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_splitmix_of_signed_numbers_is_that_of_unsigned_ones(state: int) -> None:
    assert int(splitmix(torch.tensor([state]))[0]) % 2**64 == scalar_splitmix(state)


def test_noise_is_a_function_of_key_position_and_token_alone() -> None:
    keys = torch.tensor([3, -7, 2**62])
    whole = gumbel(keys, 5, 40)
    assert whole.shape == (3, 40) and whole.dtype == torch.float64
    for i, key in enumerate(keys):
        assert torch.equal(gumbel(key.unsqueeze(0), 5, 40)[0], whole[i])
        assert torch.equal(gumbel(key.unsqueeze(0), 5, 10)[0], whole[i, :10])
    others = [gumbel(keys, 6, 40), gumbel(keys + 1, 5, 40)]
    assert all(float((other - whole).abs().min()) > 0 for other in others)


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    drawn = gumbel(torch.arange(2000), 0, 500).flatten()
    n = len(drawn)
    assert float(drawn.mean()) == pytest.approx(0.5772156649, abs=5 * 1.28 / n**0.5)
    assert float(drawn.var()) == pytest.approx(torch.pi**2 / 6, rel=0.01)
    assert bool(drawn.isfinite().all()) and float(drawn.max()) < 37
    # Neighbouring rows, positions and tokens have nothing to do with each other.
    rows = gumbel(torch.arange(2000), 0, 500), gumbel(torch.arange(2000), 1, 500)
    for a, b in ((rows[0], rows[1]), (rows[0][1:], rows[0][:-1]), (rows[0][:, 1:], rows[0][:, :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5 / n**0.5


def test_the_arg_max_of_noisy_scores_is_a_draw_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 20_000
    processor = KeyedGumbel([f"id{i}" for i in range(draws)], [0] * draws, 0, 3, "cpu")
    found = processor(torch.zeros(draws, 3), logits.expand(draws, -1)).argmax(1)
    share = torch.bincount(found, minlength=5) / draws
    expected = logits.softmax(0)
    error = (expected * (1 - expected) / draws).sqrt()
    assert bool(((share - expected).abs() <= 4.5 * error + 1e-9).all()), (share, expected)


# --- completions -----------------------------------------------------------------------------------------------------

SPREAD = 0.2
PROMPTS = ["ab", "hello there, ", "x", "12345678", "a longer prompt than the others"]


def completions(
    model: Any, tokenizer: Any, texts: Sequence[str], size: int, longest: int = 0, **settings: Any
) -> dict[str, list[tuple[str, bool]]]:
    """Samples by prompt, generated in batches of a size."""
    generation = Generation(**{"max_new_tokens": 12, "temperature": 1.0, "samples": 3, **settings})
    found = {}
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        rows = [Prompt(f"id-{t}", tokenizer(t).input_ids, t, None) for t in part]
        batch = PromptCollator(tokenizer.pad_token_id)(rows)
        made = complete(model, tokenizer, batch, generation, [tokenizer.eos_token_id], longest=longest)
        found |= dict(zip(part, made, strict=True))
    return found


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"temperature": 0.5, "samples": 1}], ids=str)
def test_completions_depend_on_neither_batch_size_nor_order(model: Any, tokenizer: Any, settings: Any) -> None:
    whole = completions(model, tokenizer, PROMPTS, 5, **settings)
    assert len({text for samples in whole.values() for text, _ in samples}) > len(PROMPTS) // 2
    for texts in (PROMPTS, PROMPTS[::-1], PROMPTS[2:] + PROMPTS[:2]):
        for size in (1, 2, 4):
            assert completions(model, tokenizer, texts, size, **settings) == whole


def test_where_positions_run_out_completions_do_not_depend_on_their_batch(model: Any, tokenizer: Any) -> None:
    texts = ["ab", "x" * 100, "12345678"]  # of 128 positions
    longest = max(len(tokenizer(text).input_ids) for text in texts)
    found = [completions(model, tokenizer, texts, size, max_new_tokens=60, longest=longest) for size in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    assert any(cut for samples in found[0].values() for _, cut in samples)
    alone = completions(model, tokenizer, texts[:1], 1, max_new_tokens=60)["ab"]
    assert any(len(text) > len(short) for (text, _), (short, _) in zip(alone, found[0]["ab"], strict=True))


def test_more_samples_keep_the_first_ones(model: Any, tokenizer: Any) -> None:
    few, many = (completions(model, tokenizer, PROMPTS, 5, samples=n) for n in (2, 6))
    assert {text: samples[:2] for text, samples in many.items()} == few


def test_longer_completions_begin_with_the_shorter_ones(model: Any, tokenizer: Any) -> None:
    short, long = (completions(model, tokenizer, PROMPTS, 5, max_new_tokens=n) for n in (6, 20))
    for text in PROMPTS:
        for (a, cut), (b, _) in zip(short[text], long[text], strict=True):
            assert a == b if not cut else b.encode("utf-8", "replace").startswith(a.rstrip("\ufffd").encode())


def test_what_torch_draws_is_left_alone(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    completions(model, tokenizer, PROMPTS, 5)
    assert torch.equal(torch.rand(3), expected)


def test_first_tokens_are_distributed_as_the_model_says(model: Any, tokenizer: Any) -> None:
    """Of one prompt under many ids."""
    ids, draws = tokenizer("ab").input_ids, 3000
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].softmax(0)
    rows = [Prompt(f"row {i}", ids, "ab", None) for i in range(draws)]
    batch = PromptCollator(tokenizer.pad_token_id)(rows)
    spelled = copy.copy(tokenizer)
    spelled.decode = lambda tokens, **_: ",".join(map(str, tokens))
    made = complete(model, spelled, batch, Generation(max_new_tokens=1, temperature=1.0), [])
    counts = torch.bincount(torch.tensor([int(s.text) for (s,) in made]), minlength=len(expected))
    likely = expected > 5 / draws
    seen, wanted = counts[likely].double(), draws * expected[likely].double()
    chi = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = int(likely.sum())
    assert freedom > 20 and chi < freedom + 5 * (2 * freedom) ** 0.5
