"""Anchored runs of one process: what they log, resume and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Stop
from transformers import AutoModelForCausalLM
from worlds import (
    SHAPE,
    adam,
    bare_trainer,
    constant,
    largest_difference,
    quiet_trainer,
    read_events,
    save_tiny_llama,
    split_data,
    still,
    sums,
    weights,
    write_rows,
)

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint, MetricCheck
from deft_lightning.cli.main import DeftCLI
from deft_lightning.errors import UserError
from deft_lightning.models import LoRA
from deft_lightning.objectives import DEFT, DFT, NLL, KLAnchor, Objective

pytestmark = pytest.mark.slow

ANCHOR = KLAnchor(base=DFT(), weight=2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("anchor")
    save_tiny_llama(root / "pretrained", 0.3)
    save_tiny_llama(root / "elsewhere", 0.3, seed=1)
    write_rows(root / "rows.jsonl", sums(40))
    return root


def quick(parameters: Any) -> torch.optim.Optimizer:
    return adam(parameters, lr=1e-2)


def module_of(world: Path, objective: Objective = ANCHOR, **options: Any) -> SFTModule:
    torch.manual_seed(0)
    given = {"pretrained": str(world / "pretrained"), "optimizer": quick, "scheduler": constant, **options}
    return SFTModule(objective, **given)


def fitted(world: Path, root: Path, module: SFTModule, resume: str | None = None, **options: Any) -> Any:
    """Return the trainer after a fit, and the newest checkpoint."""
    kept = Checkpoint()
    callbacks = [kept, *options.pop("callbacks", ())]
    trainer = bare_trainer(root, *callbacks, **{"max_epochs": 2, "logger": None, **options})
    trainer.fit(module, split_data(str(world / "rows.jsonl")), ckpt_path=resume, weights_only=True if resume else None)
    return trainer, str(kept.last_model_path)


# --- forgetting/kl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["frozen", "adapters"])
@pytest.mark.parametrize("objective", [NLL(), ANCHOR], ids=repr)
def test_forgetting_is_the_mean_kl_of_held_out_tokens(
    objective: Objective, lora: LoRA | None, world: Path, tmp_path: Path
) -> None:
    module = module_of(world, objective, lora=lora, forgetting=objective == NLL())
    trainer, _ = fitted(world, tmp_path, module)
    found = [(event.step, event.value) for event in read_events(trainer.log_dir).Scalars("forgetting/kl")]
    assert [step for step, _ in found] == [7, 15] and all(value > 0 for _, value in found)
    data, total, count = trainer.datamodule, 0.0, 0
    before = AutoModelForCausalLM.from_pretrained(world / "pretrained").eval()
    for at in range(data.size("validation")):
        example = data.example("validation", at)
        ids, keep = torch.from_numpy(example.input_ids)[None], torch.from_numpy(example.labels)[1:] != -100
        with torch.no_grad():
            log_pi, log_pi0 = (
                model(input_ids=ids).logits[0, :-1][keep].double().log_softmax(-1)
                for model in (module.model.eval(), before)
            )
        total, count = total + float((log_pi0.exp() * (log_pi0 - log_pi)).sum()), count + int(keep.sum())
    assert found[-1][1] == pytest.approx(total / count, rel=1e-4)


def test_a_model_that_does_not_move_forgets_nothing_and_a_run_that_is_not_asked_says_nothing(
    world: Path, tmp_path: Path
) -> None:
    trainer, _ = fitted(world, tmp_path / "asked", module_of(world, NLL(), forgetting=True, optimizer=still))
    assert [event.value for event in read_events(trainer.log_dir).Scalars("forgetting/kl")] == [0.0, 0.0]
    trainer, _ = fitted(world, tmp_path / "not", module_of(world, NLL(), optimizer=still))
    assert "forgetting/kl" not in read_events(trainer.log_dir).Tags()["scalars"]


def test_an_anchor_holds_what_is_known_back_from_the_labels(world: Path, tmp_path: Path) -> None:
    forgotten = []
    for weight in (0.0, 0.1, 10.0):
        module = module_of(world, KLAnchor(weight=weight), forgetting=True)
        trainer, _ = fitted(world, tmp_path / str(weight), module)
        forgotten.append(float(trainer.callback_metrics["forgetting/kl"]))
    assert forgotten[0] > forgotten[1] > forgotten[2] > 0


def test_checkpoints_may_wait_for_it_where_it_is_measured(world: Path, tmp_path: Path) -> None:
    for module, wanted in [(module_of(world, NLL(), forgetting=True), True), (module_of(world), True),
                           (module_of(world, NLL()), False)]:  # fmt: skip
        waiting = Checkpoint(monitor="forgetting/kl")
        trainer = quiet_trainer(tmp_path, waiting, max_epochs=1, monitors=False)
        assert any(isinstance(callback, MetricCheck) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if wanted:
            trainer.fit(module, split_data(str(world / "rows.jsonl")))
            assert waiting.best_model_score is not None and waiting.best_model_score > 0
        else:
            with pytest.raises(UserError, match=r"forgetting/kl: set --model.forgetting true"):
                trainer.fit(module, split_data(str(world / "rows.jsonl")))


def test_the_command_line_asks_for_it_and_anchors(world: Path, tmp_path: Path) -> None:
    DeftCLI([
        "fit", "--model.pretrained", str(world / "pretrained"), "--data.source", str(world / "rows.jsonl"),
        "--data.validation_fraction", "0.2", "--data.batch_size", "4", "--trainer.max_steps", "2",
        "--trainer.val_check_interval", "2", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--model.objective", "KLAnchor(base=DEFT, weight=0.5)", "--model.forgetting", "true",
        "--trainer.enable_progress_bar", "false",
    ])  # fmt: skip
    (folder,) = (path.parent for path in tmp_path.rglob("events.*"))
    assert "forgetting/kl" in read_events(folder).Tags()["scalars"]
    text = (folder / "config.yaml").read_text()
    assert "class_path: deft_lightning.objectives.KLAnchor" in text and "forgetting: true" in text


# --- resuming --------------------------------------------------------------------------------------------------------


def test_the_anchor_stays_where_training_began_after_a_resume(world: Path, tmp_path: Path) -> None:
    whole = module_of(world)
    fitted(world, tmp_path / "whole", whole)
    _, cut = fitted(world, tmp_path / "cut", module_of(world), callbacks=[Stop(5)])
    again = module_of(world)
    fitted(world, tmp_path / "again", again, cut)
    assert largest_difference(weights(whole.model), weights(again.model)) == 0
    start = AutoModelForCausalLM.from_pretrained(world / "pretrained").state_dict()
    copied = again.batch_loss.reference.model.state_dict()
    assert all(torch.equal(copied[name], value) for name, value in start.items())


def test_random_weights_are_the_same_again_under_the_same_seed_and_refused_under_another(
    world: Path, tmp_path: Path
) -> None:
    def made(seed: int) -> SFTModule:
        torch.manual_seed(seed)
        return SFTModule(ANCHOR, architecture=SHAPE, optimizer=quick, scheduler=constant)

    def run(seed: int, name: str, resume: str | None, *callbacks: Any) -> Any:
        module = made(seed)
        _, path = fitted(world, tmp_path / name, module, resume, callbacks=callbacks)
        return weights(module.model), path

    whole, _ = run(0, "whole", None)
    _, cut = run(0, "cut", None, Stop(5))
    assert largest_difference(whole, run(0, "again", cut)[0]) == 0
    with pytest.raises(UserError, match=r"^KLAnchor, --model.forgetting: .* this run was made with other weights"):
        run(1, "other", cut)


def test_a_checkpoint_that_does_not_say_where_its_run_began_is_told_or_refused(
    world: Path, tmp_path: Path, caplog: Any
) -> None:
    _, cut = fitted(world, tmp_path / "plain", module_of(world, DFT()), callbacks=[Stop(5)])
    with caplog.at_level("INFO"):
        fitted(world, tmp_path / "named", module_of(world), cut)
    assert "pretrained as it is now; the checkpoint does not say" in caplog.text
    model = AutoModelForCausalLM.from_pretrained(world / "pretrained")
    given = module_of(world, pretrained=model)
    with pytest.raises(UserError, match=r"the checkpoint does not say which weights its run began from"):
        fitted(world, tmp_path / "given", given, cut)


def test_a_module_made_of_a_checkpoint_is_never_anchored_to_what_was_trained(world: Path, tmp_path: Path) -> None:
    _, path = fitted(world, tmp_path, module_of(world))
    module = SFTModule.load_from_checkpoint(path)
    assert module.objective == ANCHOR
    with pytest.raises(UserError, match=r"^KLAnchor, --model.forgetting: the reference is the model before training"):
        bare_trainer(tmp_path).validate(module, split_data(str(world / "rows.jsonl")), verbose=False)


def test_validation_of_a_checkpoint_has_the_loss_of_its_run(world: Path, tmp_path: Path) -> None:
    for lora in (None, LoRA(r=2)):
        trainer, path = fitted(world, tmp_path / str(lora is None), module_of(world, lora=lora, forgetting=True))
        wanted = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "forgetting/kl")}
        data = split_data(str(world / "rows.jsonl"))
        (found,) = bare_trainer(tmp_path).validate(
            module_of(world, lora=lora, forgetting=True), data, ckpt_path=path, verbose=False, weights_only=True
        )
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)


def test_a_model_that_was_built_without_a_reference_is_refused(world: Path, tmp_path: Path) -> None:
    module = module_of(world)
    data = split_data(str(world / "rows.jsonl"), test_source=str(world / "rows.jsonl"))
    trainer = bare_trainer(tmp_path, limit_test_batches=1)
    trainer.test(module, data, verbose=False)
    assert module.batch_loss.reference is None, "grading needs no copy"
    with pytest.raises(UserError, match=r"^KLAnchor\(.*built without a reference"):
        fitted(world, tmp_path, module)


def test_what_trains_is_said_in_a_line(world: Path, tmp_path: Path, caplog: Any) -> None:
    for lora, line in [(None, "a frozen copy of the initial weights, "), (LoRA(r=2), "its adapters switched off")]:
        caplog.clear()
        with caplog.at_level("INFO"):
            fitted(world, tmp_path / str(lora is None), module_of(world, KLAnchor(base=DEFT()), lora=lora), max_steps=1)
        assert f"reference: {'' if lora is None else 'the model with '}{line}" in caplog.text
