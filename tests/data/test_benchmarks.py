"""Rows of benchmarks: every known layout becomes prompts with the right answer, every bad row one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deft_lightning.data import InstructionDataModule
from deft_lightning.data.benchmarks import named_benchmarks, read_benchmark
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Prompt
from deft_lightning.errors import UserError
from deft_lightning.evaluation import BENCHMARKS, Benchmark, ExactMatch, TestSet
from deft_lightning.evaluation.benchmarks import BOX, final_answer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MINE = Benchmark("mine", ExactMatch(), {"question": ("q",), "gold": ("a.text",)}, instruction="Say it.")
MINE_AGAIN = MINE


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["hello"], 0)


def write_benchmark(path: Path, rows: Any) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(tokenizer: Any, name: str, source: str, instruction: str | None = None) -> tuple[TestSet, list[Prompt]]:
    ((benchmark, where),) = named_benchmarks({name: source})
    return read_benchmark(benchmark, where, tokenizer, instruction)


def asked(prompt: Prompt) -> str:
    return prompt.text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


YESNO = {"yes": "yes", "no": "no", "maybe": "maybe"}
AB = {"A": "red", "B": "blue"}
WHICH = {"question": "a", "options": AB, "answer": "A", "source": "x"}
LISTS = {"label": ["A", "B"], "text": ["red", "blue"]}
# name: rows, what is asked in each, gold answers, records
LAYOUTS: dict[str, tuple[list[dict[str, Any]], list[str], list[str], list[dict[str, Any]]]] = {
    "gsm8k": (
        [{"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"}],
        ["How many?"], ["1,002"], [{}],
    ),
    "svamp": (
        [{"ID": "chal-1", "Body": "There are 2.", "Question": "How many?", "Answer": 2.0, "Equation": "2"}],
        ["There are 2. How many?"], ["2"], [{}],
    ),
    "math500": (
        [{"problem": "What is $x$?", "solution": "\\boxed{3}", "answer": "\\frac{1}{2}", "unique_id": "a/b.json"},
         {"problem": "And?", "solution": "First \\boxed{1}, then \\boxed{7}."}],
        [f"What is $x$?\n\n{BOX}", f"And?\n\n{BOX}"], ["\\frac{1}{2}", "7"], [{}, {}],
    ),
    "minerva": ([{"question": "How far?", "answer": "1.6e-19"}], [f"How far?\n\n{BOX}"], ["1.6e-19"], [{}]),
    "olympiadbench": (
        [{"id": 7, "question": "Find.", "context": "Let x be.", "final_answer": ["$2$", "$-2$"], "error": "1e-1"},
         {"id": 8, "question": "Find.", "context": None, "final_answer": ["5"], "error": None}],
        [f"Let x be.\n\nFind.\n\n{BOX}", f"Find.\n\n{BOX}"], ["2, -2", "5"], [{"error": "1e-1"}, {}],
    ),
    "aime24": ([{"id": 60, "problem": "P", "answer": "204", "url": "u"}], [f"P\n\n{BOX}"], ["204"], [{}]),
    "amc23": ([{"id": 0, "question": "P", "answer": 27.0}], [f"P\n\n{BOX}"], ["27"], [{}]),
    "math": ([{"question": "P", "answer": 3}], [f"P\n\n{BOX}"], ["3"], [{}]),
    "pubmedqa": (
        [{"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "final_decision": "yes", "LONG_ANSWER": "It does."},
         {"pubid": 5, "question": "Or?", "context": {"contexts": ["Three."]}, "final_decision": "maybe"}],
        ["One.\nTwo.\n\nDoes it?\n\nAnswer with yes, no or maybe.", "Three.\n\nOr?\n\nAnswer with yes, no or maybe."],
        ["yes", "maybe"], [{"options": YESNO}, {"options": YESNO}],
    ),
    "medical": (
        [{"question": "Which?", "options": AB, "answer_idx": "B", "answer": "blue", "source": "one"},
         {"question": "Which?", "options": ["red", "blue"], "answer": 0, "source": "two"},
         {"question": "Which?", "options": {**AB, "C": None}, "answer": "Red", "source": "one"},
         {"question": "Which?", "choices": LISTS, "answer": "B", "source": "one"}],
        ["Which?\nA. red\nB. blue\n\nAnswer with the letter of the right option."] * 4, ["B", "A", "A", "B"],
        [{"options": AB, "source": s} for s in ("one", "two", "one", "one")],
    ),
    "figfont": ([{"question": " _ \n| |", "answer": "O"}], [" _ \n| |"], ["O"], [{}]),
}  # fmt: skip


def test_every_known_benchmark_has_a_layout_here() -> None:
    assert set(LAYOUTS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_becomes_prompts_with_the_right_answers(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows, questions, golds, records = LAYOUTS[name]
    tests, prompts = load(tokenizer, name, write_benchmark(tmp_path / "rows.jsonl", rows))
    assert [asked(prompt) for prompt in prompts] == questions
    assert [prompt.gold for prompt in prompts] == golds
    assert [dict(prompt.record) for prompt in prompts] == records
    assert tests.benchmark == BENCHMARKS[name] and tests.prefix == f"test/{name}/"
    assert tests.sources == tuple(sorted({record["source"] for record in records if "source" in record}))
    assert [tests.place(record) for record in records] == [
        tests.sources.index(record["source"]) if "source" in record else 0 for record in records
    ]
    for prompt in prompts:
        assert tokenizer.decode(prompt.input_ids) == prompt.text
    # What `score` grades later is the same answer.
    if not name == "medical" and not name == "pubmedqa":
        assert [BENCHMARKS[name].gold(gold) for gold in golds] == golds


def test_rows_keep_their_ids_and_others_get_one_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"id": 3, "question": "a"}, {"question": "b"}, {"question": "b"}, {"id": 3, "question": "c"}]
    rows = [{**row, "answer": "1"} for row in rows]
    ids = [prompt.id for prompt in load(tokenizer, "math", write_benchmark(tmp_path / "rows.jsonl", rows))[1]]
    assert len(set(ids)) == 4 and ids[0].startswith("3/") and ids[2] == f"{ids[1]}#2"
    again = [
        prompt.id
        for prompt in load(tokenizer, "math", write_benchmark(tmp_path / "other.jsonl", rows[:1] + rows[3:]))[1]
    ]
    assert again == [ids[0], ids[3]]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("a\n#### 5", "5"), ("so \\boxed{x}", "x"), (" $7$ ", "7"), (7.0, "7"), (7.5, "7.5"), (7, "7"),
        (["1", "2"], "1, 2"),        (["$x$"], "x"), ("", ""),
    ],
)  # fmt: skip
def test_final_answers_of_rows(value: Any, answer: str) -> None:
    assert final_answer(value) == answer and final_answer(answer) == answer


# --- choosing --------------------------------------------------------------------------------------------------------


def test_benchmarks_are_named_with_or_without_their_rows() -> None:
    defaults = {name: benchmark.default for name, benchmark in BENCHMARKS.items()}
    assert named_benchmarks(None) == []
    assert (
        named_benchmarks("gsm8k")
        == named_benchmarks(["gsm8k"])
        == named_benchmarks({"gsm8k": None})
        == [(BENCHMARKS["gsm8k"], defaults["gsm8k"])]
    )
    assert [where for _, where in named_benchmarks({"gsm8k": "a.jsonl", "math500": "b.jsonl"})] == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_a_benchmark_of_ones_own_is_named_by_its_path(tokenizer: Any, tmp_path: Path) -> None:
    source = write_benchmark(tmp_path / "rows.jsonl", [{"q": "Who?", "a": {"text": "Me"}}])
    tests, (prompt,) = load(tokenizer, f"{__name__}.MINE", source)
    assert (asked(prompt), prompt.gold, tests.prefix) == ("Who?\n\nSay it.", "Me", "test/mine/")


@pytest.mark.parametrize(
    ("benchmarks", "says"),
    [
        ("math50", "no benchmark 'math50'. Did you mean math500"),
        (["gsm8k", "nonsense"], "no benchmark 'nonsense'. Known: gsm8k, svamp"),
        ("medical", "medical has no built-in rows; name their file: --data.benchmarks '{medical: FILE}'"),
        ("no_package.at.ALL", "no_package.at.ALL cannot be imported"),
        ("json.loads", "json.loads is not a Benchmark"),
        ({f"{__name__}.MINE": "a", f"{__name__}.MINE_AGAIN": "b"}, "mine is named twice"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(benchmarks: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        InstructionDataModule("rows.jsonl", benchmarks=benchmarks)
    assert says in str(caught.value) and str(caught.value).startswith("--data.benchmarks")


def test_benchmarks_and_a_test_source_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"--data\.test_source and --data\.benchmarks exclude each other"):
        InstructionDataModule("rows.jsonl", benchmarks="gsm8k", test_source="x.jsonl")


def test_another_instruction_or_none(tokenizer: Any, tmp_path: Path) -> None:
    source = write_benchmark(tmp_path / "rows.jsonl", [{"problem": "P", "answer": "1"}])
    for instruction, expected in (("", "P"), ("Be brief.", "P\n\nBe brief."), (None, f"P\n\n{BOX}")):
        (prompt,) = load(tokenizer, "math500", source, instruction)[1]
        assert asked(prompt) == expected


# --- rows that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        (
            "gsm8k",
            {"text": "a"},
            "field 'question': benchmark gsm8k needs one of the columns question, problem",
        ),
        ("gsm8k", {"text": "a", "x": 1}, "the row has text, x"),
        ("gsm8k", {"question": "a"}, "field 'final_answer': benchmark gsm8k needs one of"),
        ("gsm8k", {"question": " ", "answer": "1"}, "field 'question': is empty"),
        ("gsm8k", {"question": ["a"], "answer": "1"}, "field 'question': expected text"),
        ("gsm8k", {"question": "a", "answer": ""}, "field 'answer': gives no answer"),
        ("medical", {**WHICH, "answer_idx": "E"}, "field 'answer_idx': 'E' is not one of the options A, B"),
        ("medical", {**WHICH, "options": "A or B"}, "field 'options': expected at least two"),
        ("medical", {**WHICH, "options": {"A": "x", "B": 3.5, "C": {}}}, "field 'options.C': expected text"),
        ("medical", {**WHICH, "source": None}, ": has no source, but other rows do"),
        ("pubmedqa", {"question": "a", "final_decision": "so"}, "'so' is not one of the options yes, no, maybe"),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_and_field(
    name: str, row: Any, says: str, tokenizer: Any, tmp_path: Path
) -> None:
    good = {
        "gsm8k": {"question": "a", "answer": "1"}, "pubmedqa": {"question": "a", "final_decision": "no"},
        "medical": WHICH,
    }  # fmt: skip
    source = write_benchmark(tmp_path / "rows.jsonl", [good[name], row])
    with pytest.raises(UserError) as caught:
        load(tokenizer, name, source)
    assert str(caught.value).startswith(f"{source}, row 2") and says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- objects of rows -------------------------------------------------------------------------------------------------

BY_ID = {str(i): {"QUESTION": f"Q{i}", "final_decision": "yes"} for i in (11, 12, 13)}


def test_rows_by_id_are_chosen_by_a_file_of_ids(tokenizer: Any, tmp_path: Path) -> None:
    source = write_benchmark(tmp_path / "rows.json", BY_ID)
    assert [prompt.id for prompt in load(tokenizer, "pubmedqa", source)[1]] == ["11", "12", "13"]
    for ids in ({"13": "yes", "11": "no"}, ["13", "11"]):
        chosen_ids = f"{source}?ids={write_benchmark(tmp_path / 'ids.json', ids)}"
        assert [prompt.id for prompt in load(tokenizer, "pubmedqa", chosen_ids)[1]] == ["13", "11"]


def test_lists_of_rows_by_source_name_it(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "a", "options": AB, "answer": "A"}
    source = write_benchmark(tmp_path / "rows.json", {"MedQA": [row, {**row, "question": "b"}], "MMLU": [row]})
    tests, prompts = load(tokenizer, "medical", source)
    assert tests.sources == ("MMLU", "MedQA")
    assert [prompt.record["source"] for prompt in prompts] == ["MedQA", "MedQA", "MMLU"]
    plain = write_benchmark(tmp_path / "list.json", {"data": [row]})
    assert load(tokenizer, "medical", plain)[0].sources == ()


@pytest.mark.parametrize(
    ("content", "ids", "says"),
    [
        (BY_ID, ["14"], "has no row '14', which ?ids= names"),
        (BY_ID, [], "expected a list of ids"),
        (BY_ID, "11", "expected a list of ids"),
        ([{"question": "a"}], ["11"], "?ids= needs a .json object with rows by id"),
        ({"a": [{}], "b": [{}]}, ["11"], "?ids= needs a .json object with rows by id"),
    ],
)
def test_ids_that_fit_no_object_of_rows(content: Any, ids: Any, says: str, tokenizer: Any, tmp_path: Path) -> None:
    source = f"{write_benchmark(tmp_path / 'rows.json', content)}?ids={write_benchmark(tmp_path / 'ids.json', ids)}"
    with pytest.raises(UserError) as caught:
        load(tokenizer, "pubmedqa", source)
    assert says in str(caught.value) and "--data.benchmarks" in str(caught.value)


def test_files_that_are_not_there_or_broken(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    write_benchmark(tmp_path / "rows.json", BY_ID)
    for source, says in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "broken.json", "is not JSON"),
        (f"{tmp_path / 'rows.json'}?ids={tmp_path / 'none.json'}", "cannot be read"),
        (f"{tmp_path / 'none.jsonl'}?ids=x.json", "?ids= needs"),
    ]:
        with pytest.raises(UserError) as caught:
            load(tokenizer, "pubmedqa", str(source))
        assert says in str(caught.value) and "\n" not in str(caught.value)


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319),
        ("svamp", "svamp_test.jsonl", 1000),
        ("math500", "math500_test.jsonl", 500),
        ("pubmedqa", "pubmedqa_labeled.json?ids={shared}/pubmedqa_test_ids.json", 500),
        ("pubmedqa", "pubmedqa_labeled.json", 1000),
    ],
)
def test_a_real_file_is_read_whole(name: str, source: str, count: int, tokenizer: Any) -> None:
    if not (SHARED / source.partition("?")[0]).exists():
        pytest.skip(f"{SHARED / source} is not there")
    _, prompts = load(tokenizer, name, str(SHARED / source.format(shared=SHARED)))
    assert len(prompts) == count == len({prompt.id for prompt in prompts})
    assert all(prompt.gold for prompt in prompts)


def test_the_default_rows_of_figfont_are_generated(tokenizer: Any) -> None:
    source = str(BENCHMARKS["figfont"].default).replace("size=5000", "size=20")
    _, prompts = load(tokenizer, "figfont", source)
    assert len(prompts) == 20 and all(2 <= len(str(prompt.gold)) <= 5 for prompt in prompts)
