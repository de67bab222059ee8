"""Files in, batches out: the split, what is cut and dropped, padding, noise codes, order, ranks and workers."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import on_rank, write
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler

from deft_lightning.data import InstructionDataModule, Noise, ResponseSwap, TokenReplace
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.loading.sampler import ShardedSampler
from deft_lightning.errors import UserError

Rows = list[dict[str, Any]]


def qa(n: int, start: int = 0) -> Rows:
    """Rows that all differ, with questions and answers of several lengths."""
    return [
        {"question": f"What is {i} + {i}" + "?" * (1 + i % 3), "answer": f"{i} + {i} is {2 * i}" + "!" * (i % 5)}
        for i in range(start, start + n)
    ]


def make(folder: Path, rows: Iterable[object], **options: Any) -> InstructionDataModule:
    """A data module of the rows, a quarter of them held out."""
    options = {"validation_fraction": 0.25, "batch_size": 4, **options}
    return InstructionDataModule(write(folder / "rows.jsonl", rows), **options)


def set_up(folder: Path, rows: Iterable[object], **options: Any) -> InstructionDataModule:
    data = make(folder, rows, **options)
    data.setup("fit")
    return data


def saved_tokenizer(folder: Path) -> str:
    build_tokenizer([json.dumps(row) for row in qa(50)], 300).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


class Line(NamedTuple):
    """One example of a batch without its padding."""

    ids: list[int]
    labels: list[int]
    codes: list[int]

    @property
    def clean(self) -> list[int]:
        return [label for label in self.labels if label != -100]


def lines_of(loader: Any) -> dict[str, Line]:
    """Examples of a loader by id; an id that comes twice is an error."""
    found: dict[str, Line] = {}
    for batch in loader:
        for i, id in enumerate(batch["example_id"]):
            assert id not in found
            keep = batch["attention_mask"][i].bool()
            found[id] = Line(*(batch[key][i][keep].tolist() for key in ("input_ids", "labels", "noise_code")))
    return found


def answers(data: InstructionDataModule, loader: Any) -> list[str]:
    """What is supervised, as text, sorted; the end of the turn is taken off."""
    texts = [data.tokenizer.decode(line.clean) for line in lines_of(loader).values()]
    assert all(text.endswith("<|end|>") for text in texts)
    return sorted(text.removesuffix("<|end|>") for text in texts)


def validation(data: InstructionDataModule, noisy: bool = False) -> Any:
    """The loader of clean validation rows, or the one of corrupted rows beside it."""
    found = data.val_dataloader()
    return found[int(noisy)] if isinstance(found, list) and found else found


def sides(data: InstructionDataModule) -> tuple[list[str], list[str]]:
    return answers(data, data.train_dataloader()), answers(data, data.val_dataloader())


def refused(data: InstructionDataModule, stage: str = "fit") -> str:
    """The message of setting up, which must be a single line."""
    with pytest.raises(UserError) as caught:
        data.setup(stage)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- the split ------------------------------------------------------------------------------------------------------


def test_shuffling_the_file_leaves_the_split_and_every_token_unchanged(tmp_path: Path) -> None:
    rows = qa(120)
    ordered = set_up(tmp_path, rows)
    expected = [lines_of(loader) for loader in (ordered.train_dataloader(), ordered.val_dataloader())]
    random.Random(0).shuffle(rows)
    shuffled = set_up(tmp_path, rows)
    assert [lines_of(loader) for loader in (shuffled.train_dataloader(), shuffled.val_dataloader())] == expected
    assert all(len(side) > 10 for side in expected) and not set(expected[0]) & set(expected[1])


def test_more_rows_move_no_row_to_the_other_side(tmp_path: Path) -> None:
    few, more = sides(set_up(tmp_path, qa(80))), sides(set_up(tmp_path, [*qa(60, start=80), *qa(80)]))
    assert set(few[0]) < set(more[0]) and set(few[1]) < set(more[1])


def test_the_name_and_the_layout_of_the_file_do_not_matter(tmp_path: Path) -> None:
    expected = sides(set_up(tmp_path, qa(80)))
    (tmp_path / "other.json").write_text(json.dumps({"rows": qa(80)}, indent=1))
    with (tmp_path / "other.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["answer", "question", "id"])
        writer.writeheader()
        writer.writerows({**row, "id": f"row-{i}"} for i, row in enumerate(qa(80)))
    for name in ("other.json", "other.csv"):
        data = InstructionDataModule(str(tmp_path / name), validation_fraction=0.25)
        data.setup("fit")
        assert sides(data) == expected


def test_copies_of_a_row_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"id": f"{i}-{copy}", **row} for copy in range(4) for i, row in enumerate(qa(60))]
    data = set_up(tmp_path, rows)
    train, validation = (
        {id.split("-")[0] for id in lines_of(x)} for x in (data.train_dataloader(), data.val_dataloader())
    )
    assert not train & validation and len(train | validation) == 60 and len(validation) > 5
    assert len(lines_of(data.train_dataloader())) == 4 * len(train)


@pytest.mark.slow
def test_the_held_out_share_is_the_one_asked_for(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(1500), validation_fraction=0.3, tokenizer_size=1)
    held_out = data.reports["validation"].examples
    assert abs(held_out - 450) < 5 * math.sqrt(1500 * 0.3 * 0.7)
    assert held_out + data.reports["train"].examples == 1500


def test_what_is_held_out_at_a_small_fraction_is_held_out_at_a_larger_one(tmp_path: Path) -> None:
    small, large = (set(sides(set_up(tmp_path, qa(150), validation_fraction=f))[1]) for f in (0.1, 0.4))
    assert small < large


@pytest.mark.slow
def test_another_seed_holds_out_others(tmp_path: Path) -> None:
    zero, one = (set(sides(set_up(tmp_path, qa(400), seed=seed))[1]) for seed in (0, 1))
    assert len(zero & one) < 0.5 * min(len(zero), len(one))


def test_without_a_fraction_everything_is_trained_on_and_there_is_no_validation(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = set_up(tmp_path, qa(9), validation_fraction=0.0)
    assert answers(data, data.train_dataloader()) == sorted(row["answer"] for row in qa(9))
    assert data.val_dataloader() == []


def test_a_file_too_small_to_hold_anything_out_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no validation"):
        data = set_up(tmp_path, qa(3), validation_fraction=1e-6)
    assert data.val_dataloader() == [] and len(lines_of(data.train_dataloader())) == 3


def test_a_file_of_which_nothing_is_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    assert "--data.validation_fraction" in refused(make(tmp_path, qa(1) * 5, validation_fraction=1 - 1e-9))


def test_a_validation_source_replaces_the_held_out_rows(tmp_path: Path) -> None:
    held_out = write(tmp_path / "validation.jsonl", qa(7, start=100))
    train, validation = sides(set_up(tmp_path, qa(20), validation_source=held_out, validation_fraction=0.9))
    assert train == sorted(row["answer"] for row in qa(20))
    assert validation == sorted(row["answer"] for row in qa(7, start=100))


def test_the_built_tokenizer_has_not_seen_the_validation_rows(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", qa(5))
    other = write(tmp_path / "other.jsonl", [{"question": "zzzz qqqq zzzz " * 50, "answer": "zzzz qqqq " * 50}])
    vocabularies = [set_up(tmp_path, qa(20), validation_source=v).tokenizer.get_vocab() for v in (one, other)]
    assert vocabularies[0] == vocabularies[1]


# --- one more conversation ------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_learnt_and_the_last_one_is_generated(tmp_path: Path) -> None:
    talk = [("system", "s"), ("user", "a?"), ("assistant", "first"), ("user", "b?"), ("assistant", "second")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in talk]}]
    data = set_up(tmp_path, rows, validation_source=write(tmp_path / "validation.jsonl", rows))
    (line,) = lines_of(data.train_dataloader()).values()
    assert data.tokenizer.decode(line.clean) == "first<|end|>second<|end|>"
    (batch,) = data.test_dataloader()
    assert batch["gold"] == ["second"]
    assert batch["prompt"] == [
        "<|system|>s<|end|><|user|>a?<|end|><|assistant|>first<|end|><|user|>b?<|end|><|assistant|>"
    ]
    assert batch["input_ids"][0].tolist() == line.ids[: len(line.ids) - len(data.tokenizer("second<|end|>").input_ids)]


def test_text_is_learnt_as_a_whole_and_there_is_nothing_to_generate_for(tmp_path: Path) -> None:
    data = set_up(tmp_path, [{"text": f"Once upon a time {i}."} for i in range(20)])
    for line in lines_of(data.train_dataloader()).values():
        assert line.labels == [-100, *line.ids[1:]]
        assert data.tokenizer.decode(line.ids).startswith("Once upon a time")
    with pytest.raises(UserError, match=r"--data\.test_source"):
        data.predict_dataloader()


def test_the_first_row_decides_the_format_and_a_row_of_another_is_named(tmp_path: Path) -> None:
    message = refused(make(tmp_path, [*qa(2), {"instruction": "a", "output": "b"}]))
    assert "row 3" in message and "'question'" in message


def test_column_map_and_format_reach_the_rows(tmp_path: Path) -> None:
    rows = [{"extra": {"q": row["question"]}, "gold": row["answer"], "text": "not this"} for row in qa(12)]
    data = set_up(tmp_path, rows, column_map={"question": "extra.q", "answer": "gold"}, validation_fraction=0.0)
    assert answers(data, data.train_dataloader()) == sorted(row["answer"] for row in qa(12))
    data = set_up(tmp_path, rows, format="text", validation_fraction=0.0)
    assert {data.tokenizer.decode(line.ids) for line in lines_of(data.train_dataloader()).values()} == {
        "not this<|end|>"
    }


# --- truncation and what is dropped ---------------------------------------------------------------------------------


def test_examples_are_cut_at_the_end_and_counted(tmp_path: Path) -> None:
    rows = [*qa(10), {"question": "long?", "answer": "word " * 60}]
    whole = lines_of(set_up(tmp_path, rows, validation_fraction=0.0, max_length=1000).train_dataloader())
    longest = sorted(len(line.ids) for line in whole.values())
    data = set_up(tmp_path, rows, validation_fraction=0.0, max_length=longest[-2])
    cut = lines_of(data.train_dataloader())
    assert longest[-1] > longest[-2] == data.longest
    assert cut == {id: Line(*(field[: longest[-2]] for field in line)) for id, line in whole.items()}
    report = data.reports["train"]
    assert (report.examples, report.truncated, report.dropped) == (11, 1, 0)
    assert report.tokens == sum(len(line.ids) for line in cut.values())
    assert report.supervised == sum(len(line.clean) for line in cut.values())
    assert "1 truncated" in str(report)


def warned(data: InstructionDataModule, recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(one.message) for one in recwarn if "max_length" in str(one.message)]


@pytest.mark.parametrize("few", [False, True])
def test_responses_that_are_cut_are_told_with_the_lengths_at_which_they_would_not_be(
    few: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    count = 1 if few else 4
    long = [{"question": f"{i}?", "answer": "word " * (10 * i + 20)} for i in range(count)]
    rows = [*qa(36), *long]
    lengths = sorted(len(line.ids) for line in lines_of(
        set_up(tmp_path, rows, validation_fraction=0.0, max_length=1000).train_dataloader()
    ).values())  # fmt: skip
    recwarn.clear()
    data = set_up(tmp_path, rows, validation_fraction=0.0, max_length=lengths[-count] - 3)
    (line,) = warned(data, recwarn)
    report = data.reports["train"]
    assert report.cut == report.truncated == count and report.longer == dict.fromkeys(lengths[-count:], 1)
    total = 36 + count
    # 38 of 40 examples are 95 %; with one long row among 37 it is so already.
    needed = "" if few else f"{lengths[-3]} leaves 95% of the examples whole, {lengths[-1]} all of them"
    needed = needed or f"{lengths[-1]} leaves all of them whole"
    verb, size = "response is" if few else "responses are", lengths[-count] - 3
    assert line == f"train: {count} of {total} {verb} cut by --data.max_length {size} ({count / total:.1%}); {needed}"
    # The lengths hold what is said of them.
    for length, share in ((lengths[-1], 1.0), (lengths[-3], 0.95)):
        again = set_up(tmp_path, rows, validation_fraction=0.0, max_length=length).reports["train"]
        assert again.examples - again.truncated >= share * total


def test_where_only_prompts_are_cut_no_response_is_said_to_be(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = [*qa(10), {"question": "word " * 60, "answer": "yes"}]
    data = set_up(tmp_path, rows, validation_fraction=0.0, max_length=60, keep="end")
    assert data.reports["train"].truncated == 1 and data.reports["train"].cut == 0
    assert not warned(data, recwarn)


@pytest.mark.parametrize("short", [0, 1])
def test_a_length_that_cuts_every_end_is_not_blamed_on_the_template(
    short: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    rows = [*({"question": f"{i}?", "answer": "word " * 60} for i in range(20)), *qa(short)]
    data = set_up(tmp_path, rows, validation_fraction=0.0, max_length=40)
    lines = warned(data, recwarn)
    assert lines[0].startswith(f"train: 20 of {20 + short} responses are cut by --data.max_length 40 (")
    if short:
        assert len(lines) == 1 and data.stop_token_ids, "one whole response shows where responses end"
    else:
        assert len(lines) == 2 and lines[1].endswith("raise --data.max_length")
    assert not any("chat_template" in str(one.message) for one in recwarn)


def test_a_length_that_leaves_nothing_names_one_that_does(tmp_path: Path) -> None:
    rows = [{"question": "word " * 60 + str(i), "answer": "yes"} for i in range(12)]
    with pytest.raises(UserError, match=r"--data\.max_length 40 cuts off every .* of all 12 examples; \d+ leaves all"):
        set_up(tmp_path, rows, validation_fraction=0.0, max_length=40)


def test_rows_that_lose_every_label_are_dropped_and_counted(tmp_path: Path) -> None:
    long = [{"question": f"{i} " + "word " * 200, "answer": "yes"} for i in range(3)]
    data = set_up(tmp_path, [*qa(10), *long], validation_fraction=0.0, max_length=100)
    assert answers(data, data.train_dataloader()) == sorted(row["answer"] for row in qa(10))
    report = data.reports["train"]
    assert (report.examples, report.dropped) == (10, 3)
    assert "3 dropped" in str(report) and "max_length" in str(report)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_whose_rows_are_all_masked_is_an_error_that_names_max_length(tmp_path: Path, split: str) -> None:
    long = [{"question": f"{i} " + "word " * 200, "answer": "yes"} for i in range(3)]
    rows, held_out = (long, qa(3)) if split == "train" else (qa(3), long)
    data = make(tmp_path, rows, validation_source=write(tmp_path / "validation.jsonl", held_out), max_length=60)
    message = refused(data)
    assert "--data.max_length" in message and "3 examples" in message and split in message


def test_rows_of_tokens_without_a_label_are_dropped(tmp_path: Path) -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": labels} for labels in ([-100, 8, 9], [-100] * 3, [7, -100, -100])]
    data = set_up(tmp_path, rows, validation_fraction=0.0, tokenizer=saved_tokenizer(tmp_path))
    assert [line.labels for line in lines_of(data.train_dataloader()).values()] == [[-100, 8, 9]]
    assert data.reports["train"].dropped == 2


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_batches_are_padded_on_the_right(tmp_path: Path, split: str) -> None:
    data = set_up(tmp_path, qa(60), noise=Noise(splits=["train", "validation"], ops=[TokenReplace(rate=0.3)]))
    pad, padded = data.tokenizer.pad_token_id, 0
    for batch in data.train_dataloader() if split == "train" else validation(data, noisy=True):
        assert set(batch) == {
            "input_ids", "attention_mask", "labels", "noise_code", "example_id", "num_tokens", "clean_labels",
            "is_noisy", "segment", "supervised_at",
        }  # fmt: skip
        mask, shape = batch["attention_mask"], batch["input_ids"].shape
        assert {key: batch[key].dtype for key in ("input_ids", "attention_mask", "labels", "noise_code")} == {
            "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64, "noise_code": torch.int8,
        }  # fmt: skip
        assert all(batch[key].shape == shape for key in ("attention_mask", "labels", "noise_code"))
        assert shape[0] == len(batch["example_id"]) <= 4 and all(isinstance(id, str) for id in batch["example_id"])
        lengths = mask.sum(1)
        assert mask.tolist() == [[1] * n + [0] * (shape[1] - n) for n in lengths.tolist()]
        assert int(lengths.max()) == shape[1] and batch["num_tokens"] == int(lengths.sum())
        flat = [i for i, label in enumerate(batch["labels"].flatten().tolist()) if label != -100 and i % shape[1]]
        assert batch["supervised_at"].tolist() == flat
        behind = mask == 0
        assert (batch["input_ids"][behind] == pad).all() and (batch["labels"][behind] == -100).all()
        assert not batch["noise_code"][behind].any() and not (batch["input_ids"][~behind] == pad).any()
        padded += int(behind.sum())
    assert padded


def test_padding_with_the_end_of_sequence_leaves_the_end_of_turn_supervised(tmp_path: Path) -> None:
    tokenizer = build_tokenizer([json.dumps(row) for row in qa(50)], 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = set_up(tmp_path, qa(60), tokenizer=str(tmp_path / "tokenizer"))
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    assert set(sides(data)[0]) | set(sides(data)[1]) == {row["answer"] for row in qa(60)}
    for batch in data.train_dataloader():
        ends = (batch["labels"] == data.tokenizer.eos_token_id).sum(1)
        assert ends.tolist() == [1] * len(ends)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_prompts_are_padded_on_the_left_and_bring_their_gold(tmp_path: Path, stage: str) -> None:
    rows = [{"id": f"row-{i}", **row} for i, row in enumerate(qa(30, start=95))]
    data = make(tmp_path, qa(40), test_source=write(tmp_path / "test.jsonl", rows), eval_batch_size=7)
    data.setup(stage)
    loader = data.test_dataloader() if stage == "test" else data.predict_dataloader()
    seen, padded = [], 0
    for batch in loader:
        assert set(batch) == {"input_ids", "attention_mask", "example_id", "prompt", "gold", "record"}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert mask.tolist() == [[0] * (ids.shape[1] - n) + [1] * n for n in mask.sum(1).tolist()]
        assert mask[:, -1].all() and int(mask.sum(1).max()) == ids.shape[1]
        assert (ids[mask == 0] == data.tokenizer.pad_token_id).all()
        padded += int((mask == 0).sum())
        for row, keep, text in zip(ids, mask.bool(), batch["prompt"], strict=True):
            assert data.tokenizer.decode(row[keep]) == text
        seen += list(zip(batch["example_id"], batch["prompt"], batch["gold"], strict=True))
    expected = [(row["id"], f"<|user|>{row['question']}<|end|><|assistant|>", row["answer"]) for row in rows]
    assert seen == expected and padded


def test_training_and_evaluation_have_batch_sizes_of_their_own(tmp_path: Path) -> None:
    def sizes(loader: Any) -> list[int]:
        return [len(batch["example_id"]) for batch in loader]

    held_out = write(tmp_path / "validation.jsonl", qa(5))
    data = set_up(tmp_path, qa(10), validation_source=held_out, batch_size=4)
    assert sizes(data.train_dataloader()) == [4, 4, 2] and sizes(data.val_dataloader()) == [4, 1]
    data = set_up(tmp_path, qa(10), validation_source=held_out, batch_size=4, eval_batch_size=3)
    assert sizes(data.train_dataloader()) == [4, 4, 2]
    assert sizes(data.val_dataloader()) == sizes(data.test_dataloader()) == sizes(data.predict_dataloader()) == [3, 2]


def test_by_default_test_and_predict_are_about_the_held_out_rows(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(80))
    expected = sides(data)[1]
    assert expected
    for stage in ("test", "predict"):
        fresh = make(tmp_path, qa(80))
        fresh.setup(stage)
        loader = fresh.test_dataloader() if stage == "test" else fresh.predict_dataloader()
        assert sorted(gold for batch in loader for gold in batch["gold"]) == expected


def test_with_nothing_held_out_there_is_nothing_to_test_and_the_options_are_named(tmp_path: Path) -> None:
    data = make(tmp_path, qa(8), validation_fraction=0.0)
    data.setup("test")
    with pytest.raises(UserError, match=r"--data\.test_source or --data\.validation_fraction"):
        data.test_dataloader()


# --- noise ----------------------------------------------------------------------------------------------------------


def test_codes_of_replaced_tokens_reach_the_batch(tmp_path: Path) -> None:
    clean = lines_of(set_up(tmp_path, qa(80)).train_dataloader())
    data = set_up(tmp_path, qa(80), noise=Noise(ops=[TokenReplace(rate=0.3)]))
    noisy = lines_of(data.train_dataloader())
    assert set(noisy) == set(clean)
    for id, line in noisy.items():
        assert line.ids == clean[id].ids
        assert line.codes == [int(a != b) for a, b in zip(line.labels, clean[id].labels, strict=True)]
    marked = sum(sum(line.codes) for line in noisy.values())
    assert marked == data.reports["train"].noisy > 0
    assert data.reports["train"].noisy_examples == sum(any(line.codes) for line in noisy.values())
    assert f"{marked / data.reports['train'].supervised:.1%}" in str(data.reports["train"])


def test_codes_of_swapped_responses_reach_the_batch(tmp_path: Path) -> None:
    clean = set_up(tmp_path, qa(80))
    expected = lines_of(clean.train_dataloader())
    data = set_up(tmp_path, qa(80), noise=Noise(ops=[TokenReplace(rate=0.0), ResponseSwap(rate=0.5)]))
    noisy = lines_of(data.train_dataloader())
    assert set(noisy) == set(expected)
    swapped = {id for id in noisy if noisy[id].ids != expected[id].ids}
    assert 10 < len(swapped) < len(noisy)
    for id, line in noisy.items():
        assert line.codes == [2 * (id in swapped and label != -100) for label in line.labels]
    assert answers(data, data.train_dataloader()) == answers(clean, clean.train_dataloader())


@pytest.mark.parametrize("target", ["labels", "text"])
def test_special_tokens_are_never_drawn(tmp_path: Path, target: Any) -> None:
    data = set_up(tmp_path, qa(80), noise=Noise(ops=[TokenReplace(rate=1.0, target=target)]), tokenizer_size=1)
    special = set(data.tokenizer.all_special_ids)
    drawn = {label for line in lines_of(data.train_dataloader()).values() for label in line.clean}
    assert len(special) == 6 and len(drawn) > 200 and not drawn & special


def test_unigram_draws_from_the_labels_of_the_clean_training_rows(tmp_path: Path) -> None:
    held_out = write(tmp_path / "validation.jsonl", [{"question": "zq?", "answer": "zzqq"}])
    clean = set_up(tmp_path, qa(80), validation_source=held_out, tokenizer_size=1)
    spoken = {label for line in lines_of(clean.train_dataloader()).values() for label in line.clean}
    noise = Noise(splits=["train", "validation"], ops=[TokenReplace(rate=1.0, source="unigram")])
    data = set_up(tmp_path, qa(80), validation_source=held_out, tokenizer_size=1, noise=noise)
    for loader in (data.train_dataloader(), validation(data, noisy=True)):
        drawn = {label for line in lines_of(loader).values() for label in line.clean}
        assert drawn and drawn <= spoken - {data.tokenizer.eos_token_id}


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", [TokenReplace(rate=0.4), TokenReplace(rate=0.4, target="text"), ResponseSwap(rate=0.4)], ids=repr
)
def test_noise_does_not_depend_on_order_batches_or_truncation(tmp_path: Path, op: Any) -> None:
    rows, noise = qa(60), Noise(ops=[op])
    expected = lines_of(set_up(tmp_path, rows, noise=noise).train_dataloader())
    assert any(any(line.codes) for line in expected.values())
    random.Random(1).shuffle(rows)
    assert lines_of(set_up(tmp_path, rows, noise=noise, batch_size=7).train_dataloader()) == expected
    short = min(len(line.ids) for line in expected.values())
    cut = lines_of(set_up(tmp_path, rows, noise=noise, max_length=short).train_dataloader())
    assert cut == {id: Line(*(field[:short] for field in line)) for id, line in expected.items()} != expected


# --- rows that cannot be used ---------------------------------------------------------------------------------------

SPOILT: list[object] = [*qa(3), {"question": "why?", "answer": ""}, [1, 2], *qa(3, start=3), {"question": "and?"}]


def test_a_bad_row_stops_by_default_with_file_row_and_field(tmp_path: Path) -> None:
    message = refused(make(tmp_path, SPOILT))
    assert f"{tmp_path / 'rows.jsonl'}, row 4" in message and "'answer'" in message


@pytest.mark.parametrize("format", ["auto", "question_answer"])
def test_bad_rows_are_skipped_counted_and_the_first_is_shown(tmp_path: Path, format: str) -> None:
    with pytest.warns(UserWarning, match=r"skipped 3 rows.*row 4, field 'answer': is empty"):
        data = set_up(tmp_path, SPOILT, on_bad_row="skip", format=format, validation_fraction=0.0)
    assert answers(data, data.train_dataloader()) == sorted(row["answer"] for row in qa(6))


def test_a_first_row_that_is_bad_does_not_decide_the_format(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="skipped 2 rows.*row 1"):
        data = set_up(tmp_path, [{}, {"question": "a"}, *qa(5)], on_bad_row="skip", validation_fraction=0.0)
    assert len(lines_of(data.train_dataloader())) == 5


def test_a_line_that_is_not_json_is_a_bad_row_too(tmp_path: Path) -> None:
    data = make(tmp_path, qa(3), on_bad_row="skip", validation_fraction=0.0)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"question": "cut o\n' + json.dumps(qa(1, start=9)[0]) + "\n")
    with pytest.warns(UserWarning, match="skipped 1 row.*row 4: is not JSON"):
        data.setup("fit")
    assert answers(data, data.train_dataloader()) == sorted(row["answer"] for row in [*qa(3), *qa(1, start=9)])


def test_good_rows_alone_are_not_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        set_up(tmp_path, qa(40), on_bad_row="skip")


@pytest.mark.filterwarnings("ignore:.*skipped 2 rows.*")
def test_if_every_row_is_bad_skipping_is_an_error_that_shows_the_first(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": " "}, {"question": "b", "answer": ""}]
    message = refused(make(tmp_path, rows, on_bad_row="skip", format="question_answer"))
    assert "no usable row" in message and "row 1" in message and "is empty" in message


def test_half_a_surrogate_pair_is_one_line_that_names_the_row(tmp_path: Path) -> None:
    # JSON can say it, in text that was cut within an emoji; UTF-8 cannot.
    (tmp_path / "rows.jsonl").write_text(r'{"question": "a", "answer": "cut \ud83d"}' + "\n")
    data = InstructionDataModule(str(tmp_path / "rows.jsonl"), validation_fraction=0.0)
    assert "row 1" in refused(data)


def test_rows_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    refusing = "{% for m in messages %}{% if '1' in m['content'] %}{{ raise_exception('no ones') }}{% endif %}"
    template = refusing + "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    message = refused(make(tmp_path, qa(3), validation_fraction=0.0, chat_template=template))
    assert "rows.jsonl, row 2" in message and "no ones" in message


# --- rows without a response ----------------------------------------------------------------------------------------

PROMPTS: dict[str, tuple[str, Rows, Rows]] = {
    # format: (option, training rows, rows to predict)
    "messages": (
        "auto",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4,
        [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(3)],
    ),
    "sharegpt": (
        "auto",
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 4,
        [{"conversations": [{"from": "human", "value": f"q{i}"}]} for i in range(3)],
    ),
    "question_answer, named": ("question_answer", qa(4), [{"question": f"q{i}"} for i in range(3)]),
    "question_answer, recognised": ("auto", qa(4), [{"question": f"q{i}"} for i in range(3)]),
    "question_answer, null": ("question_answer", qa(4), [{"question": f"q{i}", "answer": None} for i in range(3)]),
    "prompt_completion, named": (
        "prompt_completion",
        [{"prompt": "a", "completion": "b"}] * 4,
        [{"prompt": f"q{i}"} for i in range(3)],
    ),
    "alpaca, recognised": (
        "auto",
        [{"instruction": "a", "output": "b"}] * 4,
        [{"instruction": f"q{i}"} for i in range(3)],
    ),
}
every_prompt = pytest.mark.parametrize(("format", "train", "rows"), PROMPTS.values(), ids=PROMPTS.keys())


@every_prompt
def test_rows_without_a_response_can_be_predicted(tmp_path: Path, format: Any, train: Rows, rows: Rows) -> None:
    source = write(tmp_path / "test.jsonl", rows)
    data = make(tmp_path, train, format=format, test_source=source, validation_fraction=0.0)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == [f"<|user|>q{i}<|end|><|assistant|>" for i in range(3)]
    assert batch["gold"] == [None] * 3


@every_prompt
def test_rows_without_a_response_cannot_be_tested(tmp_path: Path, format: Any, train: Rows, rows: Rows) -> None:
    source = write(tmp_path / "test.jsonl", rows)
    data = make(tmp_path, train, format=format, test_source=source, validation_fraction=0.0)
    data.setup("test")
    with pytest.raises(UserError) as caught:
        data.test_dataloader()
    message = str(caught.value)
    assert "test.jsonl, row 1" in message and len(message.splitlines()) == 1


def test_a_conversation_that_ends_with_the_user_cannot_be_tested(tmp_path: Path) -> None:
    talk = [("user", "a?"), ("assistant", "b"), ("user", "c?")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    data = make(tmp_path, rows, test_source=write(tmp_path / "test.jsonl", rows), validation_fraction=0.0)
    data.setup("test")
    with pytest.raises(UserError, match="response in every row"):
        data.test_dataloader()
    (batch,) = data.predict_dataloader()
    assert batch["gold"] == [None] and batch["prompt"][0].endswith("<|user|>c?<|end|><|assistant|>")


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        ["a"] * 5,
        ["a", "b", "a", "b", "a"],
        ["a", "a#2", "a", "a", "b"],
        ["a", "a", "a#2", "a#2", "a"],
        [1, "1", 1, 2, 3],
    ],
    ids=str,
)
def test_ids_that_repeat_are_made_unique_whatever_the_order_of_the_rows(tmp_path: Path, ids: list[Any]) -> None:
    rows = [{"id": id, **row} for id, row in zip(ids, qa(5), strict=True)]
    names: list[dict[str, tuple[int, ...]]] = []
    for order in (rows, rows[::-1], rows[2:] + rows[:2]):
        data = set_up(tmp_path, order, validation_fraction=0.0)
        names.append({id: tuple(line.ids) for id, line in lines_of(data.train_dataloader()).items()})
    assert len(names[0]) == len(set(names[0].values())) == 5
    assert names[0] == names[1] == names[2]
    written = [str(id) for id in ids]
    assert {id for id in written if written.count(id) == 1} <= set(names[0])


def test_copies_of_a_row_are_examples_of_their_own(tmp_path: Path) -> None:
    # Each draws its own noise, so that a copy of a wrong row can be right.
    data = set_up(tmp_path, qa(1) * 40, validation_fraction=0.0, noise=Noise(ops=[TokenReplace(rate=0.5)]))
    found = lines_of(data.train_dataloader())
    assert len(found) == 40 and len({tuple(line.codes) for line in found.values()}) > 20


# --- tokens and tokenizers ------------------------------------------------------------------------------------------


def test_rows_of_tokens_need_the_tokenizer_they_were_made_with(tmp_path: Path) -> None:
    message = refused(make(tmp_path, [{"input_ids": [1, 2, 3]}], validation_fraction=0.0))
    assert "--data.tokenizer" in message


def test_rows_of_tokens_are_used_as_they_are(tmp_path: Path) -> None:
    rows = [{"input_ids": [7, 8, 9, 10], "labels": [7, -100, 9, 11]}, {"input_ids": [11, 12]}]
    data = set_up(tmp_path, rows, validation_fraction=0.0, tokenizer=saved_tokenizer(tmp_path))
    found = sorted(lines_of(data.train_dataloader()).values())
    assert found == [Line([7, 8, 9, 10], [-100, -100, 9, 11], [0] * 4), Line([11, 12], [-100, 12], [0, 0])]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [7, 300, 9]}, ["'input_ids[1]'", "300"]),
        ({"input_ids": [7, -1, 9]}, ["'input_ids[1]'", "-1"]),
        ({"input_ids": [7, 8, 9], "labels": [-100, 8, 300]}, ["'labels[2]'", "300"]),
        ({"input_ids": [7, 8, 9], "labels": [-100, -1, 9]}, ["'labels[1]'", "-1"]),
    ],
    ids=str,
)
def test_tokens_outside_the_vocabulary_are_named_with_their_field(tmp_path: Path, row: Any, says: list[str]) -> None:
    rows = [{"input_ids": [1, 2]}, row]
    message = refused(make(tmp_path, rows, validation_fraction=0.0, tokenizer=saved_tokenizer(tmp_path)))
    assert "rows.jsonl, row 2" in message and all(part in message for part in [*says, "300", "--data.tokenizer"])


@pytest.mark.parametrize(("size", "expected"), [(1, 262), (262, 262), (290, 290)])
def test_tokenizer_size_is_that_of_the_tokenizer_that_is_built(tmp_path: Path, size: int, expected: int) -> None:
    assert len(set_up(tmp_path, qa(80), tokenizer_size=size).tokenizer) == expected


def test_a_tokenizer_that_is_given_is_not_built(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path)
    data = set_up(tmp_path, qa(80), tokenizer=folder, tokenizer_size=1)
    assert len(data.tokenizer) == 300
    assert data.tokenizer.get_vocab() == build_tokenizer([json.dumps(row) for row in qa(50)], 300).get_vocab()


def test_a_tokenizer_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_tokenizer(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(set_up(tmp_path, qa(20), tokenizer="~/tokenizer").tokenizer) == 300


@pytest.mark.parametrize("name", ["./nothing", "~/nothing", "{folder}", "{folder}/rows.jsonl"])
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path, name: str) -> None:
    name = name.format(folder=tmp_path)
    message = refused(make(tmp_path, qa(3), tokenizer=name))
    assert name in message and "--data.tokenizer" in message


def test_the_model_lends_its_tokenizer(tmp_path: Path) -> None:
    data = make(tmp_path, qa(20))
    module = SimpleNamespace(pretrained=saved_tokenizer(tmp_path), trust_remote_code=False)
    trainer = SimpleNamespace(lightning_module=module, strategy=None, global_rank=0, world_size=1)
    data.trainer = trainer  # type: ignore[assignment]
    data.setup("fit")
    assert len(data.tokenizer) == 300


# --- order, ranks and workers ---------------------------------------------------------------------------------------


def order(size: int, world: int, *, seed: int = 0, epoch: int = 0, shuffle: bool, even: bool) -> list[list[int]]:
    """What each rank sees in an epoch."""
    seen = []
    for rank in range(world):
        sampler = ShardedSampler(size, rank=rank, world=world, seed=seed, shuffle=shuffle, even=even)
        sampler.set_epoch(epoch)
        seen.append(list(sampler))
        assert len(sampler) == len(seen[-1]) and list(sampler) == seen[-1]
    return seen


sizes, worlds, seeds, epochs = st.integers(0, 60), st.integers(1, 7), st.integers(0, 5), st.integers(0, 5)
quick = settings(deadline=None, max_examples=100, derandomize=True)


@quick
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_in_evaluation_every_example_is_seen_exactly_once(
    size: int, world: int, seed: int, epoch: int, shuffle: bool
) -> None:
    seen = order(size, world, seed=seed, epoch=epoch, shuffle=shuffle, even=False)
    assert sorted(i for rank in seen for i in rank) == list(range(size))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    if not shuffle:
        assert seen == [list(range(rank, size, world)) for rank in range(world)]


@quick
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs)
def test_in_training_every_rank_has_as_many_and_none_is_repeated(size: int, world: int, seed: int, epoch: int) -> None:
    seen = order(size, world, seed=seed, epoch=epoch, shuffle=True, even=True)
    assert [len(rank) for rank in seen] == [size // world] * world
    everyone = [i for rank in seen for i in rank]
    assert len(set(everyone)) == len(everyone) and set(everyone) <= set(range(size))


@quick
@given(size=sizes, world=worlds, seed=seeds, epoch=epochs)
def test_the_ranks_take_turns_in_the_order_that_one_alone_would_take(
    size: int, world: int, seed: int, epoch: int
) -> None:
    (alone,) = order(size, 1, seed=seed, epoch=epoch, shuffle=True, even=True)
    seen = order(size, world, seed=seed, epoch=epoch, shuffle=True, even=True)
    assert sorted(alone) == list(range(size))
    assert [i for step in zip(*seen, strict=True) for i in step] == alone[: size - size % world]


def test_seeds_and_epochs_are_orders_of_their_own() -> None:
    orders = [tuple(order(30, 1, seed=s, epoch=e, shuffle=True, even=True)[0]) for s in range(4) for e in range(4)]
    assert len(set(orders)) == 16 and tuple(range(30)) not in orders


def test_what_is_left_out_of_an_uneven_epoch_changes_with_the_epoch() -> None:
    seen = [{i for rank in order(10, 4, epoch=e, shuffle=True, even=True) for i in rank} for e in range(12)]
    assert all(len(epoch) == 8 for epoch in seen) and set.union(*seen) == set(range(10))


def test_lightning_leaves_the_samplers_alone(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(40))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert not isinstance(loader, list) and isinstance(loader.sampler, DistributedSampler)


def test_ranks_share_the_examples(tmp_path: Path) -> None:
    held_out = write(tmp_path / "validation.jsonl", qa(8))
    data = set_up(tmp_path, qa(20), validation_source=held_out)
    for name, total in {"train_dataloader": 18, "val_dataloader": 8, "predict_dataloader": 8}.items():
        seen = [[i for b in getattr(on_rank(data, r, 3), name)() for i in b["example_id"]] for r in range(3)]
        everyone = [id for rank in seen for id in rank]
        assert len(everyone) == len(set(everyone)) == total
        assert name != "train_dataloader" or [len(rank) for rank in seen] == [6, 6, 6]


def test_fewer_examples_than_ranks_is_an_error(tmp_path: Path) -> None:
    data = on_rank(set_up(tmp_path, qa(3), validation_fraction=0.0), 0, 4)
    with pytest.raises(UserError, match="3 examples are fewer than the 4 ranks") as caught:
        data.train_dataloader()
    assert len(str(caught.value).splitlines()) == 1


def same_value(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def assert_same_batches(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)


def loaders(data: InstructionDataModule) -> Sequence[Any]:
    return data.train_dataloader(), validation(data), data.predict_dataloader()


NOISY = Noise(ops=[ResponseSwap(rate=0.3), TokenReplace(rate=0.2, target="text")])


@pytest.mark.slow
def test_workers_do_not_change_the_batches(tmp_path: Path) -> None:
    alone, helped = (set_up(tmp_path, qa(50), noise=NOISY, num_workers=workers) for workers in (0, 2))
    for one, other in zip(loaders(alone), loaders(helped), strict=True):
        for epoch in (0, 1):
            one.sampler.set_epoch(epoch)
            other.sampler.set_epoch(epoch)
            assert_same_batches(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_epoch_goes_on_where_it_was_left(tmp_path: Path, workers: int, done: int) -> None:
    data = set_up(tmp_path, qa(50), validation_fraction=0.0, batch_size=8, num_workers=workers)
    whole = data.train_dataloader()
    whole.sampler.set_epoch(3)
    expected = list(whole)
    left = data.train_dataloader()
    left.sampler.set_epoch(3)
    list(itertools.islice(left, done))
    state = json.loads(json.dumps(left.state_dict()))
    again = data.train_dataloader()
    again.load_state_dict(state)
    again.sampler.set_epoch(3)
    assert_same_batches(again, expected[done:])
    assert_same_batches(again, expected)  # continued once only


def test_another_epoch_than_the_one_that_was_left_starts_at_its_beginning(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(50), validation_fraction=0.0, batch_size=8)
    left = data.train_dataloader()
    list(itertools.islice(left, 3))
    again, whole = data.train_dataloader(), data.train_dataloader()
    again.load_state_dict(left.state_dict())
    for loader in (again, whole):
        loader.sampler.set_epoch(1)
    assert_same_batches(again, whole)


def test_an_epoch_left_on_two_ranks_goes_on_upon_three_and_no_example_is_seen_twice(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(60), validation_fraction=0.0, batch_size=4)

    def ids(loader: Any, batches: int | None = None) -> list[str]:
        return [id for batch in itertools.islice(loader, batches) for id in batch["example_id"]]

    before, states = [], []
    for rank in range(2):
        loader = on_rank(data, rank, 2).train_dataloader()
        before += ids(loader, 3)
        states.append(loader.state_dict())
    assert states[0] == states[1] and len(before) == 24
    after = []
    for rank in range(3):
        loader = on_rank(data, rank, 3).train_dataloader()
        loader.load_state_dict(states[0])
        after += ids(loader)
    assert len(before + after) == len(set(before + after)) == 60


def test_preparing_twice_gives_the_same_batches_to_the_bit(tmp_path: Path) -> None:
    first, second = (set_up(tmp_path, qa(50), noise=NOISY) for _ in range(2))
    for one, other in zip(loaders(first), loaders(second), strict=True):
        assert_same_batches(one, other)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_setting_up_again_changes_nothing(tmp_path: Path) -> None:
    data = set_up(tmp_path, qa(50), noise=NOISY)
    before = [list(loader) for loader in loaders(data)]
    for stage in ("validate", "fit", "test", "predict", "fit"):
        data.setup(stage)
    for batches, loader in zip(before, loaders(data), strict=True):
        assert_same_batches(batches, loader)


class Watch(LightningModule):
    """Trains nothing, and remembers what it was given in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[str]] = []
        self.validated: list[list[str]] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.trained[-1] += batch["example_id"]
        return self.weight * 0

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated[-1] += batch["example_id"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watched_fit(folder: Path, *, seed: int = 0, state: int = 0) -> Watch:
    rows, module = qa(30), Watch()
    torch.manual_seed(state)
    random.seed(state)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=make(folder, rows, seed=seed))
    return module


