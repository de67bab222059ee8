"""Private names of Lightning: each is pinned against the installed version, and used in one file alone."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

PACKAGE = Path(__file__).resolve().parents[1] / "deft_lightning"
HOME = PACKAGE / "_lightning.py"
CLI = PACKAGE / "cli" / "main.py"


@cache
def trainer() -> Any:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# Name, what it is looked up on, what it has to be, and what breaks without it.
ATTRIBUTES: dict[str, tuple[Callable[[], Any], Callable[[Any], bool], str]] = {
    "_logger_connector": (
        trainer, lambda found: isinstance(found.should_update_logs, bool), "monitors and train/ tags look every step",
    ),
    "_batches_that_stepped": (
        lambda: trainer().fit_loop.epoch_loop, lambda found: found == 0, "histograms stand beside the wrong steps",
    ),
    "_trainer": (
        LightningModule, lambda found: found is None, "a module without a trainer raises where it is only asked for it",
    ),
    "_data_connector": (
        trainer, lambda found: arguments(found.attach_data)[0] == "model" and "datamodule" in arguments(
            found.attach_data), "probe and preview cannot attach their data",
    ),
    "_lightning_module": (
        lambda: trainer().strategy, lambda found: found is None, "preview and resume do not know the module",
    ),
    "_checkpoint_connector": (
        trainer, lambda found: type(found) is _CheckpointConnector, "resume says nothing and refuses nothing",
    ),
    "_ckpt_path": (
        lambda: _CheckpointConnector(trainer()), lambda found: found is None, "messages of resume name no file",
    ),
    "_loaded_checkpoint": (
        lambda: _CheckpointConnector(trainer()), lambda found: found == {}, "resume compares nothing",
    ),
    "_data_fetcher": (
        lambda: trainer().fit_loop, lambda found: found is None, "nobody knows whether a validation follows a batch",
    ),
    "_last_checkpoint_saved": (
        ModelCheckpoint, lambda found: found == "", "last.ckpt links to a file that somebody has removed",
    ),
    "_save_distributed_checkpoint": (
        ModelParallelStrategy, lambda found: found is True, "fsdp2 saves one file where a folder is asked for",
    ),
    "_data_parallel_size": (
        ModelParallelStrategy, lambda found: found == "auto", "fsdp2 shards nothing",
    ),
    "_device": (
        LightningModule, lambda found: found == torch.device("cpu"), "sums stay in host memory where weights do",
    ),
    "_optimizer": (
        lambda: LightningOptimizer(torch.optim.SGD([torch.zeros(1)])),
        lambda found: isinstance(found, torch.optim.SGD), "a checkpoint names the wrapper as its optimizer",
    ),
}  # fmt: skip
METHODS: dict[str, tuple[type | Callable[[], Any], list[str], str]] = {
    "_should_accumulate": (lambda: trainer().fit_loop, [], "steps and micro-batches are told apart no more"),
    "_should_check_val_fx": (
        _TrainingEpochLoop, ["data_fetcher"], "there is no validation after the last step",
    ),
    "_num_ready_batches_reached": (_TrainingEpochLoop, [], "nor after the last epoch"),
    "_load_combined_loader_states": (
        lambda: trainer().fit_loop, [], "a run whose schedule is planned over epochs begins its epoch again if resumed",
    ),
    "_select_ckpt_path": (
        _CheckpointConnector, ["state_fn", "ckpt_path", "model_provided", "model_connected"],
        "--ckpt_path last means this run's own, and nothing is refused before data is prepared",
    ),
    "_should_skip_saving_checkpoint": (ModelCheckpoint, ["trainer"], "the last step is saved twice or never"),
    "_monitor_candidates": (ModelCheckpoint, ["trainer"], "the last step is not saved"),
    "_save_topk_checkpoint": (ModelCheckpoint, ["trainer", "monitor_candidates"], "the last step is not saved"),
    "_save_last_checkpoint": (ModelCheckpoint, ["trainer", "monitor_candidates"], "last.ckpt may lead nowhere"),
    "_parse_ckpt_path": (LightningCLI, [], "settings of a checkpoint override the command line"),
    "_prepare_subcommand_parser": (LightningCLI, ["klass", "subcommand", "kwargs"], "usage fills the screen"),
    "_prepare_subcommand_kwargs": (LightningCLI, ["subcommand"], "--ckpt_path last is not found by the verbs"),
    "_run_subcommand": (LightningCLI, ["subcommand"], "Lightning's complaints come as tracebacks"),
    "_get": (LightningCLI, ["config", "key", "default"], "the command line cannot read what was parsed"),
    "_parser": (LightningCLI, ["subcommand"], "switched-off callbacks are built"),
}  # fmt: skip
OF_THE_COMMAND_LINE = {
    "_get", "_parse_ckpt_path", "_parser", "_prepare_subcommand_kwargs", "_prepare_subcommand_parser",
    "_run_subcommand",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_what_it_was(name: str) -> None:
    owner, right, broken = ATTRIBUTES[name]
    found = owner()
    assert hasattr(found, name), f"{type(found).__name__}.{name} is gone: {broken}"
    assert right(getattr(found, name)), f"{type(found).__name__}.{name} is another thing: {broken}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_took(name: str) -> None:
    owner, wanted, broken = METHODS[name]
    found = owner if isinstance(owner, type) else owner()
    assert callable(getattr(found, name, None)), f"{name} is gone: {broken}"
    assert arguments(getattr(found, name)) == wanted, f"{name} takes other arguments: {broken}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def of_lightning() -> frozenset[str]:
    """Private names that Lightning's classes and modules have."""
    names: set[str] = set()
    root = Path(lightning.__file__).parent
    for file in [*(root / "pytorch").rglob("*.py"), *(root / "fabric").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return frozenset(filter(private, names))


def uses(tree: ast.AST) -> set[str]:
    """Private names of Lightning that code reads, sets, imports or overrides.

    What a class defines itself and reads of ``self`` is its own, whoever else has that name.
    """
    found: set[str] = set()
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in of_lightning():
            itself = isinstance(node.value, ast.Name) and node.value.id == "self"
            found |= set() if itself and node.attr in own else {node.attr}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            found |= {alias.name for alias in node.names if private(alias.name)}
    return found


def overridden(tree: ast.AST) -> set[str]:
    """Private methods of Lightning that a class with one of its bases overrides."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning"
        for alias in node.names
    }
    return {
        part.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & imported
        for part in node.body
        if isinstance(part, ast.FunctionDef) and part.name in of_lightning()
    }


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file_touches_them(path: Path) -> None:
    if path == HOME:
        return
    touched = uses(parsed(path)) | overridden(parsed(path))
    allowed = OF_THE_COMMAND_LINE if path == CLI else set()
    assert touched <= allowed, (
        f"{sorted(touched - allowed)}: put them behind a function of deft_lightning/_lightning.py"
    )


def test_every_name_that_is_used_is_pinned() -> None:
    used = uses(parsed(HOME)) | overridden(parsed(HOME)) | uses(parsed(CLI)) | overridden(parsed(CLI))
    assert used - {"_CheckpointConnector", "_TrainingEpochLoop"} <= ATTRIBUTES.keys() | METHODS.keys()
    assert OF_THE_COMMAND_LINE == uses(parsed(CLI)) | overridden(parsed(CLI))


@pytest.mark.parametrize(
    "code",
    [
        "trainer.fit_loop._should_accumulate()",
        "self.trainer._logger_connector",
        "trainer.strategy._lightning_module = module",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "from lightning.pytorch import Trainer\nclass Mine(Trainer):\n    def _run_stage(self): pass",
    ],
)
def test_a_use_elsewhere_would_be_seen(code: str) -> None:
    tree = ast.parse(code)
    assert uses(tree) | overridden(tree)
