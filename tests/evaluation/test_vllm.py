"""vLLM as a backend, as far as it can be tested without vLLM: what it is asked, and what is made of its answer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_continuous import STOPS, Numbers, asks, model_of
from worlds import bare_trainer, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.errors import UserError
from deft_lightning.evaluation import Generation
from deft_lightning.evaluation.generate import completions_of
from deft_lightning.evaluation.vllm import Engine, check_vllm

PRETRAINED: dict[str, Any] = {"spread": 0.2, "max_position_embeddings": 160}


class Recorded(ModuleType):
    """Stands in for vLLM, which is not installed: notes what it is asked, answers with the length of the prompt."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.made: list[dict[str, Any]] = []
        self.asked: list[tuple[list[int], Any]] = []

    def LLM(self, **options: Any) -> Any:
        self.made.append({**options, "files": sorted(path.name for path in Path(options["model"]).iterdir())})
        return SimpleNamespace(generate=self.generate)

    def SamplingParams(self, **options: Any) -> Any:
        return SimpleNamespace(**options)

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any]) -> list[Any]:
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked += zip(rows, params, strict=True)
        said = [[len(row) + 20, STOPS[0], 99] if len(row) % 2 else [len(row) + 20] * 3 for row in rows]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for tokens in said]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    module = Recorded()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_vllm_is_asked_once_for_all_samples_of_all_prompts(recorded: Recorded) -> None:
    model, prompts = model_of("llama"), asks(5)
    engine = Engine(model, write, 40)
    settings = Generation(3, temperature=0.5, top_p=0.9, samples=2, seed=8, backend="vllm")
    known = completions_of(model, Numbers(), prompts, settings, STOPS, places=2, engine=engine)
    found = known.take([4, 0]) + known.take([1, 2, 3])
    (made,) = recorded.made
    assert made["max_model_len"] == 40 and made["dtype"] == "float64" and made["generation_config"] == "vllm"
    assert made["files"] == ["config.json"] and not Path(made["model"]).exists()
    assert sorted(row for row, _ in recorded.asked) == sorted(ask.input_ids for ask in prompts for _ in range(2))
    params = [one for _, one in recorded.asked]
    assert len({one.seed for one in params}) == 10, "a stream of its own for each sample"
    for one in params:
        assert (one.temperature, one.top_p, one.max_tokens, one.ignore_eos) == (0.5, 0.9, 3, True)
        assert one.stop_token_ids == STOPS
    for ask, samples in zip([prompts[i] for i in (4, 0, 1, 2, 3)], found, strict=True):
        said = str(len(ask.input_ids) + 20)
        expected = (said, False) if len(ask.input_ids) % 2 else (" ".join([said] * 3), True)
        assert samples == [expected] * 2


def test_seeds_are_those_of_the_id_and_the_sample_whatever_the_order(recorded: Recorded) -> None:
    model, prompts = model_of("llama"), asks(4)
    settings = Generation(3, temperature=1.0, samples=2, backend="vllm")
    seeds = []
    for chosen in (prompts, prompts[::-1][:2]):
        recorded.asked.clear()
        known = completions_of(model, Numbers(), chosen, settings, STOPS, places=2, engine=Engine(model, write, 40))
        known.take(range(len(chosen)))
        seeds.append({(tuple(row), one.seed) for row, one in recorded.asked})
    assert seeds[1] < seeds[0]


def test_where_vllm_is_not_installed_one_line_says_so_before_anything_is_generated(
    pretrained: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    module = SFTModule(pretrained=pretrained, generation=Generation(3, backend="vllm"))
    with pytest.raises(UserError, match=r"^--model\.generation\.backend vllm: vllm is not installed here") as caught:
        bare_trainer(tmp_path).test(module, InstructionDataModule(test_source=source), verbose=False)
    assert "\n" not in str(caught.value)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_vllm(1)
    with pytest.raises(UserError, match=r"in one process: --trainer\.devices 1"):
        check_vllm(2)


def test_another_backend_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.generation\.backend must be transformers or vllm, not 'fast'"):
        Generation(backend="fast")  # type: ignore[arg-type]
