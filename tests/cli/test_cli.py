"""The command line as a user meets it: verbs, overrides, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import ROOT, conversation, write_rows

from deft_lightning import __version__
from deft_lightning.__main__ import main

pytestmark = pytest.mark.slow

TINY = [
    "--config", str(ROOT / "configs" / "from_scratch.yaml"), "--trainer.max_steps", "4",
    "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1",
    "--trainer.limit_test_batches", "2", "--trainer.limit_predict_batches", "2",
    "--trainer.num_sanity_val_steps", "0", "--model.architecture.hidden_size", "32",
    "--model.architecture.intermediate_size", "64", "--model.architecture.num_hidden_layers", "1",
    "--model.generation.max_new_tokens", "4", "--data.batch_size", "4",
    "--data.source", "reasoning_gym:spell_backward?size=200&question=metadata.word",
]  # fmt: skip

ALWAYS = {
    "train/loss", "train/nll", "train/ppl", "train/token_accuracy", "train/tokens", "train/grad_norm",
    "val/loss", "val/nll", "val/ppl", "val/token_accuracy",
}  # fmt: skip
MONITORS = {
    "gate/mean", "gate/ess", "focus/mean", "prob/mean", "entropy/shannon", "entropy/renyi2",
    "gate/clean", "gate/noisy", "nll/clean", "nll/noisy", "noise/auroc_gate", "noise/auroc_prob",
    "noise/gradient_share",
}  # fmt: skip

Cli = Callable[..., None]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run the command line in this process, with its runs under ``tmp_path / "logs"`` unless told otherwise."""

    def call(verb: str, *args: str) -> None:
        root = [] if "--trainer.default_root_dir" in args else ["--trainer.default_root_dir", str(tmp_path / "logs")]
        monkeypatch.setattr("sys.argv", ["deft_lightning", verb, *args, *root])
        main()

    return call


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of one short run of configs/from_scratch.yaml, made once for the tests that only read it."""
    root = tmp_path_factory.mktemp("fitted")
    patch = pytest.MonkeyPatch()
    patch.setattr("sys.argv", ["deft_lightning", "fit", *TINY, "--trainer.default_root_dir", str(root)])
    main()
    patch.undo()
    return root


def test_fit_writes_every_tag_of_the_contract(fitted: Path) -> None:
    events = EventAccumulator(str(fitted / "version_0"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= ALWAYS | MONITORS
    assert set(tags["histograms"]) >= {"gate/hist", "focus/hist", "prob/hist", "entropy/hist"}
    assert len(events.Scalars("train/nll")) == 4


def test_every_metric_that_a_run_logs_can_be_monitored(fitted: Path) -> None:
    """The names are listed apart from the module that logs them: a new one must be added there."""
    from deft_lightning.callbacks.monitored import NOISY, TRAIN, VAL

    events = EventAccumulator(str(fitted / "version_0"))
    events.Reload()
    for prefix, known in (("train/", TRAIN), ("val/", VAL), ("val_noisy/", NOISY)):
        logged = {tag.removeprefix(prefix) for tag in events.Tags()["scalars"] if tag.startswith(prefix)}
        assert logged and logged <= set(known), logged - set(known)


def test_fit_leaves_a_folder_that_transformers_generates_from(fitted: Path) -> None:
    folder = fitted / "version_0" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert ids["input_ids"].shape[1] < out.shape[1] <= ids["input_ids"].shape[1] + 3
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.config.use_cache


def test_export_from_a_checkpoint_alone_equals_the_export_of_the_run(fitted: Path, cli: Cli, tmp_path: Path) -> None:
    cli("export", "--ckpt_path", str(next(fitted.rglob("step=4.ckpt"))), "--output", str(tmp_path / "hf"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(fitted / "version_0" / "export").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (
        fitted / "version_0" / "export" / "chat_template.jinja"
    ).read_text()


def test_test_and_predict_from_the_last_checkpoint(
    fitted: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--trainer.default_root_dir", str(fitted)]
    cli("test", *TINY, *root, "--ckpt_path", "last")
    assert "test/exact_match" in capsys.readouterr().out
    cli("predict", *TINY, *root, "--ckpt_path", "last", "--predictions.output", str(tmp_path / "p.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(set(row) == {"id", "prompt", "completions", "gold", "truncated"} for row in rows)
    assert all(row["prompt"].startswith("<|user|>") and len(row["completions"]) == 1 for row in rows)


def test_benchmarks_of_a_checkpoint_are_tested_predicted_and_scored_alike(
    fitted: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(json.dumps({"question": word, "answer": word[::-1]}) + "\n" for word in ("abc", "drow", "on", "e"))
    (tmp_path / "rows.jsonl").write_text(rows)
    chosen = ["--data.benchmarks", f"{{figfont: {tmp_path / 'rows.jsonl'}, gsm8k: {tmp_path / 'rows.jsonl'}}}"]
    common = [*TINY, "--trainer.default_root_dir", str(fitted), "--ckpt_path", "last", *chosen]
    cli("test", *common)
    live = capsys.readouterr().out
    assert "Test metric" not in live, "one table, not one for each loader"
    cli("predict", *common, "--predictions.output", str(tmp_path / "p.jsonl"))
    capsys.readouterr()
    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setattr("sys.argv", ["deft_lightning", "score", str(tmp_path / "p.jsonl")])
    main()
    monkeypatched.undo()
    later = capsys.readouterr().out

    def table(text: str) -> list[list[str]]:
        found = [line.split() for line in text[text.index("benchmark  ") :].splitlines()]
        return [line for line in found if line and not line[0].startswith("Testing")]

    assert table(live) == table(later) and len(table(live)) == 7


def test_an_unknown_benchmark_is_one_line(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("gsm8", "[gsm8]", "{gsm8: rows.jsonl}"):
        with pytest.raises(SystemExit) as stop:
            cli("test", *TINY, "--data.benchmarks", value)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and "no benchmark 'gsm8'. Did you mean gsm8k?" in error


def test_predict_samples_several_completions_and_repeats_itself(fitted: Path, cli: Cli, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        cli(
            "predict", *TINY, "--trainer.default_root_dir", str(fitted), "--ckpt_path", "last",
            "--model.generation.temperature", "1.0", "--model.generation.samples", "3",
            "--predictions.output", str(tmp_path / name),
        )  # fmt: skip
        files.append((tmp_path / name).read_text())
    assert files[0] == files[1]
    assert all(len(json.loads(line)["completions"]) == 3 for line in files[0].splitlines())


def test_validate_of_a_checkpoint_gives_the_nll_that_fit_logged(
    fitted: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    events = EventAccumulator(str(fitted / "version_0"))
    events.Reload()
    logged = events.Scalars("val/nll")[-1].value
    cli("validate", *TINY, "--trainer.default_root_dir", str(fitted), "--ckpt_path", "last")
    row = next(line for line in capsys.readouterr().out.splitlines() if "val/nll" in line)
    assert float(row.split("│")[2]) == pytest.approx(logged, rel=1e-5)


def test_the_command_line_wins_over_the_checkpoint(fitted: Path, cli: Cli, tmp_path: Path) -> None:
    checkpoint = next(fitted.rglob("step=4.ckpt"))
    cli(
        "fit", *TINY, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "5", "--model.objective", "Tsallis",
        "--model.objective.q", "0.25", "--after_fit.test", "false",
    )  # fmt: skip
    saved = torch.load(next((tmp_path / "logs").rglob("step=5.ckpt")), weights_only=True)
    assert saved["deft_lightning"]["objective"] == "Tsallis(q=0.25)"
    assert saved["global_step"] == 5


def test_every_objective_of_the_class_tree_trains_by_name(cli: Cli, tmp_path: Path) -> None:
    from deft_lightning.objectives import known_objectives

    names = [name for name, cls in known_objectives().items() if cls.__module__.startswith("deft_lightning.")]
    assert len(names) >= 9
    for name in names:
        cli(
            "fit", *TINY, "--model.objective", name, "--after_fit.test", "false", "--after_fit.export", "false",
            "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / name),
        )  # fmt: skip
        assert list((tmp_path / name).rglob("step=1.ckpt"))


@pytest.mark.parametrize(
    ("options", "legend"),
    [
        (["Rescaled", "--model.objective.base", "DEFT"], "Rescaled(base=DEFT(), decay=0.99)"),
        (
            ["Schedule", "--model.objective.first", "Likelihood", "--model.objective.switch", "0.5"],
            "Schedule(first=Likelihood(), then=DEFT(), switch=0.5)",
        ),
        (["Floored", "--model.objective.decay", "linear"], "Floored(base=DEFT(), floor=0.1, decay='linear')"),
        (
            ["Rescaled", "--model.objective.base", "Schedule", "--model.objective.base.then", "Tsallis",
             "--model.objective.base.then.q", "0.25", "--model.objective.base.blend", "0.5"],
            "Rescaled(base=Schedule(first=NLL(), then=Tsallis(q=0.25), switch=0.3, blend=0.5), decay=0.99)",
        ),
    ],
)  # fmt: skip
def test_objectives_are_nested_by_name(options: list[str], legend: str, cli: Cli, tmp_path: Path) -> None:
    cli("fit", *TINY, "--model.objective", *options, "--after_fit.test", "false", "--after_fit.export", "false")
    saved = torch.load(next((tmp_path / "logs").rglob("step=4.ckpt")), weights_only=True)["deft_lightning"]
    assert saved["objective"] == legend
    assert saved["training"][0] == (1.0 if legend == "Rescaled(base=DEFT(), decay=0.99)" else 0.75)
    assert (saved["gates"][1] > 0) == legend.startswith("Rescaled")


def test_an_objective_of_ones_own_is_found_by_class_path(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_pkg.py").write_text(
        "from dataclasses import dataclass\n"
        "from deft_lightning.functional import TokenStats\n"
        "from deft_lightning.objectives import Objective\n"
        "from torch import Tensor\n"
        "@dataclass(frozen=True)\n"
        "class Damped(Objective):\n"
        "    power: float = 2.0\n"
        "    def __call__(self, stats: TokenStats) -> Tensor:\n"
        "        return -stats.collision.detach() ** self.power * stats.log_prob\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cli("fit", *TINY, "--model.objective", "my_pkg.Damped", "--model.objective.power", "3", "--after_fit.test", "false")
    saved = torch.load(next((tmp_path / "logs").rglob("step=4.ckpt")), weights_only=True)
    assert saved["deft_lightning"]["objective"] == "Damped(power=3.0)"


def test_noise_operations_are_chosen_by_name_with_options_of_their_own(
    cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = [
        "--data.noise.ops+=AnswerCorrupt", "--data.noise.ops.style", "boxed", "--data.noise.ops.how", "offset",
        "--data.noise.ops+=OptionFlip", "--data.noise.ops.exact", "true",
        "--data.noise.ops+=StepEdit", "--data.noise.ops.op", "insert", "--data.noise.ops.fraction", "0.5",
        "--data.noise.ops+=CharNoise", "--data.noise.ops.cer", "0.2", "--data.noise.ops.rate", "0.5",
        "--data.noise.ops+=TokenReplace", "--data.noise.ops.source", "confusable", "--data.noise.ops.rates", "[0.2]",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"AnswerCorrupt changed none of 190 responses.*--data\.noise\.ops"):
        cli(
            "fit", *TINY, *noise, "--trainer.max_steps", "1", "--after_fit.test", "false", "--after_fit.export", "false"
        )
    assert "% of 190 examples changed" in caplog.text
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    ops = [(op["class_path"].rpartition(".")[2], op["init_args"]) for op in config["data"]["noise"]["ops"]][-5:]
    assert [name for name, _ in ops] == ["AnswerCorrupt", "OptionFlip", "StepEdit", "CharNoise", "TokenReplace"]
    assert ops[0][1] == {"rate": 0.3, "style": "boxed", "how": "offset", "exact": False}
    assert ops[2][1]["op"] == "insert" and ops[3][1]["cer"] == 0.2 and ops[4][1]["rates"] == [0.2]


def test_lora_exports_merged_and_adapter_folders(fitted: Path, cli: Cli, tmp_path: Path) -> None:
    base = fitted / "version_0" / "export"
    cli("fit", *TINY, "--model.pretrained", str(base), "--model.lora.r", "2", "--after_fit.test", "false")
    checkpoint = str(next((tmp_path / "logs").rglob("step=4.ckpt")))
    merged = tmp_path / "logs" / "version_0" / "export"
    assert (merged / "model.safetensors").is_file() and not (merged / "adapter_config.json").exists()
    settings = json.loads((merged.parent / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    more = ["--model.lora.r", "2", "--after_fit.test", "false", "--after_fit.merge", "none"]
    cli("fit", *TINY, "--model.pretrained", str(base), *more)
    assert {path.name for path in (tmp_path / "logs" / "version_1").iterdir()} >= {"adapter"}
    assert not (tmp_path / "logs" / "version_1" / "export").exists()
    cli("export", "--ckpt_path", checkpoint, "--output", str(tmp_path / "adapter"), "--merge", "false")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_checkpoint_and_progress_switches_of_the_trainer_are_honoured(cli: Cli, tmp_path: Path) -> None:
    cli(
        "fit", *TINY, "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false",
        "--trainer.logger", "false", "--after_fit.test", "false", "--after_fit.export", "false",
    )  # fmt: skip
    assert not list(tmp_path.rglob("*.ckpt"))


def test_runs_without_a_logger_have_folders_of_their_own_with_an_export_each(cli: Cli, tmp_path: Path) -> None:
    for _ in range(2):
        cli("fit", *TINY, "--trainer.logger", "false", "--after_fit.test", "false")
    exports = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("model.safetensors")}
    assert {export[-16:] for export in exports} == {"version_0/export", "version_1/export"}


def test_checkpoint_every_n_steps(cli: Cli, tmp_path: Path) -> None:
    cli(
        "fit",
        *TINY,
        "--checkpoint.every_n_train_steps",
        "1",
        "--checkpoint.save_top_k",
        "-1",
        "--after_fit.test",
        "false",
    )
    assert {path.name for path in tmp_path.rglob("step=*.ckpt")} == {f"step={i}.ckpt" for i in range(1, 5)}


GOOD = conversation(("user", "hi"), ("assistant", "hello"))


def bad_input(name: str, path: Path) -> tuple[list[str], list[str]]:
    """Arguments that are wrong, and what the one line must say."""
    file = path / "rows.jsonl"
    cases: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
        "unknown role": (
            lambda: ["--data.source", write_rows(file, [GOOD, conversation(("usr", "hi"), ("assistant", "ho"))])],
            ["rows.jsonl, row 2", "messages[0].role", "'usr'", "user"],
        ),
        "missing column": (
            lambda: [
                "--data.source",
                write_rows(file, [{"question": "a", "answer": "b"}, {"question": "a", "answr": "b"}]),
            ],
            ["rows.jsonl, row 2", "'answer'", "answr"],
        ),
        "empty file": (lambda: ["--data.source", write_rows(file, [])], ["rows.jsonl", "empty"]),
        "empty response": (
            lambda: ["--data.source", write_rows(file, [GOOD, GOOD, conversation(("user", "hi"), ("assistant", " "))])],
            ["rows.jsonl, row 3", "messages[1].content", "empty"],
        ),
        "unknown format": (lambda: ["--data.format", "alpacca"], ["--data.format", "alpaca", "alpacca"]),
        "columns of no format": (
            lambda: ["--data.source", write_rows(file, [{"a": 1, "b": 2}])],
            ["rows.jsonl, row 1", "a, b"],
        ),
        "rate": (
            lambda: ["--data.noise.ops+=TokenReplace", "--data.noise.ops.rate", "1.5"],
            ["TokenReplace", "1.5", "[0, 1]"],
        ),
        "masked by max_length": (lambda: ["--data.max_length", "2"], ["max_length 2", "--data.max_length"]),
        "template without response": (
            lambda: ["--data.chat_template", "{{ messages[0]['content'] }}"],
            ["row 1", "--data.chat_template"],
        ),
        "template that supervises nothing": (
            lambda: [
                "--data.chat_template",
                "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}"
                "{% endif %}",
            ],
            ["no supervised token", "--data.chat_template"],
        ),
        "vocabulary": (lambda: ["--model.architecture.vocab_size", "10"], ["vocab_size 10", "262"]),
        "model folder": (lambda: ["--model.pretrained", str(path / "nope")], ["nope", "--model.pretrained"]),
        "objective": (lambda: ["--model.objective", "Cayleyy"], ["Cayleyy", "Did you mean Cayley?", "DEFT"]),
        "objective option": (
            lambda: ["--model.objective", "Cayley", "--model.objective.flor", "1"],
            ["--model.objective.flor", "floor"],
        ),
        "option": (lambda: ["--model.objectiv", "DEFT"], ["--model.objectiv", "Did you mean --model.objective"]),
        "strategy": (lambda: ["--trainer.strategy", "fsdp"], ["--trainer.strategy fsdp:", "use fsdp2"]),
        "lora": (lambda: ["--model.lora.r", "0"], ["--model.lora.r", "at least 1"]),
        "model type": (lambda: ["--model.architecture.model_type", "lama"], ["lama", "llama"]),
        "no checkpoint": (lambda: ["--ckpt_path", "last"], ["--ckpt_path last", "no checkpoint"]),
        "positions": (
            lambda: ["--model.architecture.max_position_embeddings", "8"],
            ["8 positions", "--data.max_length 8"],
        ),
    }
    make, wanted = cases[name]
    return make(), wanted


BAD = [
    "unknown role", "missing column", "empty file", "empty response", "unknown format", "columns of no format", "rate",
    "masked by max_length", "template without response", "template that supervises nothing", "vocabulary",
    "model folder", "objective", "objective option", "option", "strategy", "lora", "model type", "no checkpoint",
    "positions",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, wanted = bad_input(name, tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli("fit", *TINY, *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.rstrip().splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    assert all(part in lines[0] for part in wanted), lines[0]


def test_an_error_of_a_real_process_has_no_traceback(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [GOOD, conversation(("usr", "hi"), ("assistant", "ho"))])
    command = [sys.executable, "-m", "deft_lightning", "fit", *TINY, "--data.source", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "row 2" in done.stderr.splitlines()[-1]


def test_version_is_printed_before_torch_is_imported() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deft_lightning", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == f"deft_lightning {__version__}\n"
    assert "torch" not in done.stderr and "lightning.pytorch" not in done.stderr
    assert time.perf_counter() - start < 10


def test_help_of_a_verb_lists_objectives_noise_and_strategies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "fit", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("DEFT", "Cayley", "Truncated", "TokenReplace", "ResponseSwap", "ddp", "reasoning_gym:"):
        assert word in text


def test_a_checkpoint_brings_its_tokenizer_although_the_training_rows_changed(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer built from other rows has other merges under the same ids."""
    first = [{"question": f"word{i}", "answer": f"alpha beta {i}"} for i in range(80)]
    second = [{"question": f"{i} zzz", "answer": f"gamma qqq {i}"} for i in range(80)]
    one, two = write_rows(tmp_path / "one.jsonl", [*first]), write_rows(tmp_path / "two.jsonl", [*second])
    size = ["--data.tokenizer_size", "290", "--data.test_source", one]
    cli("fit", *TINY, *size, "--data.source", one, "--after_fit.test", "false")
    files = []
    for source in (one, two):
        output = tmp_path / f"{Path(source).stem}.predictions"
        cli(
            "predict", *TINY, *size, "--data.source", source, "--ckpt_path", "last", "--predictions.output", str(output)
        )
        files.append(output.read_text())
    assert files[0] == files[1] and "word0" in files[0]
    # Continuing to train on rows whose tokenizer was named differently is refused.
    from deft_lightning.data.encoding.tokenizer import build_tokenizer

    build_tokenizer([f"gamma{i} qqq{i * 7} zzz{i * 3} eta theta" for i in range(80)], 290).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(SystemExit):
        cli("fit", *TINY, "--data.source", two, "--ckpt_path", "last", "--data.tokenizer", str(tmp_path / "other"))
    assert "error: the tokenizer is not the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (
            ["--model.architecture.hidden_size", "64"],
            ["different model", "model.lm_head.weight", "--model.architecture"],
        ),
        (["--ckpt_path", str(ROOT / "README.md")], ["README.md", "--ckpt_path"]),
        (["--ckpt_path", str(ROOT)], ["is not a complete checkpoint", "--ckpt_path"]),
        (["--model.optimizer.lr", "-1"], ["--model.optimizer", "-1"]),
        (["--model.optimizer", "AdamWW"], ["AdamWW", "Did you mean AdamW"]),
        (["--model.scheduler", "Cosine"], ["Cosine", "CosineWithWarmup"]),
        (["--trainer.strategy", "auto", "--trainer.strategy.replicate", "2"], ["--trainer.strategy auto", "fsdp2"]),
        (["--trainer.strategy", "ddp", "--trainer.strategy.replicate", "2"], ["is an option of fsdp2"]),
        (
            ["--trainer.strategy", "ddp_find_unused_parameters_true", "--trainer.strategy.replicate", "2"],
            ["ddp_find_unused_parameters_true has no options of its own: choose ddp or fsdp2"],
        ),
        (["--trainer.strategy", "fsdp2", "--trainer.strategy.replicat", "2"], ["replicat", "Did you mean replicate"]),
        (["--trainer.strategy", "fsdp2", "--trainer.strategy.replicate", "0"], ["strategy.replicate", "at least 1"]),
        (["--data.num_workers", "-1"], ["--data.num_workers"]),
        (["--data.tokenizer_size", "-5"], ["--data.tokenizer_size"]),
        (["--trainer.accumulate_grad_batches", "0"], ["--trainer.accumulate_grad_batches"]),
        (["--gate_monitor.bins", "0"], ["GateMonitor", "bins"]),
        (["--gate_monitor.others", "[NLL, EAFT]"], ["gate_monitor.others", "EAFT", "DEFT()"]),
        (["--gate_monitor.others", "[NLL, NLL]"], ["gate_monitor.others", "twice"]),
        (["--dashboard.examples", "-1"], ["dashboard.examples", "-1"]),
        (["--model.objective.floor", "0.5"], ["--model.objective Cayley"]),
        (["--data.column_map.qestion", "q"], ["qestion", "question"]),
        (["--config", "model: {objektive: DEFT}"], ["model.objektive", "--model.objective"]),
        (["--model.architecture.model_type", "bert"], ["not a causal model"]),
        (
            ["--model.optimizer", "SGD", "--model.optimizer.lr", "1e30", "--trainer.gradient_clip_val", "0"],
            ["not finite"],
        ),
    ],
    ids=lambda value: value[-1][-24:] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_mistakes_that_used_to_be_tracebacks(
    args: list[str], wanted: list[str], fitted: Path, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = [] if "--ckpt_path" in args or "hidden_size" not in args[0] else ["--ckpt_path", "last"]
    root = ["--trainer.default_root_dir", str(fitted)] if resume else []
    with pytest.raises(SystemExit) as stop:
        cli("fit", *TINY, "--trainer.max_steps", "8", *resume, *root, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in wanted), line


def test_max_steps_alone_is_not_cut_at_one_epoch(cli: Cli, tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": str(i)} for i in range(9)]
    source = write_rows(tmp_path / "few.jsonl", [*rows])
    model = ["--model.architecture.hidden_size", "16", "--model.architecture.num_attention_heads", "2"]
    model += ["--model.architecture.intermediate_size", "16", "--model.architecture.num_hidden_layers", "1"]
    common = ["--data.source", source, "--data.batch_size", "4", "--data.validation_fraction", "0", *model]
    cli("fit", *common, "--trainer.max_steps", "7")
    assert list(tmp_path.rglob("step=7.ckpt"))
    cli("fit", *common, "--trainer.default_root_dir", str(tmp_path / "one"))
    assert list((tmp_path / "one").rglob("step=3.ckpt"))


def test_clipping_below_zero_is_off_and_does_not_train_uphill(cli: Cli, tmp_path: Path) -> None:
    for clip in ("-1", "0"):
        cli(
            "fit", *TINY, "--trainer.gradient_clip_val", clip, "--after_fit.test", "false",
            "--trainer.default_root_dir", str(tmp_path / clip),
        )  # fmt: skip
    states = [
        torch.load(next((tmp_path / clip).rglob("step=4.ckpt")), weights_only=True)["state_dict"]
        for clip in ("-1", "0")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
