"""The chance of an answer without its prompt, in real runs: against the model's own logits, kept, resumed, on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from worlds import bare_trainer, save_tiny_llama, sgd, split_data, sums, weights, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint, NoiseEstimate
from deft_lightning.data.loading import company
from deft_lightning.data.noise import Noise, ResponseSwap, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.objectives import NLL, Contaminated, Objective
from deft_lightning.training.unprompted import UnpromptedPass

ASKS = Contaminated(answer_chance="unprompted")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unprompted")
    save_tiny_llama(root / "model", 0.3)
    write_rows(root / "rows.jsonl", sums(20))
    return root


def data_of(world: Path, cached: Path, **options: Any) -> InstructionDataModule:
    return split_data(str(world / "rows.jsonl"), cache_dir=str(cached), tokenizer=str(world / "model"), **options)


def fitted(
    world: Path, root: Path, data: InstructionDataModule, objective: Objective = ASKS, *callbacks: Any,
    ckpt_path: str | None = None, lora: LoRA | None = None, **options: Any,
) -> SFTModule:  # fmt: skip
    module = SFTModule(objective, pretrained=str(world / "model"), optimizer=sgd, scheduler=None, lora=lora)
    bare_trainer(root, *callbacks, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def by_hand(world: Path, data: InstructionDataModule, at: int, company: list[int]) -> np.ndarray[Any, Any]:
    """What the model says of the labels of a training row after other answers, when no digit of a question is there."""
    model, train = AutoModelForCausalLM.from_pretrained(world / "model"), data.splits["train"]

    def answer(place: int) -> list[int]:
        labels = train.examples[place].labels
        return labels[labels != -100].tolist()  # type: ignore[no-any-return]

    example = train.examples[at]
    prompt = data.tokenizer.decode(example.input_ids[example.labels == -100].tolist())
    begin, question, header = prompt.partition(prompt[prompt.index("|>") + 2 : prompt.index("<|end|>")])
    assert "+" in question
    first, head = (data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, header))
    context = [*first, *(token for place in company for token in (*head, *answer(place))), *head]
    ids = torch.tensor([[*context, *answer(at)]])
    with torch.no_grad():
        log_prob = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    return log_prob.gather(-1, ids[0, len(context) :, None]).squeeze(-1).numpy()


def test_every_label_has_what_the_model_says_after_other_answers_without_the_question(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(company, "TRIED", 0)  # after other answers, whichever way the model reads better
    monkeypatch.setattr(company, "LONGEST", 128)
    monkeypatch.setattr(company, "MEMBERS", 4)  # so that all of a group are in one row
    data = data_of(world, tmp_path / "cache")
    fitted(world, tmp_path, data, max_steps=1)
    rows = data.splits["train"]
    groups = company.groups_of(range(len(rows)))
    assert len(groups) > 1
    for group in groups:
        for place, at in enumerate(group.members):
            example = rows.example(at)
            assert example.unprompted is not None
            found = example.unprompted[example.labels != -100]
            before = [*group.ahead, *group.members[:place]]
            np.testing.assert_allclose(found, by_hand(world, data, at, before), rtol=0, atol=2e-5)
            assert not example.unprompted[example.labels == -100].any()


@pytest.mark.parametrize("packing", [False, True])
def test_batches_carry_it_to_the_objective(world: Path, tmp_path: Path, packing: bool) -> None:
    seen = []

    class Looks(Contaminated):
        def __call__(self, stats: Any) -> Any:
            if stats.answer_chance is not None and stats.log_prob.requires_grad:
                seen.append((stats.answer_chance, stats.chance))
            return super().__call__(stats)

    data = data_of(world, tmp_path / "cache", packing=packing, max_length=128)
    fitted(world, tmp_path, data, Looks(answer_chance="unprompted"), max_steps=1, limit_val_batches=0)
    # The check on the first batch gives every token the same chance.
    given = torch.cat([chance for chance, _ in seen if len(chance.unique()) > 1])
    kept = data.splits["train"].unprompted
    assert kept is not None and len(given)
    known = set(np.round(kept.values.astype(float), 4).tolist())
    assert set(np.round(given.double().numpy(), 4).tolist()) <= known


def test_the_pass_is_made_once_for_a_model_and_its_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    compute = UnpromptedPass._compute

    def counted(self: UnpromptedPass, split: str, *rest: Any) -> Any:
        made.append(split)
        return compute(self, split, *rest)

    monkeypatch.setattr(UnpromptedPass, "_compute", counted)
    first = fitted(world, tmp_path / "a", data_of(world, tmp_path / "cache"), max_steps=2)
    assert sorted(made) == ["train", "validation"]
    again = fitted(world, tmp_path / "b", data_of(world, tmp_path / "cache"), max_steps=2)
    assert len(made) == 2, "both were kept"
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    fitted(world, tmp_path / "c", data_of(world, tmp_path / "cache"), lora=LoRA(r=2), max_steps=1)
    assert len(made) == 2, "adapters that do nothing yet leave the model as it was"
    fitted(world, tmp_path / "d", data_of(world, tmp_path / "cache", supervise="all"), max_steps=1)
    assert len(made) == 4, "other labels"


def test_a_fingerprint_is_of_the_weights(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    before = fingerprint(model)
    assert before == fingerprint(AutoModelForCausalLM.from_pretrained(world / "model"))
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-3
    assert fingerprint(model) != before
    with torch.no_grad():  # the same numbers in other places of two rows
        model = AutoModelForCausalLM.from_pretrained(world / "model")
        model.model.layers[0].self_attn.q_proj.weight[0, 0] *= -1
    assert fingerprint(model) != before


def test_a_run_that_goes_on_reads_what_its_start_said(world: Path, tmp_path: Path) -> None:
    whole = fitted(world, tmp_path / "whole", data_of(world, tmp_path / "cache"), max_steps=4)
    fitted(
        world, tmp_path / "half", data_of(world, tmp_path / "cache"), ASKS, Checkpoint(every_n_train_steps=2),
        max_steps=2,
    )  # fmt: skip
    state = next((tmp_path / "half").rglob("*.ckpt"))
    resumed = fitted(world, tmp_path / "on", data_of(world, tmp_path / "cache"), ckpt_path=str(state), max_steps=4)
    assert resumed.start_model == whole.start_model
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    with pytest.raises(UserError, match=r"what the model said before training is not kept any more .*--data\.cache"):
        fitted(world, tmp_path / "lost", data_of(world, tmp_path / "other"), ckpt_path=str(state), max_steps=4)


def test_nothing_is_kept_without_a_cache(world: Path, tmp_path: Path) -> None:
    data = data_of(world, tmp_path / "cache", cache=False)
    fitted(world, tmp_path, data, max_steps=1)
    assert data.splits["train"].unprompted is not None and not (tmp_path / "cache" / "unprompted").exists()


def test_noise_that_changes_from_epoch_to_epoch_is_refused(world: Path, tmp_path: Path) -> None:
    still = data_of(world, tmp_path / "cache", noise=Noise(ops=[TokenReplace(rate=0.3)]))
    fitted(world, tmp_path / "a", still, max_steps=1)
    example = still.splits["train"].example(0)
    assert example.unprompted is not None and example.noise_code.any()
    moving = data_of(world, tmp_path / "cache", noise=Noise(ops=[TokenReplace(rates=[0.3, 0.1])]))
    with pytest.raises(UserError, match="its rates change from epoch to epoch"):
        fitted(world, tmp_path / "b", moving, max_steps=1)


def test_corrupted_validation_rows_have_it_too(world: Path, tmp_path: Path) -> None:
    data = data_of(world, tmp_path / "cache", noise=Noise(ops=[ResponseSwap(rate=0.5)]))
    module = fitted(world, tmp_path, data)
    assert "val_noisy/nll" in module.trainer.callback_metrics


def test_an_estimate_asks_for_it_under_any_objective(world: Path, tmp_path: Path) -> None:
    data = data_of(world, tmp_path / "cache")
    watch = NoiseEstimate(chance="unprompted")
    module = fitted(world, tmp_path, data, NLL(), watch, max_steps=2)
    assert data.splits["train"].unprompted is not None and watch.counted == 2
    assert "noise/estimated" in module.trainer.callback_metrics


def test_a_validation_without_a_fit_makes_the_pass(world: Path, tmp_path: Path) -> None:
    module = SFTModule(ASKS, pretrained=str(world / "model"))
    bare_trainer(tmp_path).validate(module, datamodule=data_of(world, tmp_path / "cache"), verbose=False)
    assert (tmp_path / "cache" / "unprompted").is_dir()


def test_rows_of_one_s_own_loader_are_one_clear_line(world: Path, tmp_path: Path) -> None:
    module = SFTModule(ASKS, pretrained=str(world / "model"))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(UserError, match="chance unprompted needs the rows of InstructionDataModule"):
        bare_trainer(tmp_path, max_steps=1).fit(module, [batch])
