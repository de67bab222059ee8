"""SFTModule as a library: from a checkpoint alone, from a model object, with other optimizers and schedules."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import quiet_trainer, same_state, split_data, tiny_llama

from deft_lightning import SFTModule
from deft_lightning.callbacks import Checkpoint
from deft_lightning.cli.main import run
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.functional import TokenStats
from deft_lightning.models import LoRA
from deft_lightning.objectives import DEFT, NLL, Objective, Schedule, Tsallis
from deft_lightning.optim import MuonAdamW
from deft_lightning.training.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from deft_lightning.training.optim import CosineWithWarmup

pytestmark = pytest.mark.slow

trainer_in = partial(quiet_trainer, monitors=False)


def newest(root: Path) -> Path:
    return sorted(root.rglob("step=*.ckpt"), key=lambda path: int(re.findall(r"step=(\d+)", path.name)[0]))[-1]


# --- from a checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(r=2, alpha=8)], ids=["full", "lora"])
def test_a_module_is_made_of_a_checkpoint_alone(
    lora: LoRA | None, pretrained: str, source: str, tmp_path: Path
) -> None:
    module = SFTModule(
        objective=Schedule(then=Tsallis(q=0.3), switch=0.5), pretrained=pretrained, lora=lora, head="dense",
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9)), on_nonfinite="skip",
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup=0.5), generation=Generation(max_new_tokens=7),
    )  # fmt: skip
    loaded = split_data(source)
    trainer_in(tmp_path, max_steps=6).fit(module, loaded)
    again = SFTModule.load_from_checkpoint(newest(tmp_path))
    assert same_state(module, again) and again.model.training
    for name in ("objective", "lora", "head", "on_nonfinite", "generation", "current_objective", "tokens_seen"):
        assert getattr(again, name) == getattr(module, name), name
    optimizer = again.optimizer_callable([torch.nn.Parameter(torch.zeros(1, 1))])
    assert optimizer.defaults["lr"] == 1e-3 and optimizer.defaults["betas"] == (0.8, 0.9)
    assert again.scheduler_callable is not None and again.scheduler_callable(optimizer).warmup == 0.5
    batch = next(iter(loaded.train_dataloader()))
    module.eval(), again.eval()
    torch.testing.assert_close(again.loss_and_stats(batch)[0], module.loss_and_stats(batch)[0], rtol=0, atol=0)
    trainer = trainer_in(tmp_path / "more", max_steps=2)
    trainer.fit(again, split_data(source))  # with its own tokenizer, though nothing names one
    assert trainer.datamodule.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert not same_state(module, again)


def test_what_is_given_wins(pretrained: str, source: str, tmp_path: Path) -> None:
    trainer_in(tmp_path, max_steps=1).fit(SFTModule(pretrained=pretrained), split_data(source))
    again = SFTModule.load_from_checkpoint(newest(tmp_path), objective=NLL(), map_location="cpu")
    assert again.objective == NLL()
    with pytest.raises(UserError, match="the model is the checkpoint's"):
        SFTModule.load_from_checkpoint(newest(tmp_path), pretrained=pretrained)


class Theirs(Objective):
    """Of somebody else's module."""

    made = 0

    def __init__(self) -> None:
        Theirs.made += 1

    def __call__(self, stats: TokenStats) -> torch.Tensor:
        return -stats.log_prob


