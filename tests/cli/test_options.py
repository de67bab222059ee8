"""Options that cannot be meant end with one line that names the innermost option, before anything is trained."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from parsed import parser, refused
from worlds import save_tiny_llama, write_rows

from deft_lightning import Trainer
from deft_lightning.cli.main import run
from deft_lightning.cli.trainer_options import check_optimizer, check_options, complaint_of_lightning, trainer_error
from deft_lightning.errors import UserError
from deft_lightning.training.optim import adamw

WRONG_TYPES = {
    "--trainer.max_steps foo": "--trainer.max_steps: 'foo' is not a whole number",
    "--trainer.max_steps 2.5": "--trainer.max_steps: 2.5 is not a whole number",
    "--trainer.max_epochs foo": "--trainer.max_epochs: 'foo' is not a whole number",
    "--trainer.limit_train_batches x": "--trainer.limit_train_batches: 'x' is not a number",
    "--trainer.gradient_clip_val a": "--trainer.gradient_clip_val: 'a' is not a number",
    "--trainer.precision 7": "--trainer.precision: 7 is not one of 64, 32, 16, ",
    "--trainer.enable_progress_bar perhaps": "--trainer.enable_progress_bar: 'perhaps' is not true or false",
    "--trainer.deterministic foo": "--trainer.deterministic: 'foo' is not one of true, false, warn",
    "--trainer.callbacks+=EarlyStopping": "--trainer.callbacks.monitor is missing: EarlyStopping needs it",
    "--trainer.callbacks+=Nonsense": "--trainer.callbacks Nonsense is unknown. Known: ",
    "--trainer.callbacks+=EarlyStoping": "Did you mean EarlyStopping?",
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor x --trainer.callbacks.patience y":
        "--trainer.callbacks.patience: 'y' is not a whole number",
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x":
        "--trainer.callbacks.monitr is not an option of EarlyStopping. Did you mean monitor?",
    "--trainer.logger Wandb": "--trainer.logger Wandb is unknown. Did you mean WandbLogger?",
    "--trainer.logger CSVLogger": "--trainer.logger.save_dir is missing: CSVLogger needs it",
    "--trainer.max_step 4": "unknown option --trainer.max_step. Did you mean --trainer.max_steps",
    "--model.optimizer.lr inf": "--model.optimizer.lr: 'inf' is not a finite number",
    "--model.optimizer.lr foo": "--model.optimizer.lr: 'foo' is not a number",
    "--model.optimizer SGD --model.optimizer.momentm 1": "--model.optimizer.momentm is not an option of SGD. Did you",
    "--model.optimizer Adamx": "--model.optimizer Adamx is unknown. Did you mean Adamax",
    "--model.optimizer.betas [0.9,x]": "--model.optimizer.betas: 'x' is not a number",
    "--model.optimizer {class_path:AdamW,init_args:{lr:foo}}": "--model.optimizer",
    "--model.scheduler.warmup foo": "--model.scheduler.warmup: 'foo' is not a number",
    "--model.scheduler.warmup_steps 5": "--model.scheduler.warmup_steps is not an option of CosineWithWarmup. Did you",
    "--model.objective Tsallis --model.objective.q foo": "--model.objective.q: 'foo' is not a number",
    "--model.objective Schedule --model.objective.first Tsallis --model.objective.first.q x":
        "--model.objective.first.q: 'x' is not a number",
    "--model.objective Schedule --model.objective.first.q 1":
        "--model.objective.first.q is an option of Tsallis: choose it with --model.objective.first Tsallis",
    "--model.objective Rescaled --model.objective.base Tsalis": "base Tsalis is unknown. Did you mean",
    "--model.lora.r foo": "--model.lora.r: 'foo' is not a whole number",
    "--model.lora.rank 4": "--model.lora.rank is not an option of LoRA. Known: r, ",
    "--model.architecture [1]": "--model.architecture: [1] is not options as {NAME: VALUE}",
    "--model.dtype float16": "--model.dtype: 'float16' is not one of float32, bfloat16. Did you mean",
    "--model foo.yaml": "--model: 'foo.yaml' is neither a file nor options as {NAME: VALUE}",
    "--data.batch_size 2.5": "--data.batch_size: 2.5 is not a whole number",
    "--data.noise.ops foo": "--data.noise.ops: 'foo' is not a list [A, B]; add one with --data.noise.ops+=NAME",
    "--data.noise.ops+=ResponseSwap --data.noise.ops.rate foo": "--data.noise.ops.rate: 'foo' is not a number",
    "--checkpoint.save_top_k x": "--checkpoint.save_top_k: 'x' is not a whole number",
    "--seed_everything foo": "--seed_everything: 'foo' is not true or false or a whole number",
    "--ckpt_path": "--ckpt_path needs a value",
    "--config [1]": "--config: [1] is neither a file nor options as {NAME: VALUE}",
    "--config {model:{optimzer:{lr:1}}}": "--config",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", WRONG_TYPES)
def test_a_value_of_another_type_names_the_innermost_option(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["fit", *options.split(" ")], capsys)
    assert WRONG_TYPES[options] in line and len(line) < 700
    for word in ("Expected", "Subtypes", "class_path", "typing.", "Namespace"):
        assert word not in line.replace(options.split(" ")[-1], "")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("{model: {optimizer: {init_args: {lr: foo}}}}", "--model.optimizer.lr: 'foo' is not a number"),
        (
            "{model: {optimzer: {lr: 1}}}",
            "unknown option model.optimzer.lr in the configuration. Did you mean --model.opt",
        ),
        (
            "{trainer: {callbacks: [{class_path: EarlyStopping, init_args: {patience: x}}]}}",
            "--trainer.callbacks.patience",
        ),
    ],
)
def test_a_configuration_is_told_like_the_command_line(
    value: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in refused(["fit", "--config", value], capsys)


def checked(options: str, verb: str = "fit") -> str:
    """Return the line that refuses options which parse."""
    config: Any = parser().parse_args([verb, *options.split(" ")])
    with pytest.raises(UserError) as error:
        check_options(config[verb], verb)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--trainer.accumulate_grad_batches 0", "--trainer.max_epochs -5", "--trainer.max_steps -2",
        "--trainer.min_steps -1", "--trainer.num_nodes 0",
        "--trainer.log_every_n_steps -1", "--trainer.check_val_every_n_epoch 0", "--trainer.num_sanity_val_steps -2",
        "--trainer.limit_train_batches 0", "--trainer.limit_train_batches 0.0", "--trainer.limit_val_batches -1",
        "--trainer.limit_test_batches 1.5", "--trainer.overfit_batches -1", "--trainer.val_check_interval 0",
        "--trainer.val_check_interval 0.0", "--trainer.val_check_interval 1.5", "--trainer.val_check_interval -1",
        "--trainer.devices 99 --trainer.accelerator cpu", "--trainer.strategy fsdp", "--trainer.strategy deepspeed",
        "--trainer.gradient_clip_val .inf", "--model.optimizer.lr .nan", "--model.optimizer.lr .inf",
        "--trainer.default_root_dir memory://runs", "--trainer.default_root_dir s3://bucket/runs",
        "--checkpoint.dirpath memory://c", "--predictions.output gs://b/p.jsonl", "--data.cache_dir memory://x",
        "--seed_everything -1", "--data.seed -1", "--seed_everything 99999999999",
    ],
)  # fmt: skip
def test_a_value_that_means_nothing_names_its_option(options: str) -> None:
    name, _, value = options.split(" --")[0].partition(" ")
    line = checked(options)
    assert line.startswith(name) and value.lstrip("-.").rstrip("0.") in line


def test_verbs_that_do_not_train_may_leave_training_out() -> None:
    config: Any = parser().parse_args(["test", "--trainer.limit_train_batches", "0"])
    check_options(config["test"], "test")


def test_infinity_stays_where_it_has_a_meaning() -> None:
    callback = "{class_path: EarlyStopping, init_args: {monitor: val/nll, stopping_threshold: -.inf}}"
    config: Any = parser().parse_args(["fit", "--trainer.callbacks", f"[{callback}]"])
    check_options(config["fit"], "fit")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"accelerator": "foo"}, ["--trainer.accelerator: ", "foo", "cpu"]),
        ({"accelerator": "cpu", "devices": 0}, ["--trainer.devices: "]),
        ({"accelerator": "cpu", "devices": "foo"}, ["--trainer.devices: "]),
        ({"accelerator": "cpu", "strategy": "ddp_spwn"}, ["--trainer.strategy: ", "ddp_spwn"]),
        ({"accelerator": "cpu", "max_time": "soon"}, ["--trainer.max_time 'soon'", "DD:HH:MM:SS"]),
        ({"accelerator": "cpu", "profiler": "foo"}, ["--trainer.profiler: ", "simple"]),
        ({"accelerator": "cpu", "gradient_clip_algorithm": "foo"}, ["--trainer.gradient_clip_algorithm: ", "norm"]),
        ({"accelerator": "cpu", "fast_dev_run": -1}, ["--trainer.fast_dev_run: "]),
    ],
)
def test_what_lightning_refuses_is_told_by_the_option(options: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError, MisconfigurationException)) as error:
        Trainer(default_root_dir=tmp_path, **options)
    line = str(trainer_error(error.value))
    assert line.startswith(says[0]) and all(part in line for part in says)


def test_settings_of_an_optimizer_are_tried_before_the_model_is_loaded() -> None:
    check_optimizer(adamw)
    for options in ({"lr": -1.0}, {"betas": (0.9, 1.5)}, {"weight_decay": -1.0}):
        with pytest.raises(UserError, match=r"--model\.optimizer: Invalid"):
            check_optimizer(lambda weights, options=options: torch.optim.AdamW(weights, **options))


def test_errors_of_our_own_code_are_no_complaints() -> None:
    def caught(raises: Any) -> BaseException:
        with pytest.raises(Exception, match=r".*") as error:
            raises()
        return error.value

    assert complaint_of_lightning(caught(lambda: Trainer(accelerator="foo", logger=False))) is not None
    assert complaint_of_lightning(caught(lambda: int("x"))) is None
    assert complaint_of_lightning(caught(lambda: Trainer(logger=False, callbacks=5))) is None  # it fails by accident
    assert complaint_of_lightning(UserError("told already")) is None


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run: ten batches an epoch, of which it makes three."""
    root = tmp_path_factory.mktemp("options")
    save_tiny_llama(root / "model", 0.3, num_hidden_layers=1)
    rows = [{"question": f"what is {number}?", "answer": f"it is {number}"} for number in range(42)]
    write_rows(root / "rows.jsonl", rows)
    return [
        "fit", "--model.pretrained", str(root / "model"), "--data.source", str(root / "rows.jsonl"),
        "--data.batch_size", "4", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--after_fit.export", "false",
        "--trainer.default_root_dir", str(root / "runs"),
    ]  # fmt: skip


