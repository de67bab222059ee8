"""TensorBoard as a dashboard: what is in the event files, and what a browser draws of it."""

from __future__ import annotations

import csv
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pytest
import torch
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from worlds import constant, read_events, write_rows

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning._lightning import logged_step
from deft_lightning.callbacks import Dashboard, EntropyMonitor, GateMonitor, NoiseMonitor, dashboard
from deft_lightning.callbacks.marked import code_span, marked
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.objectives import DEFT, NLL, Likelihood, Objective, Rescaled, Schedule

pytestmark = pytest.mark.slow

NASTY = "a `tick` <script>x</script> **b** | c\nd \\"


def fit(
    folder: Path,
    dashboard: Dashboard,
    objective: Objective | None = None,
    *,
    noise: bool = True,
    extra: Sequence[Any] = (),
    **options: Any,
) -> Trainer:
    """Nine logged steps with a validation after every third."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"r{i}", "question": f"q{i}", "answer": f"{NASTY} {i}"} for i in range(24)]
    source = write_rows(folder / "train.jsonl", rows)
    data = InstructionDataModule(
        source, batch_size=2, validation_fraction=0.25, tokenizer_size=0,
        noise=Noise(ops=[TokenReplace(rate=0.3)] if noise else []),
    )  # fmt: skip
    torch.manual_seed(0)
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "initializer_range": 0.3}  # fmt: skip
    module = SFTModule(
        objective or DEFT(), architecture=shape,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        scheduler=constant,
    )  # fmt: skip
    callbacks = [GateMonitor(others=[NLL(), Likelihood()]), EntropyMonitor(), NoiseMonitor(), dashboard, *extra]
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=9, log_every_n_steps=1, val_check_interval=3, gradient_clip_val=None,
        check_val_every_n_epoch=None, callbacks=callbacks, default_root_dir=str(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(str(fit(tmp_path_factory.mktemp("dashboard"), Dashboard()).log_dir))


def layout(found: EventAccumulator) -> layout_pb2.Layout:
    (event,) = found.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def charts_of(found: layout_pb2.Layout) -> dict[str, list[str]]:
    """Patterns of tags by chart."""
    return {
        f"{category.title}: {chart.title}": [
            *chart.multiline.tag, *(tag for s in chart.margin.series for tag in (s.value, s.lower, s.upper)),
        ]
        for category in found.category for chart in category.chart
    }  # fmt: skip


# --- the layout -----------------------------------------------------------------------------------------------------


def test_every_chart_of_the_layout_finds_its_lines_in_the_run(run: Path) -> None:
    found = read_events(run)
    charts = charts_of(layout(found))
    assert len(charts) == 16
    for title, patterns in charts.items():
        for pattern in patterns:
            # TensorBoard matches from the start of a tag.
            tags = [tag for tag in found.Tags()["scalars"] if re.match(pattern, tag)]
            assert len(tags) == 1, (title, pattern, tags)


def test_the_margin_is_a_line_between_two_others(run: Path) -> None:
    found = read_events(run)
    (series,) = (s for c in layout(found).category for chart in c.chart for s in chart.margin.series)
    value, lower, upper = ([e.value for e in found.Scalars(t)] for t in (series.value, series.lower, series.upper))
    assert len(value) == 9
    assert all(a < b < c for a, b, c in zip(lower, value, upper, strict=True))


def test_without_noise_or_focus_there_are_no_charts_of_them(tmp_path: Path) -> None:
    from deft_lightning.objectives import DFT

    found = read_events(fit(tmp_path, Dashboard(), DFT(), noise=False).log_dir)
    titles = " ".join(charts_of(layout(found)))
    assert "Mean p" in titles and "Losses" in titles and "ocus" not in titles
    assert "noisy" not in titles.lower() and "Noise rate" in titles
    (rates,) = (lines for title, lines in charts_of(layout(found)).items() if "Noise rate" in title)
    assert rates == ["noise/estimated$", "noise/estimated_tokens$"], "what is true is not known"


def test_the_scale_has_a_chart_where_there_is_one(tmp_path: Path) -> None:
    found = read_events(fit(tmp_path, Dashboard(), Rescaled(), noise=False).log_dir)
    (pattern,) = next(tags for title, tags in charts_of(layout(found)).items() if "Scale" in title)
    assert [tag for tag in found.Tags()["scalars"] if re.match(pattern, tag)] == ["objective/scale"]


# --- figures and examples -------------------------------------------------------------------------------------------


def test_figures_are_drawn_at_the_start_and_ever_less_often(run: Path) -> None:
    found = read_events(run)
    assert {tag: [image.step for image in found.Images(tag)] for tag in found.Tags()["images"]} == {
        "objective/gate": [0], "occupancy/p_alpha": [0, 1, 3, 7],
    }  # fmt: skip


def test_the_curve_is_drawn_again_when_a_schedule_has_moved_on(tmp_path: Path) -> None:
    """Nine steps, validations after the third, sixth and ninth, whose objectives have progress 2/9, 5/9 and 8/9."""
    found = read_events(fit(tmp_path, Dashboard(), Schedule(switch=0.5)).log_dir)
    assert [image.step for image in found.Images("objective/gate")] == [0, 5]
    (tmp_path / "still").mkdir()
    found = read_events(fit(tmp_path / "still", Dashboard(), Rescaled()).log_dir)
    assert [image.step for image in found.Images("objective/gate")] == [0]


class Codes(HTMLParser):
    """Text of the code spans, tags that are there, and codes in bold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.codes: list[str] = []
        self.bold: list[bool] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(markdown.markdown(text, extensions=["tables", "fenced_code"]))
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "code":
            self.codes.append("")
            self.bold.append("strong" in self.open)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag or tag == "hr"

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if "code" in self.open:
            self.codes[-1] += data


