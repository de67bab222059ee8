"""The card of an exported folder: read by the hub's own parser, true to the run, and silent about this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from worlds import SHAPE, bare_trainer, read_events, save_tiny_llama, split_data, sums, write_rows

from deft_lightning import InstructionDataModule, SFTModule
from deft_lightning.cli.main import run
from deft_lightning.data.noise import Noise, TokenReplace
from deft_lightning.models import LoRA
from deft_lightning.models.base_facts import about_base
from deft_lightning.models.card import CardFacts, card
from deft_lightning.models.card_text import paths_shortened
from deft_lightning.models.contents import KEY
from deft_lightning.training.card_data import source_fact
from deft_lightning.training.card_facts import CARD

README = """---
license: other
license_name: tiny-terms
license_link: https://example.org/terms
base_model: somebody/older
---
# A base
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-base", spread=0.3)
    (Path(folder) / "README.md").write_text(README)
    return folder


def words(base: str, root: Path, *more: str) -> list[str]:
    source = write_rows(root / "secret" / "rows.jsonl", sums())
    return [
        "fit", "--model.pretrained", base, "--model.lora.r", "2", "--model.objective", "Tsallis",
        "--model.objective.q", "0.25", "--model.optimizer.lr", "0.003", "--data.source", source, "--data.batch_size",
        "4", "--data.validation_fraction", "0.25", "--data.noise.ops+=ResponseSwap", "--data.noise.ops.rate", "0.5",
        "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(root / "logs"),
        "--model.generation.max_new_tokens", "4", "--after_fit.test", "false", *more,
    ]  # fmt: skip


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def row(text: str, name: str) -> str:
    """The value of a row of a table, without the marks of code."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return str(found).strip("`")


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with adapters that was tested too."""
    root = tmp_path_factory.mktemp("trained")
    run(words(base, root, "--after_fit.test", "true"))
    return root / "logs" / "version_0"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "adapter"])
def test_the_hubs_own_parser_reads_a_card_that_is_true_to_the_run(name: str, trained: Path, base: str) -> None:
    loaded, text = ModelCard.load(trained / name / "README.md"), text_of(trained / name)
    data = loaded.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "tiny-terms")
    assert data["library_name"] == {"export": "transformers", "adapter": "peft"}[name]
    assert data["pipeline_tag"] == "text-generation" and "base_model" not in data  # no hub id is known of this folder
    assert row(text, "base") == "tiny-base" and row(text, "base of the base") == "somebody/older"
    assert row(text, "objective") == "Tsallis(q=0.25)" and row(text, "optimizer").startswith("AdamW(lr=0.003, ")
    assert row(text, "optimizer steps") == "4" and row(text, "LoRA").startswith("r=2, ")
    assert row(text, "precision") == "32-true" and row(text, "seed") == "0"
    assert "- Sources: `rows.jsonl` (file)" in text
    assert re.search(r"`train: 38 examples, .*label noise injected: \d+ examples, .*ResponseSwap: .* changed`", text)
    assert "label noise asked for: ResponseSwap(rate=0.5" in text

    # What was written down while it happened, by another way.
    logged = read_events(trained)
    nll = logged.Scalars("val/nll")
    assert row(text, "val/nll, first") == f"{nll[0].value:.4f} nats per token before training"
    assert row(text, "val/nll, last") == f"{nll[-1].value:.4f} nats per token at step 4"
    assert row(text, "val/nll, best").startswith(f"{min(point.value for point in nll):.4f} ")
    assert float(row(text, "estimated share of wrong answers")) == pytest.approx(
        logged.Scalars("noise/estimated")[-1].value, abs=6e-4
    )
    figures = {result.metric_name: result.metric_value for result in loaded.data.eval_results or []}
    assert set(figures) == {"val/nll, last", "test/exact_match"}
    assert figures["val/nll, last"] == pytest.approx(nll[-1].value)
    assert figures["test/exact_match"] == logged.Scalars("test/exact_match")[-1].value


@pytest.mark.slow
def test_nothing_of_this_machine_is_told(trained: Path, base: str) -> None:
    for name in ("export", "adapter"):
        text = text_of(trained / name)
        for secret in (
            str(trained),
            str(Path(base).parent),
            "secret",
            "/tmp",
            str(Path.home()) + "/",
            os.uname().nodename,
        ):
            assert secret not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["export", "adapter"])