def test_in_a_run_each_epoch_has_an_order_of_its_own_that_only_the_seed_decides(tmp_path: Path) -> None:
    first, again = watched_fit(tmp_path), watched_fit(tmp_path, state=1)
    assert first.trained == again.trained and first.validated == again.validated
    one, two, three = first.trained
    assert len(one) > 15 and sorted(one) == sorted(two) == sorted(three)
    assert one != two != three != one
    assert first.validated == [first.validated[0]] * 3 and not set(first.validated[0]) & set(one)
    other = watched_fit(tmp_path, seed=1).trained[0]
    assert [id for id in one if id in set(other)] != [id for id in other if id in set(one)]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"validation_fraction": math.nan},
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"max_length": 0},
        {"max_length": -5},
        {"format": "sharegtp"},
        {"on_bad_row": "ignore"},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_in_one_line_that_names_the_option(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"--data.{name}") as caught:
        make(tmp_path, qa(3), **options).setup("fit")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_without_a_source_the_option_is_named(stage: str) -> None:
    assert "--data.source" in refused(InstructionDataModule(), stage)


def test_a_given_column_map_is_copied(tmp_path: Path) -> None:
    column_map = {"answer": "gold"}
    data = make(tmp_path, [{"question": "a", "gold": "b"}], column_map=column_map, validation_fraction=0.0)
    column_map.clear()
    data.setup("fit")
    assert answers(data, data.train_dataloader()) == ["b"]


def test_a_template_that_was_asked_for_wins_over_that_of_a_given_tokenizer(tmp_path: Path) -> None:
    data = make(tmp_path, qa(3), validation_fraction=0.0, chat_template="chatml")
    tokenizer = build_tokenizer(["abc"], 0)
    own = tokenizer.chat_template
    data.use_tokenizer(tokenizer)
    data.setup("fit")
    assert data.tokenizer is tokenizer and "<|im_start|>" in tokenizer.chat_template != own
