"""Predictions graded from a file: the figures of `test`, without torch, and one line for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.__main__ import main
from deft_lightning.errors import UserError
from deft_lightning.evaluation.score import score

AB = {"A": "red", "B": "blue"}


def write_scored(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(gold: str, *completions: str, **more: Any) -> dict[str, Any]:
    return {"id": f"id-{gold}-{len(completions)}", "completions": list(completions), "gold": gold, **more}


def test_lines_are_graded_by_the_benchmark_they_name(tmp_path: Path) -> None:
    rows = [
        row("18", "#### 18", "It is 17", benchmark="gsm8k", truncated=[False, True]),
        row("5", "#### 5", "5", benchmark="gsm8k", truncated=[False, False]),
        row("A", "A", "The answer is B, no", benchmark="medical", record={"options": AB, "source": "one"}),
        row("B", "A", "blau", benchmark="medical", record={"options": AB, "source": "two"}),
        row("x y", " x y\n", "x  y"),
    ]
    found = score(write_scored(tmp_path / "p.jsonl", rows))
    assert list(found) == ["gsm8k", "medical", ""]
    assert found["gsm8k"] == pytest.approx(
        {"avg@2": 0.75, "avg@2_se": 0.25, "pass@2": 1.0, "pass@2_se": 1 / 6, "maj@2": 0.75, "maj@2_se": 0.25,
         "truncated": 0.25, "examples": 2.0}
    )  # fmt: skip
    medical = found["medical"]
    assert (medical["strict"], medical["compat"], medical["macro"], medical["macro_compat"]) == (0.25, 0.5, 0.25, 0.5)
    assert (medical["source/one"], medical["source/two"], medical["examples"]) == (0.5, 0.0, 2.0)
    assert found[""]["exact_match"] == 0.5 and found[""]["maj@2"] == 0.5


def test_a_benchmark_may_be_named_for_all_lines(tmp_path: Path) -> None:
    """Also for the predictions of held-out rows, whose gold is the whole response."""
    rows = [row("1+1=2\n#### 2", "so \\boxed{2}"), row("1+1=2\n#### 3", "so 2")]
    path = write_scored(tmp_path / "p.jsonl", rows)
    assert score(path, "gsm8k")["gsm8k"]["avg@1"] == 0.5
    assert score(path)[""]["exact_match"] == 0.0
    with pytest.raises(UserError, match=r"no benchmark 'gsm8'\. Did you mean gsm8k"):
        score(path, "gsm8")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "is empty"),
        (["{"], "row 1: is not JSON"),
        (["[" * 100_000], "row 1: is not JSON"),
        (["", "3"], "row 2: expected an object, got int"),
        ([{"gold": "a"}], "row 1, field 'completions': is missing (the row has gold)"),
        ([{"gold": "a", "completions": "a"}], "row 1, field 'completions': expected a list, got str"),
        ([{"gold": "a", "completions": []}], "row 1, field 'completions': expected a list of at least one text"),
        ([{"gold": "a", "completions": [None]}], "row 1, field 'completions': expected a list of at least one text"),
        ([{"gold": None, "completions": ["a"]}], "row 1, field 'gold': is missing"),
        ([{"gold": 3, "completions": ["a"]}], "row 1, field 'gold': expected text, got int"),
        ([row("a", "a"), row("b", "a", truncated=[True, False])], "row 2, field 'truncated': expected 1 truth values"),
        ([row("b", "a", truncated=["no"])], "row 1, field 'truncated': expected 1 truth values"),
        ([row("b", "a", truncated=False)], "row 1, field 'truncated': expected a list, got bool"),
        ([row("a", "a", benchmark="gsm9k")], "no benchmark 'gsm9k'"),
        ([row("a", "a", benchmark=3)], "row 1, field 'benchmark': expected text, got int"),
        ([row("a", "a", record=[])], "row 1, field 'record': expected an object, got list"),
        ([{**row("a", "a"), "id": 2.5}], "row 1, field 'id': expected text, got float"),
        ([row("a", "a"), row("b", "a", "b")], "row 2, field 'completions': has 2, row 1 has 1"),
        ([row("a", "a"), row("a", "b")], "row 2, field 'id': 'id-a-1' stands in row 1 already"),
        ([row("A", "A", benchmark="medical")], "row 1, field 'record.options': expected an object"),
        ([row("E", "A", benchmark="medical", record={"options": AB})], "field 'gold': 'E' is not one of the options"),
        (
            [row("A", "A", benchmark="medical", record={"options": AB, "source": "x"}),
             row("B", "A", benchmark="medical", record={"options": AB})],
            "row 2, field 'record.source': is missing",
        ),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_with_file_row_and_field(rows: list[Any], says: str, tmp_path: Path) -> None:
    path = write_scored(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError) as caught:
        score(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    if "row " in says:
        assert str(caught.value).startswith(str(path))


def test_the_same_id_in_two_benchmarks_is_two_examples(tmp_path: Path) -> None:
    rows = [{**row("5", "5", benchmark=name), "id": "1"} for name in ("gsm8k", "svamp")]
    assert {name: found["examples"] for name, found in score(write_scored(tmp_path / "p.jsonl", rows)).items()} == {
        "gsm8k": 1, "svamp": 1,
    }  # fmt: skip


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.jsonl").write_bytes(b'{"gold": "\xff"}')
    for path, says in ((tmp_path / "none", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=says):
            score(path)
    with pytest.raises(UserError, match="is not UTF-8"):
        score(tmp_path / "bytes.jsonl")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "score", *arguments])
    main()


def test_the_verb_prints_a_table_and_writes_the_tags_of_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_scored(tmp_path / "p.jsonl", [row("5", "5", benchmark="svamp"), row("a", "a")])
    run(monkeypatch, str(path), "--output", str(tmp_path / "s.json"))
    shown = capsys.readouterr().out
    assert "svamp" in shown and "held out" in shown and "avg@1" in shown
    tags = json.loads((tmp_path / "s.json").read_text())
    assert tags["test/svamp/avg@1"] == 1.0 and tags["test/exact_match"] == 1.0 and tags["test/svamp/examples"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{path}", "--bench", "x"], "error: score: unrecognized arguments: --bench x"),
        ([], "error: score: the following arguments are required: predictions"),
        (["missing.jsonl"], "error: missing.jsonl: cannot be read (No such file or directory)"),
        (["{path}", "--benchmark", "math50"], "error: --benchmark: no benchmark 'math50'. Did you mean math500"),
        (["{path}", "--output", "/nowhere/at/all.json"], "No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_scored(tmp_path / "p.jsonl", [row("5", "5")])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *(argument.format(path=path) for argument in arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1


@pytest.mark.slow
def test_grading_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    rows = [row("\\frac{\\pi}{2}", "\\boxed{\\pi/2}", benchmark="math500"), row("WORD", "WORT", benchmark="figfont")]
    path = write_scored(tmp_path / "p.jsonl", rows)
    code = (
        "import sys; sys.argv[1:] = ['score', sys.argv[1]]\n"
        "from deft_lightning.__main__ import main; main()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'lightning', 'transformers', 'sympy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]") and "1.0000" in done.stdout
