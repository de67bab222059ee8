"""The page of a probe: its numbers against dense softmax in float64, read in a browser; its size; what it escapes."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browser import Browser
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import constant, conversation, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.errors import UserError
from deft_lightning.objectives import DEFT, Contaminated, NoiseRates
from deft_lightning.objectives.locked import SHUT
from deft_lightning.probe.page import build
from deft_lightning.probe.page.build import chosen_ranks
from deft_lightning.probe.page.codes import LEVELS, SHUT_CODE, nats, planes, shares, whole
from deft_lightning.probe.page.posterior import contaminated_gate
from deft_lightning.probe.page.texts import TextOfTokens
from deft_lightning.terminal import visible

NASTY = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'> \x1b[2J \u202e & e"
ANSWERS = [
    "2",
    "red, green and blue",
    NASTY,
    "Hello! How are you?",
    "yes 😀 é",
    "c a t",
    "line one\nline two\ttab",
    "no no",
]
ROWS = [{"id": f"r{i}", "question": f"question {i}?", "answer": text} for i, text in enumerate(ANSWERS)]
ROWS[1]["weight"] = 0.5  # type: ignore[assignment]
PRETRAINED = {"spread": 0.6}
CLOSE = 0.0042  # half of the widest step between two codes in [0, 1]


# --- codes ----------------------------------------------------------------------------------------------------------


def test_codes_are_close_and_keep_what_is_shut() -> None:
    values = np.concatenate([np.linspace(0, 1, 5001), [SHUT * (1 - 1e-9), SHUT, 0.1, 1e-6, 1 - 1e-6]])
    codes = shares(values)[0]
    assert np.abs(LEVELS[codes] - values).max() <= CLOSE
    np.testing.assert_array_equal(codes < SHUT_CODE, values < SHUT)
    assert np.all(np.diff(LEVELS) > 0) and LEVELS[0] == 0 and 1.0 in LEVELS
    large = np.array([1.5, 7.0, 100.0, 1e9, math.nan, -1.0])
    np.testing.assert_allclose(LEVELS[shares(large)[0]], [1.5, 7.0, 100.0, 100.0, 0.0, 0.0], rtol=0.1)


def test_nats_are_thousandths() -> None:
    values = np.array([0.0, 0.0004, 2.302585, 14.9, 65.535, 80.0, math.inf])
    assert whole(nats(values)).tolist() == [0, 0, 2303, 14900, 65535, 65535, 65535]
    numbers = np.array([0, 1, 255, 256, 70_000, 2**24 - 1])
    np.testing.assert_array_equal(whole(planes(numbers, 3)), numbers)


def test_half_of_the_rows_are_the_worst_and_half_are_spread() -> None:
    assert chosen_ranks(7, 7) == list(range(7))
    ranks = chosen_ranks(1000, 10)
    assert ranks[:5] == [0, 1, 2, 3, 4] and len(set(ranks)) == 10 and ranks == sorted(ranks) and ranks[-1] > 700
    assert chosen_ranks(5, 1) == [0]


def test_gate_of_contaminated_is_the_posterior_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob, chance, asked = (-6 * torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(3))
    example, rates = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]), NoiseRates(0.3, 0.1)
    gate = contaminated_gate(log_prob, chance, asked, example, rates)
    p, u, q = log_prob.exp(), chance.exp(), asked.exp()
    for answer in range(3):
        own = example == answer
        a, best = 0.9 * p[own] + 0.1 * u[own], q[own] if q[own].prod() > u[own].prod() else u[own]
        # What chance is sure of is hardly evidence.
        evidence = ((1 - best) * (a / (0.9 * best + 0.1 * u[own])).log()).sum()
        odds = float(evidence) - math.log(0.3 / 0.7)
        expected = 0.9 * p[own] / a / (1 + math.exp(-odds))
        torch.testing.assert_close(gate[own], expected)


# --- a page, and what a dense softmax says of its tokens ------------------------------------------------------------


def numbers_of(page: Path) -> tuple[dict[str, Any], bytes]:
    """What a page holds, unpacked."""
    parts = dict(re.findall(r'<script type="application/octet-stream" id="(\w+)">([\w+/=]+)<', page.read_text()))
    meta, numbers = (zlib.decompress(base64.b64decode(parts[name])) for name in ("meta", "numbers"))
    return json.loads(meta), numbers


class Dense(NamedTuple):
    """Of the learnt tokens of all rows of a page, in its order: from dense logits in float64."""

    p: Tensor
    collision: Tensor
    entropy: Tensor
    first: Tensor
    label: Tensor
    noise: Tensor
    row: Tensor


def dense(model: Any, data: InstructionDataModule, positions: list[int]) -> Dense:
    model, columns = model.double().eval(), []
    for number, at in enumerate(positions):
        example = data.example("train", at)
        with torch.no_grad():
            pi = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0].softmax(-1)
        for t in range(1, len(example.labels)):
            if (label := int(example.labels[t])) >= 0:
                row = pi[t - 1]
                columns.append([
                    row[label], row.square().sum(), -(row * row.log()).sum(), row.argmax(), torch.tensor(label),
                    torch.tensor(int(example.noise_code[t])), torch.tensor(number),
                ])  # fmt: skip
    return Dense(*(torch.stack(column) for column in zip(*columns, strict=True)))


class World(NamedTuple):
    """A page with two models and what it was made of."""

    page: Path
    meta: dict[str, Any]
    numbers: bytes
    report: dict[str, Any]
    data: InstructionDataModule
    models: list[Dense]
    audit: list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two sources, one row weighted, some tokens corrupted; a random model before and after it has learnt the rows."""
    root = tmp_path_factory.mktemp("page")
    sources = [write_rows(root / name, part) for name, part in (("one.jsonl", ROWS[:4]), ("two.jsonl", ROWS[4:]))]
    noise = Noise(ops=[TokenReplace(rate=0.2)])
    data = InstructionDataModule(sources, validation_fraction=0.0, batch_size=3, noise=noise)  # type: ignore[arg-type]
    options = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=0.01), "scheduler": constant}
    Trainer(
        accelerator="cpu", devices=1, max_steps=60, logger=False, default_root_dir=str(root), monitors=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(trained := SFTModule(pretrained=pretrained, **options), data)  # type: ignore[arg-type] # fmt: skip
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    page = root / "gate.html"
    module = SFTModule(DEFT(), pretrained=pretrained, **options)  # type: ignore[arg-type]
    report = trainer.probe(module, data, page=str(page), compare="last", audit=str(root / "audit.jsonl"))
    audit = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()]
    meta, numbers = numbers_of(page)
    positions = [row[1] for row in meta["rows"]]
    models = [AutoModelForCausalLM.from_pretrained(pretrained), trained.model]
    return World(page, meta, numbers, report, data, [dense(model, data, positions) for model in models], audit)


