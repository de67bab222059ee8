"""Real files and a real tokenizer, where they are at hand beside the repository; small slices of what is large."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from deft_lightning.data import InstructionDataModule, Noise, ResponseSwap, TokenReplace
from deft_lightning.data.records.formats import detect_format, normalise
from deft_lightning.data.sources.read import read
from deft_lightning.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
STORIES = SHARED / "models" / "stories260K"


def shared(name: str) -> Path:
    """A file or folder there, or a skip that says which one is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def first_lines(name: str, n: int, folder: Path) -> Path:
    """The first rows of a large .jsonl file, in a file of their own."""
    target = folder / name
    with shared(f"data/{name}").open(encoding="utf-8") as file:
        target.write_text("".join(itertools.islice(file, n)), encoding="utf-8")
    return target


def parsed_row(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = (
        json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    )
    return rows


def spelled(ids: list[int]) -> str:
    """Tokens of the story model as text, by the letter: ▁ is a blank, and bytes are bytes."""
    tokenizer, raw = Tokenizer.from_file(str(STORIES / "tokenizer.json")), b""
    for piece in map(tokenizer.id_to_token, ids):
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    return raw.decode()


def prepared_file(source: Path, **options: Any) -> InstructionDataModule:
    data = InstructionDataModule(
        str(source),
        **{
            "tokenizer": str(shared("models/stories260K")),
            "max_length": 8192,
            "validation_fraction": 0.0,
            "batch_size": 8,
            **options,
        },
    )
    data.setup("fit")
    return data


def supervised_texts(data: InstructionDataModule) -> list[str]:
    """What each training example supervises, in no order."""
    return sorted(spelled(row[row != -100].tolist()) for batch in data.train_dataloader() for row in batch["labels"])


SVAMP = {"question": "Question", "answer": "Answer", "id": "ID"}
MATH500 = {"question": "problem", "answer": "solution", "id": "unique_id"}
FILES: dict[str, tuple[int, dict[str, str], str, str]] = {
    # file: (rows in it, column_map, format, the column that is learnt)
    "gsm8k_train.jsonl": (7473, {}, "question_answer", "answer"),
    "gsm8k_test.jsonl": (1319, {}, "question_answer", "answer"),
    "svamp_test.jsonl": (1000, SVAMP, "question_answer", "Answer"),
    "math500_test.jsonl": (500, MATH500, "question_answer", "solution"),
    "gpteacher_codegen.json": (4533, {}, "alpaca", "response"),
}
every_file = pytest.mark.parametrize("name", FILES)


@pytest.mark.slow
@every_file
def test_every_row_of_the_file_becomes_messages(name: str) -> None:
    count, column_map, format, response = FILES[name]
    path = shared(f"data/{name}")
    found = list(read(str(path)))
    assert len(found) == count
    assert detect_format(found[0][1], found[0][0], column_map) == format
    for (where, record), row in zip(found, parsed_row(path), strict=True):
        example = normalise(record, where, format, column_map)
        assert example.response == str(row[response])
        assert example.id == row[column_map["id"]] if column_map else example.id == example.digest


@pytest.mark.slow
@every_file
def test_the_response_alone_is_supervised_to_the_letter(tmp_path: Path, name: str) -> None:
    _, column_map, _, response = FILES[name]
    if name.endswith(".jsonl"):
        path = first_lines(name, 30, tmp_path)
    else:
        path = tmp_path / name
        path.write_text(json.dumps(parsed_row(shared(f"data/{name}"))[:30]))
    data = prepared_file(path, column_map=column_map)
    assert supervised_texts(data) == sorted(str(row[response]) + "</s>" for row in parsed_row(path))
    assert data.stop_token_ids == [data.tokenizer.eos_token_id]


def test_code_that_ends_in_blanks_is_supervised_with_them(tmp_path: Path) -> None:
    rows = [row for row in parsed_row(shared("data/gpteacher_codegen.json")) if row["response"][-1].isspace()]
    assert len(rows) > 20
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert supervised_texts(prepared_file(tmp_path / "rows.json")) == sorted(row["response"] + "</s>" for row in rows)


def test_prompts_of_one_file_are_generated_for_after_training_on_another(tmp_path: Path) -> None:
    test = first_lines("gsm8k_test.jsonl", 20, tmp_path)
    data = InstructionDataModule(
        str(first_lines("gsm8k_train.jsonl", 20, tmp_path)),
        tokenizer=str(shared("models/stories260K")),
        test_source=str(test),
        batch_size=8,
    )
    data.setup("test")
    golds, prompts = [], []
    for batch in data.test_dataloader():
        golds += batch["gold"]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            prompts.append(spelled(ids[mask].tolist()))
    assert golds == [row["answer"] for row in parsed_row(test)]
    # The tokenizer writes a blank before the first word of a text.
    wanted = [f"<s> <|im_start|>user\n{row['question']}</s> \n<|im_start|>assistant\n" for row in parsed_row(test)]
    assert prompts == wanted


def test_noise_on_real_rows_is_recorded_to_the_token(tmp_path: Path) -> None:
    path = first_lines("gsm8k_train.jsonl", 60, tmp_path)

    def by_id(noise: Noise) -> dict[str, tuple[list[int], list[int]]]:
        rows = {}
        for batch in prepared_file(path, noise=noise).train_dataloader():
            for i, id in enumerate(batch["example_id"]):
                keep = batch["labels"][i] != -100
                rows[id] = (batch["labels"][i][keep].tolist(), batch["noise_code"][i][keep].tolist())
        return rows

    clean = by_id(Noise())
    replaced = by_id(Noise(ops=[TokenReplace(rate=0.2, source="unigram")]))
    swapped = by_id(Noise(ops=[ResponseSwap(rate=0.3)]))
    assert len(clean) == 60 and not any(any(codes) for _, codes in clean.values())
    for id, (labels, codes) in replaced.items():
        assert codes == [int(a != b) for a, b in zip(labels, clean[id][0], strict=True)]
    wrong = {id for id in swapped if swapped[id][0] != clean[id][0]}
    assert 5 < len(wrong) < 40
    assert all(codes == [int(id in wrong)] * len(labels) for id, (labels, codes) in swapped.items())


def test_an_object_of_objects_is_no_list_of_rows_and_a_list_of_them_is() -> None:
    path = shared("data/pubmedqa_labeled.json")
    with pytest.raises(UserError, match="list of rows") as caught:
        next(read(str(path)))
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_long_answers_of_pubmedqa_are_supervised_under_a_column_map(tmp_path: Path) -> None:
    rows = list(json.loads(shared("data/pubmedqa_labeled.json").read_text(encoding="utf-8")).values())[:20]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = prepared_file(tmp_path / "rows.json", column_map={"question": "QUESTION", "answer": "LONG_ANSWER"})
    assert supervised_texts(data) == sorted(row["LONG_ANSWER"] + "</s>" for row in rows)
