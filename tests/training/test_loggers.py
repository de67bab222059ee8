"""One run in every logger that is installed: settings, curves and what is no number, read back from their files."""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from worlds import ROOT, read_events, split_data, sums, write_rows

from deft_lightning import SFTModule, Trainer
from deft_lightning.callbacks.sinks import Sink, sink_of
from deft_lightning.training.logs import lasting
from deft_lightning.training.trackio_logger import TrackioLogger

pytestmark = pytest.mark.slow

EXTRA = [name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is not None]
RUN = """
import json, sys
from pathlib import Path
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from worlds import SHAPE, split_data
from deft_lightning import SFTModule, Trainer
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.training.trackio_logger import TrackioLogger

class Numbers(Logger):
    name, version = "numbers", 0
    def __init__(self, file):
        super().__init__()
        self.file = file
    def write(self, kind, value, step=None):
        with open(self.file, "a") as file:
            file.write(json.dumps([kind, value, step], default=str) + "\\n")
    def log_metrics(self, metrics, step=None):
        self.write("metrics", metrics, step)
    def log_hyperparams(self, params, *args, **kwargs):
        self.write("settings", dict(params))

root, extra = Path(sys.argv[1]), sys.argv[2:]
loggers = [TensorBoardLogger(str(root / "tb"), default_hp_metric=False), CSVLogger(str(root / "csv")),
           Numbers(str(root / "numbers.jsonl"))]
if "wandb" in extra:
    loggers.append(WandbLogger(save_dir=str(root), offline=True, project="deft"))
if "mlflow" in extra:
    loggers.append(MLFlowLogger(tracking_uri=f"file:{root / 'ml'}"))
if "trackio" in extra:
    loggers.append(TrackioLogger("deft", run_name="one"))
data = split_data(str(root / "rows.jsonl"), noise=Noise(ops=[TokenReplace(rates=[0.5])]))
module = SFTModule(architecture={"model_type": "llama", **SHAPE})
trainer = Trainer(accelerator="cpu", devices=1, logger=loggers, max_steps=3, log_every_n_steps=1,
                  default_root_dir=str(root / "runs"), enable_progress_bar=True)
trainer.fit(module, data)
"""


class Ran(NamedTuple):
    """A run that is over.

    Attributes:
        root: What it wrote.
        told: What it said.
        nll: Its validations, as the plainest logger of all was given them.
    """

    root: Path
    told: str
    nll: list[float]

    @property
    def numbers(self) -> list[list[Any]]:
        return [json.loads(line) for line in (self.root / "numbers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("loggers")
    write_rows(root / "rows.jsonl", sums(24))
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TRACKIO_DIR": str(root / "trackio"),
        "WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true", "PL_GLOBAL_SEED": "7",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root), *EXTRA], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (root / "numbers.jsonl").read_text().splitlines()]
    nll = [value["val/nll"] for kind, value, _ in lines if kind == "metrics" and "val/nll" in value]
    assert len(nll) == 2 and all(map(math.isfinite, nll))
    return Ran(root, done.stdout + done.stderr, nll)


def needs(name: str) -> None:
    if name not in EXTRA:
        pytest.skip(f"{name} is not installed; Numbers, a logger of this file, is given the same")


def check_settings(settings: dict[str, Any]) -> None:
    """Look at nested settings, or at some whose names are joined."""

    def at(*names: str) -> Any:
        value: Any = settings
        for name in names:
            if "/".join(names) in settings:
                return settings["/".join(names)]
            value = value[name]
        return value

    assert at("objective") == "DEFT()" and float(at("optimizer", "lr")) == 5e-5
    assert "TokenReplace(" in at("data", "noise") and int(at("data", "batch_size")) == 4
    assert str(at("data", "source")).endswith("rows.jsonl")
    assert int(at("trainer", "max_steps")) == 3 and int(at("seed_everything")) == 7


def test_any_logger_is_given_settings_and_numbers(ran: Ran) -> None:
    settings: dict[str, Any] = {}
    for kind, value, _ in ran.numbers:
        settings |= value if kind == "settings" else {}
    check_settings(settings)
    tags = {tag for kind, value, _ in ran.numbers if kind == "metrics" for tag in value}
    assert {"train/nll", "gate/mean", "noise/estimated", "val/nll"} <= tags and "gate/hist" not in tags
    assert "Numbers takes no histograms or figures or texts: they are left out of it (--trainer.logger)" in ran.told


def groups(folder: Path) -> tuple[dict[str, Any], dict[str, float], int]:
    """What TensorBoard's own page of HParams has: settings, figures and the state of the one run in a folder."""
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))  # type: ignore[no-untyped-call]
    asked = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(RequestContext(), context, "", asked).run()  # type: ignore[no-untyped-call]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3])
    for info in experiment.metric_infos:
        request.col_params.add(metric=info.name)
    found = list_session_groups.Handler(RequestContext(), context, "", request).run()  # type: ignore[no-untyped-call]
    (group,) = found.session_groups
    settings = {name: value.string_value or value.number_value for name, value in group.hparams.items()}
    return settings, {one.name.tag: one.value for one in group.metric_values}, group.sessions[0].status


