"""How well the audit's scores tell corrupted rows of real text from clean ones, with a real model.

    python tests/benchmarks/bench_audit_rows.py --model DIR --source gsm8k_test.jsonl --rows 200 [--output FILE.json]

Half of the rows are corrupted, once by each of three operations: a wrong final answer, another row's answer, five
percent of the labels replaced. The statistics are those of the two passes of ``probe``, in float32. Rows that follow
each other share a prompt, which is read once. Scores are the
package's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from deft_lightning import InstructionDataModule
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.company import Group, better_read, by_member, chains_of, groups_of
from deft_lightning.data.loading.unprompted import Frame, frame_of_split
from deft_lightning.data.noise import AnswerCorrupt, Noise, NoiseOp, ResponseSwap, TokenReplace
from deft_lightning.functional import token_stats
from deft_lightning.hashing import uniform
from deft_lightning.probe.scores import Tokens, last_numbers, score_rows
from deft_lightning.probe.truth import truth_record

FIELDS = ("target", "correct", "log_prob", "collision")  # of a row with its prompt


class Reader:
    """Hidden states of rows; what a row has in common with the row before in front is not read again."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self._new = model, DynamicCache
        self._cache, self._ids, self._hidden = DynamicCache(), list[int](), torch.zeros(0, model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Return the last hidden states of a row."""
        shared = 0
        while shared < min(len(ids), len(self._ids)) and ids[shared] == self._ids[shared]:
            shared += 1
        if not shared:
            self._cache = self._new()
        elif shared < len(self._ids):
            self._cache.crop(shared - len(self._ids))
        if shared < len(ids):
            rest = torch.tensor([list(ids[shared:])])
            out = self.model.model(rest, past_key_values=self._cache, use_cache=True).last_hidden_state[0]
            self._hidden = torch.cat([self._hidden[:shared], out])
        else:
            self._hidden = self._hidden[:shared]
        self._ids = list(ids)
        return self._hidden

    def stats(self, row: Prepared) -> tuple[np.ndarray, ...]:
        """Return target, whether it is the first choice, log p and C of the supervised tokens of a row."""
        keep = torch.from_numpy(row.labels[1:] != -100)
        hidden = self(row.input_ids.tolist())[:-1][keep]
        target = torch.from_numpy(row.labels[1:])[keep]
        with torch.no_grad():
            stats = token_stats(self.model.lm_head(hidden), target)
        return target.numpy(), stats.correct.numpy(), stats.log_prob.numpy(), stats.collision.numpy()


def modules(source: Any, tokenizer: str, style: str) -> dict[str, InstructionDataModule]:
    """Return the rows clean, and corrupted by each operation wherever it can be."""
    answer: Any = AnswerCorrupt(rate=1.0, style=style)
    operations: dict[str, list[NoiseOp]] = {
        # Swapped among half of the rows: no answer stands in the file twice, once right and once wrong.
        "clean": [], "AnswerCorrupt": [answer], "ResponseSwap": [ResponseSwap(rate=0.5)],
        "TokenReplace 5 %": [TokenReplace(rate=0.05)],
    }  # fmt: skip
    made = {}
    for name, ops in operations.items():
        made[name] = InstructionDataModule(
            source, validation_fraction=0.0, max_length=1024, tokenizer=tokenizer, noise=Noise(ops=ops), cache=False
        )
        made[name].prepare_data()
        made[name].setup("fit")
    return made


def read(model: str, data: dict[str, InstructionDataModule], say: Callable[[int], None]) -> dict[str, list[Any]]:
    """Return the tokens of every row as each operation leaves it, ``(noisy, arrays)``; half of them are corrupted."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reader, clean = Reader(loaded), data["clean"]
    count = clean.size("train")
    rows: dict[str, list[tuple[bool, Prepared, dict[str, Any]]]] = {name: [] for name in data if name != "clean"}

    def tokens(row: Prepared) -> dict[str, Any]:
        return dict(zip(FIELDS, reader.stats(row), strict=True))

    for at in range(count):
        own, half = clean.example("train", at), uniform("half", clean.example("train", at).id) < 0.5
        kept = tokens(own)
        for name in rows:
            row = replace(data[name].example("train", at), weight=None)
            picked = half or name == "ResponseSwap"
            if picked and (row.noise_code > 0).any():
                rows[name].append((True, row, tokens(row)))
            elif not half or name == "ResponseSwap":
                rows[name].append((False, own, dict(kept)))
        say(at + 1)
    frame = frame_of_split(count, partial(clean.example, "train"))
    for of_operation in rows.values():
        for at, chance in in_company([row for _, row, _ in of_operation], frame, reader).items():
            of_operation[at][2]["bare"] = chance
    return {name: [(noisy, values) for noisy, _, values in of_operation] for name, of_operation in rows.items()}


def in_company(rows: Sequence[Prepared], frame: Frame, reader: Reader) -> dict[int, Any]:
    """Return ``log q`` of the labels of each row, after other answers and without its prompt."""
    values: dict[int, Any] = {}

    def read(groups: Sequence[Group]) -> float:
        total = 0.0
        for group in groups:
            chains, whole = chains_of(group, rows.__getitem__, frame)
            found = by_member(chains, [reader.stats(chain.row)[2] for chain in chains])
            values.update({at: np.full_like(row, np.nan) if at in whole else row for at, row in found.items()})
            total += sum(float(row.sum()) for row in found.values())
        return total

    read(better_read(groups_of(range(len(rows))), read))
    return values


def scored(rows: Sequence[Any], text: Callable[[int], str]) -> tuple[Tokens, list[bool]]:
    """Return rows as the scores want them."""
    arrays = {field: np.concatenate([row[field] for _, row in rows]) for field in (*FIELDS, "bare")}
    counts = np.array([len(row["target"]) for _, row in rows])
    numbers = {field: arrays[field].astype(np.float64) for field in ("log_prob", "collision", "bare")}
    number, last = last_numbers(counts, [text(int(token)) for token in arrays["target"]])
    tokens = Tokens(counts, arrays["target"], arrays["correct"], **numbers, number=number, last=last)
    return tokens, [noisy for noisy, _ in rows]


def keep_tokens(path: Path, tokens: Tokens, noisy: Sequence[bool]) -> None:
    """Write the tokens of a file, and which of its rows are noisy: scores are compared without reading it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, noisy=np.array(noisy), **tokens._asdict())


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal model with its tokenizer")
    parser.add_argument("--source", required=True, help="file of rows")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="rows to leave out in front")
    parser.add_argument("--style", default="gsm8k", help="where AnswerCorrupt looks for the answer")
    parser.add_argument("--output", help="JSON to write")
    parser.add_argument("--keep", help="folder for the tokens, which bench_audit_candidates.py reads")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    lines = Path(options.source).read_text(encoding="utf-8").splitlines()[options.first : options.first + options.rows]
    data = modules([json.loads(line) for line in lines], options.model, options.style)
    result = {}
    for name, rows in read(options.model, data, lambda row: print(f"{row} rows", file=sys.stderr)).items():
        tokens, noisy = scored(rows, lambda token: str(data["clean"].tokenizer.decode([token])))
        if options.keep:
            keep_tokens(Path(options.keep) / f"{Path(options.source).stem} {name}.npz", tokens, noisy)
        record = result[name] = truth_record(None, score_rows(tokens).scores, noisy)
        print(f"{name}: {record['noisy']} of {record['known']} rows noisy; {record['first']}")
        for score, row in record["scores"].items():
            print(f"  {score:10} {row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
