"""`test` and `predict` on benchmarks with a real model: same figures whatever the batch, and later from the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from worlds import bare_trainer, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import PredictionWriter
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Benchmark, ExactMatch, Generation
from deft_lightning.evaluation.score import score

pytestmark = pytest.mark.slow

AB = {"A": "red", "B": "blue"}
WORDS = ["abc", "d", "a longer one", "ef", "12345", "g\nh", "xyz"]
PRETRAINED = {
    "spread": 0.2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 160,
}  # fmt: skip


def generating(pretrained: str, **generation: Any) -> SFTModule:
    return SFTModule(pretrained=pretrained, generation=Generation(**{"max_new_tokens": 6, **generation}))


def predict_to(folder: Path, pretrained: str, benchmarks: Any, size: int = 3, **generation: Any) -> Path:
    path = folder / "predictions.jsonl"
    data = InstructionDataModule(benchmarks=benchmarks, eval_batch_size=size)
    bare_trainer(folder, PredictionWriter(str(path))).predict(
        generating(pretrained, **generation), data, return_predictions=False
    )
    return path


def test(folder: Path, pretrained: str, benchmarks: Any, size: int = 3, **generation: Any) -> dict[str, float]:
    data, runner = InstructionDataModule(benchmarks=benchmarks, eval_batch_size=size), bare_trainer(folder)
    runner.test(generating(pretrained, **generation), data, verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


test.__test__ = False  # type: ignore[attr-defined]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def benchmarks(tmp_path: Path, pretrained: str) -> dict[str, str]:
    """Three benchmarks of which the model, which says the same every time, gets some right."""
    words = [{"id": f"w{i}", "question": word, "answer": "?"} for i, word in enumerate(WORDS)]
    first = predict_to(
        tmp_path, pretrained, {"figfont": write_rows(tmp_path / "w.jsonl", words)}, samples=4, temperature=1.0
    )
    for i, (row, made) in enumerate(zip(words, read_lines(first), strict=True)):
        if i % 2:
            row["answer"] = next((text for text in made["completions"] if text.strip()), "?")
    medical = [
        {"id": i, "question": word, "options": AB, "answer": "AB"[i % 2], "source": ("one", "two")[i // 3 % 2]}
        for i, word in enumerate(WORDS[:5])
    ]
    return {
        "figfont": write_rows(tmp_path / "words.jsonl", words),
        "medical": write_rows(tmp_path / "medical.jsonl", medical),
        "gsm8k": write_rows(tmp_path / "gsm8k.jsonl", [{"question": w, "answer": "#### 1"} for w in WORDS]),
    }


MINE = Benchmark("mine", ExactMatch(), {"question": ("q",), "gold": ("a",)})


def test_predictions_of_a_benchmark_of_ones_own_are_scored_as_they_are(pretrained: str, tmp_path: Path) -> None:
    benchmarks = {
        f"{__name__}.MINE": write_rows(tmp_path / "mine.jsonl", [{"q": word, "a": "x"} for word in WORDS]),
        "gsm8k": write_rows(tmp_path / "gsm8k.jsonl", [{"question": w, "answer": "#### 1"} for w in WORDS]),
    }
    live, file = test(tmp_path, pretrained, benchmarks), predict_to(tmp_path, pretrained, benchmarks)
    with pytest.raises(UserError, match=r"MINE is code to import.*--trust_benchmarks"):
        score(file)
    found = score(file, trust=True)
    assert list(found) == [f"{__name__}.MINE", "gsm8k"]
    assert {f"test/mine/{figure}": value for figure, value in found[f"{__name__}.MINE"].items()}.items() <= live.items()


def test_a_prompt_that_leaves_little_room_is_warned_of(pretrained: str, tmp_path: Path) -> None:
    rows = [{"question": word, "answer": "1"} for word in ("a", "b" * 110)]
    with pytest.warns(UserWarning, match=r"gsm8k: completions end after \d+ tokens, not 90") as told:
        test(tmp_path, pretrained, {"gsm8k": write_rows(tmp_path / "g.jsonl", rows)}, max_new_tokens=90)
    assert len([w for w in told if "completions end" in str(w.message)]) == 1


SAMPLED = {"samples": 4, "temperature": 1.0}


@pytest.mark.parametrize("generation", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_predictions_scored_later_give_the_figures_of_the_run(
    generation: dict[str, Any], benchmarks: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    live = test(tmp_path, pretrained, benchmarks, **generation)
    found = score(predict_to(tmp_path, pretrained, benchmarks, **generation))
    later = {f"test/{name}/{figure}": value for name, figures in found.items() for figure, value in figures.items()}
    assert live == pytest.approx(later, rel=1e-6)
    n = generation.get("samples", 1)
    assert {"test/gsm8k/avg@4", "test/gsm8k/pass@4", "test/gsm8k/maj@4_se"} <= set(live) or n == 1
    assert [live[f"test/{name}/examples"] for name in benchmarks] == [7, 5, 7]
    assert 0 < live["test/figfont/jaro_winkler"] < 1 and live["test/figfont/jaro_winkler_se"] > 0
    assert 0 < live["test/medical/compat"] < 1 and "test/medical/macro" in live and "test/medical/source/two" in live
    if n > 1:
        assert 0 < live["test/figfont/exact_match"] < live["test/figfont/pass@4"] < 1


def test_predictions_hold_what_grading_needs_in_the_order_of_the_files(
    benchmarks: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    found = read_lines(predict_to(tmp_path, pretrained, benchmarks, size=2, **SAMPLED))
    assert [row["benchmark"] for row in found] == ["figfont"] * 7 + ["medical"] * 5 + ["gsm8k"] * 7
    assert [row["id"] for row in found[:12]] == [f"w{i}" for i in range(7)] + ["0", "1", "2", "3", "4"]
    for row in found:
        assert len(row["completions"]) == len(row["truncated"]) == 4
        assert ("record" in row) == (row["benchmark"] == "medical")
    assert found[8]["record"] == {"options": AB, "source": "one"} and found[8]["gold"] == "B"
    assert not list(tmp_path.glob(".predictions*")), "no part is left behind"


@pytest.mark.parametrize("generation", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_neither_batch_size_nor_order_nor_company_changes_a_completion(
    generation: dict[str, Any], benchmarks: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    def completions(chosen: dict[str, str], size: int) -> dict[tuple[str, str], Any]:
        found = read_lines(predict_to(tmp_path, pretrained, chosen, size, **generation))
        return {(row["benchmark"], row["id"]): (row["completions"], row["truncated"]) for row in found}

    whole = completions(benchmarks, 7)
    assert len(whole) == 19
    for size in (1, 4):
        assert completions(benchmarks, size) == whole
    reversed_rows = Path(benchmarks["figfont"]).read_text().splitlines()[::-1]
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed_rows) + "\n")
    alone = completions({"figfont": str(tmp_path / "reversed.jsonl")}, 3)
    assert alone == {key: value for key, value in whole.items() if key[0] == "figfont"}


def test_one_table_says_it_all(
    benchmarks: dict[str, str], pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = test(tmp_path, pretrained, benchmarks)
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert shown[0] == ["benchmark", "examples", "figure", "value", "error"]
    assert [line[0] for line in shown if len(line) == 5 and line[1].isdigit()] == list(benchmarks)
    (compat,) = [line for line in shown if line[0] == "compat"]
    assert compat[1:] == [f"{live['test/medical/compat']:.4f}", f"{live['test/medical/compat_se']:.4f}"]


def test_a_limit_of_batches_tests_the_first_ones(benchmarks: dict[str, str], pretrained: str, tmp_path: Path) -> None:
    data = InstructionDataModule(benchmarks=benchmarks, eval_batch_size=2)
    runner = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), limit_test_batches=1,
    )  # fmt: skip
    runner.test(generating(pretrained), data, verbose=False)
    assert [float(runner.callback_metrics[f"test/{name}/examples"]) for name in benchmarks] == [2, 2, 2]


def test_prompts_that_fill_the_model_are_skipped_and_counted(pretrained: str, tmp_path: Path) -> None:
    short = [{"id": f"s{i}", "question": word, "answer": "1"} for i, word in enumerate(("a", "bb", "ccc"))]
    long = [{"id": f"l{i}", "question": "long" * 60, "answer": "1"} for i in range(2)]
    some = {"gsm8k": write_rows(tmp_path / "some.jsonl", [long[0], *short, long[1]])}
    with pytest.warns(UserWarning, match=r"gsm8k: skipped 2 of 5 prompts, which fill .* 160 positions; .*'l0'"):
        found = test(tmp_path, pretrained, some, 1)
    assert found["test/gsm8k/skipped_prompts"] == 2 and found["test/gsm8k/examples"] == 3
    with pytest.warns(UserWarning, match=r"skipped 2 of 5 .*\(the rows of gsm8k in --data\.benchmarks\)"):
        predicted = predict_to(tmp_path, pretrained, some, 1)
    left = test(tmp_path, pretrained, {"gsm8k": write_rows(tmp_path / "left.jsonl", short)}, 1)
    assert left == {name: value for name, value in found.items() if not name.endswith("skipped_prompts")}
    assert [row["id"] for row in read_lines(predicted)] == ["s0", "s1", "s2"]
    for verb in (test, predict_to):
        with pytest.raises(UserError, match=r"skipped 2 of 2 prompts.*nothing left to generate for"):
            verb(tmp_path, pretrained, {"gsm8k": write_rows(tmp_path / "long.jsonl", long)}, 1)


def test_held_out_rows_are_graded_by_exact_match_as_before(pretrained: str, tmp_path: Path) -> None:
    rows = [{"id": f"t{i}", "question": word, "answer": "?"} for i, word in enumerate(WORDS)]
    source, path = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "p.jsonl"

    def data() -> InstructionDataModule:
        return InstructionDataModule(test_source=source, eval_batch_size=3)

    writer = PredictionWriter(str(path))
    bare_trainer(tmp_path, writer).predict(generating(pretrained), data(), return_predictions=False)
    said = read_lines(path)
    for row, made in zip(rows, said, strict=True):
        row["answer"] = made["completions"][0] or "?"
    write_rows(tmp_path / "rows.jsonl", rows)
    runner = bare_trainer(tmp_path)
    runner.test(generating(pretrained), data(), verbose=False)
    right = sum(bool(row["completions"][0].strip()) for row in said) / len(said)
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert set(found) == {"test/exact_match", "test/exact_match_se", "test/truncated", "test/examples"}
    assert found["test/exact_match"] == pytest.approx(right) and found["test/examples"] == len(WORDS)


@pytest.mark.parametrize("limit", [None, 2])
def test_the_loop_knows_all_prompts_of_a_loader_ahead(
    limit: int | None, benchmarks: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    """So that places are refilled beyond a batch; what a limit leaves out is not generated."""
    data = InstructionDataModule(benchmarks=benchmarks, eval_batch_size=2)
    for verb, option in (("test", "limit_test_batches"), ("predict", "limit_predict_batches")):
        module = generating(pretrained)
        runner = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(tmp_path), **({} if limit is None else {option: limit}),
        )  # fmt: skip
        found = getattr(runner, verb)(module, data)
        known = module.evaluator._completions
        expected = [7, 5, 7] if limit is None else [4, 4, 4]
        assert [one.total for one in known.values()] == [one.done for one in known.values()] == expected
        if verb == "predict":
            ids = [row["id"] for batch in found[0] for row in batch]
            assert ids == [f"w{i}" for i in range(7 if limit is None else 4)], "in the order of the rows"


def test_a_model_that_generates_whole_batches_is_told_in_one_line(
    benchmarks: dict[str, str], pretrained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = generating(pretrained), InstructionDataModule(benchmarks=benchmarks, eval_batch_size=3)
    runner = bare_trainer(tmp_path)
    with caplog.at_level("INFO"):
        runner.test(module, data, verbose=False)
    assert "whole batches" not in caplog.text
    plain = {name: float(value) for name, value in runner.callback_metrics.items()}
    module.model.generation_config.remove_invalid_values = True
    with caplog.at_level("INFO"):
        runner.test(module, data, verbose=False)
    (line,) = [one.getMessage() for one in caplog.records if "whole batches" in one.getMessage()]
    assert line.endswith("its generation config sets remove_invalid_values") and "\n" not in line
    assert {name: float(value) for name, value in runner.callback_metrics.items()} == plain