def test_tensorboards_hparams_page_compares_runs_by_what_they_led_to(ran: Ran) -> None:
    settings, figures, status = groups(ran.root / "tb")
    assert settings["objective"] == "DEFT()" and settings["lr"] == 5e-5 and settings["batch"] == 4
    assert settings["noise"].startswith("TokenReplace(") and settings["data"] == "rows.jsonl"
    assert settings["model"] == "llama" and settings["seed"] == "7"
    assert figures["val/nll"] == pytest.approx(ran.nll[-1]) and figures["val/nll"] != pytest.approx(ran.nll[0])
    assert 0 < figures["noise/estimated"] <= 1 and status == api_pb2.STATUS_SUCCESS
    (folder,) = (ran.root / "tb").rglob("hparams.yaml")
    check_settings(yaml.safe_load(folder.read_text()))
    # No figure of its own is written for the page: the first `val/nll` is that before training.
    assert [point.value for point in read_events(folder.parent).Scalars("val/nll")] == pytest.approx(ran.nll)
    assert f"look at it: tensorboard --logdir {folder.parent}" in ran.told


def test_a_tensorboard_logger_with_lightnings_defaults_has_the_same_page(tmp_path: Path, pretrained: str) -> None:
    logger = TensorBoardLogger(str(tmp_path / "tb"))  # which would have a column `hp_metric` of -1 alone
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=logger, max_steps=1, log_every_n_steps=1, enable_progress_bar=False,
        default_root_dir=str(tmp_path), enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(SFTModule(pretrained=pretrained), split_data(write_rows(tmp_path / "rows.jsonl", sums(12))))
    settings, figures, _ = groups(tmp_path / "tb")
    assert settings["objective"] == "DEFT()" and settings["noise"] == "none" and figures["val/nll"] > 0
    assert settings["model"] == Path(pretrained).name


def test_csv(ran: Ran) -> None:
    (table,) = (ran.root / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    assert [float(row["val/nll"]) for row in rows if row["val/nll"]] == pytest.approx(ran.nll)
    check_settings(yaml.safe_load((table.parent / "hparams.yaml").read_text()))
    assert "CSVLogger takes no histograms or figures or texts: they are left out of it (--trainer.logger)" in ran.told
    assert f"look at it: {table}" in ran.told


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a file of W&B: blocks of 32 KiB, and in them pieces with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb(ran: Ran) -> None:
    needs("wandb")
    (file,) = (ran.root / "wandb").glob("offline-run-*/run-*.wandb")
    settings: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        elif record.WhichOneof("record_type") == "history":
            named = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history.append({name: json.loads(value) for name, value in named.items()})
    check_settings(settings)
    assert [row["val/nll"] for row in history if "val/nll" in row] == pytest.approx(ran.nll)
    values = [row["gate/hist/values"] for row in history if "gate/hist/values" in row]
    bins = [row["gate/hist/bins"] for row in history if "gate/hist/bins" in row]
    logged = read_events(next((ran.root / "tb").rglob("events*")).parent).Histograms("gate/hist")
    assert len(values) == len(logged) == 3 and all(len(one) == 51 and one[0] == 0 for one in bins)
    for own, theirs in zip(values, logged, strict=True):
        assert sum(own) == theirs.histogram_value.num and own == list(theirs.histogram_value.bucket)
    pictures = {path.name.partition("_")[0] for path in (file.parent / "files" / "media" / "images").rglob("*.png")}
    assert {"gate", "p"} <= pictures
    pages = list((file.parent / "files" / "media" / "html").rglob("*.html"))
    assert any("that is" in page.read_text() for page in pages)
    assert f"look at it: wandb sync {file.parent}" in ran.told


def test_mlflow(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{ran.root / 'ml'}")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    check_settings(run.data.params)
    points = client.get_metric_history(run.info.run_id, "val/nll")
    assert [point.value for point in points] == pytest.approx(ran.nll)
    folder = next((ran.root / "ml").rglob("artifacts"))
    assert any(path.name.startswith("occupancy~p_alpha") for path in (folder / "images").glob("*.png"))
    assert "that is" in next((folder / "examples" / "val").glob("*.md")).read_text(encoding="utf-8")
    assert "MLFlowLogger takes no histograms: they are left out of it (--trainer.logger)" in ran.told
    assert f"look at it: mlflow ui --backend-store-uri file:{ran.root / 'ml'}" in ran.told


def test_trackio(ran: Ran) -> None:
    needs("trackio")
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps([S.get_runs('deft'), S.get_run_config('deft', 'one'), S.get_logs('deft', 'one')]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(ran.root / "trackio")}  # which it reads at its import
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    names, settings, logs = json.loads(done.stdout.splitlines()[-1])
    assert names == ["one"]
    check_settings(settings)
    assert [row["val/nll"] for row in logs if "val/nll" in row] == pytest.approx(ran.nll)
    hist = [row["gate/hist"] for row in logs if "gate/hist" in row]
    assert len(hist) == 3 and all(len(one["bins"]) == 51 and sum(one["values"]) > 0 for one in hist)
    texts = [row["examples/val"] for row in logs if "examples/val" in row]
    assert any("that is" in one["_value"] for one in texts)
    picture = next(row["objective/gate"] for row in logs if "objective/gate" in row)["file_path"]
    found = list((ran.root / "trackio").rglob(Path(picture).name))
    assert found and found[0].read_bytes().startswith(base64.b64decode("iVBORw=="))
    assert "look at it: trackio show --project deft" in ran.told


def test_a_logger_may_bring_a_sink_of_its_own() -> None:
    class Mine(CSVLogger):
        @property
        def sink(self) -> Sink:
            return Own(self)

    class Own(Sink):
        kinds = ("texts",)

    logger: Logger = lasting(Mine("."))
    assert isinstance(sink_of(logger), Own) and sink_of(logger).kinds == ("texts",)


@pytest.mark.skipif("trackio" in EXTRA, reason="it is installed")
def test_a_logger_that_is_not_installed_is_named() -> None:
    with pytest.raises(Exception, match="pip install trackio"):
        TrackioLogger()
