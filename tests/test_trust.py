"""Folders of strangers that want to run code, fetch it, or read files elsewhere: one line, and nothing has run.

The payload of each only touches a marker file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import save_tiny_llama

from deft_lightning.cli.main import run
from deft_lightning.data.encoding.tokenizer import load_tokenizer
from deft_lightning.errors import UserError
from deft_lightning.models import check_pretrained, load_pretrained
from deft_lightning.training.module import SFTModule
from deft_lightning.trust import inside

REMEDY = "--model.trust_remote_code true"
OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class Settings(LlamaConfig):
    model_type = "ownnet"
class Net(LlamaForCausalLM):
    config_class = Settings
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class Words(PreTrainedTokenizerFast):
    pass
"""


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny_llama(tmp_path / "model", 0.1))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


def code(folder: Path, marker: Path, body: str) -> None:
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch(){body}")


def own_model(folder: Path, marker: Path) -> None:
    code(folder, marker, OWN_MODEL)
    names = {"AutoConfig": "own.Settings", "AutoModelForCausalLM": "own.Net"}
    change(folder, "config.json", model_type="ownnet", auto_map=names)


def own_tokenizer(folder: Path, marker: Path) -> None:
    code(folder, marker, OWN_TOKENIZER)
    change(folder, "tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": [None, "own.Words"]})


def old_tokenizer(folder: Path, marker: Path) -> None:
    code(folder, marker, OWN_TOKENIZER)
    change(folder, "tokenizer_config.json", tokenizer_class="Words", auto_map=["own.Words", None])


VERBS: dict[str, list[str]] = {
    "fit": [], "validate": [], "test": [], "predict": [], "probe": [], "preview": ["--output", "page.html"],
    "export": ["--ckpt_path", "last", "--output", "out"],
}  # fmt: skip


def verb_line(verb: str, folder: Path, *more: str) -> list[str]:
    rows = folder.parent / "rows.jsonl"
    rows.write_text('{"question": "one", "answer": "two"}\n' * 4)
    return [
        verb, "--data.source", str(rows), "--data.cache", "false", "--data.validation_fraction", "0.25",
        "--model.pretrained", str(folder), "--trainer.accelerator", "cpu", "--trainer.max_steps", "1",
        "--trainer.default_root_dir", str(folder.parent / "runs"), *VERBS[verb], *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "own"), [*((verb, own_model) for verb in VERBS), ("preview", own_tokenizer)])