@pytest.mark.parametrize(
    "objective",
    ["Theirs()", "Schedule(then=Theirs())", "os.system('true')", "tests.test_library.Theirs()", "__import__('os')", 3],
)
def test_a_strangers_checkpoint_names_no_class_that_is_not_of_this_package(
    objective: Any, pretrained: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trainer_in(tmp_path, max_steps=1).fit(SFTModule(pretrained=pretrained), split_data(source))
    held = torch.load(newest(tmp_path), weights_only=True)
    held["hyper_parameters"]["objective"] = objective
    held["hyper_parameters"]["optimizer"] = {"class": "os.system", "lr": 1.0}
    held["hyper_parameters"]["scheduler"] = {"class": "builtins.exec", "warmup": 1.0}
    torch.save(held, tmp_path / "theirs.ckpt")
    before = Theirs.made
    with caplog.at_level("INFO"):
        module = SFTModule.load_from_checkpoint(tmp_path / "theirs.ckpt")
    assert Theirs.made == before and module.objective == DEFT()
    lines = [record.getMessage() for record in caplog.records if "theirs.ckpt" in record.getMessage()]
    told = [line for line in lines if "says nothing of" in line]
    assert len(told) == 1 and all(name in told[0] for name in ("objective", "optimizer", "scheduler"))


def test_an_earlier_checkpoint_says_what_it_does_not_know(
    pretrained: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_in(tmp_path, max_steps=1).fit(
        SFTModule(objective=Tsallis(q=0.3), pretrained=pretrained), split_data(source)
    )
    held = torch.load(newest(tmp_path), weights_only=True)
    del held["hyper_parameters"]
    torch.save(held, tmp_path / "earlier.ckpt")
    with caplog.at_level("INFO"):
        module = SFTModule.load_from_checkpoint(tmp_path / "earlier.ckpt")
    assert module.objective == Tsallis(q=0.3)
    (line,) = [r.getMessage() for r in caplog.records if "says nothing of" in r.getMessage()]
    assert "generation" in line and "objective" not in line and "\n" not in line
    del held["deft_lightning"]["settings"], held["deft_lightning"]["objective"]
    torch.save(held, tmp_path / "earliest.ckpt")
    assert SFTModule.load_from_checkpoint(tmp_path / "earliest.ckpt").objective == DEFT()


# --- a model object -------------------------------------------------------------------------------------------------


def test_a_model_object_is_trained_in_place_saved_resumed_and_exported(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    start = {name: value.clone() for name, value in model.named_parameters()}
    module, named = SFTModule(pretrained=model), SFTModule(pretrained=pretrained)
    trainer_in(tmp_path / "object", max_steps=4).fit(module, split_data(source))
    trainer_in(tmp_path / "name", max_steps=4).fit(named, split_data(source))
    assert module.model is model and same_state(module, named)
    assert any(not torch.equal(start[name], value) for name, value in model.named_parameters())
    resumed = SFTModule(pretrained=AutoModelForCausalLM.from_pretrained(pretrained))
    trainer = trainer_in(tmp_path / "again", max_steps=6)
    trainer.fit(resumed, split_data(source), ckpt_path=str(newest(tmp_path / "object")))
    trainer_in(tmp_path / "whole", max_steps=6).fit(named := SFTModule(pretrained=pretrained), split_data(source))
    assert trainer.global_step == 6
    trainer.export(resumed, output=str(tmp_path / "export"), datamodule=trainer.datamodule)  # type: ignore[attr-defined]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in resumed.model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "export")) == 262


def test_adapters_are_added_to_a_model_object(pretrained: str, source: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained=AutoModelForCausalLM.from_pretrained(pretrained), lora=LoRA(r=2))
    trainer_in(tmp_path, max_steps=2).fit(module, split_data(source))
    assert same_state(module, SFTModule.load_from_checkpoint(newest(tmp_path)))


def test_a_model_object_with_adapters_of_its_own_comes_back(pretrained: str, source: str, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained), config)
    module = SFTModule(pretrained=model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    trainer_in(tmp_path, max_steps=2).fit(module, split_data(source))
    assert module.model is model and any(value.any() for name, value in model.state_dict().items() if "lora_B" in name)
    again = SFTModule.load_from_checkpoint(newest(tmp_path))
    assert same_state(module, again) and again.lora == LoRA(3, 5, 0.0, ["q_proj", "v_proj"])


def test_adapters_that_no_checkpoint_can_describe_are_named(pretrained: str) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="not plain LoRA: checkpoints of this run cannot be exported"):
        SFTModule(pretrained=get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained), config))


def test_a_model_object_without_a_folder_needs_a_tokenizer(pretrained: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder with a tokenizer: give InstructionDataModule\(tokenizer="):
        trainer_in(tmp_path, max_steps=1).fit(SFTModule(pretrained=tiny_llama(0.3)[0]), split_data(source))
    module = SFTModule(pretrained=tiny_llama(0.3)[0])
    trainer_in(tmp_path, max_steps=1).fit(module, split_data(source, tokenizer=pretrained))
    assert module.tokens_seen > 0


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), 3, ["a"]], ids=["module", "number", "list"])
def test_other_objects_are_no_models(thing: Any) -> None:
    with pytest.raises(UserError, match="neither the name of a model nor a causal language model"):
        SFTModule(pretrained=thing)


