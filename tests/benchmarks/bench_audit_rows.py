"""How well the audit's scores tell corrupted rows of real text from clean ones, with a real model.

    python tests/benchmarks/bench_audit_rows.py --model DIR --source gsm8k_test.jsonl --rows 200 [--output FILE.json]
    python tests/benchmarks/bench_audit_rows.py --model DIR --source svamp_test.jsonl --form svamp --style last_number

Half of the rows are corrupted, once by each of three operations: a wrong final answer, another row's answer, five
percent of the labels replaced. The statistics are those of the two passes of ``probe``, in float32. Rows that follow
each other share a prompt, which is read once. Scores are the
package's own. Solutions that models have written are read as they are: their column ``wrong`` is the truth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from audit_sources import FORMS, rows_of
from torch import Tensor

from deft_lightning import InstructionDataModule
from deft_lightning.atomic import whole_file
from deft_lightning.data.examples import Prepared
from deft_lightning.data.loading.company import Company, written_out
from deft_lightning.data.noise import AnswerCorrupt, Noise, NoiseOp, ResponseSwap, TokenReplace
from deft_lightning.functional import IGNORE_INDEX, token_stats
from deft_lightning.hashing import uniform
from deft_lightning.probe.bare import TRIED
from deft_lightning.probe.scores import Tokens, last_numbers, score_rows
from deft_lightning.probe.truth import truth_record

FIELDS = ("target", "correct", "log_prob", "collision")  # of a row with its prompt


class Reader:
    """Hidden states of rows; what a row has in common with the row before in front is not read again.

    Args:
        folder: Of a causal model.
        kept: Folder where the results of rows are kept, so that a run that was killed goes on; None keeps none.
    """

    def __init__(self, folder: str, kept: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.kept, self._new = kept, DynamicCache
        self._cache, self._ids = DynamicCache(), list[int]()
        self._hidden = torch.zeros(0, self.model.config.hidden_size)

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
        if self.kept is None:
            return self._computed(row)
        digest = blake2b(row.input_ids.tobytes() + row.labels.tobytes(), digest_size=16).hexdigest()
        file = self.kept / f"{digest}.npz"
        if not file.exists():
            with whole_file(file) as partial_file, partial_file.open("wb") as out:
                np.savez(out, *self._computed(row))
        with np.load(file, allow_pickle=False) as arrays:
            return tuple(arrays[name] for name in arrays.files)

    def _computed(self, row: Prepared) -> tuple[np.ndarray, ...]:
        keep = torch.from_numpy(row.labels[1:] != -100)
        hidden = self(row.input_ids.tolist())[:-1][keep]
        target = torch.from_numpy(row.labels[1:])[keep]
        with torch.no_grad():
            stats = token_stats(self.model.lm_head(hidden), target)
        return target.numpy(), stats.correct.numpy(), stats.log_prob.numpy(), stats.collision.numpy()


def modules(source: Any, tokenizer: str, style: str, corrupted: bool) -> dict[str, InstructionDataModule]:
    """Return the rows clean, and if wanted corrupted by each operation wherever it can be."""
    answer: Any = AnswerCorrupt(rate=1.0, style=style)
    operations: dict[str, list[NoiseOp]] = {
        # Swapped among half of the rows: no answer stands in the file twice, once right and once wrong.
        "clean": [], "AnswerCorrupt": [answer], "ResponseSwap": [ResponseSwap(rate=0.5)],
        "TokenReplace 5 %": [TokenReplace(rate=0.05)],
    }  # fmt: skip
    made = {}
    for name, ops in (operations if corrupted else {"clean": operations["clean"]}).items():
        made[name] = InstructionDataModule(
            source, validation_fraction=0.0, max_length=1024, tokenizer=tokenizer, noise=Noise(ops=ops), cache=False
        )
        made[name].prepare_data()
        made[name].setup("fit")
    return made


def halves(data: dict[str, InstructionDataModule]) -> dict[str, list[tuple[bool, Prepared]]]:
    """Return whether each row is noisy, and the row, by operation; half of the rows are corrupted."""
    clean = data["clean"]
    rows: dict[str, list[tuple[bool, Prepared]]] = {name: [] for name in data if name != "clean"}
    for at in range(clean.size("train")):
        own = clean.example("train", at)
        half = uniform("half", own.id) < 0.5
        for name, of_operation in rows.items():
            row = replace(data[name].example("train", at), weight=None)
            picked = half or name == "ResponseSwap"
            if picked and (row.noise_code > 0).any():
                of_operation.append((True, row))
            elif not half or name == "ResponseSwap":
                of_operation.append((False, own))
    return rows


def marked(data: InstructionDataModule) -> list[tuple[bool, Prepared]]:
    """Return whether each row is noisy by its column ``wrong``, and the row."""
    truth = data.truths("wrong")
    rows = [data.example("train", at) for at in range(data.size("train"))]
    return [(bool(truth[row.id]), row) for row in rows]


def read(reader: Reader, rows: Sequence[Prepared], say: Callable[[int], None]) -> list[dict[str, Any]]:
    """Return the arrays of every row, those of its tokens behind the prompt and without it."""
    values = []
    for row in rows:
        values.append(dict(zip(FIELDS, reader.stats(row), strict=True)))
        say(len(values))
    for at, chance in in_company(rows, reader).items():
        values[at]["bare"] = chance
    return values


def in_company(rows: Sequence[Prepared], reader: Reader) -> dict[int, Any]:
    """Return ``log q`` of the labels of each row, behind other answers; NaN where it has no prompt to leave out."""
    company = Company(len(rows), rows.__getitem__, np.array([len(row.input_ids) for row in rows]))
    answers = [company.of(at, row) for at, row in enumerate(rows)]

    def log_prob(at: int, alone: bool) -> Any:
        answer = answers[at]
        behind = answer._replace(ahead=answer.ahead[: answer.frame]) if alone else answer
        ids, labels = written_out(behind)
        return reader.stats(replace(rows[at], input_ids=ids, labels=labels, noise_code=np.zeros_like(labels)))[2]

    asked = [at for at, answer in enumerate(answers) if len(answer.input_ids)]
    few = np.random.default_rng([len(asked), 1]).permutation(len(asked))[:TRIED].tolist()
    by_itself, behind = (sum(float(log_prob(asked[i], way).sum()) for i in few) for way in (True, False))
    values = {at: log_prob(at, by_itself > behind) for at in asked}
    labels = {at: int((row.labels[1:] != IGNORE_INDEX).sum()) for at, row in enumerate(rows)}
    return {at: values.get(at, np.full(count, np.nan, np.float32)) for at, count in labels.items()}


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
    parser.add_argument("--form", default="rows", choices=FORMS, help="of the file")
    parser.add_argument("--style", default="gsm8k", help="where AnswerCorrupt looks for the answer")
    parser.add_argument("--only", help="one operation alone")
    parser.add_argument("--cache", help="folder where what is read of a row is kept: a killed run goes on")
    parser.add_argument("--output", help="JSON to write")
    parser.add_argument("--keep", help="folder for the tokens, which bench_audit_candidates.py reads")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    source = rows_of(Path(options.source), options.form)[options.first : options.first + options.rows]
    data = modules(source, options.model, options.style, corrupted=options.form != "solutions")
    clean = data["clean"]
    files = halves(data) if len(data) > 1 else {"wrong": marked(clean)}
    if options.only:
        files = {options.only: files[options.only]}
    reader = Reader(options.model, Path(options.cache) if options.cache else None)
    result = {}
    for name, labelled in files.items():

        def say(row: int, name: str = name, of: int = len(labelled)) -> None:
            print(f"{name}: {row} of {of} rows", file=sys.stderr)

        found = read(reader, [row for _, row in labelled], say)
        rows = [(noisy, values) for (noisy, _), values in zip(labelled, found, strict=True)]
        tokens, noisy = scored(rows, lambda token: str(data["clean"].tokenizer.decode([token])))
        if options.keep:
            first, last = options.first + 1, options.first + len(source)
            keep_tokens(Path(options.keep) / f"{Path(options.source).stem} {first}-{last}, {name}.npz", tokens, noisy)
        record = result[name] = truth_record(None, score_rows(tokens).scores, noisy)
        print(f"{name}: {record['noisy']} of {record['known']} rows noisy; {record['first']}")
        for score, row in record["scores"].items():
            print(f"  {score:10} {row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