def test_examples_are_the_labels_of_the_validation_set_and_stay_the_same(run: Path) -> None:
    found = read_events(run)
    for name in ("examples/val", "examples/val_noisy"):
        written = found.Tensors(f"{name}/text_summary")
        assert len(written) == 3 and len({event.step for event in written}) == 3
        texts = [event.tensor_proto.string_val[0].decode() for event in written]
        pages = [Codes(text) for text in texts]
        assert len(set(texts)) == 3, "the gates move"
        assert len({"".join(page.codes).replace("␣", " ") for page in pages}) == 1, "the tokens do not"
        assert any(pages[0].bold) == (name == "examples/val_noisy")
        assert set(pages[0].tags) <= {"p", "code", "strong", "hr"}
    whole = "".join(Codes(found.Tensors("examples/val/text_summary")[0].tensor_proto.string_val[0].decode()).codes)
    expected = re.escape(NASTY.replace("\n", "↵"))
    # Three are asked for, a batch has two; the names stand before the tokens.
    assert len(re.findall(rf"r\d+{expected} \d+<\|end\|>", whole.replace("␣", " "))) == 2


def test_training_rows_are_shown_with_the_gate_they_trained_with(tmp_path: Path) -> None:
    """Two micro-batches of two rows a step: the first of them, on the first, second, fourth and eighth logged step."""
    seen: dict[int, list[str]] = {}

    class Watch(GateMonitor):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            gate = module.current_objective.gate(outputs["stats"])
            rows = gate.split((batch["labels"][:, 1:] != -100).sum(1).tolist())
            named = zip(batch["example_id"], rows, strict=True)
            texts = [f"`{name}`: {len(row)} tokens, mean gate {row.mean():.2f}" for name, row in named]
            seen.setdefault(logged_step(trainer), texts)

    found = read_events(fit(tmp_path, Dashboard(examples=2), accumulate_grad_batches=2, extra=[Watch()]).log_dir)
    written = found.Tensors("examples/train/text_summary")
    assert [event.step for event in written] == [0, 1, 3, 7]
    for event in written:
        text = event.tensor_proto.string_val[0].decode()
        assert all(row in text for row in seen[event.step]), (event.step, seen[event.step], text)
    assert len({tuple(rows) for rows in seen.values()}) > 4
    assert "**" in "".join(event.tensor_proto.string_val[0].decode() for event in written)  # corrupted labels are bold


