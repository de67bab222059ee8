"""Files of strangers that would run code, write elsewhere, or never end; and what becomes of each.

    python tests/security/attacks.py          prints the table of docs/guides/security.md
    python tests/security/attacks.py --write  writes it there

Each attack makes its files in a folder of its own and names the command lines that would open them. A payload only
makes a file, the marker: whether it is there tells whether code has run or something was written outside.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - the paths come first where this is run as a script
import torch.distributed.checkpoint  # noqa: E402
from worlds import save_tiny_llama  # noqa: E402

from deft_lightning.__main__ import main  # noqa: E402

DOCS = ROOT / "docs" / "guides" / "security.md"
BEGIN, END = "<!-- made by tests/security/attacks.py -->\n", "<!-- end -->\n"
RESUMED = ("fit", "validate", "test", "predict", "probe")


class Touch:
    """Makes a folder, the marker, where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Place:
    """Where an attack may work.

    Attributes:
        folder: For its files.
        marker: Must never be there.
        run: Folder of a run of this package that is in order, to be spoiled in a copy.
        model: A model folder that is in order.
        rows: Rows that are in order.
    """

    folder: Path
    marker: Path
    run: Path
    model: Path
    rows: Path

    @property
    def checkpoint(self) -> Path:
        """The run's checkpoint."""
        return next(self.run.rglob("step=2.ckpt"))

    def copy_of_model(self) -> Path:
        """Return a copy of the model folder, to be spoiled."""
        return Path(shutil.copytree(self.model, self.folder / "model"))

    def shares(self) -> Path:
        """Return the run's checkpoint as a folder of shares, such as fsdp2 writes."""
        held = torch.load(self.checkpoint, weights_only=True)
        folder = self.folder / "theirs.ckpt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.checkpoint.save(
                {"state_dict": held.pop("state_dict")}, checkpoint_id=folder, no_dist=True
            )
        held.pop("optimizer_states")
        torch.save(held, folder / "meta.pt")
        return folder


@dataclass(frozen=True)
class Attack:
    """One kind of attack.

    Attributes:
        about: What a stranger did, for the table.
        make: Makes the files; returns the option that opens them.
        verbs: Through which it is tried.
        shown: Whether the files may be used, as long as what they hold is shown escaped.
    """

    about: str
    make: Callable[[Place], list[str]]
    verbs: tuple[str, ...]
    shown: bool = False


def ckpt(path: Path) -> list[str]:
    """The option that opens a checkpoint."""
    return ["--ckpt_path", str(path)]


def changed(place: Place, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    """A checkpoint file whose content was changed, without digest, as a sender would write it."""
    held = torch.load(place.checkpoint, weights_only=True)
    change(held)
    torch.save(held, place.folder / "theirs.ckpt")
    return ckpt(place.folder / "theirs.ckpt")


def code_in_metadata(place: Place) -> list[str]:
    folder = place.shares()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(place.marker)))
    return ckpt(folder)


def code_in_last(place: Place) -> list[str]:
    folder = place.shares()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(place.marker)))
    return ["--ckpt_path", "last", "--trainer.default_root_dir", str(place.folder)]


def code_beside_shares(place: Place) -> list[str]:
    folder = place.shares()
    torch.save({**torch.load(folder / "meta.pt", weights_only=True), "x": Touch(place.marker)}, folder / "meta.pt")
    return ckpt(folder)


def leaving_shares(place: Place) -> list[str]:
    folder = place.shares()
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    for entry in found.storage_data.values():
        entry.relative_path = f"../{entry.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    return ckpt(folder)


def leaving_names(place: Place) -> list[str]:
    marker = str(place.marker)

    def change(held: dict[str, Any]) -> None:
        held["deft_lightning"]["tokenizer"] |= {marker: "x", "../" * 20 + marker.lstrip("/"): "x"}

    return changed(place, change)


