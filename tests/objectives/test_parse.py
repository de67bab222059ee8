"""Objectives from text: what people write is understood, and nothing of it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from deft_lightning.errors import UserError
from deft_lightning.objectives import (
    DEFT,
    EAFT,
    NLL,
    BySource,
    Cayley,
    Floored,
    Likelihood,
    Rescaled,
    Truncated,
    Tsallis,
)
from deft_lightning.objectives.parse import as_objective, label, parse_objective, settings_of, short_legend


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("DEFT", DEFT()), ("DEFT()", DEFT()), (" NLL ", NLL()), ("Tsallis(q=-0.5)", Tsallis(q=-0.5)),
        ("Tsallis(0.3)", Tsallis(q=0.3)), ("Cayley(floor=5e-1)", Cayley(floor=0.5)),
        ("EAFT(k=5, normalizer=three)", EAFT(k=5, normalizer="three")),
        ("Truncated(threshold=0.4, keep='below', base=Likelihood)", Truncated(0.4, "below", Likelihood())),
        ("Truncated(base=Tsallis(q=0.1))", Truncated(base=Tsallis(q=0.1))),
        ("BySource(own={a: NLL, 'b c': Cayley(floor=1)})", BySource(own={"a": NLL(), "b c": Cayley(floor=1)})),
        ("BySource(base=NLL, own={})", BySource(base=NLL())),
        ("deft_lightning.objectives.Cayley", Cayley()), ("deft_lightning.objectives.Tsallis(q=2)", Tsallis(q=2)),
    ],
)  # fmt: skip
def test_it_is_what_it_says(text: str, wanted: object) -> None:
    assert parse_objective(text) == wanted
    assert parse_objective(repr(wanted)) == wanted


@pytest.mark.parametrize("given", [Cayley(floor=0.5), "Cayley(floor=0.5)"])
def test_python_takes_an_objective_or_its_name(given: object) -> None:
    from deft_lightning import SFTModule
    from deft_lightning.integrations import compute_loss_func

    tiny = {"model_type": "llama"}
    assert as_objective(given) == Cayley(floor=0.5) == SFTModule(given, architecture=tiny).objective  # type: ignore[arg-type]
    assert compute_loss_func(given).objective == Cayley(floor=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(Cayley, r"is a class; make an instance, Cayley\(\)"), (None, "give an instance"), ("Deft2", "is unknown")],
)
def test_what_is_no_objective_is_one_line(given: object, wanted: str) -> None:
    from deft_lightning import SFTModule

    with pytest.raises(UserError, match=wanted):
        SFTModule(given, architecture={"model_type": "llama"})  # type: ignore[arg-type]


def test_a_class_of_the_users_own_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_objectives_to_parse.py").write_text(
        "from dataclasses import dataclass\nfrom deft_lightning.objectives import Likelihood\n\n\n"
        "@dataclass(frozen=True, repr=False)\nclass Own(Likelihood):\n    power: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = parse_objective("my_objectives_to_parse.Own(power=3)")
    assert repr(found) == "Own(power=3)" and isinstance(found, Likelihood)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("DEFF", "Did you mean DEFT"), ("Tsalis(q=1)", "Did you mean Tsallis"), ("3", "is unknown"),
        ("", "write NAME"), ("DEFT(", "write NAME"), ("Tsallis(q=1, q=2)", "given twice"),
        ("Tsallis(p=1)", "options of Tsallis: q"), ("Tsallis(**{})", "without stars"),
        ("Tsallis(q=high)", "must be"), ("Tsallis(q=nan)", "must be"), ("Cayley(floor=2)", "outside"),
        ("Tsallis(q=1/0)", "not a number"), ("lambda: DEFT()", "not a number"),
        ("Tsallis(q=open('x'))", "open is unknown"),
        ("__import__('os').abort()", "cannot import"), ("os.path", "is not an objective"),
        ("BySource(own={1: NLL})", "names in braces"), ("BySource(own={**a})", "names in braces"),
        ("BySource(own={a: NLLL})", "no objective"), ("BySource(own=3)", "own"),
        ("nowhere.Mine", "cannot import nowhere"), ("deft_lightning.objectives.Objective", "is not an objective"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line(text: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as error:
        parse_objective(text)
    assert text in str(error.value) and "\n" not in str(error.value)


# --- as settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Cayley(floor=0.5)", {"class_path": "Cayley", "init_args": {"floor": 0.5}}),
        ("Tsallis(0.3)", {"class_path": "Tsallis", "init_args": {"q": 0.3}}),
        (
            "deft_lightning.objectives.Truncated(0.4, keep=below, base=Tsallis(q=0.1))",
            {
                "class_path": "deft_lightning.objectives.Truncated",
                "init_args": {
                    "threshold": 0.4, "keep": "below", "base": {"class_path": "Tsallis", "init_args": {"q": 0.1}},
                },
            },
        ),
        ("Rescaled(base=DEFT)", {"class_path": "Rescaled", "init_args": {"base": {"class_path": "DEFT"}}}),
        (
            "BySource(own={a: NLL, b: Tsallis(q=1)})",
            {
                "class_path": "BySource",
                "init_args": {
                    "own": {"a": {"class_path": "NLL"}, "b": {"class_path": "Tsallis", "init_args": {"q": 1}}},
                },
            },
        ),
        ("Cayley(flor=1)", {"class_path": "Cayley", "init_args": {"flor": 1}}),
    ],
)  # fmt: skip
def test_a_call_has_settings(text: str, wanted: object) -> None:
    assert settings_of(text) == wanted


@pytest.mark.parametrize(
    "text", ["DEFT", "", "a sentence (with brackets)", "Cayleyy(floor=1)", "nowhere.Mine(x=1)", "Cayley(", "os.path(1)",
             "Cayley(1, 2, 3)", "Cayley(floor=open('x'))", "{a: b}", "Cayley(floor=0.5) and more()"],
)  # fmt: skip
def test_other_text_has_none(text: str) -> None:
    assert settings_of(text) is None


@pytest.mark.parametrize(
    "objective", [DEFT(), Cayley(floor=0.5), Floored(base=Cayley(floor=0.1), floor=0.3), Rescaled()]
)
def test_a_legend_is_a_spelling(objective: object) -> None:
    assert parse_objective(label(objective)) == objective  # type: ignore[arg-type]
    assert parse_objective(short_legend(repr(objective))) == objective