# --- optimizers and schedules ---------------------------------------------------------------------------------------


def test_a_constant_rate(pretrained: str, source: str, tmp_path: Path) -> None:
    args = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--after_fit.export", "false"]
    args += ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    common = ["fit", "--model.pretrained", pretrained, "--data.source", source, "--model.scheduler", "null", *args]
    run([*common, "--trainer.max_steps", "3", "--trainer.default_root_dir", str(tmp_path)])
    run([*common, "--trainer.max_steps", "5", "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", "last"])
    held = torch.load(newest(tmp_path), weights_only=True)
    assert held["global_step"] == 5 and held["lr_schedulers"] == []
    assert {group["lr"] for group in held["optimizer_states"][0]["param_groups"]} == {5e-5}


@pytest.mark.parametrize(
    "spell", ["torch.optim.lr_scheduler.ReduceLROnPlateau", "lightning.pytorch.cli.ReduceLROnPlateau"]
)
def test_a_rate_that_waits_for_a_plateau_is_reduced_after_validations(
    spell: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    """A rate of nothing: the metric never gets better, and the validations at steps 4 and 6 halve it."""
    more = ["--model.scheduler.monitor", "val/loss"] if "lightning" in spell else []
    run(
        ["fit", "--model.pretrained", pretrained, "--data.source", source, "--model.optimizer.lr", "1e-12",
         "--model.scheduler", spell, *more, "--model.scheduler.patience", "0", "--model.scheduler.factor", "0.5",
         "--model.scheduler.threshold", "0.1", "--model.scheduler.eps", "0",
         "--trainer.val_check_interval", "2", "--trainer.max_steps", "8", "--trainer.accelerator", "cpu",
         "--trainer.default_root_dir", str(tmp_path), "--after_fit.export", "false", "--data.batch_size", "4",
         "--data.validation_fraction", "0.2", "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip
    held = torch.load(newest(tmp_path), weights_only=True)
    assert {group["lr"] for group in held["optimizer_states"][0]["param_groups"]} == {1e-12 / 4}


def test_a_resumed_plateau_goes_on_as_if_it_had_not_stopped(pretrained: str, source: str, tmp_path: Path) -> None:
    def module() -> SFTModule:
        return SFTModule(
            pretrained=pretrained, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        )  # fmt: skip

    options: dict[str, Any] = {"val_check_interval": 2}
    whole, half, rest = module(), module(), module()
    trainer_in(tmp_path / "whole", max_steps=8, **options).fit(whole, split_data(source))
    trainer_in(tmp_path / "half", max_steps=5, **options).fit(half, split_data(source))
    trainer_in(tmp_path / "rest", max_steps=8, **options).fit(
        rest, split_data(source), ckpt_path=str(newest(tmp_path / "half"))
    )
    assert same_state(whole, rest)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("val", {"limit_val_batches": 0}, "waits for a validation, and there is none"),
        ("train/loss", {}, "name a metric of validation, such as val/nll"),
        ("val/nlll", {"val_check_interval": 1}, r"no such metric of validation\. Did you mean val/nll"),
    ],
)
def test_a_plateau_of_nothing_is_refused(
    scheduler: str, options: dict[str, Any], message: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    def plateau(optimizer: Any) -> Any:
        found = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        found.monitor = scheduler  # type: ignore[attr-defined]
        return found

    with pytest.raises(UserError, match=message) as caught:
        trainer_in(tmp_path, max_steps=2, **options).fit(
            SFTModule(pretrained=pretrained, scheduler=plateau), split_data(source)
        )
    assert "\n" not in str(caught.value)


def muon(groups: Any) -> MuonAdamW:
    return MuonAdamW(groups, lr=1e-2)


def test_muon_trains_the_matrices_of_the_layers_and_adamw_the_rest(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    start = AutoModelForCausalLM.from_pretrained(pretrained)
    module = SFTModule(pretrained=pretrained, optimizer=muon, scheduler=None)
    trainer = trainer_in(tmp_path, max_steps=1, gradient_clip_val=None)
    trainer.fit(module, split_data(source))
    names = {id(p): name for name, p in module.model.named_parameters()}
    groups = {
        bool(group["muon"]): {names[id(p)] for g in trainer.optimizers[0].param_groups if g["muon"] == group["muon"]
                              for p in g["params"]}
        for group in trainer.optimizers[0].param_groups
    }  # fmt: skip
    assert groups[True] == {name for name in names.values() if "proj" in name}
    assert groups[False] == {n for n in names.values() if "embed" in n or "norm" in n or "lm_head" in n}
    # An orthogonal step scaled to AdamW's: its singular values are near 0.2 sqrt(max(rows, columns)) times the rate.
    weight = dict(start.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    moved = (dict(module.model.named_parameters())["model.layers.0.mlp.up_proj.weight"] - weight * (1 - 1e-4)).detach()
    singular = torch.linalg.svdvals(moved) / (1e-2 * 0.2 * 24**0.5)
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3


def test_muon_equals_the_two_optimizers_of_torch() -> None:
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    one = MuonAdamW([{"params": [first[0]], "muon": True}, {"params": [first[1]]}], lr=1e-2, weight_decay=0.1)
    two = torch.optim.Muon([second[0]], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    three = torch.optim.AdamW([second[1]], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(5):
        for mine, theirs in zip(first, second, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        for optimizer in (one, two, three):
            optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def test_muon_is_resumed_to_the_bit(pretrained: str, source: str, tmp_path: Path) -> None:
    modules = [SFTModule(pretrained=pretrained, optimizer=muon) for _ in range(2)]
    trainer_in(tmp_path / "whole", max_steps=6, max_epochs=2).fit(modules[0], split_data(source))
    kept = Checkpoint(every_n_train_steps=3, save_top_k=-1)
    trainer_in(tmp_path / "half", kept, max_steps=6, max_epochs=2).fit(
        SFTModule(pretrained=pretrained, optimizer=muon), split_data(source)
    )
    (path,) = (tmp_path / "half").rglob("step=3.ckpt")
    trainer_in(tmp_path / "rest", max_steps=6, max_epochs=2).fit(modules[1], split_data(source), ckpt_path=str(path))
    assert same_state(*modules)
    assert SFTModule.load_from_checkpoint(path).hparams["optimizer"]["lr"] == 1e-2


def test_muon_where_it_cannot_be_is_refused(pretrained: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is for full fine-tuning: leave --model\.lora out"):
        trainer_in(tmp_path, max_steps=1).fit(
            SFTModule(pretrained=pretrained, optimizer=muon, lora=LoRA(r=2)), split_data(source)
        )
    with pytest.raises(UserError, match=r"trains only matrices; --model\.optimizer MuonAdamW"):
        trainer_in(tmp_path, max_steps=1).fit(
            SFTModule(pretrained=pretrained, optimizer=torch.optim.Muon), split_data(source)
        )


def test_muon_from_the_command_line(pretrained: str, source: str, tmp_path: Path) -> None:
    run(
        ["fit", "--model.pretrained", pretrained, "--data.source", source, "--model.optimizer",
         "deft_lightning.optim.MuonAdamW", "--model.optimizer.lr", "1e-3", "--trainer.max_steps", "2",
         "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path), "--after_fit.export", "false",
         "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip
    held = torch.load(newest(tmp_path), weights_only=True)
    assert held["hyper_parameters"]["optimizer"]["class"].endswith(".MuonAdamW")
    assert {"momentum_buffer", "exp_avg"} <= {
        n for state in held["optimizer_states"][0]["state"].values() for n in state
    }


# --- parts of Lightning ---------------------------------------------------------------------------------------------


def test_lightnings_search_for_a_rate_leaves_the_weights_alone_and_the_run_uses_its_answer(
    pretrained: str, source: str, tmp_path: Path
) -> None:
    module, loaded = SFTModule(pretrained=pretrained, scheduler=None), split_data(source)
    trainer = trainer_in(tmp_path, max_steps=3)
    finder = Tuner(trainer).lr_find(module, datamodule=loaded, num_training=30, min_lr=1e-6, max_lr=1e-2)
    assert finder is not None and module.lr == finder.suggestion()
    start = AutoModelForCausalLM.from_pretrained(pretrained)
    assert same_state(module.model, start)
    trainer.fit(module, loaded)
    assert float(trainer.callback_metrics["train/lr"]) == pytest.approx(module.lr)
    assert trainer.global_step == 3 and not same_state(module.model, start)


@pytest.mark.parametrize("by", ["plugin", "option"])
def test_checkpoints_written_in_the_background_are_whole_and_resumed_to_the_bit(
    by: str, pretrained: str, source: str, tmp_path: Path
) -> None:
    whole = SFTModule(pretrained=pretrained)
    trainer_in(tmp_path / "whole", max_steps=6, max_epochs=2).fit(whole, split_data(source))
    kept = Checkpoint(every_n_train_steps=3, save_top_k=-1, asynchronous=by == "option")
    plugins: list[Any] = [AsyncCheckpointIO()] if by == "plugin" else []
    trainer = trainer_in(tmp_path / "half", kept, max_steps=6, max_epochs=2, plugins=plugins)
    assert isinstance(trainer.strategy.checkpoint_io, BackgroundCheckpointIO)
    trainer.fit(SFTModule(pretrained=pretrained), split_data(source))
    left = sorted(path.name for path in (tmp_path / "half").rglob("*.ckpt"))
    assert left == ["last.ckpt", "step=3.ckpt", "step=6.ckpt"]
    (path,) = (tmp_path / "half").rglob("step=3.ckpt")
    resumed = SFTModule(pretrained=pretrained)
    trainer_in(tmp_path / "rest", max_steps=6, max_epochs=2, plugins=plugins).fit(
        resumed, split_data(source), ckpt_path=str(path)
    )
    assert same_state(whole, resumed)


def test_the_one_before_is_removed_once_the_next_is_written(tmp_path: Path) -> None:
    class Slow(AtomicCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            super().save_checkpoint(*args, **kwargs)

    one, two, background = tmp_path / "1.ckpt", tmp_path / "2.ckpt", BackgroundCheckpointIO(Slow())
    background.save_checkpoint({"value": torch.ones(1)}, one)
    background.teardown()
    background.save_checkpoint({"value": torch.ones(1)}, two)
    background.remove_checkpoint(one)
    assert one.exists() and not two.exists() and background.pending(two)
    background.teardown()
    assert two.exists() and not one.exists() and not background.pending(two)


def test_what_fails_in_the_background_is_told(pretrained: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is to be")
    trainer = trainer_in(tmp_path, max_steps=2, plugins=[AsyncCheckpointIO()], enable_checkpointing=False)
    trainer.fit(SFTModule(pretrained=pretrained), split_data(source))
    trainer.save_checkpoint(tmp_path / "taken" / "a.ckpt")
    with pytest.raises(UserError, match="cannot save the checkpoint"):
        trainer.strategy.checkpoint_io.teardown()


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks", "RichProgressBar"],
        ["--trainer.barebones", "true"],
        ["--trainer.plugins", "AsyncCheckpointIO"],
        ["--trainer.max_time", "00:00:00:03", "--trainer.max_steps", "-1", "--model.scheduler", "null"],
    ],
    ids=["rich", "barebones", "async", "time"],
)
def test_parts_of_lightning_work_from_the_command_line(
    options: list[str], pretrained: str, source: str, tmp_path: Path
) -> None:
    run(
        ["fit", "--model.pretrained", pretrained, "--data.source", source, "--trainer.accelerator", "cpu",
         "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "4", *options]
    )  # fmt: skip
    (folder,) = tmp_path.iterdir()
    assert folder.name == "version_0" and (folder / "export" / "model.safetensors").is_file()
    assert (folder / "checkpoints").exists() == ("--trainer.barebones" not in options)


def test_a_time_limit_alone_names_the_rate(
    pretrained: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(
            ["fit", "--model.pretrained", pretrained, "--data.source", source, "--trainer.accelerator", "cpu",
             "--trainer.default_root_dir", str(tmp_path), "--trainer.max_time", "00:00:00:03"]
        )  # fmt: skip
    assert "--model.scheduler null" in capsys.readouterr().err.splitlines()[-1]


def test_a_name_that_two_classes_have_is_refused_with_both(
    pretrained: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(
            ["fit", "--model.pretrained", pretrained, "--data.source", source, "--model.scheduler", "ReduceLROnPlateau"]
        )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "torch.optim.lr_scheduler.ReduceLROnPlateau, lightning.pytorch.cli.ReduceLROnPlateau" in line