def flipped(place: Place) -> list[str]:
    raw = bytearray(place.checkpoint.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    (place.folder / "flipped.ckpt").write_bytes(raw)
    return ckpt(place.folder / "flipped.ckpt")


def unpacking(place: Place) -> list[str]:
    path = place.folder / "theirs.ckpt"
    with zipfile.ZipFile(place.checkpoint) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        new.writestr("archive/data/99", b"\0" * (1 << 24))
    return ckpt(path)


def absurd_config(place: Place) -> list[str]:
    def change(held: dict[str, Any]) -> None:
        config = json.loads(held["deft_lightning"]["config"])
        held["deft_lightning"]["config"] = json.dumps({**config, "num_hidden_layers": 10**9})

    return changed(place, change)


def of_model(change: Callable[[Path, Place], Any]) -> Callable[[Place], list[str]]:
    """A copy of the model folder that was changed, and the option that opens it."""

    def make(place: Place) -> list[str]:
        folder = place.copy_of_model()
        change(folder, place)
        return ["--model.pretrained", str(folder)]

    return make


def edit(path: Path, **values: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def own_code(file: str, **values: Any) -> Callable[[Place], list[str]]:
    """A model folder that brings code, named by `auto_map` of one of its files."""

    def change(folder: Path, place: Place) -> None:
        body = "from transformers import LlamaConfig as Settings, LlamaForCausalLM as Net\n"
        body += "from transformers import PreTrainedTokenizerFast as Words\n"
        (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(place.marker)!r}).touch()\n{body}")
        edit(folder / file, **values)

    return of_model(change)


def pickled_weights(folder: Path, place: Place) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(place.marker)}, folder / "pytorch_model.bin")


def weights_elsewhere(folder: Path, place: Place) -> None:
    weights = (folder / "model.safetensors").rename(place.folder / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": f"../{weights.name}"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_adapter(folder: Path, place: Place) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(place.model), "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"x": Touch(place.marker)}, folder / "adapter_model.bin")


def template(text: str) -> Callable[[Place], list[str]]:
    """A model folder with a chat template."""
    return of_model(lambda folder, place: (folder / "chat_template.jinja").write_text(text))


def tagged_config(place: Place) -> list[str]:
    path = place.folder / "theirs.yaml"
    path.write_text(f"data: !!python/object/apply:pathlib.Path.touch [!!python/name:pathlib.Path {place.marker}]\n")
    return ["--config", str(path)]


def laughing_config(place: Place) -> list[str]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (place.folder / "theirs.yaml").write_text("\n".join(lines))
    return ["--config", str(place.folder / "theirs.yaml")]


def long_line(place: Place) -> list[str]:
    path = place.folder / "theirs.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20))
    return ["--data.source", str(path), "--model.pretrained", str(place.model)]


def escapes(place: Place) -> list[str]:
    path = place.folder / "theirs.jsonl"
    row = {"question": "\x1b[2J\x1b]0;title\x07 what? \u202e", "answer": "\x9b31m \x1b]8;;http://x.invalid\x07link"}
    path.write_text("".join(json.dumps({**row, "question": f"{row['question']} {i}"}) + "\n" for i in range(24)))
    return ["--data.source", str(path), "--model.pretrained", str(place.model)]


def escaped_column(place: Place) -> list[str]:
    path = place.folder / "theirs.jsonl"
    path.write_text(json.dumps({"\x1b[2J\u202equestion": "a", "\x07answer": "b"}) + "\n")
    return ["--data.source", str(path), "--model.pretrained", str(place.model)]