STOP = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--trainer.val_check_interval", "100"],
         ["--trainer.val_check_interval 100 is above the 10 batches", "check_val_every_n_epoch null"]),
        ([*STOP, "val/los"], ["monitor (EarlyStopping) val/los: no such metric. Did you mean val/loss", "train/nll"]),
        (["--checkpoint.monitor", "nll"], ["--checkpoint.monitor nll: no such metric. Did you mean val/nll"]),
        ([*STOP, "val/nll", "--data.validation_fraction", "0"], ["val/nll: there is no validation", "--data."]),
        (["--trainer.logger", "CometLogger"], ["error: --trainer.logger: Requirement 'comet"]),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k", "-3"],
         ["error: --trainer.callbacks: Invalid value for save_top_k=-3"]),
        (["--checkpoint.save_top_k", "-3"], ["error: --checkpoint: Invalid value for save_top_k=-3"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_before_training(
    options: list[str], says: list[str], given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run([*given, *options])
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and "Traceback" not in error
    assert all(part in line for part in says), line
    assert not line.endswith("Expected a bool")


@pytest.mark.slow
def test_early_stopping_looks_after_validations(given: list[str], tmp_path: Path) -> None:
    """A run that ends before its first validation is no run without the metric."""
    run([*given, *STOP, "val/nll", "--trainer.default_root_dir", str(tmp_path)])
    assert list(tmp_path.rglob("step=3.ckpt"))


# ---------------------------------------------------------------- generated

INTEGERS = ["trainer.max_steps", "trainer.max_epochs", "data.batch_size", "data.max_length", "model.lora.r",
            "checkpoint.save_top_k", "model.generation.max_new_tokens", "data.noise.seed", "data.num_proc"]  # fmt: skip
NUMBERS = ["model.optimizer.lr", "data.validation_fraction", "trainer.gradient_clip_val", "model.scheduler.warmup",
           "model.generation.temperature"]  # fmt: skip
SWITCHES = ["data.packing", "model.compile", "trainer.enable_progress_bar", "after_fit.test", "data.cache"]
CHOICES = ["model.head", "model.dtype", "data.keep", "data.on_bad_row", "data.supervise", "trainer.precision"]
CLASSES = ["model.objective", "model.optimizer", "model.scheduler", "trainer.callbacks", "trainer.logger"]
VALID = "model:\n  head: dense\ntrainer:\n  max_steps: 3\n  log_every_n_steps: 2\ndata:\n  batch_size: 4\n"


def word(draw: random.Random) -> str:
    """Return letters that are no number, no switch and no class, controls and directions among them."""
    letters = string.ascii_letters + "äß漢 _-.\x1b\u202e\n\t\"'%{}[]&*!|>@`"
    return "q" + "".join(draw.choice(letters) for _ in range(draw.randrange(1, 30))) + "q"


def bad_options(draw: random.Random) -> list[str]:
    """Return options with one value that is wrong."""
    kind = draw.choice([INTEGERS, NUMBERS, SWITCHES, CHOICES, CLASSES, ["unknown"]])
    name = draw.choice(kind)
    if name == "unknown":
        return [f"--{draw.choice(INTEGERS)}{draw.choice(string.ascii_lowercase)}x", "1"]
    values = [word(draw), f"[{word(draw)}]", "[1, 2]", "{a: 1}", "0x", "1e", "--", "é" * 5000]
    if kind is INTEGERS:
        values += ["2.5", "1e3", ".inf"]
    if kind is CLASSES:
        values = [word(draw), "os.system", "nothing.Here", "builtins.eval", "torch.nn.Linear"]
    value = draw.choice(values)
    return [f"--{name}={value}"]


def bad_file(draw: random.Random) -> bytes:
    """Return a configuration with one thing that is wrong."""
    lines = VALID.splitlines()
    at = draw.randrange(len(lines))
    inner = [number for number, line in enumerate(lines) if line.startswith(" ")]
    return draw.choice(
        [
            lambda: "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]).encode(),  # a line twice
            lambda: VALID.encode().replace(b": ", b": \xff", 1),
            lambda: "\n".join([*lines[:at], "\t" + lines[at], *lines[at + 1 :]]).encode(),
            lambda: (VALID + f"{word(draw).strip()!r}x: 1\n").encode(),
            lambda: (VALID + draw.choice("[{&*!%@`") + "\n").encode(),
            lambda: VALID.encode("utf-16")[: -draw.choice([1, 3, 5])],
            lambda: VALID.encode().replace(b"dense", draw.choice([b"!!python/name:os.system", b"[dense]", b"{a: b}"])),
            lambda: VALID.encode()[: len(VALID) // 2] + b"\0" + VALID.encode()[len(VALID) // 2 :],
            lambda: "\n".join(line + (" x: y" if n == inner[0] else "") for n, line in enumerate(lines)).encode(),
            lambda: (
                VALID.replace("3", draw.choice(["three", "3.5", "[3]", "03", "1:30", "null", "2026-01-01"]))
            ).encode(),
        ]
    )()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_anything_wrong_is_one_line(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    if seed % 2:
        (tmp_path / "c.yaml").write_bytes(bad_file(draw))
        options = ["--config", str(tmp_path / "c.yaml")]
    else:
        options = bad_options(draw)
    line = refused([draw.choice(["fit", "preview", "test", "probe"]), *options], capsys)
    assert len(line) < 1200 and line.isprintable() and "<class" not in line, line
