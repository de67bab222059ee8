"""Keep the suite on one thread: numbers that repeat, and no fight over small machines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Prepared data of this run alone: what an older version of the code prepared must not hide what this one does.
_cache = tempfile.TemporaryDirectory(prefix="deft_lightning-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DEFT_LIGHTNING_CACHE"] = _cache.name

import torch  # noqa: E402 - threads are counted at its import
from worlds import save_tiny_llama, sums, write_rows  # noqa: E402

torch.set_num_threads(1)

# What Lightning sets for ranks in this process; what starts ranks later would inherit it, and a port that is taken.
OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "RANK", "LOCAL_RANK")
# Files that take a minute or more, longest first. They begin, so that no worker has one alone at the end.
LONG = (
    "study/test_study.py", "models/test_fused_bodies.py", "training/test_ranks.py", "ops/test_triton.py",
    "cli/test_cli.py", "probe/test_probe.py", "data/noise/test_noise_ops.py", "configs/test_paper_configs.py",
    "callbacks/test_stop.py", "training/test_checkpoints.py", "evaluation/test_adversarial.py", "test_saved.py",
    "evaluation/test_grader_bounds.py", "data/loading/test_order_resume.py", "cli/test_lost_rank.py",
    "training/test_module.py", "data/sources/test_long_rows.py", "fuzz/test_fuzz.py", "test_wheel.py",
    "test_first_hour.py",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_group_of_ranks_is_left() -> Iterator[None]:
    """End the process group that a module has begun in this process, and forget its address."""
    before = {name: os.environ.get(name) for name in OF_RANKS}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Llama and a byte tokenizer; a file's PRETRAINED says what differs."""
    options = {"spread": 0.3, **getattr(request.module, "PRETRAINED", {})}
    return save_tiny_llama(tmp_path_factory.mktemp("pretrained"), **options)


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the ROWS of the test's file, or with sums."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", getattr(request.module, "ROWS", None) or sums())


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of :func:`pytest_collection_modifyitems` where files are spread over workers."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # it would begin with the files of most tests, which are quick ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    assert all(path.is_file() for path in place), "LONG names a file that has moved"
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
