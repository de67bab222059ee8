"""The chance of an answer without its prompt, in real runs: against the model's own logits, resumed, on ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import bare_trainer, conversation, save_tiny_llama, sgd, split_data, sums, weights, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.callbacks import Checkpoint, NoiseEstimate
from deft_lightning.data.noise import Noise, ResponseSwap, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.models.fingerprint import fingerprint
from deft_lightning.models.unprompted import UnpromptedReader
from deft_lightning.objectives import NLL, Contaminated, Objective
from deft_lightning.training.unprompted import _sample

ASKS = Contaminated(answer_chance="unprompted")
WAYS = ["alone", "in company"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unprompted")
    save_tiny_llama(root / "model", 0.3)
    write_rows(root / "rows.jsonl", sums(20))
    return root


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have answers read in one way, whichever the model does better."""

    def settle(way: str) -> None:
        def chosen(self: UnpromptedReader, batches: Any, agreed: Any = bool) -> None:
            self.alone, self.once = way == "alone", True

        monkeypatch.setattr(UnpromptedReader, "settle", chosen)

    return settle


def data_of(world: Path, cached: Path, **options: Any) -> InstructionDataModule:
    return split_data(str(world / "rows.jsonl"), cache_dir=str(cached), tokenizer=str(world / "model"), **options)


