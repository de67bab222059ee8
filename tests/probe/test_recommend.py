"""Rules of the recommendation, by numbers made by hand."""

from __future__ import annotations

import pytest

from deft_lightning.objectives import known_objectives
from deft_lightning.probe.recommend import Facts, recommend

NOISE_MODEL = "Contaminated"
CASES = {
    "strong prior, 60 % wrong": (Facts(0.59, 0.01, -4.0, 0.41, 0.99, 0.54), "mixed", NOISE_MODEL),
    "strong prior, 80 % wrong": (Facts(0.78, 0.01, -5.5, 0.21, 0.99, 0.39), "mixed", NOISE_MODEL),
    "some noise": (Facts(0.12, 0.01, 2.0, 0.9, 0.8, 0.9), "mixed", NOISE_MODEL),
    "clean, well known": (Facts(0.01, 0.01, 2.5, 0.99, 0.9, 0.98), "clean", "NLL"),
    "long answers, some of them wrong": (Facts(0.23, 0.02, 0.39, 0.75, 0.59, 0.87), "mixed", NOISE_MODEL),
    "wrong tokens in right answers": (Facts(0.01, 0.2, 1.2, 0.99, 0.9, 0.8), "mixed", NOISE_MODEL),
    "clean, hardly known": (Facts(0.01, 0.01, 0.1, 0.7, 0.1, 0.6), "mixed", NOISE_MODEL),
    "random weights": (Facts(0.95, 0.01, -1.4, 0.0, 0.0, None), "unknown", NOISE_MODEL),
    "sure of nothing it is asked": (Facts(0.95, 0.01, -1.4, 0.05, 0.2, 0.3), "unknown", NOISE_MODEL),
    "sure and right, but not by the prompt": (Facts(0.9, 0.01, 0.0, 0.05, 0.8, 0.9), "unknown", NOISE_MODEL),
    "sure of another rule": (Facts(0.95, 0.01, -4.0, 0.03, 0.9, 0.2), "other", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_speaks(case: str) -> None:
    facts, rule, objective = CASES[case]
    found = recommend(facts)
    assert (found.rule, found.objective) == (rule, objective)
    assert found.text.startswith(objective or "cannot tell")
    # One sentence, of letters that end in no full stop: the report adds it.
    assert ". " not in found.text and not found.text.endswith(".")


def test_the_numbers_it_rests_on_are_said() -> None:
    mixed = recommend(CASES["strong prior, 60 % wrong"][0]).text
    assert "0.59 of the answers and 0.01 of the tokens" in mixed and "0.41 of the answers better than chance" in mixed
    assert "gains 2.50 nats per token" in recommend(CASES["clean, well known"][0]).text
    other = recommend(CASES["sure of another rule"][0]).text
    assert "0.03" in other and "0.20" in other


def test_what_it_names_exists() -> None:
    assert {"Contaminated", "NLL"} <= known_objectives().keys()
