"""The first hour of a newcomer, command by command as README and docs write it, with the minutes that each one took.

    python tests/benchmarks/first_hour.py --model FOLDER --rows ROWS.json [--first 120] [--steps 6] [--examples 120]
        [--output docs/evidence/data/first_hour.json]

Model and file take the place of those of the pages; ``--first`` rows and a few steps keep it short. Every step is
checked: pages are opened in Chromium, Ctrl-C is a SIGINT to the group of processes, the resumed run must end with the
weights of an uninterrupted one, the export is loaded by transformers alone and answers, TRL trains, and so does an
objective of one's own. ``--folder`` keeps what the walk leaves.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from browser import Browser
from page_commands import blocks, code_lines, command, read
from safetensors.torch import load_file
from walker import Walker, require, table
from worlds import largest_difference

QUICKSTART, EXPORT, TRL = "docs/quickstart.md", "docs/guides/export.md", "docs/guides/trl.md"
OWN = "docs/tutorials/own_objective.md"
# What a newcomer adds to the code of the page on export: a question, and the same of the base with its adapters.
ASK = """
import json
import torch
from peft import PeftModel

turns = [{{"role": "user", "content": {question!r}}}]
asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
said = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.bfloat16).float()  # as the adapters were trained
adapted = PeftModel.from_pretrained(base, {adapter!r})
with torch.no_grad():
    one, other = (which(**asked).logits for which in (model, adapted))
found = {{"answer": tokenizer.decode(said), "off": float((one - other).abs().max() / other.abs().max())}}
print("found:", json.dumps(found))
"""
LOGGED = """
import json

names = ("step", "nll", "gate/mean")
print("found:", json.dumps([{name: row[name] for name in names} for row in trainer.state.log_history if "nll" in row]))
"""


def found(said: str) -> Any:
    """Return what a script printed behind ``found:``."""
    return json.loads(re.findall(r"^found: (.*)$", said, re.MULTILINE)[-1])


def one(pattern: str, said: str) -> str:
    """Return the only or last text that a pattern finds in an output."""
    every = re.findall(pattern, said)
    require(bool(every), f"the output has nothing like {pattern}: {said[-2000:]}")
    return str(every[-1])


def open_page(walk: Walker, page: str, ready: str, counted: str) -> int | None:
    """Open a page in Chromium; return how many elements match once it is ready, None where there is no Chromium."""
    try:
        with Browser(walk.folder / "profile") as browser:
            browser.look(1400, 1000)
            text = browser.open((walk.folder / page).as_uri(), ready)
            require(ready in text, f"{page} does not show {ready!r}")
            number = int(browser.evaluate(f"document.querySelectorAll({counted!r}).length"))
    except pytest.skip.Exception:
        return None
    require(number > 0, f"{page} has nothing like {counted}")
    return number


def quickstart(walk: Walker) -> None:
    """Run the README's quickstart."""
    said = walk.deft("quickstart", "README.md", command("README.md", "configs/quickstart.yaml"), folder="first")
    walk.see(one(r"test/exact_match: .*", said))


def look(walk: Walker, examples: int) -> None:
    """Look at rows, ask the model about them, and open both pages."""
    said = walk.deft("look at the rows", QUICKSTART, command(QUICKSTART, "preview"))
    shown = open_page(walk, "preview.html", "supervised", "span")
    walk.see(one(r"train: (\d+ examples, \d+ tokens, \d+% supervised)", said), spans=shown)
    words = command(QUICKSTART, "probe", "--audit", "--page")
    words[words.index("--examples") + 1] = str(examples)
    said = walk.deft("ask the model", QUICKSTART, words)
    ranked = len((walk.folder / "audit.jsonl").read_text().splitlines())
    require(ranked > 0, "the audit ranks no row")
    walk.see(one(r"noise: ([^(;]+?)(?: \(|,)", " ".join(said.split())), ranked=ranked)
    with walk.step("open the gate page", QUICKSTART, "gate.html"):
        tokens = open_page(walk, "gate.html", "suspicion", "#rows .t")
    walk.see("not opened: there is no Chromium here" if tokens is None else f"{tokens} tokens, coloured", tokens=tokens)


