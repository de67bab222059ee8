"""The wheel is enough: installed in an environment of its own, README's first command runs in an empty folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from worlds import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None, reason="a wheel is built by hatchling (pip install -e '.[test]')"
    ),
]

SHORT = [
    "--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1",
    "--trainer.limit_test_batches", "1", "--data.batch_size", "4",
]  # fmt: skip
Installed = Callable[..., subprocess.CompletedProcess[str]]


def pip(*words: str) -> None:
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("deft_lightning-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Runs a script of an environment that has the wheel; other packages are those of the tests' environment."""
    folder, home = tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (own,) = (folder / "lib").glob("python*/site-packages")
    # As a path alone: what is installed there as editable, this tree among it, is not followed.
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        line = [str(folder / "bin" / script), *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=home, env=clean, timeout=500)

    where = call("python", "-c", "import deft_lightning; print(deft_lightning.__file__, end='')").stdout
    assert Path(where).parent == own / "deft_lightning", where
    return call


def test_it_has_every_configuration_once_and_nothing_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("deft_lightning/") for name in names if name.startswith("deft_lightning/configs/")}
    assert {name for name in inside if name.endswith(".yaml")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")
    }
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deft_lightning" / "pretrained").rglob("*.*")}
    assert models and models <= set(names)
    assert len(names) == len(set(names)) and not any("__pycache__" in name for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"deft_lightning"}


def test_an_editable_install_points_at_the_tree(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=120)
    (built,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(built)
    plain = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert [name[-4:] for name in plain] == [".pth"]  # no copy of a configuration that would grow old
    assert Path(archive.read(plain[0]).decode().strip()) == ROOT


def test_the_readmes_first_command_runs_in_an_empty_folder(installed: Installed) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.findall(r"`python -m deft_lightning (fit --config deft:quickstart)`", readme)[0]
    done = installed("python", "-m", "deft_lightning", *command.split(), *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test/exact_match: 1.000 before training" in done.stdout
    assert "fit --config deft:quickstart" in done.stdout and "--model.objective NLL" in done.stdout
    listing = "import os; print(os.listdir('.'), sorted(os.listdir('logs/version_0')))"
    seen = installed("python", "-c", listing).stdout
    assert seen.startswith("['logs'] ") and all(name in seen for name in ("checkpoints", "export", "config.yaml"))
    again = installed("deft-lightning", "export", "--ckpt_path", "last", "--output", "folder")
    assert again.returncode == 0, again.stderr[-2000:]


def test_its_script_knows_the_configurations(installed: Installed) -> None:
    done = installed("deft-lightning", "fit", "--config", "deft:model/lroa")
    assert done.returncode == 2 and "Did you mean deft:model/lora" in done.stderr
    assert "deft:quickstart" in installed("deft-lightning", "--print_completion").stdout


def test_data_of_the_package_are_in_it(installed: Installed) -> None:
    code = "from deft_lightning.probe.page import document; print(document.__file__)"
    done = installed("python", "-c", code)
    page = Path(done.stdout.strip()).parent / "web"
    assert {path.name for path in page.iterdir()} == {
        path.name for path in (ROOT / "deft_lightning" / "probe" / "page" / "web").iterdir()
    }


def needed_by(name: str) -> set[str]:
    """Return the distributions that one needs on this machine, itself included."""
    found, todo = set[str](), [name]
    while todo:
        one = canonicalize_name(todo.pop())
        if one in found:
            continue
        found.add(one)
        wanted = map(Requirement, importlib.metadata.requires(one) or [])
        todo += [want.name for want in wanted if want.marker is None or want.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: torch, what it needs, and the wheel without what that needs."""
    folder = tmp_path_factory.mktemp("alone")
    for name in needed_by("torch"):
        for top in {Path(file).parts[0] for file in importlib.metadata.files(name) or []}:
            own = Path(sysconfig.get_path("purelib")) / top
            if top not in ("..", "__pycache__") and own.exists() and not (folder / top).exists():
                (folder / top).symlink_to(own)
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


ALONE = """
import importlib.util
import torch
from deft_lightning.functional import token_loss
from deft_lightning.integrations import compute_loss_func
from deft_lightning.objectives import DEFT, Floored
from deft_lightning.ops import linear_loss

others = ("lightning", "transformers", "datasets", "peft", "numpy")
assert not [name for name in others if importlib.util.find_spec(name)]
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
labels = torch.tensor([3, 1, -100, 7, 0, 31])
fused, _ = linear_loss(hidden, weight, labels, DEFT())
logits = (hidden @ weight.T).detach().requires_grad_()
dense = token_loss(logits, labels, DEFT()).sum()
torch.testing.assert_close(fused, dense)

class Outputs(dict):
    logits = logits.detach()[None].requires_grad_()

loss = compute_loss_func(Floored(base=DEFT(), floor=0.3))(Outputs(logits=Outputs.logits), labels[None])
loss.backward()
print("all of it ran")
"""


def test_objectives_functions_and_losses_for_other_trainers_need_torch_alone(torch_alone: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment["PYTHONPATH"] = str(torch_alone)
    call = [sys.executable, "-S", "-c", ALONE]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120, cwd=torch_alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "all of it ran"


def test_training_without_its_packages_ends_in_one_line(torch_alone: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment["PYTHONPATH"] = str(torch_alone)
    call = [sys.executable, "-S", "-m", "deft_lightning", "fit", "--config", "deft:quickstart"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120, cwd=torch_alone)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert "pip install deft-lightning" in done.stderr