class Letters:
    """A tokenizer whose tokens are letters."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_runs_of_tokens_stand_behind_the_mean_of_their_gates() -> None:
    labels = torch.full((3, 7), -100)
    labels[0, 1:] = torch.tensor([ord(c) for c in "abcdef"])
    labels[1, 3:] = torch.tensor([ord(c) for c in "wxyz"])
    codes = torch.zeros_like(labels)
    codes[0, 5:] = 1
    gate = torch.tensor([0.0, 0.04, 0.3, 0.95, 0.91, 0.99, 0.6, 0.7, 0.8, 0.2])
    batch = {"labels": labels, "noise_code": codes, "example_id": ["one", "two", "three"]}
    text = marked(Letters(), batch, gate, 3, 3)
    assert "█ 0.02 `ab` ▓ 0.30 `c` … 3 more" in text and "`one`: 6 tokens, mean gate 0.53" in text
    assert "▒ 0.70 `wxy` … 1 more" in text and "`three`: 0 tokens" in text
    assert "░ 0.95 `d` ░ 0.95 **`ef`**" in marked(Letters(), batch, gate, 1, 99)
    assert "`two`" not in marked(Letters(), batch, gate, 1, 99)


@given(st.text(alphabet="`*_<>&|\\ \n\r\tab#-[]()!\u2028é", max_size=12))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_no_text_is_markup(text: str) -> None:
    page = Codes(f"before {code_span(text)} after **{code_span(text)}**")
    assert len(page.codes) == 2 and set(page.tags) <= {"p", "code", "strong"}, page.tags
    flat = re.sub(r"\r\n|[\n\r\u2028]", "↵", text)
    # Markdown turns tabs into blanks, and leaves out those at the ends.
    assert page.codes[0].replace("␣", " ").split() == flat.split()
    assert page.codes[0].count("␣") == len(flat) - len(flat.strip(" ")) or "\t" in text


def test_everything_can_be_turned_off(tmp_path: Path) -> None:
    tags = read_events(fit(tmp_path, Dashboard(layout=False, curve=False, examples=0)).log_dir).Tags()
    assert tags["images"] == ["occupancy/p_alpha"] and "gate/mean" in tags["scalars"]
    assert not [tag for tag in tags["tensors"] if "custom" in tag or "examples" in tag]


def test_without_matplotlib_everything_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    tags = read_events(fit(tmp_path, Dashboard()).log_dir).Tags()
    assert tags["images"] == ["occupancy/p_alpha"] and {"custom_scalars__config__", "examples/val/text_summary"} <= set(
        tags["tensors"]
    )


# --- other loggers --------------------------------------------------------------------------------------------------


def test_a_csv_logger_gets_the_same_numbers(run: Path, tmp_path: Path) -> None:
    trainer = fit(tmp_path, Dashboard(), logger=CSVLogger(str(tmp_path), name="csv"))
    with (Path(str(trainer.loggers[0].log_dir)) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert not list(tmp_path.rglob("events.out*"))
    found = read_events(run)
    for tag in (
        "gate/mean",
        "gate/q50",
        "gradient/p0_10",
        "counterfactual/Likelihood/gate",
        "noise/memorised",
        "noise/recovered",
        "val/nll",
    ):
        values = [float(row[tag]) for row in rows if row.get(tag)]
        assert values == pytest.approx([event.value for event in found.Scalars(tag)], rel=1e-5), tag


def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Dashboard(), logger=False)
    assert trainer.global_step == 9 and [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


# --- a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(run: Path) -> Iterator[str]:
    """Address of a TensorBoard that shows the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--load_fast", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while time.monotonic() < end and server.poll() is None:
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout", timeout=5) as answer:
                    if b"Focus" in answer.read():
                        break
            except OSError:
                pass
            time.sleep(0.3)
        yield address
    finally:
        server.kill()
        server.wait()


def orange(path: Path) -> int:
    """Pixels of that colour below TensorBoard's bar and beside its settings."""
    red, green, blue = np.moveaxis(imread(path)[150:, 400:, :3], -1, 0)
    return int(((red > 0.8) & (green < 0.7) & (blue < 0.6)).sum())


def test_a_browser_draws_the_dashboard(served: str, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        lines = ["focus/mean", "prob/mean", "gate/ess", "gate/q50", "gradient/p90_100", "gate/clean", "gate/noisy"]
        titles = ["Focus curves: mean alpha, mean p", "Clean against noisy labels", "Losses"]
        # A chart says "Matches (0)" until its numbers have come.
        text = browser.open(f"{served}/#custom_scalars", *lines, *titles, gone="Matches (0)")
        assert [word for word in (*lines, *titles) if word not in text] == []
        assert "Matches (0)" not in text and "Matches (2)" in text
        # Lines and bands have the orange of the run. Icons are blue, so a page without lines has next to none of it.
        end = time.monotonic() + 20
        while (seen := orange(browser.screenshot(tmp_path / "custom.png"))) < 1500 and time.monotonic() < end:
            time.sleep(0.3)
        assert seen >= 1500

        text = browser.open(f"{served}/?text#text", "examples/val_noisy", "darker", "gate 0")
        assert "<script>x</script>" in text and "examples/val" in text

        images = browser.open(f"{served}/?images#images", "objective/gate", "occupancy/p_alpha")
        assert "objective/gate" in images and "occupancy/p_alpha" in images
        text = browser.open(f"{served}/?series#timeseries", "counterfactual/Likelihood", "/hist")
        assert "/hist" in text
        assert np.ptp(imread(browser.screenshot(tmp_path / "series.png"))[..., :3]) > 0.9
