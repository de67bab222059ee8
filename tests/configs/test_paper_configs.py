"""The paper's 21 pairs of model and task: settings, two steps of each under fsdp2, prompts, scoring, and costs."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from paper_pairs import PAIRS, PAPER, TASKS, layers, options, pairs_table, parts, written
from paper_worker import (
    MODELS,
    PAIRED,
    ROWS,
    STEPS,
    arguments,
    prepare_stand_ins,
    question,
    row_of,
    tokenizer_of,
)
from start_ranks import run_ranks
from worlds import ROOT

from deft_lightning import InstructionDataModule
from deft_lightning.__main__ import main
from deft_lightning.cli.main import DeftCLI
from deft_lightning.data.benchmarks import read_benchmark
from deft_lightning.data.encoding.template import chatml
from deft_lightning.data.sources.read import read
from deft_lightning.evaluation import find_benchmark

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

HUB = {
    "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "deepseek-math-7b": "deepseek-ai/deepseek-math-7b-base",
}


class Recipe(NamedTuple):
    """What the paper says of a task."""

    max_length: int
    micro_batch: int
    weight_decay: float
    samples: int
    temperature: float
    benchmarks: set[str]


RECIPES = {
    "math": Recipe(3072, 4, 0.01, 16, 1.0, {"minerva", "olympiadbench", "aime24", "amc23", "math500"}),
    "medical": Recipe(800, 16, 0.01, 1, 0.0, {"medical"}),
    "figfont": Recipe(800, 16, 1e-5, 1, 0.0, {"figfont"}),
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


# --- what they say ---------------------------------------------------------------------------------------------------


@functools.cache
def parsed_config(*words: str) -> dict[str, Any]:
    """What ``fit --print_config`` makes of the options."""
    out = io.StringIO()
    line = ["deft_lightning", "fit", *words, "--print_config"]
    with mock.patch.object(sys, "argv", line), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        DeftCLI()
    assert stop.value.code == 0
    found: dict[str, Any] = yaml.safe_load(out.getvalue())
    return found


BEFORE = json.loads((ROOT / "tests" / "fixtures" / "paper_pairs.json").read_text(encoding="utf-8"))


def test_there_is_a_file_for_every_model_and_task_and_each_is_used() -> None:
    assert set(PAIRS) == {f"{task}-{model}" for task in RECIPES for model in HUB} == set(BEFORE)
    used = {path for pair in PAIRS for path in layers(pair)}
    assert used == set(PAPER.rglob("*.yaml")) and all(path.is_file() for path in used)
    assert {path.stem for path in used if path.parent.name == "model"} == set(HUB)
    assert {path.stem for path in used if path.parent.name == "task"} == set(TASKS)


@each_pair
def test_the_files_of_a_pair_resolve_to_the_settings_of_the_one_file_it_once_had(pair: str, tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(BEFORE[pair]), encoding="utf-8")
    whole, layered = parsed_config("--config", str(tmp_path / "whole.yaml")), parsed_config(*options(pair))
    assert layered == whole


def test_medicine_without_the_prompts_of_a_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    prepare_stand_ins(tmp_path)
    pq.write_table(pa.Table.from_pylist([row_of("medical", i) for i in range(4)]), tmp_path / "medical.parquet")
    words = arguments(
        "fit", "medical-qwen2.5-7b", tmp_path, 1, "--trainer.strategy", "auto", "--trainer.max_steps", "1"
    )
    extra = words.index(str(PAPER / "pair" / "medical-qwen.yaml"))
    with (
        pytest.raises(SystemExit) as stop,
        mock.patch.object(sys, "argv", ["deft_lightning", *words[: extra - 1], *words[extra + 1 :]]),
    ):
        main()
    assert stop.value.code == 2
    assert "medical.parquet, row 1" in capsys.readouterr().err


@each_pair
def test_a_pair_is_the_papers_recipe(pair: str) -> None:
    task, name = parts(pair)
    recipe, (model, data, trainer) = (
        RECIPES[task],
        (parsed_config(*options(pair))[key] for key in ("model", "data", "trainer")),
    )
    assert model["pretrained"] == HUB[name] and model["head"] == "fused" and model["lora"] is None
    assert model["objective"] == {"class_path": "deft_lightning.objectives.DEFT", "init_args": {"eps": 0.0}}
    optimizer, schedule = model["optimizer"], model["scheduler"]
    assert optimizer["class_path"] == "torch.optim.AdamW" and optimizer["init_args"]["betas"] == [0.9, 0.95]
    assert optimizer["init_args"]["lr"] == (2e-5 if name == "llama-3.1-8b" else 5e-5)
    assert optimizer["init_args"]["weight_decay"] == recipe.weight_decay
    assert schedule["class_path"].endswith("CosineWithWarmup")
    assert (schedule["init_args"]["warmup"], schedule["init_args"]["floor"]) == (0.1, 0.0)
    assert trainer["gradient_clip_val"] == 1.0 and trainer["precision"] == "bf16-mixed"
    assert trainer["strategy"] == "fsdp2" and trainer["num_nodes"] == 1
    assert trainer["max_epochs"] is None and trainer["max_time"] is None and trainer.get("max_steps", -1) == -1
    assert (data["batch_size"], data["max_length"]) == (recipe.micro_batch, recipe.max_length)
    assert data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"] == 256
    assert data["max_tokens_per_batch"] is None and not data["packing"] and not data["noise"]["ops"]
    assert data["validation_fraction"] == 0.0 and data["split"] == "train"
    assert set(data["benchmarks"]) == recipe.benchmarks
    generation = model["generation"]
    assert (generation["samples"], generation["temperature"]) == (recipe.samples, recipe.temperature)
    assert generation["top_p"] == 1.0


@each_pair
def test_the_file_of_a_task_says_how_256_comes_out_on_other_numbers_of_devices(pair: str) -> None:
    lines = [line for path in layers(pair) for line in path.read_text(encoding="utf-8").splitlines()]
    (line,) = [line for line in lines if "accumulate_grad_batches" in line]
    size, trainer = parsed_config(*options(pair))["data"]["batch_size"], parsed_config(*options(pair))["trainer"]
    assert f"{trainer['devices']} devices x {size} examples x {trainer['accumulate_grad_batches']} = 256" in line
    windows = int(line.rpartition("on n devices ")[2].removesuffix(" / n"))
    assert all(size * n * (windows // n) == 256 and windows % n == 0 for n in (1, 2, 4, 8, 16))


def leaves(tree: Any, *at: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *at, key)
        else:
            yield (*at, key), value


def look_up(tree: Any, at: tuple[str, ...]) -> Any:
    for key in at:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


@each_pair
def test_files_state_nothing_but_departures_from_the_defaults(pair: str) -> None:
    for at, value in leaves(written(pair)):
        assert look_up(parsed_config(*options(pair)), at) == value
        assert look_up(parsed_config(), at) != value, f"{'.'.join(at)} is the default"


# --- two steps of each -----------------------------------------------------------------------------------------------


RANKS = [(1, 0), (2, 0), (2, 1)]  # how many work together, and which of them


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    prepare_stand_ins(folder)
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank found with every pair, run once: a rank takes longer to start than to train."""
    run_ranks(Path(__file__).with_name("paper_worker.py"), root, worlds=[1, 2])
    results = [json.loads((root / f"{world}-{rank}.json").read_text()) for world, rank in RANKS]
    return {pair: [result[pair] for result in results if pair in result] for pair in PAIRS}


