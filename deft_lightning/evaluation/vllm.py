"""vLLM in place of transformers: its offline engine, on a folder that the model is written to.

Written from vLLM's documentation of ``LLM`` and ``SamplingParams``; it was not run where this was written.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from deft_lightning.annotations import CausalLM
from deft_lightning.errors import UserError
from deft_lightning.evaluation.completions import Ask, Row
from deft_lightning.evaluation.sampling import stream_key

OPTION = "--model.generation.backend vllm"


def check_vllm(ranks: int) -> None:
    """Refuse vLLM where it cannot be used.

    Args:
        ranks: Processes of the run.

    Raises:
        UserError: It is not installed, or there are several ranks.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{OPTION}: vllm is not installed here; leave the option out, or install vllm (it needs a GPU)")
    if ranks > 1:
        raise UserError(f"{OPTION} runs in one process: --trainer.devices 1 --trainer.num_nodes 1")


class Engine:
    """vLLM's engine with the weights of a model, made when it is first asked.

    Args:
        model: The model; it moves to host memory then, since vLLM has weights of its own on the device.
        write: Writes the model as a Hugging Face folder.
        length: Tokens of the longest prompt with its completion.
    """

    def __init__(self, model: CausalLM, write: Callable[[Path], object], length: int) -> None:
        self.model, self.write, self.length = model, write, length
        self._engine: Any = None

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any]) -> list[Any]:
        """Return vLLM's output for each prompt, in their order."""
        if self._engine is None:
            from vllm import LLM

            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            with tempfile.TemporaryDirectory() as folder:
                self.write(path := Path(folder) / "model")
                self.model.to("cpu")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                # The folder's generation config would bring penalties and a temperature of its own.
                options: dict[str, Any] = {"max_model_len": self.length, "generation_config": "vllm"}
                self._engine = LLM(model=str(path), dtype=dtype, **options)
        return list(self._engine.generate(prompts, params))


class VLLM:
    """Completes all prompts at once by vLLM.

    Args:
        engine: The engine.
        temperature: 0 is greedy.
        top_p: As of :class:`~deft_lightning.evaluation.generate.Generation`.
        seed: Of all draws. A sample's seed depends on it, the example id and the number of the sample.
        stops: Tokens that end a completion.
        limit: Longest completion in tokens.
        samples: Completions per prompt.
    """

    def __init__(
        self,
        engine: Engine,
        temperature: float,
        top_p: float,
        seed: int,
        stops: Iterable[int],
        limit: int,
        samples: int,
    ) -> None:
        self.engine, self.seed, self.samples = engine, seed, samples
        self.params = {
            "temperature": float(temperature), "top_p": float(top_p), "max_tokens": limit,
            "stop_token_ids": list(stops),
            "ignore_eos": True,  # only the run's own end tokens end a completion, those of the folder do not
            "detokenize": False,
        }  # fmt: skip

    def step(self, waiting: deque[Ask]) -> list[Row]:
        """Complete all prompts."""
        from vllm import SamplingParams

        rows = [Row(ask, n) for ask in waiting for n in range(self.samples)]
        waiting.clear()
        prompts = [{"prompt_token_ids": row.ask.input_ids} for row in rows]
        seeds = [stream_key(self.seed, row.ask.id, row.sample) % 2**32 for row in rows]
        outputs = self.engine.generate(prompts, [SamplingParams(seed=seed, **self.params) for seed in seeds])
        for row, output in zip(rows, outputs, strict=True):
            row.tokens = list(output.outputs[0].token_ids)
        return rows
