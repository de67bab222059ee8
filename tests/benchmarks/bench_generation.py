"""Tokens a second of generation: prompts in data order by whole batches, against sorted prompts and refilled places.

    python tests/benchmarks/bench_generation.py --data DIR --model DIR [--random] [--repeats 3]
        [--rows 100] [--batch 64] [--new_tokens 256] [--samples 1] [--temperature 0]
        [--output docs/evidence/data/bench_generation.json]

DIR holds gsm8k_test.jsonl; the model is a folder. Both ways run in turn, a batch at a time, in one
process with one thread; the time is that of the processor. What differs between them is counted. With --random the
tokenizer alone is of the model: a Llama of 20 million random weights samples, and one token in a hundred ends a
completion, so that lengths are geometric with a mean of 100 tokens before the limit. That measures the batching alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from deft_lightning.evaluation import Completion, Generation
from deft_lightning.evaluation.batchwise import Batchwise
from deft_lightning.evaluation.completions import Ask, Completions
from deft_lightning.evaluation.generate import completions_of, warpers_of


def asks_of(tokenizer: Any, path: Path, rows: int) -> list[Ask]:
    """Prompts of the first rows: chats, or the first 100 letters of questions for a model without a template."""
    with path.open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line, _ in zip(file, range(rows), strict=False)]
    if tokenizer.chat_template is None:
        return [Ask(str(i), tokenizer(question[:100]).input_ids) for i, question in enumerate(questions)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    made = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True) for chat in chats]
    return [Ask(str(i), list(one["input_ids"])) for i, one in enumerate(made)]


def random_model(size: int) -> Any:
    """A Llama of eight layers whose predictions are nearly flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(
    model: Any, tokenizer: Any, asks: list[Ask], size: int, settings: Generation, stops: list[int]
) -> dict[str, Any]:
    """Seconds, tokens and completions of both ways."""
    n = settings.samples
    sampled = settings.temperature > 0
    before: list[list[Completion]] = []
    after: list[list[Completion]] = []
    seconds, tokens, windows = {"before": 0.0, "after": 0.0}, {"before": 0, "after": 0}, []
    ahead = completions_of(model, tokenizer, asks, settings, stops, places=size)
    for start in range(0, len(asks), size):
        part = asks[start : start + size]
        began = time.process_time()
        given = (
            warpers_of(settings),
            sampled,
            settings.seed,
            stops,
            settings.max_new_tokens,
            n,
            size,
            tokenizer.pad_token_id,
        )
        batch = Completions(part, Batchwise(model, *given), tokenizer, stops, n, size)
        before += batch.take(range(len(part)))
        seconds["before"] += (old := time.process_time() - began)
        tokens["before"] += batch.tokens
        began = time.process_time()
        after += ahead.take(range(start, start + len(part)))
        seconds["after"] += (new := time.process_time() - began)
        windows.append({"prompts": len(part), "before": old, "after": new})
        print(json.dumps(windows[-1]), flush=True)
    tokens["after"] = ahead.tokens
    pairs = [pair for rows in zip(before, after, strict=True) for pair in zip(*rows, strict=True)]
    return {
        "completions": len(pairs),
        "different": sum(a != b for a, b in pairs),
        "truncated": sum(b.truncated for _, b in pairs),
        "prompt tokens": sum(len(ask.input_ids) for ask in asks),
        "tokens": tokens,
        "CPU seconds": seconds,
        "tokens a second": {way: tokens[way] / seconds[way] for way in seconds},
        "ratio": tokens["after"] / seconds["after"] * seconds["before"] / tokens["before"],
        "windows": windows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.random:
        model, stops = random_model(len(tokenizer)), list(range(0, len(tokenizer), 100))
        options.temperature = options.temperature or 1.0
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        stops = [tokenizer.eos_token_id]
    settings = Generation(options.new_tokens, options.temperature, samples=options.samples)
    with torch.inference_mode():
        asks = asks_of(tokenizer, options.data / "gsm8k_test.jsonl", options.rows)
        found = {"batch": options.batch, "new tokens": options.new_tokens, "samples": options.samples}
        runs = [measure(model, tokenizer, asks, options.batch, settings, stops) for _ in range(options.repeats)]
        found["ratio, min median max"] = [f(run["ratio"] for run in runs) for f in (min, median, max)]
        found["runs"] = runs
    print(json.dumps(found, indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