def scored(**row: Any) -> Callable[[Place], list[str]]:
    """A file of predictions with one row."""

    def make(place: Place) -> list[str]:
        path = place.folder / "theirs.jsonl"
        text = json.dumps({"id": "1", "completions": ["x"], "gold": "1", **row})
        path.write_text(text.replace("MARKER", str(place.marker)) + "\n")
        return [str(path)]

    return make


ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}"
NAMED = {"AutoConfig": "own.Settings", "AutoModelForCausalLM": "own.Net"}
ATTACKS = {
    "pickled-file": Attack(
        "A checkpoint file holds a pickled object that runs code",
        lambda place: changed(place, lambda held: held.update(x=Touch(place.marker))),
        (*RESUMED, "export"),
    ),
    "pickled-metadata": Attack(
        "`.metadata` of a checkpoint folder holds a pickled object that runs code", code_in_metadata,
        (*RESUMED, "export"),
    ),
    "pickled-last": Attack(
        "The same, in a folder that `--ckpt_path last` comes upon", code_in_last, ("export",)
    ),
    "pickled-beside": Attack(
        "`meta.pt` of a checkpoint folder holds a pickled object that runs code", code_beside_shares,
        ("export", "test"),
    ),
    "shares-elsewhere": Attack(
        "`.metadata` of a checkpoint folder names a share outside of it", leaving_shares, ("export",)
    ),
    "names-elsewhere": Attack(
        "A checkpoint names tokenizer files `../../x` and `/x`", leaving_names, (*RESUMED, "export")
    ),
    "flipped-bit": Attack("A bit of a checkpoint has changed", flipped, ("fit", "test", "export")),
    "compressed-checkpoint": Attack(
        "A checkpoint is compressed, so that few bytes could unpack to any number", unpacking, ("export",)
    ),
    "absurd-checkpoint": Attack("A checkpoint's model has 10^9 layers", absurd_config, ("export",)),
    "model-code": Attack(
        "`config.json` of a model names code of its own (`y` on standard input)",
        own_code("config.json", model_type="ownnet", auto_map=NAMED), ("preview", "probe", "test", "fit"),
    ),
    "tokenizer-code": Attack(
        "`tokenizer_config.json` names code of its own",
        own_code("tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": ["own.Words", None]}),
        ("preview", "fit"),
    ),
    "kernel": Attack(
        "`config.json` names an attention kernel of the hub",
        of_model(lambda folder, place: edit(folder / "config.json", attn_implementation="evil/kernel")), ("fit",),
    ),
    "pickled-weights": Attack("`pytorch_model.bin` holds a pickled object", of_model(pickled_weights), ("fit",)),
    "pickled-adapter": Attack(
        "A model folder is an adapter whose `.bin` holds a pickled object", of_model(pickled_adapter), ("fit",)
    ),
    "weights-elsewhere": Attack(
        "The index of the weights names a file outside of the folder", of_model(weights_elsewhere), ("fit",)
    ),
    "absurd-model": Attack(
        "A model has 10^9 layers",
        of_model(lambda folder, place: edit(folder / "config.json", num_hidden_layers=10**9)), ("fit",),
    ),
    "endless-text": Attack("A chat template asks for 10^10 letters", template("{{ 'x' * 10**10 }}"), ("preview",)),
    "endless-loop": Attack("A chat template turns 10^10 times", template(ENDLESS), ("preview",)),
    "leaving-sandbox": Attack(
        "A chat template looks for Python's classes",
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}"), ("preview",),
    ),
    "tagged-config": Attack("A config has a tag that makes Python objects", tagged_config, ("fit",)),
    "laughing-config": Attack("A config has aliases that multiply to 10^12 entries", laughing_config, ("fit",)),
    "long-line": Attack("A compressed file has one line of 100 MB", long_line, ("preview",)),
    "escaped-column": Attack("Names of columns hold escape sequences", escaped_column, ("preview",)),
    "escapes": Attack("Rows hold escape sequences and reversed text", escapes, ("preview",), shown=True),
}  # fmt: skip


# --- running them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of an attack.

    Attributes:
        code: Exit status.
        out: Standard output.
        err: Standard error.
        harmed: Whether the marker was there afterwards.
    """

    code: int
    out: str
    err: str
    harmed: bool

    @property
    def line(self) -> str:
        """The line that begins with ``error:``, without it; empty if there is not exactly one."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if len(lines) == 1 else ""