def train(walk: Walker, steps: int) -> None:
    """Train adapters without suspicious rows; stop by Ctrl-C, resume, and compare with a run that nobody stopped."""
    few = ["--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"]
    words = command(QUICKSTART, "fit", "deft:model/lora", "--data.exclude")
    said = walk.deft("train, and press Ctrl-C", QUICKSTART, words, *few, interrupt=r"step +2/")
    require("stopping after this step" in said, f"Ctrl-C was not heard: {said[-2000:]}")
    stopped = int(one(r"step=(\d+)\.ckpt", said))
    require(1 < stopped < steps, f"stopped at step {stopped}")
    left_out = one(r"left out (\d+) of", said)
    require(int(left_out) > 0, "no row was left out")
    walk.see(f"{left_out} rows left out; stopped after step {stopped}", left_out=int(left_out), stopped=stopped)
    said = walk.deft("resume", QUICKSTART, command(QUICKSTART, "fit", "--ckpt_path"))
    require(f"step {steps}/{steps}" in said, "the resumed run did not reach its end")
    walk.see(one(r"val/nll: .*", said))
    walk.deft("the same without Ctrl-C", QUICKSTART, words, *few, folder="whole", inputs=("audit.jsonl",))
    paths = [home / "adapter" / "adapter_model.safetensors" for home in (walk.run(1), walk.run(0, "whole"))]
    off = largest_difference(*map(load_file, paths))
    require(off == 0, f"the resumed run differs from one that was not stopped by {off}")
    walk.see("the same weights: largest difference 0.0", largest_difference=off)


def serve(walk: Walker, question: str) -> None:
    """Export, load in transformers and ask."""
    walk.deft("export", QUICKSTART, command(QUICKSTART, "export"))
    files = sorted(path.name for path in (walk.folder / "my-model").iterdir())
    require({"model.safetensors", "config.json", "README.md"} <= set(files), f"the export holds {files}")
    walk.see(f"{len(files)} files, the card among them", files=files)
    tail = ASK.format(question=question, base=walk.model, adapter=str(walk.run(1) / "adapter"))
    said = found(walk.script("load in transformers", EXPORT, blocks(read(EXPORT), "python")[0] + tail))
    require(said["off"] < 1e-4, f"merged weights predict otherwise than base and adapters: {said['off']}")
    walk.see("it answers; logits as of base and adapters", **said)


def use_in_trl(walk: Walker, rows: list[dict[str, str]]) -> None:
    """Train with DEFT in TRL's SFTTrainer."""
    with (walk.folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            prompt, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": row["response"]}
            print(json.dumps({"prompt": [prompt], "completion": [answer]}), file=file)
    code = blocks(read(TRL), "python")[0]
    few = "logging_steps=1, use_cpu=True, max_steps=3, per_device_train_batch_size=4"
    require("logging_steps=5" in code, f"{TRL} sets logging_steps=5 no longer")
    logged = found(walk.script("DEFT in TRL", TRL, code.replace("logging_steps=5", few) + LOGGED))
    require([row["step"] for row in logged] == [1, 2, 3], f"TRL logged {logged}")
    require(all(0 < row["gate/mean"] <= 1 for row in logged), f"no gate: {logged}")
    walk.see(f"three steps, mean gate {logged[-1]['gate/mean']:.2f}", logged=logged)


def add_an_objective(walk: Walker, steps: int) -> None:
    """Write the objective of the tutorial and train with it."""
    code = blocks(read(OWN), "python")[0]
    (walk.folder / "trust.py").write_text(code, encoding="utf-8")
    lines = code_lines(code)
    require(lines <= 10, f"the objective of {OWN} has {lines} lines")
    name = command(OWN, "fit", "--model.objective")
    given = name[name.index("--model.objective") :][:2]
    few = ["--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"]
    said = walk.deft(
        "add an objective", OWN, command(QUICKSTART, "fit", "deft:model/lora", "--data.exclude"), *given, *few
    )
    card = (walk.run(2) / "export" / "README.md").read_text(encoding="utf-8")
    require("Trust(" in card, "the card does not name the objective")
    walk.see(one(r"val/nll: .*", said), lines=lines)


def main() -> None:
    """Walk, print a table, and write the minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an instruction model")
    parser.add_argument("--rows", type=Path, required=True, help="a list of rows of instruction, input and response")
    parser.add_argument("--first", type=int, default=120, help="rows of the file that are used")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--examples", type=int, default=120, help="rows that the probe reads at most")
    parser.add_argument("--folder", type=Path, help="where to walk; default: a folder that is removed")
    parser.add_argument("--without", nargs="*", default=[], choices=["quickstart", "trl"], help="steps to leave out")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = json.loads(given.rows.read_text(encoding="utf-8"))[: given.first]
    with tempfile.TemporaryDirectory() as temporary:
        walk = Walker((given.folder or Path(temporary)).resolve(), given.model, rows)
        if "quickstart" not in given.without:
            quickstart(walk)
        look(walk, given.examples)
        train(walk, given.steps)
        serve(walk, rows[0]["instruction"])
        if "trl" not in given.without:
            use_in_trl(walk, rows)
        add_an_objective(walk, given.steps)
    print(table(walk.steps))
    if given.output:
        told = {"rows": len(rows), "steps_of_a_run": given.steps, "walk": walk.steps}
        given.output.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
