"""The tables of a study, from results made up here: every figure is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deft_lightning.objectives import DEFT, NLL, Contaminated, Likelihood
from deft_lightning.study import Regime, Study
from deft_lightning.study.advice import advice, asked, served
from deft_lightning.study.report import chosen_rates, grid, margins, summary, worst_regime
from deft_lightning.study.tables import text

# Exact match by objective, regime and seed; the headline is strong at 0.6 and weak at 0.
VALUES = {
    ("NLL()", "strong"): [0.5, 0.3, 0.4], ("NLL()", "weak"): [1.0, 0.9, 0.8],
    ("DEFT()", "strong"): [0.9, 0.8, 1.0], ("DEFT()", "weak"): [0.9, 0.1, 0.7],
    ("Likelihood()", "strong"): [1.0, 0.9, 0.9], ("Likelihood()", "weak"): [0.0, 0.0, 0.1],
}  # fmt: skip


def made_up(**setting: Any) -> tuple[Study, dict[str, dict[str, Any]]]:
    regimes = {
        "strong": Regime("a", 5, 1e-3, **{"rates": [1e-2, 1e-4], **setting}, noise=[0.6], headline=[0.6]),
        "weak": Regime("a", 6, 1e-3, noise=[0.0], headline=[0.0], **setting),
    }
    study = Study(regimes, {}, objectives=[NLL(), Likelihood(), DEFT()], headline_seeds=3)
    results = {}
    for cell in study.shared():
        value = VALUES[repr(cell.objective), cell.regime][cell.seed]
        results[cell.id] = {"test": {"exact_match": value}}
    for cell in study.tuning():
        # DEFT does best with the largest rate; for the others all are equal.
        value = cell.rate if cell.objective == DEFT() else 0.5
        results[cell.id] = {"validation": {"exact_match": value}}
    for cell in study.tuned(chosen_rates(study, results)):
        results.setdefault(cell.id, {"test": {"exact_match": 1.0}})
    return study, results


def test_worst_regime_regret_and_margin() -> None:
    study, results = made_up()
    report = summary(study, results)
    rows = {row["objective"]: row for row in report["ranking_shared"]}
    assert [row["objective"] for row in report["ranking_shared"]] == ["DEFT()", "NLL()", "Likelihood()"]
    assert rows["DEFT()"]["medians"] == [0.9, 0.7] and rows["DEFT()"]["worst"] == 0.7
    assert rows["DEFT()"]["where"] == "weak" and rows["DEFT()"]["regret"] == pytest.approx(0.2)
    assert rows["DEFT()"]["worst_seeds"] == [0.9, 0.1, 0.7]
    assert rows["NLL()"]["worst"] == 0.4 and rows["NLL()"]["regret"] == pytest.approx(0.5)
    assert rows["Likelihood()"]["worst"] == 0.0 and rows["Likelihood()"]["regret"] == pytest.approx(0.9)
    against = {row["against"]: row for row in report["margins_shared"]}
    assert against["NLL()"]["margin"] == pytest.approx(0.3)
    assert [against["NLL()"][key] for key in ("median", "low", "high")] == pytest.approx([0.3, -0.2, 0.4])


def test_intervals_are_of_resamples_of_the_seeds() -> None:
    study, results = made_up()
    rows = {row["objective"]: row for row in summary(study, results)["ranking_shared"]}
    # Of the 27 ways to draw three seeds, in 7 the middle of DEFT's weak values is the 0.1 of the second seed, against
    # 0.9 of NLL; in 7 it is 0.9, and as good as that in the strong cell.
    assert rows["DEFT()"]["worst_interval"] == [0.1, 0.9]
    assert rows["DEFT()"]["regret_interval"] == pytest.approx([0.1, 0.8])
    assert rows["Likelihood()"]["worst_interval"] == [0.0, 0.1]


def test_a_second_rounding_is_told_beside_the_first() -> None:
    study, results = made_up()
    study = replace(study, second_rounding=True)
    for cell in study.rounded():
        assert cell.head == "dense"
        results[cell.id] = {"test": {"exact_match": VALUES[repr(cell.objective), cell.regime][cell.seed] - 0.1}}
    assert len(results) > len({cell.id for cell in study.shared()}) + len({cell.id for cell in study.rounded()})
    report = summary(study, results)
    row = next(r for r in report["rounding"] if (r["regime"], r["objective"]) == ("weak", "NLL()"))
    assert row["medians"] == pytest.approx([0.9, 0.8])
    assert "| weak, noise 0 | NLL | 0.900 | 0.800 | -0.100 |" in text(report)


def test_a_rate_is_the_best_on_validation_and_of_equals_the_shared_one() -> None:
    study, results = made_up()
    rates = chosen_rates(study, results)
    assert rates["strong", 0.6, "DEFT()"] == 1e-2 and rates["strong", 0.6, "NLL()"] == 1e-3
    report = summary(study, results)
    tuned = {(row["objective"], row["regime"]): row for row in report["tuned"]}
    assert tuned["DEFT()", "strong"]["values"] == [1.0, 1.0, 1.0]
    assert tuned["NLL()", "strong"]["values"] == VALUES["NLL()", "strong"]
    assert tuned["DEFT()", "weak"]["values"] == VALUES["DEFT()", "weak"]  # one rate: nothing was chosen


def test_means_and_standard_errors_over_seeds() -> None:
    study, results = made_up()
    (row,) = [r for r in summary(study, results)["grid"] if (r["objective"], r["regime"]) == ("NLL()", "strong")]
    assert row["mean"] == pytest.approx(0.4) and row["values"] == [0.5, 0.3, 0.4]
    assert row["se"] == pytest.approx(0.1 / 3**0.5)


def test_the_text_has_every_table_and_every_seed() -> None:
    study, results = made_up()
    said = text(summary(study, results))
    assert "| DEFT | 0.900 | 0.700 | 0.700 | 0.10 to 0.90 | 0.200 | 0.10 to 0.80 | 0.90 0.10 0.70 |" in said
    assert "| NLL | 0.400 ± 0.058 |" in said
    assert "| DEFT | 0.01 | 0.001 |" in said  # the rates
    assert "| NLL | +0.300 | +0.300 (-0.200 to +0.400) |" in said


def test_nll_is_better_when_it_is_smaller() -> None:
    study, results = made_up(judge="nll")
    for result in results.values():
        for split, found in result.items():
            result[split] = {"nll": 1 - found["exact_match"], "token_accuracy": 0.5}
    report = summary(study, results)
    assert [row["objective"] for row in report["ranking_shared"]] == ["DEFT()", "NLL()", "Likelihood()"]
    said = text(report)
    assert "Plain NLL of held-out answers in nats per token (less is better), median over seeds." in said
    assert (
        "| DEFT | 0.100 | 0.300 | 0.300 | 0.90 to 0.10 | 0.200 | 0.10 to 0.80 | 0.10 0.90 0.30 |" in said
    )  # regret is positive whatever is judged
    assert "| NLL | 0.600 ± 0.058 |" in said and "xact match" not in said and "-0.4" not in said


def test_where_nothing_was_tuned_there_are_no_tuned_tables() -> None:
    study, results = made_up(rates=[])
    said = text(summary(study, results))
    assert "tuned" not in said and "chosen on the validation split" not in said and "one learning rate for all" in said


def test_an_objective_that_is_not_there_has_no_margins() -> None:
    values = {("a", 0.0): {"NLL()": {0: 0.5}}}
    assert margins(worst_regime(values, [("a", 0.0)], ["NLL()"]), "DEFT()") == []


def told(objective: str | None) -> dict[str, Any]:
    return {"recommendation": {"objective": objective}}


def test_a_recommendation_is_held_against_the_best() -> None:
    """DEFT has medians of 0.9 and 0.7, NLL 0.4 and 0.9: the best is DEFT where the prior is strong, else NLL."""
    study, results = made_up()
    values = grid(study.shared(), results)
    probed = asked(study)
    assert [(cell.regime, cell.seed) for cell in probed] == [(r, s) for r in ("strong", "weak") for s in range(3)]
    named = {"strong": ["DEFT", "DEFT", "NLL"], "weak": ["DEFT", "DEFT", "DEFT"]}
    rows = advice(values, probed, {cell.id: told(named[cell.regime][cell.seed]) for cell in probed})
    assert rows[0]["recommended"] == {"DEFT()": 2, "NLL()": 1} and rows[0]["best"] == "DEFT()"  # as Likelihood
    assert [row["behind"] for row in rows] == pytest.approx([0.0, 0.2])
    assert served(rows) == 1
    cannot = advice(values, probed, {cell.id: told(None) for cell in probed})
    assert [row["behind"] for row in cannot] == [None, None] and served(cannot) == 2
    absent = advice(values, probed, {cell.id: told("Cayley") for cell in probed})  # the study has not run it
    assert [row["behind"] for row in absent] == [None, None] and served(absent) == 0
    said = text(summary(study, results) | {"advice": rows})
    assert "| strong, noise 0.6 | DEFT (2), NLL (1) | DEFT | 0.000 |" in said and "in 1 of 2." in said


def test_margins_are_those_of_the_noise_model_where_it_is_compared() -> None:
    study, results = made_up()
    assert summary(study, results)["margins_of"] == "DEFT()"
    study = replace(study, objectives=[NLL(), Contaminated()])
    results = {cell.id: {"test": {"exact_match": 0.5}} for cell in study.shared()}
    results |= {cell.id: {"validation": {"exact_match": 0.5}} for cell in study.tuning()}
    results |= {cell.id: {"test": {"exact_match": 0.5}} for cell in study.tuned(chosen_rates(study, results))}
    said = text(summary(study, results))
    assert "How much better the worst regime of Contaminated is than another's" in said
