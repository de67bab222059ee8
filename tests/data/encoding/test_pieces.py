"""A long text in pieces: the tokens and places of one go, or none; and the memory of a row of ten megabytes."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import test_template as made

from deft_lightning.data.encoding import pieces
from deft_lightning.data.encoding.offsets import encodings
from deft_lightning.data.encoding.pieces import Joined, in_pieces
from deft_lightning.data.encoding.tokenizer import build_tokenizer

WORDS = (
    "once", "upon", "a", "time", "I'll", "x = 12", "\n\n", "  ", "A", "cat's", "\u00e9t\u00e9", "e\u0301",
    "\u65e5\u672c", "\U0001f44d", "def f(x):\n    return", "</s>", "...", "\t", "1234567", "e", "of the user",
)  # fmt: skip


def text_of(seed: int, words: int = 3000) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " ", " ", "\n"]) for _ in range(words))


@pytest.fixture(params=["gpt2", "llama3", "built"])
def tokenizer(request: Any) -> Any:
    if request.param == "built":
        return build_tokenizer([text_of(9)], 400)
    return made.byte_level(pattern=made.GPT2 if request.param == "gpt2" else made.LLAMA3)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_give_the_tokens_and_places_of_one_go(tokenizer: Any, seed: int, monkeypatch: Any) -> None:
    text = text_of(seed)
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    plain = "once upon a time of the user and a cat " * 12
    for size in (2500, 4001, 9000):
        monkeypatch.setattr(pieces, "PIECE", size)
        parts = in_pieces(tokenizer, text)
        if parts is not None:
            assert parts.ids.tolist() == expected["input_ids"] and list(parts.places) == expected["offset_mapping"]
        mixed = "".join(text[at : at + 700] + plain for at in range(0, len(text), 700))
        long = in_pieces(tokenizer, mixed)
        assert long is not None
        whole = tokenizer(mixed, add_special_tokens=False, return_offsets_mapping=True)
        assert long.ids.tolist() == whole["input_ids"] and list(long.places) == whole["offset_mapping"]
        for letter in range(0, len(mixed), 997):
            assert long.places.before(letter) == sum(start < letter for start, _ in whole["offset_mapping"])


def test_a_text_without_a_place_to_cut_and_a_tokenizer_that_does_not_split_at_blanks_stay_whole() -> None:
    tokenizer = build_tokenizer(["once upon"], 300)
    for text in ("x" * 300_000, "\u65e5\u672c " * 100_000):
        assert in_pieces(tokenizer, text) is None
        ((ids, offsets),) = encodings(tokenizer, [text])
        assert not isinstance(offsets, Joined) and len(ids) == len(offsets)
    assert in_pieces(made.sentencepiece("first"), "once upon a time " * 20_000) is None


@pytest.mark.parametrize(
    "pattern", [r".+", r"\p{L}+ \p{L}+|\s+", r"(?<=a)\p{L}+|\s+", r"\p{L}+\s+|\s+", r"\p{N}+|\s+", r"^\p{L}+|\s+"]
)
def test_a_pattern_that_may_hold_a_blank_behind_a_word_is_not_divided(pattern: str) -> None:
    assert in_pieces(made.byte_level(pattern=pattern), "once upon a time " * 20_000) is None


ROW = """
import json, resource, sys
from deft_lightning import InstructionDataModule
folder = sys.argv[1]
small, large = ({"question": "Once upon?", "answer": "There was a cat in the house. " * n} for n in (1, 340_000))
def prepare(name, rows):
    with open(f"{folder}/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    options = {"validation_fraction": 0.0, "max_length": 128, "cache_dir": f"{folder}/cache", "tokenizer": sys.argv[2]}
    InstructionDataModule(f"{folder}/{name}.jsonl", **options).setup("fit")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = prepare("small", [small] * 20)
print(prepare("large", [large, small]) - before)
"""


@pytest.mark.slow
def test_a_row_of_ten_megabytes_that_is_cut_takes_less_than_400_mb(tmp_path: Any) -> None:
    build_tokenizer(["Once upon? There was a cat in the house."], 300).save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", ROW, str(tmp_path), str(tmp_path / "tokenizer")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) < 400
