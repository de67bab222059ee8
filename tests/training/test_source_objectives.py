"""Objectives of sources in real runs: gradients against float64, what is asked for and refused, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sources_worker import ANSWERS, make_data, run, write_sources
from test_module import assert_step, initial
from worlds import fit_command, read_events, same_state, save_tiny_llama, still, unit_sgd

from deft_lightning import InstructionDataModule
from deft_lightning.__main__ import main
from deft_lightning.callbacks import Checkpoint
from deft_lightning.errors import UserError
from deft_lightning.functional import TokenContext, token_stats
from deft_lightning.objectives import DEFT, NLL, BySource, Cayley, Contaminated, Objective, Rescaled, Truncated, Tsallis

pytestmark = pytest.mark.slow

ALL = {"validation_fraction": 0.0, "batch_size": 100}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    save_tiny_llama(root / "pretrained", 0.3)
    write_sources(root)
    return root


def sources(world: Path) -> list[str]:
    return [str(world / f"{name}.jsonl") for name in ANSWERS]


def gradient_by_hand(world: Path, data: InstructionDataModule, objectives: dict[str, Objective]) -> dict[str, Any]:
    """Gradient of runs on one source each, weighted by their tokens; float64, one example at a time."""
    model = initial(str(world / "pretrained"))
    logits: dict[str, list[Any]] = {name: [] for name in objectives}
    labels: dict[str, list[Any]] = {name: [] for name in objectives}
    for at in range(data.size("train")):
        example = data.example("train", at)
        own = torch.from_numpy(example.labels)[1:]
        keep = own != -100
        logits[example.id[0]].append(model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0, :-1][keep])
        labels[example.id[0]].append(own[keep])
    losses, counts = [], []
    for name, objective in objectives.items():
        stats = token_stats(torch.cat(logits[name]), torch.cat(labels[name]), topk=objective.topk)
        known = torch.repeat_interleave(torch.arange(len(labels[name])), torch.tensor([len(x) for x in labels[name]]))
        losses.append(objective(stats.within(TokenContext(example=known))).mean())
        counts.append(len(known))
    shares = torch.tensor(counts).double() / sum(counts)
    total = (torch.stack(losses) * shares).sum()
    total.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("size", "accumulate"), [(100, 1), (5, 100)])
@pytest.mark.parametrize("head", ["fused"])
def test_the_gradient_is_that_of_a_run_on_each_source_weighted_by_its_tokens(
    size: int, accumulate: int, packing: bool, head: str, world: Path, tmp_path: Path
) -> None:
    objectives: dict[str, Objective] = {"a": NLL(), "b": DEFT(), "c": Tsallis(q=0.2)}
    options = {"a": "NLL", "c": "Tsallis(q=0.2)"}
    data = make_data(
        sources(world), **{**ALL, "batch_size": size}, packing=packing, max_length=96, objectives=options
    )  # fmt: skip
    module = run(tmp_path, str(world / "pretrained"), data, optimizer=unit_sgd, accumulate_grad_batches=accumulate)
    assert module.trainer.global_step == 1
    assert module.objective == BySource(DEFT(), {"a": NLL(), "c": Tsallis(q=0.2)})
    assert_step(initial(str(world / "pretrained")), module.model, gradient_by_hand(world, data, objectives))
    for wrong in ({"a": DEFT()}, {"c": NLL()}):
        with pytest.raises(AssertionError):
            gradient = gradient_by_hand(world, data, {**objectives, **wrong})
            assert_step(initial(str(world / "pretrained")), module.model, gradient)


def test_an_objective_that_looks_at_the_batch_sees_the_tokens_of_its_sources(world: Path, tmp_path: Path) -> None:
    kept = Truncated(threshold=0.004, normalize_by="kept")
    objectives: dict[str, Objective] = {"a": Cayley(floor=0.5), "b": Cayley(floor=0.5), "c": kept}
    options = {name: repr(objective) for name, objective in objectives.items() if name != "b"}
    data = make_data(sources(world), **ALL, objectives=options)
    module = run(tmp_path, str(world / "pretrained"), data, optimizer=unit_sgd, objective=objectives["b"])
    assert_step(initial(str(world / "pretrained")), module.model, gradient_by_hand(world, data, objectives))


def test_monitors_show_the_gate_of_the_objective_of_each_source(world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world), **ALL, objectives={"a": "NLL", "b": "Truncated(threshold=1.0)"})
    run(tmp_path / "run", str(world / "pretrained"), data, optimizer=still)
    events = read_events(tmp_path / "run")
    means = {name: events.Scalars(f"gate/{name}/mean")[-1].value for name in ANSWERS}
    assert means["a"] == 1.0 and means["b"] == 0.0 and 0.2 < means["c"] < 0.999


def test_resume_is_bit_exact_with_rates_of_sources(world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 4,
        "objectives": {"a": "Contaminated(answer_chance=least, decay=0.5)", "c": "Rescaled"},
    }
    pretrained, steps = str(world / "pretrained"), {"max_epochs": -1}
    base = Contaminated(answer_chance="least", decay=0.5)
    whole = run(
        tmp_path / "whole", pretrained, make_data(sources(world), **options), objective=base, max_steps=6, **steps
    )
    saved = Checkpoint(dirpath=str(tmp_path / "saved"), every_n_train_steps=3)
    run(
        tmp_path / "first",
        pretrained,
        make_data(sources(world), **options),
        saved,
        objective=base,
        max_steps=3,
        **steps,
    )
    last = str(tmp_path / "saved" / "last.ckpt")
    second = run(
        tmp_path / "second", pretrained, make_data(sources(world), **options), objective=base, max_steps=6,
        ckpt_path=last, **steps,
    )  # fmt: skip
    assert same_state(whole.model, second.model)
    assert whole.normaliser.memory == second.normaliser.memory and len(whole.normaliser.memory) == 6
    about = torch.load(last, weights_only=True)["deft_lightning"]
    own = {"a": Contaminated(answer_chance="least", decay=0.5), "c": Rescaled()}
    assert about["objective"] == repr(BySource(base, own)) and len(about["rates"]) == 4 and len(about["gates"]) == 6
    assert about["rates"][0] != about["rates"][2]


def test_a_checkpoint_of_other_objectives_keeps_its_rates_to_itself(world: Path, tmp_path: Path) -> None:
    pretrained = str(world / "pretrained")
    saved = Checkpoint(dirpath=str(tmp_path / "saved"))
    run(tmp_path / "first", pretrained, make_data(sources(world)), saved, objective=Rescaled(), max_steps=2)
    found = run(
        tmp_path / "second", pretrained,
        make_data(sources(world), objectives={"b": "Contaminated(answer_chance=least)"}), max_steps=4,
        max_epochs=2, ckpt_path=str(tmp_path / "saved" / "last.ckpt"),
        objective=Contaminated(answer_chance="least", start=0.3),
    )  # fmt: skip
    assert len(found.normaliser.memory) == 4 and all(0.01 <= rate < 0.5 for rate in found.normaliser.memory)


def test_settings_that_differ_are_told_at_resume(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    pretrained, saved = str(world / "pretrained"), Checkpoint(dirpath=str(tmp_path / "saved"))
    run(tmp_path / "first", pretrained, make_data(sources(world), objectives={"b": "NLL"}), saved, max_steps=2)
    run(
        tmp_path / "second", pretrained, make_data(sources(world), objectives={"b": "Likelihood"}), max_steps=3,
        ckpt_path=str(tmp_path / "saved" / "last.ckpt"),
    )  # fmt: skip
    lines = caplog.text + " ".join(str(warning.message) for warning in recwarn)
    assert "data.objectives: {'b': 'NLL'} -> {'b': 'Likelihood'}" in lines


@pytest.mark.parametrize(
    ("objectives", "options", "words"),
    [
        ({"bb": "NLL"}, {}, ["--data.objectives", "there is no source 'bb'", "Did you mean b", "Known: a, b, c"]),
        ({"b": "NLLL"}, {}, ["--data.objectives.b", "NLLL is unknown", "Did you mean NLL"]),
        ({"b": "BySource(own={a: NLL})"}, {}, ["--data.objectives", "base and own cannot be"]),
        ({"b": "EAFT(k=3)", "c": "EAFT"}, {}, ["--data.objectives", "give them the same k"]),
        ({"b": "NLL"}, {"objective": BySource(own={"a": NLL()})}, ["--data.objectives", "leave one of them out"]),
        ({}, {"objective": BySource(own={"d": NLL()})}, ["--model.objective BySource", "'d'", "Known: a, b, c"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    objectives: dict[str, str], options: dict[str, Any], words: list[str], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        run(tmp_path, str(world / "pretrained"), make_data(sources(world), objectives=objectives), **options)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value), refused.value


def test_one_source_has_the_objective_of_the_model(world: Path, tmp_path: Path) -> None:
    data = make_data(sources(world)[0], objectives={"a": "NLL"})
    with pytest.raises(UserError, match=r"^--data\.objectives: the data has one source; .*--model\.objective"):
        run(tmp_path, str(world / "pretrained"), data)


def test_by_source_by_hand_is_the_same_and_without_names_its_base(world: Path, tmp_path: Path) -> None:
    pretrained = str(world / "pretrained")
    asked = run(tmp_path / "a", pretrained, make_data(sources(world), objectives={"b": "NLL"}))
    by_hand = run(tmp_path / "b", pretrained, make_data(sources(world)), objective=BySource(own={"b": NLL()}))
    assert same_state(asked.model, by_hand.model) and asked.objective == by_hand.objective
    plain, bare = (
        run(tmp_path / "c", pretrained, make_data(sources(world)), objective=o) for o in (DEFT(), BySource())
    )
    assert same_state(plain.model, bare.model) and not same_state(plain.model, asked.model)


@pytest.mark.parametrize("how", ["options", "yaml", "by hand"])
def test_the_command_line_reads_it(how: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "options": ["--data.objectives.b", "Tsallis(q=0.3)", "--data.objectives.c", "NLL"],
        "by hand": ["--model.objective", "BySource(own={b: Tsallis(q=0.3), c: NLL})"],
        "yaml": ["--config", str(tmp_path / "run.yaml")],
    }
    (tmp_path / "run.yaml").write_text("data: {objectives: {b: Tsallis(q=0.3), c: NLL}}\n")
    sets = [
        "--data.source",
        f"[{', '.join(sources(world))}]",
        "--after_fit.test",
        "false",
        "--after_fit.export",
        "false",
    ]
    monkeypatch.setattr("sys.argv", ["deft_lightning", *fit_command(tmp_path, *sets, *given[how])])
    main()
    (last,) = {path for path in (tmp_path / "logs").rglob("step=4.ckpt")}
    about = torch.load(last, weights_only=True)["deft_lightning"]
    assert about["objective"] == "BySource(base=DEFT(), own={'b': Tsallis(q=0.3), 'c': NLL()})"


def test_the_help_has_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["deft_lightning", "fit", "--help=all"])
    with pytest.raises(SystemExit):
        main()
    assert "--data.objectives" in (found := capsys.readouterr().out)
    assert "--data.objectives.gsm8k NLL" in " ".join(found.split())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("NLL", "NLL"), ({"class_path": "NLL"}, "NLL()"), ("Tsallis(q=0.3)", "Tsallis(q=0.3)"),
        (
            {"class_path": "Floored", "init_args": {"base": {"class_path": "Cayley"}, "decay": "linear"}},
            "Floored(base=Cayley(), decay='linear')",
        ),
    ],
)  # fmt: skip
def test_class_and_settings_are_one_spelling_more(given: Any, text: str) -> None:
    assert make_data("rows.jsonl", objectives={"a": given}).settings.objectives == {"a": text}
    with pytest.raises(UserError, match=r"^--data\.objectives: .*not 3"):
        make_data("rows.jsonl", objectives={"a": 3})
