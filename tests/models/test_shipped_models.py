"""The models that come with the package: what they are made by, that they know their task, how they are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from worlds import ROOT

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.data.encoding.tokenizer import load_tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import load_pretrained
from deft_lightning.models.base_facts import about_base
from deft_lightning.shipped_models import FOLDER, model_path, shipped_models

RECIPE = yaml.safe_load((ROOT / "configs" / "speller.yaml").read_text(encoding="utf-8"))
QUICKSTART = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))


def test_a_name_with_the_prefix_is_a_folder_of_the_package_and_others_are_what_they_were() -> None:
    assert shipped_models() == ["deft:speller"]
    assert model_path("deft:speller") == FOLDER / "speller"
    assert model_path("org/name") == Path("org/name") and model_path("~/a") == Path("~/a").expanduser()


@pytest.mark.parametrize("name", ["deft:speler", "deft:", "deft:../models", "deft:speller/.."])
@pytest.mark.parametrize("load", [load_tokenizer, lambda name: SFTModule(pretrained=name)], ids=["tokenizer", "model"])
def test_an_unknown_name_is_one_line_with_what_there_is(name: str, load: object) -> None:
    with pytest.raises(UserError) as error:
        load(name)  # type: ignore[operator]
    assert str(error.value).startswith(f"{name}: no model of this name comes with the package.")
    assert "Known: deft:speller (--model.pretrained" in str(error.value) and "\n" not in str(error.value)
    assert name != "deft:speler" or "Did you mean deft:speller?" in str(error.value)


def test_its_files_are_small_and_those_of_the_recipe() -> None:
    """The recipe names shape and vocabulary; the split of both configurations holds out the same words."""
    files = {path.name: path.stat().st_size for path in (FOLDER / "speller").iterdir()}
    assert sum(files.values()) < 1 << 20 and not {"model.safetensors", "config.json", "README.md"} - files.keys()
    config = load_pretrained("deft:speller", "float32").config
    assert {name: getattr(config, name) for name in RECIPE["model"]["architecture"]} == RECIPE["model"]["architecture"]
    assert RECIPE["data"]["tokenizer_size"] == 0 and len(load_tokenizer("deft:speller")) == config.vocab_size == 262
    for name in ("validation_fraction", "max_length"):
        assert RECIPE["data"][name] == QUICKSTART["data"][name]
    mine, base = (one["data"]["source"].partition("size=") for one in (QUICKSTART, RECIPE))
    assert mine[0] == base[0] and mine[2].partition("&")[2] == base[2].partition("&")[2]
    assert "seed" not in QUICKSTART["data"] and "seed" not in RECIPE["data"]
    about = about_base("deft:speller")
    assert about["name"] == "speller" and about["license"] == "apache-2.0" and "hub_id" not in about


@pytest.mark.slow
def test_it_spells_words_that_it_was_not_trained_on(tmp_path: Path) -> None:
    data = InstructionDataModule(**{k: v for k, v in QUICKSTART["data"].items() if k != "noise"}, cache=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, monitors=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.test(SFTModule(pretrained="deft:speller"), datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test/exact_match"]) > 0.95
    assert float(trainer.callback_metrics["test/examples"]) > 200


@pytest.mark.slow
def test_adapters_on_it_name_it_and_export(tmp_path: Path) -> None:
    from deft_lightning.models import LoRA
    from deft_lightning.models.base import BASE
    from deft_lightning.models.contents import KEY

    rows = [{"question": word, "answer": word[::-1]} for word in ("ohmic", "neon", "bird", "bliss", "bingo", "chess")]
    data = InstructionDataModule(rows, batch_size=2, validation_fraction=0.3, cache=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, monitors=False, enable_progress_bar=False,
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(SFTModule(pretrained="deft:speller", lora=LoRA(r=2)), datamodule=data)
    (checkpoint,) = tmp_path.rglob("step=1.ckpt")
    # Not the folder of this machine: the checkpoint goes on wherever the package is.
    assert torch.load(checkpoint, weights_only=True)[KEY][BASE]["name"] == "deft:speller"
    folder = trainer.export(ckpt_path=str(checkpoint), output=str(tmp_path / "merged"))
    assert (folder / "model.safetensors").is_file()
    assert str(FOLDER) not in (folder / "README.md").read_text(encoding="utf-8")