@each_pair
def test_a_stand_in_trains_for_two_steps_under_fsdp2(pair: str, found: dict[str, list[dict[str, Any]]]) -> None:
    task, model = parts(pair)
    recipe, ranks = RECIPES[task], found[pair]
    assert len(ranks) == (2 if pair in PAIRED else 1)
    for rank in ranks:
        assert rank["strategy"] == "FSDP2Strategy" and rank["sharded"]
        assert rank["bfloat16"] and rank["shares"] == ["torch.float32"]
        assert rank["fused"] and rank["checkpointing"] and rank["objective"] == "DEFT()"
        rate = 2e-5 if model == "llama-3.1-8b" else 5e-5
        assert rank["optimizer"] == ["AdamW", rate, 0.9, 0.95, recipe.weight_decay]
        assert rank["steps"] == STEPS
        # A rank of eight has 32 of 256 examples a step, and every row is learnt once.
        assert rank["batches"] * recipe.micro_batch == ROWS == STEPS * 256 // 8
        assert rank["rows"] == ROWS * len(ranks) and rank["tokens_seen"] == rank["supervised"] > 0
        assert rank["finite"] and not rank["still"], "every weight has moved"
        metrics = rank["metrics"]
        # DEFT is at most NLL, and a model of random weights is as unsure as it can be.
        assert 0 < metrics["train/loss"] <= metrics["train/nll"] < 1.2 * math.log(300)
        assert metrics["train/tokens"] == rank["tokens_seen"] and 0 < metrics["gate/mean"] <= 1
        assert metrics == ranks[0]["metrics"]