def column_codes(world: World, place: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The codes of a column that is in the order of the text."""
    count = len(world.models[0].p)
    codes = np.frombuffer(world.numbers, np.uint8)[place["at"] : place["at"] + place["width"] * count]
    return whole(codes.reshape(place["width"], count))


def column(world: World, place: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The values of a column of the page."""
    numbers = column_codes(world, place)
    if place["sorted"]:
        columns = next(
            m["columns"] for m in world.meta["models"] if place in [*m["columns"].values(), *m["objectives"]]
        )
        log_prob, collision = (column_codes(world, columns[name]) for name in ("log_prob", "collision"))
        order = np.lexsort((collision, np.floor(np.sqrt(log_prob))))
        numbers[order] = numbers.copy()
    return LEVELS[numbers] if place["kind"] == "share" else numbers / 1000 if place["kind"] == "nats" else numbers


@pytest.mark.slow
def test_page_holds_what_a_dense_softmax_says(world: World) -> None:
    for look, truth in zip(world.meta["models"], world.models, strict=True):
        values = {name: column(world, place) for name, place in look["columns"].items()}
        gates = {one["name"]: column(world, one) for one in look["objectives"]}
        p, c = truth.p.numpy(), truth.collision.numpy()
        np.testing.assert_allclose(values["log_prob"], -np.log(p), atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(values["collision"], c, atol=CLOSE + 1e-5)
        np.testing.assert_allclose(values["entropy"], truth.entropy.numpy(), atol=1e-3)
        np.testing.assert_allclose(values["conflict"], np.maximum(0, np.log(c / p)), atol=1e-3, rtol=1e-4)
        np.testing.assert_array_equal(values["flags"] & 1, (truth.first == truth.label).numpy())
        np.testing.assert_array_equal(values["flags"] & 2 > 0, c >= 0.5)
        by_hand = {"NLL": np.ones_like(p), "Likelihood": p, "DFT": p, "Tsallis": np.sqrt(p), "DEFT": p**c}
        for name, gate in by_hand.items():
            np.testing.assert_allclose(gates[name], gate, atol=CLOSE + 1e-5, err_msg=name)
        assert look["objectives"][0]["name"] == look["chosen"] == "DEFT" and "Contaminated" in gates
        said = [world.meta["words"][number - 1] if number else None for number in values["said"]]
        tokenizer = TextOfTokens(world.data.tokenizer)
        assert said == [
            None if first == label else visible(tokenizer.piece(int(first)))
            for first, label in zip(truth.first.tolist(), truth.label.tolist(), strict=True)
        ]
    shared, truth = world.meta["shared"], world.models[0]
    np.testing.assert_array_equal(column(world, shared["noise"]), truth.noise.numpy())
    half = next(number for number, row in enumerate(world.meta["rows"]) if row[0] == "r1")
    weight = np.where(truth.row.numpy() == half, 0.5, 1.0)
    np.testing.assert_allclose(column(world, shared["weight"]), weight, atol=CLOSE)
    learnt = world.models[1].p
    assert truth.noise.any() and (truth.p < 1e-3).any() and (learnt > 0.9).any() and (learnt < 0.1).any()


def suspicious(world: World) -> Tensor:
    """Which tokens the audit names, in the order of the page."""
    spans = {record["id"]: record["spans"] for record in world.audit}
    marks = []
    for row in world.meta["rows"]:
        learnt = np.flatnonzero(world.data.example("train", row[1]).labels >= 0)
        marks += [any(span["start"] <= place < span["end"] for span in spans[row[0]]) for place in learnt[learnt > 0]]
    return torch.tensor(marks)


@pytest.mark.slow
def test_page_marks_the_tokens_that_the_audit_names(world: World) -> None:
    """They are odd for the file, which a token of high conflict need not be."""
    named = suspicious(world)
    first, second = (
        torch.from_numpy(column(world, model["columns"]["flags"]) & 4 > 0) for model in world.meta["models"]
    )
    assert named.any() and torch.equal(first, named)
    assert second.any() and not torch.equal(second, first)  # what is odd for the other model
    truth = world.models[0]
    assert not torch.equal(named, (truth.collision / truth.p).log() >= 2.302585)


@pytest.mark.slow
def test_page_holds_the_rows_in_the_order_of_the_audit(world: World) -> None:
    rows = world.meta["rows"]
    assert [row[2] for row in rows] == list(range(1, len(ROWS) + 1)) and world.meta["total"] == len(ROWS)
    assert {row[0]: row[5] for row in rows} == {f"r{i}": int(i >= 4) for i in range(len(ROWS))}
    where = {f"r{i}": f"{'one' if i < 4 else 'two'}.jsonl, row {i % 4 + 1}" for i in range(len(ROWS))}
    assert {row[0]: row[10] for row in rows} == where
    assert world.meta["sources"] == ["one", "two"] and world.meta["operations"] == ["TokenReplace"]
    assert [(row[0], row[3]) for row in rows] == [(record["id"], record["score"]) for record in world.audit]
    assert [row[0] for row in rows[:5]] == [record["id"] for record in world.report["suspicious"]]
    for row in rows:
        example = world.data.example("train", row[1])
        kept = example.labels != -100
        assert sum(row[8][1::2]) == kept.sum()
        assert sum(row[8][::2]) + sum(lengths_of(world, row)) == len(row[9].encode("utf-16-le")) // 2
        assert f"question {row[0][1:]}?" in row[9]


def lengths_of(world: World, row: list[Any]) -> list[int]:
    """Letters of the learnt tokens of a row."""
    start = 0
    for other in world.meta["rows"]:
        count = sum(other[8][1::2])
        if other[1] == row[1]:
            return column(world, world.meta["shared"]["lengths"])[start : start + count].tolist()
        start += count
    raise AssertionError(row)


@pytest.mark.slow
def test_every_file_of_the_page_is_in_it(world: World) -> None:
    html, folder = world.page.read_text(), Path(build.__file__).parent
    others = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(others) == 6 and all(path.read_text() in html for path in others), others


@pytest.mark.slow
def test_nothing_is_left_beside_the_page(world: World) -> None:
    """Neither what the passes have kept, nor a part of the page."""
    folder = world.page.parent
    assert not (folder / "probe" / "unfinished").exists()
    assert [path.name for path in folder.glob("*gate*")] == ["gate.html"]
    assert len(world.meta["models"]) == 2 and world.meta["models"][0]["name"] != world.meta["models"][1]["name"]
    assert "checkpoint" in world.meta["models"][1]["name"] and world.report["checkpoint"] is None


@pytest.mark.slow
def test_chosen_noise_model_is_there_once(pretrained: str, source: str, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    module = SFTModule(Contaminated(start=0.2), pretrained=pretrained)
    report = trainer.probe(module, InstructionDataModule(source), page=str(tmp_path / "gate.html"), examples=10)
    meta, _ = numbers_of(tmp_path / "gate.html")
    names = [one["name"] for one in meta["models"][0]["objectives"]]
    assert "start=0.2" in names[0] and not any(n.startswith("Contaminated") for n in names[1:])
    assert set(names) == {row["name"] for row in report["objectives"]}


def test_tokens_that_are_half_a_letter_have_its_text_at_the_last_of_them(tmp_path: Path, pretrained: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "é?", "answer": "a😀b\x1b"}])
    data = InstructionDataModule(source, validation_fraction=0.0, tokenizer=pretrained)
    data.prepare_data()
    data.setup()
    row = TextOfTokens(data.tokenizer).row(data.example("train", 0))
    shown = row.text[sum(row.runs[:1]) :]
    assert shown.startswith("a😀b\\x1b") and row.lengths[:7] == [1, 0, 0, 0, 2, 1, 4]
    assert "é?" in row.text[: row.runs[0]]


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 2,000 of 2,100 rows, each of a hundred letters and more that no model expects."""
    root = tmp_path_factory.mktemp("many")
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghij"), 7)) for _ in range(500)]
    rows = [
        {"id": f"m{i}", "question": " ".join(draw.choice(words, 9)), "answer": " ".join(draw.choice(words, 15))}
        for i in range(2100)
    ]
    data = InstructionDataModule(
        write_rows(root / "rows.jsonl", rows), validation_fraction=0.0, batch_size=64, max_length=512,
        tokenizer=pretrained,
    )  # fmt: skip
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "initializer_range": 0.6, "max_position_embeddings": 512}  # fmt: skip
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(root))
    trainer.probe(SFTModule(architecture=shape), data, page=str(root / "many.html"))
    return root / "many.html"


@pytest.mark.slow
def test_two_thousand_rows_are_less_than_ten_megabytes(many: Path) -> None:
    meta, _ = numbers_of(many)
    tokens = sum(sum(row[8][1::2]) for row in meta["rows"])
    assert len(meta["rows"]) == 2000 and meta["total"] == 2100 and tokens > 230_000
    assert many.stat().st_size < 10_000_000


@pytest.mark.slow
def test_rows_that_would_be_too_much_are_left_out(
    world: World, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    page = tmp_path / "small.html"
    limit = world.page.stat().st_size + 30_000
    monkeypatch.setattr(build, "LARGEST", limit)
    letters = np.random.default_rng(0).integers(33, 126, (120, 90))
    rows = [{"id": f"x{i}", "question": "?", "answer": "".join(map(chr, own))} for i, own in enumerate(letters)]
    data = InstructionDataModule(write_rows(tmp_path / "rows.jsonl", rows), validation_fraction=0.0)
    trainer.probe(SFTModule(pretrained=pretrained), data, page=str(page))
    meta, _ = numbers_of(page)
    assert page.stat().st_size <= limit and 10 < len(meta["rows"]) < 120 == meta["total"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "last"}, "--compare shows two models on a page; set --page FILE"),
        ({"page": "."}, "--page .: is a folder"),
        ({"page": "gate.html", "compare": "nowhere.ckpt"}, "probe: --compare: nowhere.ckpt: no such checkpoint"),
    ],
)
def test_what_cannot_be_written_or_read_is_refused_before_the_pass(
    options: dict[str, str], message: str, pretrained: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        trainer.probe(SFTModule(pretrained=pretrained), InstructionDataModule(source), **options)  # type: ignore[arg-type]
    assert not (tmp_path / "gate.html").exists() and not (tmp_path / "probe" / "probe.json").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("there is no chromium here")
    with Browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def opened(browser: Browser, world: World) -> Browser:
    browser.look(1400, 1000)
    browser.open(world.page.as_uri(), "Keys", "suspicion")
    assert browser.evaluate("document.documentElement.dataset.ready") == "yes"
    return browser


def chip(browser: Browser, name: str) -> None:
    """Click the switch of that name."""
    chips = "[...document.querySelectorAll('.chips label')]"
    browser.evaluate(f"{chips}.find(l => l.textContent.replace(' ★', '') === {name!r}).id = 'wanted'")
    browser.click("#wanted input")
    browser.evaluate("document.getElementById('wanted').removeAttribute('id')")


def shown(browser: Browser, name: str) -> list[str]:
    """The numbers of that name in the panel."""
    script = f"[...document.querySelectorAll('#detail tr')].filter(r => r.dataset.name === {name!r})"
    return list(browser.evaluate(f"{script}.flatMap(r => [...r.querySelectorAll('td')].map(c => c.textContent))"))


def visible_rows(browser: Browser, world: World) -> list[str]:
    numbers = browser.evaluate("[...document.querySelectorAll('.row')].map(row => +row.dataset.row)")
    return [world.meta["rows"][number][0] for number in numbers]


def same(text: str, value: float) -> bool:
    """Whether a number as the page writes it is that value, to its digits and those of its code."""
    return float(text) == pytest.approx(value, abs=0.005 + CLOSE, rel=0.02) and (value > 0.01 or float(text) < 0.02)


@pytest.mark.slow
def test_numbers_of_a_token_are_those_of_the_dense_softmax(opened: Browser, world: World) -> None:
    wrong = [i for i in range(len(world.models[0].p)) if world.models[0].p[i] < 0.2][:3]
    for token in [0, *wrong, len(world.models[0].p) - 1]:
        opened.point(f'[data-token="{token}"]')
        for model, truth in enumerate(world.models):
            p, c = float(truth.p[token]), float(truth.collision[token])
            wanted = {"p": p, "C": c, "NLL": 1.0, "Likelihood": p, "Tsallis": math.sqrt(p), "DEFT": p**c}
            wanted |= {"conflict": max(0.0, math.log(c / p)), "entropy": float(truth.entropy[token])}
            for name, value in wanted.items():
                assert same(shown(opened, name)[model], value), (token, model, name, shown(opened, name), value)
        row = world.meta["rows"][int(world.models[0].row[token])]
        text = opened.evaluate("document.getElementById('detail').textContent")
        assert f"in row #{row[2]}, {row[0]}" in text
        assert ("would say the same" in text) == any(t.first[token] == t.label[token] for t in world.models)
        assert ("corrupted: TokenReplace" in text) == bool(world.models[0].noise[token])


@pytest.mark.slow
def test_switches_colour_the_tokens(opened: Browser, world: World) -> None:
    first, second = world.models

    def levels() -> list[int]:
        script = "[...document.querySelectorAll('#rows .t')].sort((a, b) => a.dataset.token - b.dataset.token)"
        return list(opened.evaluate(f"{script}.map(t => +t.className.match(/[lc](\\d)/)[1])"))

    def banded(values: Tensor, *bounds: float) -> list[int]:
        return [sum(float(value) >= bound for bound in bounds) for value in values]

    def agree(colours: list[int], values: Tensor, *bounds: float) -> None:
        near = [any(abs(float(v) - b) < CLOSE + 1e-4 for b in bounds[1:]) for v in values]
        wanted = banded(values, *bounds)
        assert len(colours) == len(wanted) and len(set(wanted)) > 1
        assert all(a == b or close for a, b, close in zip(colours, wanted, near, strict=True))

    gates = (SHUT, 0.3, 0.6, 0.9)
    agree(levels(), first.p**first.collision, *gates)
    chip(opened, "Tsallis")
    agree(levels(), first.p.sqrt(), *gates)
    assert "gate of Tsallis" in opened.evaluate("document.getElementById('legend').textContent")
    chip(opened, "p")
    agree(levels(), first.p, 0.01, 0.1, 0.5, 0.9)
    chip(opened, "conflict")
    agree([4 - level for level in levels()], (first.collision / first.p).log().clamp_min(0), 0.1, 1, 2.302585, 4.60517)
    chip(opened, "DEFT")
    second_name = f"second: {world.meta['models'][1]['name']}"
    chip(opened, second_name)
    agree(levels(), second.p**second.collision, *gates)
    chip(opened, "change from first to second")
    change = second.p**second.collision - first.p**first.collision
    near = [any(abs(abs(float(v)) - b) < 2 * CLOSE + 1e-4 for b in (0.1, 0.5)) for v in change]
    wanted = [0 if v <= -0.5 else 1 if v <= -0.1 else 2 if v < 0.1 else 3 if v < 0.5 else 4 for v in change.tolist()]
    assert all(a == b or close for a, b, close in zip(levels(), wanted, near, strict=True)) and len(set(wanted)) > 2


@pytest.mark.slow
def test_filters_and_search_leave_the_rows_they_say(opened: Browser, world: World) -> None:
    truth = world.models[0]
    ids = [row[0] for row in world.meta["rows"]]
    shut = truth.p**truth.collision < SHUT
    locked = shut & (truth.collision >= 0.5) & (truth.first != truth.label)

    def where(mask: Tensor) -> list[str]:
        return [name for number, name in enumerate(ids) if bool(mask[truth.row == number].any())]

    def choose(field: str, key: str) -> None:
        opened.evaluate(f"(() => {{ const s = document.getElementById('{field}'); s.value = {key!r};"
                        " s.dispatchEvent(new Event('change')); })()")  # fmt: skip

    for key, wanted in (("locked", where(locked)), ("shut", where(shut)), ("noisy", where(truth.noise > 0)),
                        ("suspicious", where(suspicious(world)))):  # fmt: skip
        choose("filter", key)
        assert visible_rows(opened, world) == wanted, key
        assert 0 < len(wanted)
    choose("filter", "clean")
    assert set(visible_rows(opened, world)) == set(ids) - set(where(truth.noise > 0))
    choose("filter", "all")
    choose("source", "1")
    assert set(visible_rows(opened, world)) == {"r4", "r5", "r6", "r7"}
    choose("source", "")
    choose("sort", "data")
    assert visible_rows(opened, world) == [r[0] for r in sorted(world.meta["rows"], key=lambda row: row[1])]
    choose("sort", "lowest")
    means = {name: float((truth.p**truth.collision)[truth.row == n].mean()) for n, name in enumerate(ids)}
    order = visible_rows(opened, world)
    assert all(means[a] < means[b] + 2 * CLOSE for a, b in pairwise(order))
    choose("sort", "worst")
    assert visible_rows(opened, world) == ids
    opened.click("#search")
    opened.press(*"QUESTION 3")
    time.sleep(0.5)
    assert visible_rows(opened, world) == ["r3"]
    assert opened.evaluate("document.querySelector('mark').textContent") == "question 3"
    assert "1 of 8 rows" in opened.evaluate("document.getElementById('count').textContent")


@pytest.mark.slow
def test_keys_reach_every_token(opened: Browser, world: World) -> None:
    focused = "document.activeElement.dataset.token"
    opened.press("j")
    assert opened.evaluate(focused) == "0"
    opened.press("ArrowRight", "ArrowRight", "ArrowLeft")
    token = opened.evaluate(focused)
    last = int((world.models[0].row == 0).sum()) - 1
    assert token == str(max(min(2, last) - 1, 0))  # there is nothing behind the last token of a row
    label = opened.evaluate("document.activeElement.getAttribute('aria-label')")
    gate = float((world.models[0].p ** world.models[0].collision)[int(token)])
    assert same(re.search(r"DEFT ([\d.e-]+)", label)[1], gate)  # type: ignore[index]
    opened.press("]")
    assert opened.evaluate("document.querySelector('input[name=view]:checked').parentNode.textContent") == "Cayley"
    opened.press("[", "j")
    assert opened.evaluate(focused) == str(int((world.models[0].row == 0).sum()))
    opened.press("n")
    assert opened.evaluate("document.activeElement.classList.contains('l0')")
    kept = opened.evaluate(focused)
    opened.press("Enter")
    opened.point("#head h1")
    assert opened.evaluate("document.querySelector('.t.on').dataset.token") == kept
    opened.press("/")
    assert opened.evaluate("document.activeElement.id") == "search"


@pytest.mark.slow
def test_text_of_rows_is_text(opened: Browser, world: World) -> None:
    assert opened.evaluate("document.title") == f"Gates of {world.report['data']}"
    assert opened.evaluate("document.querySelectorAll('#rows img, #rows script').length") == 0
    row = next(number for number, row in enumerate(world.meta["rows"]) if row[0] == "r2")
    text = opened.evaluate(f"document.querySelector('[data-row=\"{row}\"] .text').textContent")
    noisy = bool(world.models[0].noise[world.models[0].row == row].any())
    assert noisy or NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in text
    assert "\x1b" not in text and "\u202e" not in text and "script" in text
    html = world.page.read_text()
    assert "taken" not in html and "red, green" not in html and html.count("<script>") == 1
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", html.split("<script type=")[0])
    # A policy that the browser keeps: nothing is loaded, and no other script runs.
    script = "(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s); return document.title; })()"  # noqa: E501
    assert opened.evaluate(script) == f"Gates of {world.report['data']}"


@pytest.mark.slow
def test_what_all_rows_begin_with_and_long_prompts_are_shown_when_asked_for(
    browser: Browser, pretrained: str, tmp_path: Path
) -> None:
    system = ("system", "Answer truthfully, and in one word where one word is enough.\n")
    rows = [
        conversation(system, ("user", "short?"), ("assistant", "yes")),
        conversation(system, ("user", " ".join(f"word{i}" for i in range(300))), ("assistant", "no")),
    ]
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
    data = InstructionDataModule(
        write_rows(tmp_path / "rows.jsonl", rows), validation_fraction=0.0, max_length=4096, tokenizer=pretrained
    )
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=str(tmp_path))
    trainer.probe(SFTModule(architecture=shape), data, page=str(tmp_path / "gate.html"))
    meta, _ = numbers_of(tmp_path / "gate.html")
    browser.look(1400, 1000)
    browser.open((tmp_path / "gate.html").as_uri(), "suspicion")
    text = "[...document.querySelectorAll('.text')].map(t => t.textContent)"
    assert not any("truthfully" in shown or "word150 " in shown for shown in browser.evaluate(text))
    for _ in range(3):
        browser.click(".ctx button")
    assert browser.evaluate("document.querySelectorAll('.ctx button').length") == 0
    assert browser.evaluate(text) == [row[9] for row in meta["rows"]]


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => { canvas.fillStyle = "#000"; canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = colour => { const [r, g, b] = rgb(colour).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = node => { for (; node; node = node.parentElement) { const b = getComputedStyle(node).backgroundColor;
    if (b !== "rgba(0, 0, 0, 0)") return b; } return "#fff"; };
  const found = {};
  const home = document.querySelector(".text");
  for (const name of ["l0", "l1", "l2", "l3", "l4", "c0", "c1", "c2", "c3", "c4"]) {
    const node = document.createElement("span");
    node.className = `t ${name}`; node.textContent = "x"; home.append(node); }
  for (const node of document.querySelectorAll("p, span, b, label, td, th, caption, legend, button, select, header")) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const a = light(getComputedStyle(node).color), b = light(ground(node));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), key = node.tagName + "." + node.className;
    found[key] = Math.min(found[key] ?? 99, ratio);
  }
  return found;
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390], ids=["desktop", "phone"])
def test_page_is_readable(browser: Browser, world: World, dark: bool, width: int) -> None:
    browser.look(width, 900, dark)
    browser.open(world.page.as_uri(), "Keys", "suspicion")
    browser.click("#rows .t")
    ratios = browser.evaluate(CONTRAST)
    assert len(ratios) > 15 and min(ratios.values()) >= 4.5, ratios
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # nothing is beside the screen
    # Without colour: each of the five levels has a border of its own.
    script = "['l0', 'l1', 'l2', 'l3', 'l4'].map(n => { const s = getComputedStyle(document.querySelector('.text .' + n)); return s.borderBottomStyle + s.borderBottomWidth + (s.borderBottomColor === 'rgba(0, 0, 0, 0)') })"  # noqa: E501
    assert len(set(browser.evaluate(script))) == 5


@pytest.mark.slow
def test_two_thousand_rows_open_in_seconds(browser: Browser, many: Path) -> None:
    browser.look(1400, 1000)
    began = time.monotonic()
    browser.open(many.as_uri(), "suspicion")
    assert browser.evaluate("document.documentElement.dataset.ready") == "yes"
    assert time.monotonic() - began < 30
    assert browser.evaluate("document.querySelectorAll('.row').length") < 200  # the others when they are scrolled to
    assert "2,000 of 2,100 rows" in browser.evaluate("document.getElementById('about').textContent")
    browser.click("#more")