def command(verb: str, place: Place) -> list[str]:
    """A short command line of a verb; the first option of a name is overridden by what follows."""
    small = [
        "--data.source", str(place.rows), "--data.batch_size", "4", "--trainer.accelerator", "cpu",
        "--data.cache_dir", str(place.folder / "cache"), "--trainer.logger", "false",
        "--trainer.default_root_dir", str(place.folder / "runs"), "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
    ]  # fmt: skip
    shape = ["--model.architecture", '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}']
    if verb == "export":
        return ["export", "--output", str(place.folder / "out"), "--trainer.accelerator", "cpu"]
    if verb == "fit":
        return ["fit", *small, *shape, "--trainer.max_steps", "3", "--after_fit.export", "false"]
    if verb == "score":
        return ["score"]
    if verb == "preview":
        return ["preview", *small, "--output", str(place.folder / "page.html")]
    if verb in ("test", "predict"):
        return [verb, *small, *shape, "--model.generation.max_new_tokens", "2"]
    return [verb, *small, *shape]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Give the block four GiB of memory more than there is now: an attack that is not stopped ends, and fails here."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(arguments: list[str], marker: Path) -> Outcome:
    """Run a command line in this process, with `y` on standard input."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mock.patch("sys.argv", ["deft_lightning", *arguments]), mock.patch("sys.stdin", io.StringIO("y\n" * 9)):
            try:
                main()
            except SystemExit as end:
                code = end.code
    return Outcome(int(code or 0), out.getvalue(), err.getvalue(), marker.exists())


@lru_cache(maxsize=1)
def prepared() -> tuple[Path, Path, Path]:
    """Make a run, a model and rows that are in order, once."""
    home = Path(tempfile.mkdtemp(prefix="deft_lightning-attacks-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # used by every attack of the process, by none after it
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": f"{i + 1}"}) + "\n" for i in range(24)))
    model = Path(save_tiny_llama(home / "model", 0.1))
    place = Place(home, home / "marker", home / "runs", model, rows)
    found = run([*command("fit", place), "--trainer.max_steps", "2"], place.marker)
    assert found.code == 0, found.err
    return home / "runs", model, rows


@cache
def outcome(name: str, verb: str) -> Outcome:
    """Return what becomes of an attack through a verb."""
    model_run, model, rows = prepared()
    with tempfile.TemporaryDirectory(prefix="deft_lightning-attack-") as folder:
        home = Path(folder)
        place = Place(home, home / "elsewhere" / "marker", model_run, model, rows)
        place.marker.parent.mkdir()
        arguments = [*command(verb, place), *ATTACKS[name].make(place)]
        found = run(arguments, place.marker)
        said = (text.replace(folder, "").replace(str(rows.parent), "") for text in (found.out, found.err))
        return Outcome(found.code, *said, found.harmed)


def table() -> str:
    """Return the table of docs/guides/security.md."""
    lines = ["| what a stranger did | through | what happens |", "|---|---|---|"]
    for name, attack in ATTACKS.items():
        found = outcome(name, attack.verbs[-1])
        said = "shown escaped" if attack.shown else f"`{shortened(found.line)}`"
        verbs = ", ".join(f"`{verb}`" for verb in attack.verbs)
        lines.append(f"| {attack.about} | {verbs} | {said} |")
    return "\n".join(lines) + "\n"


def shortened(line: str) -> str:
    """A line as a cell of a table."""
    flat = re.sub(r"\s+", " ", line).replace("|", "\\|").replace("`", "'")
    return flat if len(flat) <= 240 else f"{flat[:240]} ..."


def write() -> None:
    """Put the table into the page."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write() if sys.argv[1:] == ["--write"] else print(table())