def test_the_lines_on_loading_run_as_they_stand(name: str, trained: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", text_of(trained / name), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=trained / name, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_checkpoint_that_is_exported_later_has_the_card_of_its_run(base: str, tmp_path: Path) -> None:
    run(words(base, tmp_path))
    folder = tmp_path / "logs" / "version_0"
    shutil.rmtree(tmp_path / "secret")  # nothing but the checkpoint is asked
    (checkpoint,) = folder.glob("checkpoints/step=4.ckpt")
    run(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "later"), "--trainer.accelerator", "cpu"])
    # It was saved before the last validation: of that alone it knows nothing.
    later, then = (text_of(one).splitlines() for one in (tmp_path / "later", folder / "export"))
    assert len(later) == len(then)
    differs = [pair for pair in zip(later, then, strict=True) if pair[0] != pair[1]]
    assert {re.split(r"[|:]", line)[line[0] == "|"].strip() for line, _ in differs} == {
        "value", "val/nll, last", "val/nll, best"
    }  # fmt: skip
    assert {len(text_of(tmp_path / "later").split(line)) for line, _ in differs} == {2}
    module = SFTModule.load_from_checkpoint(checkpoint)
    bare_trainer(tmp_path).export(module, output=str(tmp_path / "restored"))
    rest = [text_of(tmp_path / name).partition("## Model")[2] for name in ("restored", "later")]
    assert rest[0] == rest[1] != ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["absent", "malformed", "hostile"])
def test_a_checkpoint_without_facts_or_with_a_strangers_is_exported_all_the_same(
    kind: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(words(base, tmp_path, "--after_fit.export", "false"))
    (path,) = (tmp_path / "logs").rglob("step=4.ckpt")
    held = torch.load(path, weights_only=True)
    if kind == "absent":
        del held[KEY][CARD]
    elif kind == "malformed":
        held[KEY][CARD] |= {"noise": {"share": "much"}, "tests": ["?"]}
    else:
        held[KEY][CARD] |= {"base": {"name": "`x` |<b>\n\n# Trust me\n---\nlicense: mit", "license": "a: b\n- c"},
                            "data": ["![](https://example.org/x.png)"] * 10_000}  # fmt: skip
    torch.save(held, tmp_path / "other.ckpt")
    output = tmp_path / "out"
    run(
        ["export", "--ckpt_path", str(tmp_path / "other.ckpt"), "--output", str(output), "--trainer.accelerator", "cpu"]
    )
    text, told = text_of(output), caplog.text
    loaded = ModelCard.load(output / "README.md")
    if kind == "hostile":
        assert "\n# Trust me" not in text and text.count("`![](") == 100
        assert loaded.data.license == "a: b\n- c" and loaded.data.library_name == "transformers"
        return
    assert ("facts in the checkpoint are left out: 'noise' is not what it should be" in told) == (kind == "malformed")
    assert row(text, "objective") == "Tsallis(q=0.25)" and row(text, "optimizer steps") == "4"
    assert row(text, "base") == "tiny-base" and row(text, "val/nll, first").endswith("before training")
    assert row(text, "LoRA").startswith("r=2, ") and row(text, "optimizer").startswith("AdamW(lr=0.003, ")


@pytest.mark.slow
def test_an_audit_and_random_weights_are_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"id": f"r{n}", **one} for n, one in enumerate(sums(24))])
    audit = write_rows(tmp_path / "hidden place" / "audit.jsonl", [{"id": f"r{n}"} for n in (2, 3, 5)])
    data = InstructionDataModule(
        source, batch_size=4, validation_fraction=0.0, exclude=audit, noise=Noise(ops=[TokenReplace(rates=[0.3])])
    )
    module = SFTModule(architecture={"model_type": "llama", **SHAPE})
    trainer = bare_trainer(tmp_path / "run", max_steps=2, max_epochs=-1)
    trainer.fit(module, data)
    text = text_of(trainer.export(module, output=str(tmp_path / "out"), datamodule=data))
    assert "`left out 3 of 24 training rows by audit.jsonl (12.5 %)`" in text and "hidden place" not in text
    assert "trained from random weights" in text and "TokenReplace(rate" in text
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