def fitted(
    world: Path, root: Path, data: InstructionDataModule, objective: Objective = ASKS, *callbacks: Any,
    ckpt_path: str | None = None, kind: type[SFTModule] = SFTModule, model: dict[str, Any] | None = None,
    **options: Any,
) -> SFTModule:  # fmt: skip
    module = kind(objective, pretrained=str(world / "model"), **{"optimizer": sgd, "scheduler": None, **(model or {})})
    bare_trainer(root, *callbacks, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


class Recorded(SFTModule):
    """Keeps, for each training step, what the objective was told, and the weights of that step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps = getattr(self, "steps", [])
        told = super().training_step(batch, batch_idx)
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.steps.append((list(batch["example_id"]), told["stats"], state))
        return told


def by_hand(world: Path, data: InstructionDataModule, at: int, state: Any, alone: bool) -> np.ndarray[Any, Any]:
    """What a model with these weights says of the labels of a training row, when no digit of its question is there."""
    model, train = AutoModelForCausalLM.from_pretrained(world / "model").double(), data.splits["train"]
    model.load_state_dict(state)
    example = train.example(at)
    answer = example.labels[example.labels != -100].tolist()
    prompt = data.tokenizer.decode(example.input_ids[example.labels == -100].tolist())
    begin, question, header = prompt.partition(prompt[prompt.index("|>") + 2 : prompt.index("<|end|>")])
    assert "+" in question and example.unprompted is not None
    first, head = (data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, header))
    # Whose answers stand in front is no matter of this: they are others of the file, each with its header.
    ahead = example.unprompted.ahead[example.unprompted.frame :].tolist()
    assert alone or (len(ahead) == 64 and data.tokenizer.decode(answer) not in data.tokenizer.decode(ahead))
    context = [*first, *([] if alone else ahead), *head]
    ids = torch.tensor([[*context, *answer]])
    with torch.no_grad():
        log_prob = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return log_prob.gather(-1, ids[0, len(context) :, None]).squeeze(-1).numpy()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("options", "model"),
    [({}, {}), ({"packing": True, "max_length": 120}, {}), ({}, {"head": "dense"}), ({}, {"lora": LoRA(r=2)})],
    ids=["rows", "packed", "dense", "lora"],
)
def test_each_step_reads_its_answers_anew_without_the_question(
    options: Any, model: Any, way: str, world: Path, tmp_path: Path, settled: Callable[[str], None]
) -> None:
    settled(way)
    data = data_of(world, tmp_path / "cache", **options)
    module = fitted(world, tmp_path, data, kind=Recorded, model=model, max_steps=4, max_epochs=4)
    assert isinstance(module, Recorded)
    place = {data.splits["train"].example(at).id: at for at in range(data.size("train"))}
    before: dict[str, Tensor] | None = None
    for ids, stats, state in module.steps:
        moved = before is not None and any(not torch.equal(before[name], state[name]) for name in state)
        assert moved or before is None
        before = state
        if model.get("lora") is not None:
            continue  # other names of weights; that it runs and moves is enough, the rest is the same code
        expected = np.concatenate([by_hand(world, data, place[id], state, way == "alone") for id in ids])
        np.testing.assert_allclose(stats.answer_chance.numpy(), expected, rtol=0, atol=2e-5)
    assert len(module.steps) == 4


class Dropping(SFTModule):
    """Has dropout in its attention."""

    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.5


def test_reading_changes_no_mode_no_draw_and_no_gradient(world: Path, tmp_path: Path, settled: Any) -> None:
    settled("in company")
    # An objective whose loss does not depend on what is read: what else the pass changed would show.
    plain = fitted(world, tmp_path / "a", data_of(world, tmp_path / "cache"), NLL(), kind=Dropping, max_steps=3)
    watch = NoiseEstimate(chance="unprompted")
    read = fitted(world, tmp_path / "b", data_of(world, tmp_path / "cache"), NLL(), watch, kind=Dropping, max_steps=3)
    assert watch.counted == 3 and read.model.training
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(read).values(), strict=True))


def test_casts_made_for_reading_do_not_take_gradients_away(world: Path, tmp_path: Path, settled: Any) -> None:
    settled("in company")
    start = SFTModule(pretrained=str(world / "model"))
    start.configure_model()
    module = fitted(world, tmp_path, data_of(world, tmp_path / "cache"), max_steps=1, precision="bf16-mixed")
    moved = [not torch.equal(a, b) for a, b in zip(weights(start).values(), weights(module).values(), strict=True)]
    assert all(moved), "autocast would hand weights that were cast without gradient to the step"


@pytest.mark.parametrize("once", [True, False])
def test_a_model_reads_once_only_what_gives_the_same(
    once: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not once:  # a cache that forgets, as one of a model that keeps something else would

        def forgets(self: Any, places: Tensor) -> None:
            for layer in self.layers:
                layer.keys, layer.values = 0 * layer.keys[places], 0 * layer.values[places]

        monkeypatch.setattr("transformers.DynamicCache.batch_select_indices", forgets)
    with caplog.at_level("INFO"):
        module = fitted(world, tmp_path, data_of(world, tmp_path / "cache"), max_steps=1)
    reader = module.batch_loss.unprompted
    assert reader.once is once
    (said,) = [record.getMessage() for record in caplog.records if "chance unprompted" in record.getMessage()]
    assert ("again before every answer" in said) is not once


def test_a_recurrent_model_reads_everything_anew(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", sums(20))
    mamba = {"model_type": "mamba", "state_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    module = SFTModule(ASKS, architecture=mamba)
    bare_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, split_data(source, cache=False))
    assert module.batch_loss.unprompted.once is False


def test_compiled_layers_read_everything_anew(world: Path) -> None:
    for compiled in (False, True):
        module = SFTModule(ASKS, pretrained=str(world / "model"), compile=compiled)
        module.configure_model()
        assert (module.batch_loss.unprompted._cache_name() is None) is compiled


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


def test_a_resumed_run_is_one_that_was_not_interrupted(world: Path, tmp_path: Path, settled: Any) -> None:
    settled("in company")
    whole = fitted(world, tmp_path / "whole", data_of(world, tmp_path / "cache"), max_steps=4)
    keeps = Checkpoint(every_n_train_steps=2)
    fitted(world, tmp_path / "half", data_of(world, tmp_path / "cache"), ASKS, keeps, max_steps=2)
    state = next((tmp_path / "half").rglob("*.ckpt"))
    assert torch.load(state, weights_only=True)["deft_lightning"]["unprompted_alone"] is False
    resumed = fitted(world, tmp_path / "on", data_of(world, tmp_path / "other"), ckpt_path=str(state), max_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


@pytest.mark.parametrize("alone", [True, False])
def test_a_resumed_run_reads_as_it_began(alone: bool, world: Path, tmp_path: Path) -> None:
    """Whatever the model has come to read better."""
    keeps = Checkpoint(every_n_train_steps=1)
    fitted(world, tmp_path / "half", data_of(world, tmp_path / "cache"), ASKS, keeps, max_steps=1)
    file = next((tmp_path / "half").rglob("*.ckpt"))
    state = torch.load(file, weights_only=True)
    state["deft_lightning"]["unprompted_alone"] = alone
    torch.save(state, file)
    resumed = fitted(world, tmp_path / "on", data_of(world, tmp_path / "cache"), ckpt_path=str(file), max_steps=2)
    assert resumed.batch_loss.unprompted.alone is alone


def test_of_a_long_answer_what_is_not_read_is_no_evidence(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: Any
) -> None:
    settled("in company")
    monkeypatch.setattr("deft_lightning.training.unprompted.MOST", 4)
    tokens = Contaminated(chance="unprompted", answer_chance="unprompted")
    whole = fitted(world, tmp_path / "a", data_of(world, tmp_path / "cache"), tokens, kind=Recorded, max_steps=1)
    part = fitted(world, tmp_path / "b", data_of(world, tmp_path / "cache"), kind=Recorded, max_steps=1)
    assert isinstance(whole, Recorded) and isinstance(part, Recorded)
    ((ids, full, _),), ((same, first, _),) = whole.steps, part.steps
    assert ids == same and full.chance.lt(0).all(), "a token that is judged by itself is read wherever it stands"
    objective = part.objective
    assert isinstance(objective, Contaminated)
    evidence = objective.posterior(first).evidence
    for number in range(len(ids)):
        own = first.example == number
        assert int(own.sum()) > 4
        assert torch.allclose(first.answer_chance[own][:4], full.chance[own][:4], atol=1e-5)
        assert torch.equal(first.answer_chance[own][4:], torch.zeros(int(own.sum()) - 4))
        read = first.map(lambda field, own=own: field[own][:4])
        assert torch.allclose(evidence[own][:4], objective.posterior(read).evidence, atol=1e-5)


def test_the_way_that_a_model_finds_more_probable_is_taken(world: Path, tmp_path: Path) -> None:
    module = fitted(world, tmp_path, data_of(world, tmp_path / "cache"), max_steps=1)
    loss = module.batch_loss
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    fresh = SFTModule(pretrained=str(world / "model"))
    fresh.configure_model()
    batches = _sample(data.splits["train"], data.tokenizer.pad_token_id, torch.device("cpu"))
    reader = fresh.batch_loss.unprompted
    alone, company = (sum(float(reader.read(b, way, True).sum()) for b in batches) for way in (True, False))
    assert loss.unprompted.alone is (alone > company) and alone != company


def test_noise_that_changes_from_epoch_to_epoch_is_read_as_it_is_in_its_epoch(world: Path, tmp_path: Path) -> None:
    data = data_of(world, tmp_path / "cache", noise=Noise(ops=[TokenReplace(rates=[0.5, 0.1])]))
    fitted(world, tmp_path, data, max_epochs=2)
    rows = data.splits["train"]
    for at in range(len(rows)):
        for epoch in (0, 1):
            example = rows.example(at, epoch)
            assert example.unprompted is not None
            labels = example.unprompted.labels
            assert labels[labels != -100].tolist() == example.labels[example.labels != -100].tolist()
    assert any(not np.array_equal(rows.example(at, 0).labels, rows.example(at, 1).labels) for at in range(len(rows)))


def test_corrupted_validation_rows_have_it_too(world: Path, tmp_path: Path) -> None:
    data = data_of(world, tmp_path / "cache", noise=Noise(ops=[ResponseSwap(rate=0.5)]))
    module = fitted(world, tmp_path, data)
    assert "val_noisy/nll" in module.trainer.callback_metrics


def test_an_estimate_asks_for_it_under_any_objective_on_logged_steps_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    read = UnpromptedReader.__call__
    monkeypatch.setattr(UnpromptedReader, "__call__", lambda self, batch: asked.append(1) or read(self, batch))
    watch = NoiseEstimate(chance="unprompted")
    module = fitted(world, tmp_path, data_of(world, tmp_path / "cache"), NLL(), watch, max_steps=4, log_every_n_steps=2)
    assert watch.counted == 2 and len(asked) == 2
    assert "noise/estimated" in module.trainer.callback_metrics


def test_a_validation_without_a_fit_reads_too(world: Path, tmp_path: Path) -> None:
    module = SFTModule(ASKS, pretrained=str(world / "model"))
    data = data_of(world, tmp_path / "cache", noise=Noise(ops=[ResponseSwap(rate=0.5)]), num_workers=1)
    found = {tag: value for one in bare_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
             for tag, value in one.items()}  # fmt: skip
    assert np.isfinite(found["val/loss"]) and np.isfinite(found["val_noisy/nll"])


def test_rows_without_a_prompt_are_compared_with_frequencies_and_a_line_says_so(world: Path, tmp_path: Path) -> None:
    asked = (conversation(("user", f"{i} + {i}"), ("assistant", f"that is {2 * i}")) for i in range(16))
    rows = [*asked, *(conversation(("assistant", f"some words {i}")) for i in range(4))]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data = split_data(source, cache_dir=str(tmp_path / "cache"), tokenizer=str(world / "model"), batch_size=2)
    with pytest.warns(UserWarning, match="^train: 4 of 17 examples .* no prompt that could be left out"):
        module = fitted(world, tmp_path, data, kind=Recorded)
    assert isinstance(module, Recorded)
    unigram, train, texts = module.batch_loss.context.unigram, data.splits["train"], 0
    examples = {train.example(at).id: train.example(at) for at in range(len(train))}
    for ids, stats, _ in module.steps:
        for number, id in enumerate(ids):
            labels = examples[id].labels[examples[id].labels != -100]
            same = torch.equal(stats.answer_chance[stats.example == number], unigram[torch.from_numpy(labels)])
            assert same is (not len(examples[id].unprompted.input_ids))
            texts += same
        assert stats.answer_chance.isfinite().all()
    assert texts == 4


def test_rows_of_one_s_own_loader_are_one_clear_line(world: Path, tmp_path: Path) -> None:
    module = SFTModule(ASKS, pretrained=str(world / "model"))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(UserError, match="chance unprompted needs the rows of InstructionDataModule"):
        bare_trainer(tmp_path, max_steps=1).fit(module, [batch])
