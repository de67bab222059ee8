"""Keep the suite on one thread: numbers that repeat, and no fight over small machines."""

from __future__ import annotations

import os
import tempfile

# Prepared data of this run alone: what an older version of the code prepared must not hide what this one does.
_cache = tempfile.TemporaryDirectory(prefix="deft_lightning-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DEFT_LIGHTNING_CACHE"] = _cache.name

import torch  # noqa: E402 - threads are counted at its import

torch.set_num_threads(1)