def test_two_ranks_run_every_task_on_every_architecture() -> None:
    pairs = [parts(pair) for pair in PAIRS if pair in PAIRED]
    kinds = [(task, MODELS[model]["model_type"], MODELS[model]["tie_word_embeddings"]) for task, model in pairs]
    assert {kind[:2] for kind in kinds} == {(task, kind) for task in RECIPES for kind in ("qwen2", "llama")}
    assert {kind[1:] for kind in kinds} == {(kind, tied) for kind in ("qwen2", "llama") for tied in (True, False)}


# --- prompts ---------------------------------------------------------------------------------------------------------


def trained_on(pair: str, root: Path) -> tuple[Any, str, str]:
    """The tokenizer of a pair's run, and a row of its training data as text: all of it, and what is learnt."""
    task, model = parts(pair)
    (root / f"{task}.jsonl").write_text(json.dumps(row_of(task, 7)) + "\n", encoding="utf-8")
    settings = {**written(pair)["data"], "source": str(root / f"{task}.jsonl"), "cache": False}
    data = InstructionDataModule(**settings)
    tokenizer = tokenizer_of(model)
    data.use_tokenizer(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chatml(tokenizer)
    data.prepare_data()
    data.setup("fit")
    example = data.example("train", 0)
    learnt = example.input_ids[example.labels != -100]
    return tokenizer, tokenizer.decode(example.input_ids), tokenizer.decode(learnt)


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_with_its_turns_written_in_gets_no_second_template(model: str, tmp_path: Path) -> None:
    pair = f"medical-{model}"
    tokenizer, text, learnt = trained_on(pair, tmp_path)
    extra = row_of("medical", 7)["extra_info"]
    assert learnt == extra["qwen_reponse_no_thinking"] + tokenizer.eos_token
    if model.startswith("deepseek"):  # the file has no prompt for it
        assert text.count("<|im_start|>") == 2 and text.count(extra["question"]) == 1
        return
    assert text == extra["qwen_prompt" if model.startswith("qwen") else "llama_prompt"] + learnt


@pytest.mark.parametrize("model", MODELS)
def test_a_benchmarks_question_gets_the_turns_of_the_training_prompts(model: str, tmp_path: Path) -> None:
    pair = f"medical-{model}"
    tokenizer, text, learnt = trained_on(pair, tmp_path)
    rows = {"a": [{"question": "Which number follows 7?", "options": {"A": "8", "B": "6"}, "answer_idx": "A"}]}
    (tmp_path / "test.json").write_text(json.dumps({**rows, "b": rows["a"]}), encoding="utf-8")
    told = written(pair)["data"]["benchmark_instruction"]
    _, (prompt, _) = read_benchmark(find_benchmark("medical"), str(tmp_path / "test.json"), tokenizer, told)
    before, asked, after = text.rstrip("\n").removesuffix(learnt).partition(question(7))
    assert asked
    # The authors' instruction stands behind a line break, ours behind an empty line.
    assert prompt.text == before + question(7) + (f"\n\n{told}" if told else "") + after.removeprefix("\nBox it.")


@pytest.mark.parametrize("model", MODELS)
def test_mathematics_gets_the_template_of_its_tokenizer_once(model: str, tmp_path: Path) -> None:
    pair = f"math-{model}"
    tokenizer, text, learnt = trained_on(pair, tmp_path)
    extra = row_of("math", 7)["extra_info"]
    end = "<|im_end|>" if model.startswith("qwen") else tokenizer.eos_token
    assert learnt == extra["answer"] + end
    assert text.count("<|im_start|>") == 2 and text.count(extra["question"]) == 1


@pytest.mark.parametrize("model", ["qwen2.5-7b"])
def test_figfont_rows_are_those_of_the_authors_script(model: str) -> None:
    """It takes items 0 to 39999 and 40000 to 44999 of one seed; item i of seed s is item 0 of seed s + i."""
    import reasoning_gym

    pair = f"figfont-{model}"
    data = written(pair)["data"]
    items = reasoning_gym.create_dataset(
        "figlet_font", size=10, seed=42, min_word_len=2, max_word_len=5, space_letters=True
    )
    for source, start, size in ((data["source"], 0, 40_000), (data["benchmarks"]["figfont"], 40_000, 5000)):
        assert f"size={size}&" in source
        for at, (_, record) in enumerate(itertools.islice(read(source), 3)):
            item = items[start + at]
            assert (record["question"], record["answer"]) == (item["question"], item["answer"])
            assert 2 <= len(record["answer"]) <= 5


# --- scoring ---------------------------------------------------------------------------------------------------------


def write_tests(root: Path) -> dict[str, str]:
    """Rows for every benchmark, two each, as the commands of docs/evidence/paper.md take them."""
    found = {}
    for name in RECIPES["math"].benchmarks:
        rows = [{"problem": f"{name}: {i} + 1 = ?", "answer": str(i + 1)} for i in range(2)]
        found[name] = root / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    found["medical"] = root / "m1_eval_data.json"
    one = {"question": "Which number follows 7?", "options": {"A": "8", "B": "6"}, "answer_idx": "A"}
    found["medical"].write_text(json.dumps({"first": [one], "second": [one, {**one, "answer_idx": "B"}]}))
    figlets = "reasoning_gym:figlet_font?size=2&seed=40042&min_word_len=2&max_word_len=5&static_font=mini"
    return {**{name: str(path) for name, path in found.items()}, "figfont": figlets}


def figures(printed: str) -> list[str]:
    """The lines of a table of figures in what was printed."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("benchmark "))
    return list(itertools.takewhile(str.strip, lines[first:]))


@pytest.mark.parametrize("name", ["math-qwen2.5-1.5b", "medical-llama-3.1-8b", "figfont-deepseek-math-7b"])
def test_the_exported_model_is_tested_and_its_predictions_score_the_same(
    name: str, root: Path, found: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    wanted, rows = RECIPES[parts(name)[0]].benchmarks, write_tests(root)
    export, output = found[name][0]["export"], tmp_path / "predictions.jsonl"
    # As docs/evidence/paper.md has it, on one process and with a few tokens.
    scoring = [
        "--model.pretrained", export, "--model.dtype", "bfloat16", "--trainer.precision", "32-true",
        "--trainer.strategy", "auto", "--model.generation.max_new_tokens", "3",
        "--data.benchmarks", json.dumps({benchmark: rows[benchmark] for benchmark in sorted(wanted)}),
    ]  # fmt: skip

    def run(*line: str) -> str:
        monkeypatch.setattr("sys.argv", ["deft_lightning", *line])
        main()
        return capsys.readouterr().out

    tested = figures(run(*arguments("test", name, root, 1, *scoring)))
    assert {line.split()[0] for line in tested[1:] if not line.startswith(" ")} == wanted
    figure = {"math": "avg@16", "medical": "macro_compat", "figfont": "jaro_winkler"}[parts(name)[0]]
    assert sum(f" {figure} " in line for line in tested) == len(wanted)
    if name.startswith("medical"):  # the figures of which need most of what predict writes
        run(*arguments("predict", name, root, 1, *scoring, "--predictions.output", str(output)))
        assert figures(run("score", str(output), "--output", str(tmp_path / "figures.json"))) == tested
        assert f"test/medical/{figure}" in json.loads((tmp_path / "figures.json").read_text())


# --- what they cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", HUB)
def test_the_parameters_are_those_of_the_transformers_model(model: str) -> None:
    from paper_cost import MODELS as SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[model]
    assert shape.hub == HUB[model]
    config = AutoConfig.for_model(
        MODELS[model]["model_type"], hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_the_products_of_a_step_are_those_that_torch_counts() -> None:
    """Every matrix product of forward, recomputation and backward of a small model, and of its attention."""
    from paper_cost import Run, Shape, Task
    from torch.utils.flop_counter import FlopCounterMode

    from deft_lightning import SFTModule

    shape = Shape("", layers=3, hidden=256, ffn=96, heads=2, kv_heads=1, vocab=300, tied=True, bias=True, positions=64)
    module = SFTModule(
        architecture={
            "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300,
            "tie_word_embeddings": True, "max_position_embeddings": 64,
        },
        gradient_checkpointing=True, attention="eager",
    )  # fmt: skip
    module.configure_model()
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(32) >= 22, ids, -100)  # ten of each row are learnt
    batch = {"input_ids": ids, "labels": labels}
    module.loss_and_stats(batch)  # the checks of the first batch
    with FlopCounterMode(display=False) as counter:
        module.loss_and_stats(batch)[0].backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    run = Run("", shape, Task(rows=2, tokens=32, learnt=10, padding=1.0), {"model": {"gradient_checkpointing": True}})
    halved = 2 * 32 * 3 * 4 * (2 * 32 * 128 * 2)  # positions, layers, passes, and what one of these looks back on
    assert counted["aten.mm"] + counted["aten.addmm"] == run.flops - halved
    # Eager attention computes what a causal one leaves out; the angles of the positions are batched products as well.
    assert counted["aten.bmm"] == pytest.approx(2 * halved, rel=2e-3)


def test_a_row_of_the_table_comes_out_by_hand() -> None:
    from paper_cost import TASKS, runs

    (run,) = [run for run in runs(TASKS) if run.name == "math-qwen2.5-7b"]
    # 7.616 G parameters, of which 2 x 152064 x 3584 are embedding and head, and few are norms and biases.
    body, head = 7.6156e9 - 2 * 152_064 * 3584, 152_064 * 3584
    positions = 264 * 256 * 500 * 1.7
    by_hand = positions * (8 * body - 2 * 28 * 3584 * 18_944) + 264 * 256 * 400 * 6 * head
    by_hand += positions * 28 * 3584 * (500 * 1.7) * 8  # forward, again, and twice backward: 4 x 4 x 850 / 2
    assert run.flops == pytest.approx(by_hand, rel=1e-3)
    assert run.hours("H100", 0.4) == pytest.approx(by_hand / 989e12 / 0.4 / 3600, rel=1e-3)
    # Weights, gradients and two moments in float32 over eight; gathered root and two layers; one of them on its way.
    shares, gathered = 16 * 7.6156e9 / 8, 2 * (2 * head + 2 * body / 28)
    root = 6 * 2 * head
    assert run.memory(8) * 2**30 > shares + gathered + root
    assert run.memory(8) * 2**30 < shares + gathered + root + 10e9
    assert run.memory(1) - run.memory(2) == pytest.approx(20 * 7.6156e9 / 2 / 2**30, rel=1e-3), "the step of AdamW"
    assert run.memory(run.fewest) <= 72 < run.memory(run.fewest // 2)


def test_the_page_has_the_tables_of_the_script_and_names_every_pair() -> None:
    from paper_cost import TASKS, models_table, runs_table

    page = (ROOT / "docs" / "evidence" / "paper.md").read_text(encoding="utf-8")
    assert models_table() in page and runs_table(TASKS, 0.4) in page
    for task, found in TASKS.items():
        assert f"| {task} | {found.rows:,} | {found.tokens:g} | {found.learnt:g} | {found.padding:g} |" in page
    assert all(f"`{pair}`" in page for pair in PAIRS) and pairs_table() in page
