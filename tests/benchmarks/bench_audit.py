"""How well the audit finds noise: token scores and example scores against injected errors.

    python tests/benchmarks/bench_audit.py --model DIR [--output docs/evidence/data/bench_audit.json]

The text is what the model itself writes: stories sampled at two temperatures, cut at the end of a sentence into prompt
and response, so that the model knows the text as well as a model can. Noise is this package's own, the pass is that of
``probe``. Printed is the AUROC of each candidate for the score of a token (corrupted against clean tokens), and of the
same candidates over examples (corrupted against clean examples) pooled over their tokens in four ways.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning._lightning import attach
from deft_lightning.data.noise import CharNoise, Noise, NoiseOp, ResponseSwap, TokenReplace
from deft_lightning.functional import TokenStats
from deft_lightning.metrics import exact_auroc
from deft_lightning.probe import conflict, example_score
from deft_lightning.training.verbs.probe import load

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CANDIDATES: dict[str, Callable[[TokenStats], Tensor]] = {
    "conflict = max(0, log C/p)": conflict,
    "-log p": lambda s: -s.log_prob,
    "1 - p": lambda s: -s.log_prob.expm1(),
    "-log p - H": lambda s: -s.log_prob - s.entropy,
    "C (1 - p)": lambda s: s.collision * -s.log_prob.expm1(),
    "C^0.5 (-log p)": lambda s: s.collision.sqrt() * -s.log_prob,
    "C (-log p)": lambda s: s.collision * -s.log_prob,
    "1 - p^C (DEFT's gate)": lambda s: -(s.collision * s.log_prob).expm1(),
}
EXAMPLES: dict[str, Callable[[Tensor], float]] = {
    "rms": example_score,
    "mean": lambda values: float(values.mean()),
    "top three": lambda values: float(values.topk(min(3, len(values))).values.mean()),
    "largest": lambda values: float(values.max()),
}
# At 20 % every example has wrong tokens: of them, the tokens are told apart. At 0.5 % about half of the examples do.
NOISE: dict[str, NoiseOp] = {
    "TokenReplace 20 %, labels": TokenReplace(rate=0.2),
    "TokenReplace 20 %, text": TokenReplace(rate=0.2, target="text"),
    "TokenReplace 20 %, confusable": TokenReplace(rate=0.2, source="confusable"),
    "TokenReplace 0.5 %, labels": TokenReplace(rate=0.005),
    "CharNoise 20 %": CharNoise(rate=0.2),
    "ResponseSwap 20 %": ResponseSwap(rate=0.2),
}


def sampled_stories(model: Any, tokenizer: Any, count: int, temperature: float) -> list[dict[str, str]]:
    """Sample rows of prompt and response; a story without the end of a sentence in its middle is left out."""
    torch.manual_seed(0)
    rows = []
    for start in range(0, count, 100):
        ids = torch.full((min(100, count - start), 1), tokenizer.bos_token_id)
        made = model.generate(ids, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=200, pad_token_id=0)
        for i, row in enumerate(made.tolist()):
            text = tokenizer.decode(row[1:], skip_special_tokens=True)
            cut = text.find(". ", 150) + 1
            if 0 < cut < len(text) - 100:
                rows.append({"id": f"{start + i}", "prompt": text[:cut], "completion": text[cut:]})
    return rows


@torch.no_grad()
def measure(model: str, source: str, op: NoiseOp, folder: str) -> dict[str, Any]:
    """Return the AUROC of every candidate, over tokens and over examples."""
    data = InstructionDataModule(
        source, validation_fraction=0, chat_template=PLAIN, noise=Noise(ops=[op]), batch_size=32, cache=False
    )
    module = SFTModule(pretrained=model)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=folder, enable_progress_bar=False)
    attach(trainer, module, data)
    data.prepare_data()
    data.setup("fit")
    load(trainer, module, None)
    module.eval()
    values: dict[str, list[Tensor]] = {name: [] for name in CANDIDATES}
    codes: list[Tensor] = []
    for _, batch in data.batches_of("train", data.spread("train")):
        stats, keep = module.statistics(batch)
        counts = keep.sum(1).tolist()
        codes += (batch["noise_code"][:, 1:][keep] > 0).split(counts)
        for name, score in CANDIDATES.items():
            values[name] += score(stats).split(counts)
    hit, known = torch.cat(codes), torch.tensor([bool(code.any()) for code in codes])
    nll = torch.cat(values["-log p"])
    result: dict[str, Any] = {
        "examples": len(codes), "noisy_examples": int(known.sum()), "tokens": len(hit), "noisy_tokens": int(hit.sum()),
        "nll_clean": float(nll[~hit].mean()), "nll_noisy": float(nll[hit].mean()), "scores": {},
    }  # fmt: skip
    for name, parts in values.items():
        result["scores"][name] = {"tokens": apart(torch.cat(parts), hit)} | {
            way: apart(torch.tensor([score(part) for part in parts]), known) for way, score in EXAMPLES.items()
        }
    return result


def apart(scores: Tensor, positive: Tensor) -> float | None:
    """AUROC; None where there is one kind only."""
    if positive.all() or not positive.any():
        return None
    return exact_auroc(scores[positive].tolist(), scores[~positive].tolist())


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a small causal model that writes stories")
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--output", help="JSON to write")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for temperature in (0.7, 1.0):
            rows = sampled_stories(model, tokenizer, options.stories, temperature)
            source = Path(folder) / f"stories-{temperature}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            for name, op in NOISE.items():
                result = found[f"T {temperature}: {name}"] = measure(options.model, str(source), op, folder)
                print(
                    f"\nT {temperature}, {name}: {result['noisy_examples']} of {result['examples']} examples,"
                    f" {result['noisy_tokens']} of {result['tokens']} tokens noisy; NLL"
                    f" {result['nll_clean']:.2f} clean, {result['nll_noisy']:.2f} noisy"
                )
                print(" " * 28 + "".join(f"{way:>11}" for way in ("tokens", *EXAMPLES)))
                for score, row in result["scores"].items():
                    print(f"{score:28}" + "".join(f"{_n(value):>11}" for value in row.values()))
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
