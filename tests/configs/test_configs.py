"""Every config is a test: it parses; the run from random weights and each data format also train for a few steps."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import ROOT

from deft_lightning.__main__ import main

pytestmark = pytest.mark.slow

# Those of the verb `study`, and the paper's, have tests of their own.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not {"study", "paper"} & set(path.parts))
QUICKSTART, SCRATCH = (ROOT / "configs" / f"{name}.yaml" for name in ("quickstart", "from_scratch"))

TINY = [
    "--config", str(SCRATCH), "--trainer.max_steps", "3", "--trainer.val_check_interval", "2",
    "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
    "--trainer.num_sanity_val_steps", "0", "--model.architecture.hidden_size", "32",
    "--model.architecture.intermediate_size", "64", "--model.architecture.num_hidden_layers", "1",
    "--model.generation.max_new_tokens", "4", "--data.batch_size", "4",
]  # fmt: skip

Cli = Callable[..., None]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run the command line in this process, with its runs under the test's folder."""

    def call(verb: str, *args: str) -> None:
        root = ["--trainer.default_root_dir", str(tmp_path / "logs")]
        monkeypatch.setattr("sys.argv", ["deft_lightning", verb, *args, *root])
        main()

    return call


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_parses(path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("fit", "--config", str(path), "--print_config")
    assert stop.value.code == 0
    assert "objective" in capsys.readouterr().out


def test_the_configs_are_there() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"configs", "model", "data", "strategy"}


@pytest.mark.parametrize(("config", "rate"), [(QUICKSTART, 5e-4), (SCRATCH, 2e-3)], ids=["quickstart", "from_scratch"])
def test_it_says_what_to_take_out_for_a_model_of_ones_own(
    config: Path, rate: float, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rate is that of a tiny model, its noise would swap the user's answers."""
    header, _, rest = config.read_text(encoding="utf-8").partition("\nseed_everything")
    header = header.replace("\n# ", " ")
    assert "`model.optimizer` and `data.noise`" in header
    options = yaml.safe_load(f"seed_everything{rest}")
    assert options["model"]["optimizer"]["init_args"]["lr"] == rate and options["data"]["noise"]["ops"]
    behind = re.findall(r"`(--model\.optimizer\.lr \S+ --data\.noise\.ops \S+)`", header)[0]
    with pytest.raises(SystemExit):
        cli("fit", "--config", str(config), *behind.replace("'", "").split(), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["optimizer"]["init_args"]["lr"] == 5e-5 and printed["data"]["noise"]["ops"] == []
    plain = re.findall(r"`(fit --model\.pretrained ID_OR_DIR --data\.source FILE\.jsonl)`", header)[0]
    with pytest.raises(SystemExit):
        cli(*plain.split(), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["optimizer"]["init_args"]["lr"] == 5e-5 and not printed["data"]["noise"]["ops"]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


Shape = Callable[[str, str], dict[str, Any]]
FORMATS: dict[str, tuple[str, Callable[[Path, list[Any]], None], Shape]] = {
    "messages": ("jsonl", write_jsonl, lambda q, a: {"messages": chat(q, a)}),
    "sharegpt": (
        "json",
        lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8") and None,
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    ),
    "prompt_completion": ("csv", write_csv, lambda q, a: {"prompt": q, "completion": a}),
    "alpaca_output": ("jsonl", write_jsonl, lambda q, a: {"instruction": q, "input": "", "output": a}),
    "alpaca_response": ("jsonl", write_jsonl, lambda q, a: {"instruction": q, "input": "", "response": a}),
    "question_answer": ("parquet", write_parquet, lambda q, a: {"question": q, "answer": a}),
    "text": ("jsonl", write_jsonl, lambda q, a: {"text": f"{q} {a}"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_trains(name: str, cli: Cli, tmp_path: Path) -> None:
    suffix, write, shape = FORMATS[name]
    source = tmp_path / f"data.{suffix}"
    write(source, [shape(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(60)])
    cli(
        "fit", *TINY, "--data.source", str(source), "--data.validation_fraction", "0.2",
        "--after_fit.test", "false",
    )  # fmt: skip
    assert (tmp_path / "logs" / "version_0" / "export" / "config.json").is_file()


def test_tokens_train_with_the_tokenizer_they_were_made_with(cli: Cli, tmp_path: Path) -> None:
    from deft_lightning.data.encoding.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(["a few words"], 0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [tokenizer(f"{i} and {i}<|end|>").input_ids for i in range(60)]
    source = tmp_path / "data.jsonl"
    write_jsonl(source, [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows])
    cli(
        "fit", *TINY, "--data.source", str(source), "--data.validation_fraction", "0.2",
        "--after_fit.test", "false", "--data.tokenizer", str(tmp_path / "tokenizer"),
    )  # fmt: skip
    assert (tmp_path / "logs" / "version_0" / "export" / "tokenizer.json").is_file()


def test_the_papers_parquet_layout_trains_through_its_config(cli: Cli, tmp_path: Path) -> None:
    rows = [{"extra_info": {"question": f"{i}+{i}?", "answer": str(2 * i)}} for i in range(40)]
    write_parquet(tmp_path / "train.parquet", rows)
    cli(
        "fit", *TINY, "--config", str(ROOT / "configs" / "data" / "math.yaml"),
        "--data.source", str(tmp_path / "train.parquet"), "--data.validation_fraction", "0.2",
        "--after_fit.test", "false",
    )  # fmt: skip
    assert (tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt").exists()