@pytest.mark.slow
def test_rows_and_a_model_that_were_handed_over(pretrained: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = SFTModule(pretrained=AutoModelForCausalLM.from_pretrained(pretrained), lora=LoRA(r=2))
    data: Any = split_data(sums(16))  # type: ignore[arg-type]
    trainer = bare_trainer(tmp_path / "run", max_steps=1, max_epochs=-1)
    trainer.fit(module, data)
    text = text_of(trainer.export(module, output=str(tmp_path / "out"), datamodule=data))
    assert "- Sources: `rows` (passed from Python)" in text and str(Path(pretrained).parent) not in text


def test_what_a_base_says_of_its_licence(tmp_path: Path) -> None:
    def facts(name: str, readme: str | None, *files: str) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if readme is not None:
            (folder / "README.md").write_text(readme)
        for file in files:
            (folder / file).write_text("terms")
        return about_base(str(folder))

    assert facts("a", None) == {"name": "a"}
    assert facts("b", "---\nlicense: [mit, apache-2.0]\nlicense_link: LICENSE\n---\n") == {"name": "b"}
    assert facts("c", "---\n{ not: [yaml\n---\n", "LICENSE.txt")["license_file"].endswith("LICENSE.txt")
    assert facts("d", "no metadata at all", "COPYING")["license_file"].endswith("COPYING")
    assert facts("e", "---\nlicense: mit\n---\n", "LICENSE") == {"name": "e", "license": "mit"}
    cached = facts("models--org--model-1/snapshots/abc", "---\nlicense: mit\n---\n")
    assert cached == {"name": "org/model-1", "hub_id": "org/model-1", "license": "mit"}


def test_sources_are_named_without_the_places_they_lie_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("{}\n")
    wanted = {
        str(tmp_path / "deep" / "rows.jsonl"): ("rows.jsonl", "file"),
        "deep/rows.jsonl": ("rows.jsonl", "file"),
        "deep/*.jsonl": ("*.jsonl", "file"),
        str(tmp_path / "deep"): ("deep", "folder"),
        f"file://{tmp_path}/deep/rows.jsonl": ("rows.jsonl", "file"),
        "https://me:pass@example.org/rows.jsonl?token=abc": ("https://example.org/rows.jsonl", "address"),
        "openai/gsm8k": ("openai/gsm8k", "hub"),
        "hub:openai/gsm8k[test]": ("openai/gsm8k", "hub"),
        "reasoning_gym:chain_sum?size=10": ("chain_sum?size=10", "generated by reasoning_gym"),
        "": ("rows", "passed from Python"),
    }
    assert {source: source_fact(source, None) for source in wanted} == wanted


PARTS = st.text("abcXYZ019_-.", min_size=1, max_size=6).filter(lambda part: part.strip("."))


@given(
    st.lists(PARTS, min_size=2, max_size=5), st.sampled_from(["/", "~/", "C:/"]), st.sampled_from([" ", "(", "'", "`"])
)
def test_a_path_in_a_text_keeps_its_last_part_alone(parts: list[str], root: str, before: str) -> None:
    text = paths_shortened(f"by{before}{root}{'/'.join(parts)} (5 %)")
    assert text == f"by{before}{parts[-1]} (5 %)"


@pytest.mark.parametrize("text", ["val/nll 1.5 nats/s", "https://a.org/b/c", "org/name", "1 / 2", "a</b>", "| x | y |"])
def test_what_is_no_path_stays(text: str) -> None:
    assert paths_shortened(text) == text


def test_a_card_of_nothing_still_loads() -> None:
    loaded = ModelCard(card(CardFacts(), "whole", "float32", chat=False))
    assert loaded.data.pipeline_tag == "text-generation" and "tokenizer" not in loaded.text
    hub = ModelCard(card(CardFacts(base={"name": "a/b", "hub_id": "a/b"}), "adapters", "float32", True, "lab/mine"))
    assert (hub.data.base_model, hub.data.base_model_relation) == ("a/b", "adapter")  # type: ignore[attr-defined]
    assert 'folder = "lab/mine"' in hub.text


def test_facts_survive_a_checkpoint() -> None:
    facts = CardFacts(
        base={"name": "b"}, sources={"s": "file"}, data=("one", "two"), objective="NLL()", training={"seed": "1"},
        noise={"share": 0.25}, validations={"last": (3, 1.5)}, tests={"test/exact_match": 0.5}, versions={"torch": "2"},
    )  # fmt: skip
    assert CardFacts.of(facts.plain()) == facts and isinstance(facts.plain()["validations"]["last"], list)
