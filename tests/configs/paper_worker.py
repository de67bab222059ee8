"""The paper's configurations on stand-in models; as a script, one rank of ``fit`` with several of them.

``python paper_worker.py FOLDER`` with LOCAL_RANK, WORLD_SIZE and MASTER_* set joins the other ranks, runs the real
command line with the pairs for that number of ranks and leaves ``<WORLD_SIZE>-<RANK>.json`` in FOLDER, what it found.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from paper_pairs import PAIRS, options, parts
from worlds import whole_tensor

from deft_lightning.cli.main import DeftCLI
from deft_lightning.data.encoding.template import chatml
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.models import from_architecture

# Run by two ranks: of each task one pair an architecture, tied and untied. The others by one, which takes less.
PAIRED = {
    "math-qwen2.5-math-1.5b", "math-llama-3.1-8b", "medical-qwen2.5-7b", "medical-llama-3.2-3b",
    "figfont-qwen2.5-1.5b", "figfont-deepseek-math-7b",
}  # fmt: skip
# Of 256 examples a step a rank of eight has 32, so no row comes twice.
STEPS, ROWS = 2, 64
UNDRAWN = [  # figures take longer than the steps
    "--dashboard.curve", "false", "--gate_monitor.histograms", "false", "--entropy_monitor.histograms", "false",
]  # fmt: skip
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip
# What the stand-ins have of the real models: architecture, tying, whether heads share keys and values.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-math-1.5b": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2.5-math-7b": {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 2},
    "qwen2.5-1.5b": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2.5-7b": {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 2},
    "llama-3.1-8b": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 1},
    "llama-3.2-3b": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "deepseek-math-7b": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
}
# End of sequence first; one token a byte for everything else.
SPECIAL = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "deepseek": ("<|end of sentence|>",),
}


def tokenizer_of(model: str) -> Any:
    """A tokenizer with the special tokens of the real one, and ChatML where that one has a template."""
    end, *others = next(tokens for family, tokens in SPECIAL.items() if model.startswith(family))
    tokenizer = build_tokenizer([], 0)
    tokenizer.add_special_tokens({"eos_token": end, "pad_token": end})
    tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.chat_template = None
    if model.startswith("qwen"):
        tokenizer.chat_template = chatml(tokenizer)
    return tokenizer


def make_model(model: str, folder: Path) -> None:
    """Leave a stand-in with its tokenizer in a folder."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(model)
    network = from_architecture({**SHAPE, **MODELS[model]}, tokenizer, "float32")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def question(i: int) -> str:
    return f"Which number follows {i}?\nA. {i + 1}\nB. {i - 1}"


def row_of(task: str, i: int) -> dict[str, Any]:
    """A row with the columns of the authors' file."""
    if task == "math":
        return {"extra_info": {"question": f"{i} + {i} = ?", "answer": f"Twice {i} is $\\boxed{{{2 * i}}}$."}}
    asked, answer = question(i), f"One more than {i}.\n\n\\boxed{{A}}"
    qwen = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{asked}\nBox it.<|im_end|>\n"
    llama = f"<|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>"
    llama += f"<|start_header_id|>user<|end_header_id|>\n\n{asked}\nBox it.<|eot_id|>"
    return {
        "extra_info": {
            "question": asked,
            "qwen_prompt": f"{qwen}<|im_start|>assistant\n",
            "llama_prompt": f"{'<|begin_of_text|>' * 2}{llama}<|start_header_id|>assistant<|end_header_id|>\n\n",
            "qwen_reponse_no_thinking": answer,
            "llama_reponse_no_thinking": answer,
        }
    }


def prepare_stand_ins(root: Path) -> None:
    """Leave models and rows where :func:`arguments` looks for them."""
    for model in MODELS:
        make_model(model, root / "models" / model)
    import pyarrow as pa
    import pyarrow.parquet as pq

    for task in ("math", "medical"):
        pq.write_table(pa.Table.from_pylist([row_of(task, i) for i in range(2 * ROWS)]), root / f"{task}.parquet")


def source_of(task: str, root: Path, ranks: int) -> str:
    """Where the rows of a dry run are; of FigFont the task itself, a few rows of a small font."""
    few = f"reasoning_gym:figlet_font?size={ranks * ROWS}&seed=42&min_word_len=2&max_word_len=5&static_font=mini"
    return few if task == "figfont" else f"{root / task}.parquet?limit={ranks * ROWS}"


def arguments(verb: str, pair: str, root: Path, ranks: int, *more: str) -> list[str]:
    """The command line of a pair with a stand-in model and its rows in place of the real ones."""
    task, model = parts(pair)
    return [
        verb, *options(pair), "--model.pretrained", str(root / "models" / model),
        "--data.source", source_of(task, root, ranks), "--data.cache_dir", str(root / "cache"),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--trainer.log_every_n_steps", str(STEPS),
        "--trainer.default_root_dir", str(root / "logs" / pair), "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", *more,
    ]  # fmt: skip


def fit(pair: str, root: Path, ranks: int) -> dict[str, Any]:
    """What two steps of a pair did."""
    from transformers import AutoModelForCausalLM

    cli = DeftCLI(arguments("fit", pair, root, ranks, "--trainer.max_steps", str(STEPS), *UNDRAWN))
    trainer, module = cli.trainer, cli.model
    before = dict(AutoModelForCausalLM.from_pretrained(root / "models" / parts(pair)[1]).named_parameters())
    after = {name: whole_tensor(parameter) for name, parameter in module.model.named_parameters()}
    optimizer, group = trainer.optimizers[0], trainer.optimizers[0].param_groups[0]
    report = cli.datamodule.reports["train"]
    return {
        "strategy": type(trainer.strategy).__name__,
        "bfloat16": trainer.strategy.low_precision,
        "shares": sorted({str(parameter.dtype) for parameter in module.model.parameters()}),
        "sharded": all(hasattr(parameter, "placements") for parameter in module.model.parameters()),
        "fused": module.batch_loss.seam is not None,
        "checkpointing": any(getattr(layer, "gradient_checkpointing", False) for layer in module.model.modules()),
        "objective": repr(module.objective),
        "optimizer": [type(optimizer).__name__, group["initial_lr"], *group["betas"], group["weight_decay"]],
        "steps": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx + 1,
        "rows": report.examples,
        "supervised": report.supervised,
        "tokens_seen": module.tokens_seen,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "still": [name for name in before if torch.equal(before[name], after[name])],
        "finite": all(bool(value.isfinite().all()) for value in after.values()),
        "export": str(Path(trainer.log_dir) / "export"),
    }


def main() -> None:
    """Run the pairs for this number of ranks as one of them."""
    root, ranks = Path(sys.argv.pop(1)), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    found = {}
    for pair in PAIRS:
        if (pair in PAIRED) == (ranks == 2):
            print(f"pair: {pair}", flush=True)
            found[pair] = fit(pair, root, ranks)
    (root / f"{ranks}-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
