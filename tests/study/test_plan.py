"""What a study consists of, and how its rows are split."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT

from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, NLL, Likelihood
from deft_lightning.study import Base, Regime, Study
from deft_lightning.study.cells import base_folder
from deft_lightning.study.command import read_options
from deft_lightning.study.files import files_of
from deft_lightning.study.tasks import task_files

WORDS = "reasoning_gym:spell_backward?size=3000&question=metadata.word&min_word_len=3&max_word_len=4"
ARCHITECTURE = {"model_type": "llama", "hidden_size": 16}


def study(**more: Any) -> Study:
    strong = Regime(WORDS, 8, 1e-3, base=Base(WORDS, 9), rates=[3e-4], noise=[0.0, 0.4], headline=[0.4])
    weak = Regime(WORDS, 6, 4e-3, noise=[0.0, 0.4], headline=[0.0])
    settings: dict[str, Any] = {"objectives": [NLL(), DEFT()], "seeds": 2, "headline_seeds": 3, **more}
    return Study({"strong": strong, "weak": weak}, ARCHITECTURE, **settings)


def test_the_grid_is_every_objective_regime_noise_and_seed_once() -> None:
    cells = list(study(remedies=[Likelihood()]).shared())
    assert len(cells) == len({cell.id for cell in cells}) == 2 * 3 * 3 + 2 * 2 * 2
    headline = [cell for cell in cells if (cell.regime, cell.noise) in (("strong", 0.4), ("weak", 0.0))]
    assert {cell.seed for cell in headline} == {0, 1, 2} and len(headline) == 18
    assert cells[:18] == headline  # what the ranking needs comes first
    assert not [c for c in cells if c.objective == Likelihood() and c not in headline]


def test_seeds_are_counted_from_the_first() -> None:
    plan = study(first_seed=40)
    assert {cell.seed for cell in plan.shared()} == {40, 41, 42}
    assert [cell.seed for cell in plan.tuned({("strong", 0.4, "NLL()"): 3e-4})] == [40, 41, 42]
    with pytest.raises(UserError, match="first_seed must be from 0, and seeds below 1000, not 998"):
        study(first_seed=998)


def test_headline_cells_are_run_with_the_other_head_too_if_that_is_asked_for() -> None:
    assert not list(study().rounded())
    plan = study(second_rounding=True)
    rounded, first = list(plan.rounded()), {cell.id for cell in plan.shared()}
    assert len(rounded) == 2 * 2 * 3 and {cell.head for cell in rounded} == {"dense"}
    assert not {cell.id for cell in rounded} & first


def test_few_rows_are_those_of_the_regime_and_not_of_its_start() -> None:
    many = Regime(WORDS, 8, 1e-3, base=Base(WORDS, 9))
    few = Study({"few": replace(many, rows=100), "many": many}, ARCHITECTURE, objectives=[NLL()], rows=500)
    cells = {cell.regime: cell for cell in few.shared() if cell.seed == 0 and not cell.noise}
    assert (cells["few"].rows, cells["few"].base_rows) == (100, 500) == (100, cells["many"].rows)
    assert cells["few"].id != cells["many"].id
    root = Path("study")
    assert base_folder(cells["few"], root) == base_folder(cells["many"], root)
    other = Study({"rule": replace(many, base=Base(WORDS, 9, op="WrongRule"))}, ARCHITECTURE, objectives=[NLL()])
    assert base_folder(next(other.shared()), root) != base_folder(cells["many"], root)


def test_rates_are_chosen_on_seeds_that_are_not_reported() -> None:
    plan = study()
    tuning = list(plan.tuning())
    assert {cell.regime for cell in tuning} == {"strong"}  # the other has one rate
    assert {cell.rate for cell in tuning} == {3e-4, 1e-3}
    assert not {cell.seed for cell in tuning} & {cell.seed for cell in plan.shared()}
    tuned = list(plan.tuned({("strong", 0.4, "NLL()"): 3e-4}))
    assert [(cell.rate, cell.seed) for cell in tuned] == [(3e-4, 0), (3e-4, 1), (3e-4, 2)]


@pytest.mark.parametrize(
    "change", [{"rate": 2e-3}, {"seed": 7}, {"noise": 0.1}, {"objective": DEFT(eps=1e-6)}, {"rows": 9}, {"held_out": 9}]
)
def test_a_result_is_found_again_only_for_the_same_cell(change: dict[str, Any]) -> None:
    cell = next(study().shared())
    assert replace(cell).id == cell.id
    assert replace(cell, **change).id != cell.id
    assert replace(cell, setting=replace(cell.setting, steps=99)).id != cell.id
    # What else is tried in the regime changes no single run.
    assert replace(cell, setting=replace(cell.setting, rates=[1.0], headline=[])).id == cell.id


def test_clean_cells_are_shared_by_regimes_that_differ_in_their_noise_alone() -> None:
    ids = []
    for noise in (0.0, 0.4):
        for op in ("TokenReplace", "AnswerCorrupt"):
            regime = Regime(WORDS, 6, 4e-3, noise=[0.0, 0.4], op=op)
            ids.append(Study({op: regime}, ARCHITECTURE).cell(op, NLL(), noise, 4e-3, 0).id)
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_regimes_are_judged_alike() -> None:
    regimes = {"a": Regime(WORDS, 6, 4e-3, judge="nll"), "b": Regime(WORDS, 6, 4e-3)}
    with pytest.raises(UserError, match="judge must be one for all regimes"):
        Study(regimes, ARCHITECTURE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": [1.0]}, r"noise must be in \[0, 1\)"),
        ({"headline": [0.5]}, "headline noise"),
        ({"steps": 0}, "steps must be above 0"),
        ({"op": "ResponseSwop"}, "Did you mean ResponseSwap"),
        ({"judge": "bleu"}, "judge must be"),
        ({"split_by": "row"}, "split_by must be"),
        ({"base": Base(WORDS, 3), "pretrained": "x"}, "leave one out"),
        ({"noise": []}, "at least one rate"),
        ({"rates": [1e-3, 0.0]}, "rates must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Regime(**{"source": WORDS, "steps": 5, "rate": 1e-3, "noise": [0.0, 0.4], **settings})


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_is_a_study(path: Path) -> None:
    study, options = read_options(["--config", str(path), "--seeds", "4"])
    # Each has a folder of its own: what it writes takes the place of no other report.
    assert study.seeds == 4 and options.output == f"logs/study/{path.stem}" and not options.smoke
    _, options = read_options(["--config", str(path), "--smoke"])
    assert options.smoke and options.output == f"logs/smoke/{path.stem}"
    assert read_options(["--config", str(path), "--smoke", "--output", "here"])[1].output == "here"
    assert all(regime.headline for regime in study.regimes.values())
    few = study.smoke()
    assert few.regimes.keys() == study.regimes.keys() and len(list(few.shared())) <= 60


def test_the_default_study_is_the_one_that_is_reported() -> None:
    study, _ = read_options(["--config", str(ROOT / "configs" / "study" / "regimes.yaml")])
    assert list(study.regimes) == ["strong", "intermediate", "weak"]
    assert all(regime.noise == [0.0, 0.2, 0.4, 0.6] for regime in study.regimes.values())
    assert (study.seeds, study.headline_seeds, len(study.objectives)) == (3, 5, 8)
    assert len({regime.source for regime in study.regimes.values()}) == 1  # only the prior differs


def test_a_smaller_study_stays_as_small_in_its_smoke_form() -> None:
    small = study(rows=60, held_out=10).smoke()
    assert (small.rows, small.held_out) == (60, 10) and small.regimes["weak"].steps == 6


@pytest.mark.parametrize("name", ["seeds", "headline_seeds", "tuning_seeds"])
def test_a_study_without_seeds_is_refused_before_it_runs(name: str) -> None:
    with pytest.raises(UserError, match=f"study: {name} must be above 0"):
        study(**{name: 0})


@pytest.mark.slow
def test_an_objective_whose_settings_cannot_be_told_is_refused() -> None:
    class Mine(NLL):
        def __init__(self, tau: float) -> None:
            object.__setattr__(self, "tau", tau)

    with pytest.raises(UserError, match="Mine must be a frozen dataclass"):
        study(objectives=[Mine(0.5)])
    del Mine
    gc.collect()  # the class tree is the registry: other tests walk it


def test_a_result_is_not_found_again_once_a_file_has_changed(tmp_path: Path) -> None:
    def ids() -> set[str]:
        files_of.cache_clear()  # what another process would see
        regime = Regime(str(rows), 5, 1e-3, base=Base(str(before), 5), noise=[0.0], headline=[0.0])
        return {cell.id for cell in Study({"a": regime}, ARCHITECTURE, seeds=1, headline_seeds=1).shared()}

    rows, before = tmp_path / "rows.jsonl", tmp_path / "before.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    before.write_text('{"prompt": "c", "completion": "d"}\n')
    first = ids()
    assert ids() == first and first
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    second = ids()
    assert not second & first
    before.write_text('{"prompt": "c", "completion": "e"}\n')
    assert not ids() & second


def test_every_seed_has_a_base_of_its_own(tmp_path: Path) -> None:
    plan = study()
    cells = [cell for cell in (*plan.shared(), *plan.tuning()) if cell.regime == "strong"]
    folders = {cell.seed: base_folder(cell, tmp_path) for cell in cells}
    assert len(set(folders.values())) == len(folders) == 4  # three seeds, and that of tuning
    assert all(base_folder(cell, tmp_path) == folders[cell.seed] for cell in cells)
    changed = replace(cells[0], setting=replace(cells[0].setting, split_by="answer"))
    assert base_folder(changed, tmp_path) not in folders.values()  # its training rows are others


def test_the_same_objective_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"DEFT\(\) is listed twice"):
        study(remedies=[DEFT()])


def test_rows_are_split_by_prompt_the_same_every_time(tmp_path: Path) -> None:
    found = task_files(WORDS, 500, 100, tmp_path / "a")
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in found]
    assert [len(part) for part in rows] == [500, 100, 100]
    prompts = [row["prompt"] for part in rows for row in part]
    assert len(set(prompts)) == 700
    assert all(row["completion"] == row["prompt"][::-1] for part in rows for row in part)
    again = task_files(WORDS, 500, 100, tmp_path / "b")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in found]
    larger = task_files(WORDS, 600, 100, tmp_path / "a")  # more rows to train on, the same ones to judge by
    assert larger.test != found.test and larger.test.read_bytes() == found.test.read_bytes()


def test_rows_split_by_answer_share_no_answer(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{way} {i % 50}", "completion": str(i % 50)} for i in range(50) for way in ("say", "write")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = task_files(str(source), 1000, 10, tmp_path, "answer")
    parts = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in found]
    assert [len(part) for part in parts] == [60, 10, 10]
    answers = [{row["completion"] for row in part} for part in parts]
    assert not answers[0] & answers[1] and not answers[0] & answers[2] and not answers[1] & answers[2]


def test_rows_that_have_changed_are_split_anew(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    for word in ("old", "new"):
        files_of.cache_clear()
        source.write_text("".join(f'{{"prompt": "{i}", "completion": "{word}"}}\n' for i in range(40)))
        found = task_files(str(source), 10, 5, tmp_path)
        assert word in found.train.read_text()


def test_a_conversation_of_several_turns_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    source.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(UserError, match="row 1: a study needs rows of one question and one answer"):
        task_files(str(source), 10, 5, tmp_path)


def test_too_few_rows_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different prompts are too few"):
        task_files(WORDS.replace("3000", "30"), 10, 100, tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_accelerator_that_nobody_knows_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"accelerator must be one of auto, cpu, .* not 'gpuu'"):
        Regime(source="rows.jsonl", steps=1, rate=0.1, accelerator="gpuu")