def test_no_verb_runs_code_of_a_folder(
    folder: Path, marker: Path, verb: str, own: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own(folder, marker)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(SystemExit) as ended:
        run(verb_line(verb, folder))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert ended.value.code == 2 and not marker.exists()
    assert str(folder) in line and "own.py" in line and REMEDY in line


@pytest.mark.slow
def test_yes_on_standard_input_does_not_help(folder: Path, marker: Path) -> None:
    own_model(folder, marker)
    done = subprocess.run(
        [sys.executable, "-m", "deft_lightning", *verb_line("fit", folder)],
        input="y\n" * 50, capture_output=True, text=True, cwd=folder.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "[y/N]" not in done.stdout + done.stderr and not marker.exists()
    assert done.stderr.splitlines()[-1].startswith("error: ") and REMEDY in done.stderr.splitlines()[-1]


def test_code_runs_where_an_option_admits_it(folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_model(folder, marker)
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
    module = SFTModule(pretrained=str(folder), trust_remote_code=True)
    module.configure_model()
    assert marker.exists() and type(module.model).__name__ == "Net"


@pytest.mark.parametrize("own", [own_tokenizer, old_tokenizer])
def test_code_of_a_tokenizer_is_refused_unless_admitted(folder: Path, marker: Path, own: Any) -> None:
    own(folder, marker)
    with pytest.raises(UserError, match=r"its tokenizer is code of its own \(own\.py\).*trust_remote_code true"):
        load_tokenizer(str(folder))
    assert not marker.exists()
    if own is own_tokenizer:
        assert load_tokenizer(str(folder), trust=True).eos_token_id is not None and marker.exists()


@pytest.mark.parametrize("reference", ["own.Net", "someone/else--own.Net"])
def test_a_known_model_type_needs_no_code_and_runs_none(folder: Path, marker: Path, reference: str) -> None:
    code(folder, marker, OWN_MODEL)
    change(folder, "config.json", auto_map={"AutoModelForCausalLM": reference, "AutoConfig": reference})
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Words"]})
    load_pretrained(str(folder), "float32")
    load_tokenizer(str(folder))
    assert not marker.exists()


def test_code_elsewhere_is_named_as_such(folder: Path) -> None:
    change(folder, "config.json", model_type="ownnet", auto_map={"AutoConfig": "someone/else--own.Settings"})
    with pytest.raises(UserError, match=r"\(someone/else: own\.py\)"):
        check_pretrained(str(folder))


def test_nobody_is_asked_about_the_code_of_a_part(folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuyu makes its text model without the option; a kind of it that is no text model has no code in transformers."""
    own_model(folder, marker)
    shape = {"vocab_size": 262, "pad_token_id": 0, "hidden_size": 16}
    part = {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert"},
        **shape,
    }
    code_of = {"auto_map": {"AutoModel": "own.Net"}, "_name_or_path": str(folder), "name_or_path": str(folder)}
    (folder / "config.json").write_text(json.dumps({"model_type": "fuyu", **shape, "text_config": {**part, **code_of}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load the model"):
        load_pretrained(str(folder), "float32")
    assert not marker.exists()


def test_custom_generation_code_is_not_run(folder: Path, marker: Path) -> None:
    (folder / "custom_generate").mkdir()
    body = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef generate(model, **_):\n    return None\n"
    (folder / "custom_generate" / "generate.py").write_text(body)
    load_pretrained(str(folder), "float32").generate(torch.tensor([[1, 2]]), max_new_tokens=1)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@main:f"}, "quick", 3])
def test_attention_of_a_config_is_one_that_transformers_has(folder: Path, key: str, value: Any) -> None:
    change(folder, "config.json", **{key: value})
    with pytest.raises(UserError, match=r"config\.json: _?attn_implementation.*--model\.attention"):
        check_pretrained(str(folder))
    if key.startswith("_"):  # transformers lets it win over what is asked for
        with pytest.raises(UserError, match="_attn_implementation"):
            load_pretrained(str(folder), "float32", "eager")
        return
    assert load_pretrained(str(folder), "float32", "eager").config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "says"),
    [("spda", "Did you mean sdpa"), ("someone/kernel", REMEDY), ("flash", "Known: eager"), ("", "Known: eager")],
)
def test_attention_asked_for_is_known(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        SFTModule(architecture={"model_type": "llama"}, attention=name)
    assert "--model.attention" in str(caught.value)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.marker),)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_run_nothing(folder: Path, marker: Path, sharded: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(marker)}, folder / "pytorch_model.bin")
    if sharded:
        (folder / "pytorch_model.bin").rename(folder / "part.bin")
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_pretrained(str(folder), "float32")
    assert not marker.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "a/../../b.safetensors"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_folder_alone(folder: Path, index: str, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder.parent / "elsewhere.safetensors", {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, part)}))
    with pytest.raises(UserError, match="a file outside the folder"):
        load_pretrained(str(folder), "float32")


def test_weights_that_a_config_names_are_in_the_folder(folder: Path) -> None:
    change(folder, "config.json", transformers_weights="../elsewhere.safetensors")
    with pytest.raises(UserError, match="outside the folder"):
        load_pretrained(str(folder), "float32")


def test_adapters_beside_a_model_are_not_laid_over_it(folder: Path) -> None:
    change(folder, "adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA")
    with pytest.raises(UserError, match="low-rank adapters"):
        check_pretrained(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"low-rank adapters.*'someone/else'"):
        check_pretrained(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 5000, '{"auto_map": 3}', '{"auto_map": {"a": []}}'])
def test_malformed_settings_are_one_line(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    try:
        check_pretrained(str(folder))
        load_tokenizer(str(folder))
    except UserError as error:
        assert file in str(error) or "load" in str(error) or "end-of-sequence" in str(error)


def test_which_names_stay_inside() -> None:
    assert all(inside(name) for name in ("a", "a/b.bin", "..a"))
    assert not any(inside(name) for name in ("../a", "/a", "a/../../b", "C:\\a", "\\\\host\\a", "..\\a", "a\0"))
