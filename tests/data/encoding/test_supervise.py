"""What is learnt of a conversation, which end of it is kept, and validation on what is corrupted."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_rows import on_rank, write

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data import Noise, ResponseSwap, TokenReplace
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.objectives import DEFT, NLL

Part = dict[str, Any]
FIELDS = ("input_ids", "labels", "clean_labels", "noise_code")


def ready(folder: Path, rows: Iterable[object], **options: Any) -> InstructionDataModule:
    options = {"validation_fraction": 0.0, "batch_size": 4, "tokenizer_size": 0, **options}
    data = InstructionDataModule(write(folder / "rows.jsonl", rows), **options)
    data.setup("fit")
    return data


def parts(batches: Iterable[dict[str, Any]]) -> dict[str, Part]:
    """Examples by id, without padding; an id that comes twice is an error."""
    found: dict[str, Part] = {}
    for batch in batches:
        for place, id in enumerate(batch["example_id"]):
            assert id not in found
            here = batch["segment"] == place
            found[id] = {name: batch[name][here].tolist() for name in FIELDS}
    return found


def said(data: InstructionDataModule, part: Part) -> str:
    text: str = data.tokenizer.decode([label for label in part["labels"] if label != -100])
    return text


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


LONG = talk(("system", "s"), ("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two"))

# --- supervise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [
        ("assistant", "one<|end|>two<|end|>"),
        ("last", "two<|end|>"),
        # Nothing predicts the very first token.
        ("all", "s<|end|><|user|>a?<|end|><|assistant|>one<|end|><|user|>b?<|end|><|assistant|>two<|end|>"),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_what_is_learnt_of_a_conversation(tmp_path: Path, supervise: Any, expected: str, packing: bool) -> None:
    data = ready(tmp_path, [LONG], supervise=supervise, packing=packing)
    (part,) = parts(data.train_dataloader()).values()
    assert said(data, part) == expected
    assert data.tokenizer.decode(part["input_ids"]).startswith("<|system|>s<|end|>")
    assert all(label in (-100, token) for label, token in zip(part["labels"], part["input_ids"], strict=True))


@pytest.mark.parametrize(("supervise", "expected"), [("assistant", "one<|end|>two<|end|>"), ("last", "two<|end|>")])
def test_what_the_user_says_after_the_last_response_is_not_learnt(
    tmp_path: Path, supervise: Any, expected: str
) -> None:
    row = {"messages": [*LONG["messages"], {"role": "user", "content": "c?"}]}
    data = ready(tmp_path, [row], supervise=supervise)
    (part,) = parts(data.train_dataloader()).values()
    assert said(data, part) == expected


def test_a_single_response_is_the_last_one_too(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(20)]
    expected = parts(ready(tmp_path, rows).train_dataloader())
    assert parts(ready(tmp_path, rows, supervise="last").train_dataloader()) == expected


def test_text_is_learnt_as_a_whole_whatever_is_supervised(tmp_path: Path) -> None:
    rows = [{"text": f"Once upon a time {i}."} for i in range(5)]
    for supervise in ("assistant", "last", "all"):
        data = ready(tmp_path, rows, supervise=supervise)
        for part in parts(data.train_dataloader()).values():
            assert part["labels"] == [-100, *part["input_ids"][1:]] and len(part["labels"]) > 15


def test_rows_of_tokens_keep_their_own_labels_whatever_is_supervised(tmp_path: Path) -> None:
    build_tokenizer(["a"], 0).save_pretrained(tmp_path / "tokenizer")
    rows = [{"input_ids": [7, 8, 9, 10], "labels": [-100, 8, -100, 10]}]
    for supervise in ("assistant", "last", "all"):
        data = ready(tmp_path, rows, supervise=supervise, tokenizer=str(tmp_path / "tokenizer"))
        (part,) = parts(data.train_dataloader()).values()
        assert (part["input_ids"], part["labels"]) == ([7, 8, 9, 10], [-100, 8, -100, 10])


def test_with_all_supervised_noise_may_hit_what_the_user_says_and_a_swap_only_the_response(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?" * 9, "answer": f"{i}!" * 9} for i in range(40)]
    noise = Noise(ops=[TokenReplace(0.3), ResponseSwap(0.5)])
    first = {False: 0, True: 0}
    data = ready(tmp_path, rows, supervise="all", noise=noise)
    for part in parts(data.train_dataloader()).values():
        answer = part["input_ids"].index(data.tokenizer.convert_tokens_to_ids("<|assistant|>"))
        for at, code in enumerate(part["noise_code"]):
            assert code != 2 or at > answer
            first[at > answer] += code == 1
    assert min(first.values()) > 100


# --- keep ------------------------------------------------------------------------------------------------------------


def talks(count: int) -> list[dict[str, Any]]:
    rng = random.Random(3)
    rows = []
    for i in range(count):
        question, answer = f"{i} " + "q" * rng.randint(5, 60), "a" * rng.randint(5, 60)
        rows.append({"id": f"t{i}", "question": question, "answer": answer})
    return rows


@pytest.mark.parametrize("supervise", ["assistant", "all"])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_a_long_example_keeps_the_end_that_was_asked_for(tmp_path: Path, keep: Any, supervise: Any) -> None:
    size, swap = 60, Noise(ops=[ResponseSwap(0.5)])
    whole = parts(ready(tmp_path, talks(60), supervise=supervise, noise=swap).train_dataloader())
    data = ready(tmp_path, talks(60), keep=keep, max_length=size, supervise=supervise, noise=swap)
    expected: dict[str, Part] = {}
    for id, part in whole.items():
        cut = slice(0, size) if keep == "start" else slice(max(0, len(part["labels"]) - size), None)
        kept = {name: list(values[cut]) for name, values in part.items()}
        # The first token that is left has nothing before it to be predicted from.
        kept["labels"][0] = kept["clean_labels"][0] = -100
        kept["noise_code"][0] = 0
        if any(label != -100 for label in kept["labels"]):
            expected[id] = kept
    assert parts(data.train_dataloader()) == expected
    report = data.reports["train"]
    assert report.dropped == 60 - len(expected) and (report.dropped > 0) == (keep == "start" and supervise != "all")
    assert report.truncated >= sum(len(part["labels"]) > size for part in whole.values()) - report.dropped > 10


@pytest.mark.parametrize("keep", ["start", "end"])
def test_the_noise_on_a_token_does_not_depend_on_where_the_example_is_cut(tmp_path: Path, keep: Any) -> None:
    # Otherwise a run at another length is about other wrong labels.
    noise = Noise(ops=[TokenReplace(0.3)])
    whole = parts(ready(tmp_path, talks(60), noise=noise, max_length=1000).train_dataloader())
    cut = parts(ready(tmp_path, talks(60), noise=noise, max_length=60, keep=keep).train_dataloader())
    compared = 0
    for id, part in cut.items():
        size = len(part["labels"])
        side = slice(0, size) if keep == "start" else slice(len(whole[id]["labels"]) - size, None)
        # The first one is left out: it is not learnt once the example begins there.
        assert part["noise_code"][1:] == whole[id]["noise_code"][side][1:]
        assert part["labels"][1:] == whole[id]["labels"][side][1:]
        compared += len(whole[id]["labels"]) > size and any(part["noise_code"])
    assert compared > 10


# --- validation on corrupted examples --------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True, "max_length": 150},
    "max_tokens": {"max_tokens_per_batch": 300},
    "packing, max_tokens": {"packing": True, "max_length": 150, "max_tokens_per_batch": 300},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
OPS = [ResponseSwap(0.2), TokenReplace(0.05)]


def validated(folder: Path, mode: dict[str, Any], splits: list[Any], **options: Any) -> InstructionDataModule:
    return ready(folder, talks(80), validation_fraction=0.15, noise=Noise(splits=splits, ops=OPS), **mode, **options)


def clean_validation(folder: Path) -> dict[str, Part]:
    found = ready(folder, talks(80), validation_fraction=0.15).val_dataloader()
    assert not isinstance(found, list)
    return parts(found)


@pytest.mark.slow
@every_mode
def test_with_noise_in_training_the_second_loader_has_corrupted_training_examples(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    data = validated(tmp_path, mode, ["train"])
    clean, noisy = (parts(loader) for loader in data.val_dataloader())
    assert clean == clean_validation(tmp_path) and len(clean) > 5
    trained = parts(data.train_dataloader())
    assert noisy.items() <= trained.items()
    assert all(any(part["noise_code"]) for part in noisy.values())
    assert len(noisy) == len(clean)


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("splits", [["train", "validation"], ["validation"]], ids=str)
def test_with_noise_in_validation_the_second_loader_has_those_examples_corrupted(
    tmp_path: Path, mode: dict[str, Any], splits: list[Any]
) -> None:
    data = validated(tmp_path, mode, splits)
    clean, noisy = (parts(loader) for loader in data.val_dataloader())
    assert clean == clean_validation(tmp_path)
    assert noisy.keys() == clean.keys()
    wrong = sum(any(part["noise_code"]) for part in noisy.values())
    assert 0 < wrong
    for id, part in noisy.items():
        if not any(part["noise_code"]):
            assert part == clean[id]
    assert any(any(p["noise_code"]) for p in parts(data.train_dataloader()).values()) == ("train" in splits)


def test_the_second_loader_is_the_same_in_every_run(tmp_path: Path) -> None:
    one, other = (list(validated(tmp_path, {}, ["train"]).val_dataloader()[1]) for _ in range(2))
    assert parts(one) == parts(other) and [b["example_id"] for b in one] == [b["example_id"] for b in other]


def test_without_noise_or_without_validation_there_is_no_second_loader(tmp_path: Path) -> None:
    assert not isinstance(ready(tmp_path, talks(80), validation_fraction=0.15).val_dataloader(), list)
    none = Noise(ops=[TokenReplace(0.0)])
    data = ready(tmp_path, talks(80), validation_fraction=0.15, noise=none)
    assert not isinstance(data.val_dataloader(), list)  # nothing is corrupted at rate 0
    assert ready(tmp_path, talks(80), noise=Noise(ops=OPS)).val_dataloader() == []


def test_fewer_corrupted_examples_than_ranks_do_not_stop_a_run(tmp_path: Path) -> None:
    # A few trusted rows, a rare error: one corrupted example among many on eight devices.
    noise = Noise(ops=[TokenReplace(0.001)])
    data = ready(tmp_path, talks(80), validation_fraction=0.15, noise=noise)
    corrupted = sum(any(part["noise_code"]) for part in parts(data.train_dataloader()).values())
    assert 0 < corrupted < 8
    for rank in range(8):
        on_rank(data, rank, 8).val_dataloader()


def tiny(objective: Any = None, head: Any = "fused", width: int = 16, rate: float = 1e-2) -> SFTModule:
    torch.manual_seed(0)
    return SFTModule(
        architecture={
            "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2,
        },
        objective=objective or DEFT(),
        head=head,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )  # fmt: skip


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    return Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=steps, check_val_every_n_epoch=None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        num_sanity_val_steps=0, default_root_dir=str(folder), **options,
    )  # fmt: skip


@torch.no_grad()
def by_hand(module: SFTModule, examples: dict[str, Part], *, corrupted: bool) -> tuple[float, float, float | None]:
    """NLL, and shares of labels and of known clean labels that are the first choice, in float64, one by one.

    Over the corrupted tokens or over all.
    """
    model = module.model.double().eval()
    nll, right, count, through, known = 0.0, 0, 0, 0, 0
    for part in examples.values():
        logits = model(input_ids=torch.tensor([part["input_ids"]]), use_cache=False).logits[0]
        for at, label in enumerate(part["labels"]):
            if label == -100 or (corrupted and not part["noise_code"][at]):
                continue
            nll -= float(logits[at - 1].log_softmax(-1)[label])
            first, clean = int(logits[at - 1].argmax()), part["clean_labels"][at]
            right += first == label
            count += 1
            through += first == clean
            known += clean != -100
    return nll / count, right / count, through / known if known else None


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize(("head", "splits"), [("fused", ["train"]), ("dense", ["train", "validation"])])
def test_a_run_logs_what_a_float64_forward_gives(tmp_path: Path, mode: dict[str, Any], head: Any, splits: Any) -> None:
    data, module, run = validated(tmp_path, mode, splits), tiny(head=head), trainer(tmp_path, 6)
    run.fit(module, data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    clean, noisy = (parts(loader) for loader in data.val_dataloader())
    nll, accuracy, _ = by_hand(module, clean, corrupted=False)
    assert found["val/nll"] == pytest.approx(nll, rel=1e-5)
    assert found["val/token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    nll, accuracy, recovered = by_hand(module, noisy, corrupted=True)
    assert found["val_noisy/nll"] == pytest.approx(nll, rel=1e-5)
    assert found["val_noisy/reproduced"] == pytest.approx(accuracy, abs=1e-6)
    assert found.get("val_noisy/recovered") == (None if recovered is None else pytest.approx(recovered, abs=1e-6))
    assert abs(found["val_noisy/nll"] - found["val/nll"]) > 0.05  # they are not about the same tokens


def test_validating_without_noise_logs_nothing_of_it_and_warns_of_nothing(tmp_path: Path) -> None:
    data, module, run = ready(tmp_path, talks(80), validation_fraction=0.15), tiny(), trainer(tmp_path, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, data)
    assert "val/nll" in run.callback_metrics
    assert not [name for name in run.callback_metrics if name.startswith("val_noisy")]
    assert not [str(w.message) for w in caught if "before the ``update``" in str(w.message)]


def test_noise_that_names_validation_is_quiet_when_nothing_is_held_out(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ready(tmp_path, talks(40), noise=Noise(splits=["train", "validation"], ops=[ResponseSwap(0.5)]))
    # It does something: every row ends with a response.
    assert not [str(w.message) for w in caught if "does nothing" in str(w.message)]


@pytest.mark.slow
def test_what_a_model_has_memorised_shows(tmp_path: Path) -> None:
    rows = [{"id": f"m{i}", "question": f"{i}?", "answer": "the answer to it"} for i in range(8)]
    held_out = write(tmp_path / "validation.jsonl", [{"question": f"v{i}?", "answer": "the answer"} for i in range(8)])
    noise = Noise(ops=[TokenReplace(0.3)])
    data = ready(tmp_path, rows, validation_source=held_out, batch_size=8, noise=noise)
    run = trainer(tmp_path, 150)
    module = tiny(NLL(), width=64, rate=5e-3)
    run.validate(tiny(NLL(), width=64), data, verbose=False)
    assert run.callback_metrics["val_noisy/reproduced"] < 0.1 and run.callback_metrics["val_noisy/nll"] > 4
    run.fit(module, data)
    assert run.callback_metrics["val_noisy/reproduced"] > 0.97 and run.callback_metrics["val_noisy/nll"] < 0.1
    assert run.callback_metrics["val_noisy/recovered"] < 0.03


def test_a_module_can_be_validated_before_it_is_trained(tmp_path: Path) -> None:
    data, module = validated(tmp_path, {}, ["train"]), tiny()
    run = trainer(tmp_path, 4)
    run.validate(module, data, verbose=False)
    before = float(run.callback_metrics["val/nll"])
    run.fit(module, data)
    assert float(run.callback_metrics["val/nll"]) < before


@pytest.mark.slow
def test_a_model_that_only_knows_the_truth_reproduces_no_error(tmp_path: Path) -> None:
    rows = [{"id": f"m{i}", "question": f"{i}?", "answer": "the answer to it"} for i in range(8)]
    held_out = write(tmp_path / "validation.jsonl", [{"question": f"v{i}?", "answer": "the answer"} for i in range(8)])
    run, module = trainer(tmp_path, 100), tiny(NLL(), width=64, rate=5e-3)
    run.fit(module, ready(tmp_path, rows, validation_source=held_out, batch_size=8))
    noisy = ready(tmp_path, rows, validation_source=held_out, batch_size=8, noise=Noise(ops=[TokenReplace(0.3)]))
    run = trainer(tmp_path, 1)
    run.validate(module, noisy, verbose=False)
    found = run.callback_metrics
    assert found["val_noisy/reproduced"] < 0.05 and found["val_noisy/nll"] > 4
    assert found["val_noisy/recovered"] > 0.95
