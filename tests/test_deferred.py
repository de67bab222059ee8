"""What a start imports: neither matplotlib nor scipy, which work as before where they are used; garbage after it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import ROOT

from deft_lightning.deferred import StandIn, deferred, no_collection

UNUSED = {"matplotlib", "scipy", "rapidfuzz", "pandas", "sklearn", "math_verify", "bitsandbytes"}
HOME = "from deft_lightning.cli.dispatch import _home, TRAINER; _home(TRAINER)\n"
FIRST_STEP = """
import sys
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, *_):
        print("imported", sorted({name.partition(".")[0] for name in sys.modules}))
"""


def ran(script: str, *words: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "deft_lightning", *words] if not script else ["-c", script]
    environment = None if at is None else {**os.environ, "PYTHONPATH": f"{ROOT}:{at}"}
    done = subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_run_imports_no_package_before_its_first_step_that_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "first_step.py").write_text(FIRST_STEP, encoding="utf-8")
    done = ran(
        "", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", "1", "--after_fit.export", "false",
        "--trainer.default_root_dir", str(tmp_path), "--after_fit.test", "false", "--after_fit.compare", "false",
        "--trainer.callbacks+=first_step.FirstStep", "--trainer.enable_checkpointing", "false", at=tmp_path,
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("imported "))
    imported = set(line.removeprefix("imported ").strip("[]").replace("'", "").split(", "))
    assert {"torch", "lightning", "transformers", "torchmetrics"} <= imported
    assert not imported & UNUSED


@pytest.mark.slow
def test_plots_of_torchmetrics_are_those_of_matplotlib() -> None:
    ran(
        HOME
        + """
import sys
assert not any(name.startswith("matplotlib") for name in sys.modules)
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.utilities.plot import trim_axs
import numpy as np
both = MetricCollection([MeanMetric(), MaxMetric()])
both.update(2.0)
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
assert type(plt).__name__ == type(matplotlib).__name__ == "module"
plt.rcParams["axes.facecolor"] = "red"  # which the style of torchmetrics overrides
figure, axes = both["MeanMetric"].plot()
assert isinstance(axes, Axes) and isinstance(figure, plt.Figure)
assert matplotlib.colors.to_hex(axes.get_facecolor()) == "#ffffff"
both.plot(ax=axes, together=True)
assert trim_axs(axes, 1) is axes
_, several = plt.subplots(2, 2)
assert len(trim_axs(several, 3)) == 3
try:
    both.plot(ax=1, together=True)
except ValueError as error:
    assert "matplotlib axis object" in str(error)
else:
    raise AssertionError("any object passes for an axis")
"""
    )


@pytest.mark.slow
def test_assignments_are_those_of_scipy() -> None:
    pytest.importorskip("scipy")
    ran(
        HOME
        + """
import sys
from deft_lightning.deferred import deferred
with deferred():
    from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert not any(name.startswith("scipy") for name in sys.modules)
rows, columns = linear_sum_assignment([[4.0, 1.0], [1.0, 4.0]])
assert columns.tolist() == [1, 0]
import scipy.optimize
from torchmetrics.functional.audio import permutation_invariant_training as pit, signal_noise_ratio
import torch
value, order = pit(torch.eye(4)[None, :3], torch.eye(4)[None, [2, 0, 1]], signal_noise_ratio)
assert order.tolist() == [[1, 2, 0]] or order.tolist() == [[2, 0, 1]]
"""
    )


def test_a_package_is_whole_whatever_is_imported_of_it_meanwhile() -> None:
    pytest.importorskip("scipy")
    ran(
        """
import sys
from deft_lightning.deferred import StandIn, deferred
with deferred():
    import scipy.signal
    held = scipy
    assert type(scipy) is type(scipy.signal) is StandIn
    import scipy.sparse.linalg  # has no stand-in: the package is imported after all
    assert type(sys.modules["scipy"]) is not StandIn and type(sys.modules["scipy.sparse"]) is not StandIn
    from scipy import fft
import scipy, scipy.signal
assert held is not scipy and held.sparse is scipy.sparse and held.__version__ == scipy.__version__
assert held.signal.windows.hamming is scipy.signal.windows.hamming
assert scipy.sparse.linalg is sys.modules["scipy.sparse.linalg"] and fft is scipy.fft
assert not hasattr(held, "no_such_name")
"""
    )


def test_nothing_is_left_behind_where_an_import_fails() -> None:
    finders, enabled = list(sys.meta_path), gc.isenabled()
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), no_collection(), deferred():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
    assert sys.meta_path == finders and gc.isenabled() is enabled
    assert not any(isinstance(module, StandIn) for module in sys.modules.values())


@pytest.mark.slow
def test_a_process_ends_in_silence() -> None:
    """Libraries in C++ count what is not collected at its end."""
    assert ran("", "fit", "--help").stderr == ""
    script = HOME + "import gc; assert gc.isenabled() and gc.get_freeze_count() > 100_000; import triton"
    assert ran(script).stderr == ""
