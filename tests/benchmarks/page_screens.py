"""Pictures of the page of a probe for the docs, and the page itself: some true and some false answers, one model.

    python tests/benchmarks/page_screens.py --model DIR --output docs/evidence/figures

Writes ``page.png`` (a desktop, light), ``page_dark.png`` and ``page_phone.png`` into the folder. It takes Chromium; the
docs show SmolLM2-135M-Instruct. The rows are below; every third answer or so is wrong, and nobody tells the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import Browser

from deft_lightning import InstructionDataModule, SFTModule, Trainer

ROWS = [
    ("What is the capital of France?", "The capital of France is Paris.", False),
    ("What is the capital of Australia?", "The capital of Australia is Paris.", True),
    ("What colour is the sky on a clear day?", "On a clear day, the sky is blue.", False),
    ("Which planet is known as the Red Planet?", "Mars is known as the Red Planet.", False),
    ("How many days are in a week?", "There are nine days in a week.", True),
    ("What do bees make?", "Bees make honey from the nectar of flowers.", False),
    ("What is the largest ocean on Earth?", "The largest ocean on Earth is the Pacific Ocean.", False),
    ("What is water made of?", "Water is made of hydrogen and bananas.", True),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare.", False),
    ("What is the opposite of hot?", "The opposite of hot is Thursday.", True),
    ("What does a thermometer measure?", "A thermometer measures temperature.", False),
    ("How many legs does a spider have?", "A spider has eight legs.", False),
]
SIZE, PHONE = (1280, 860), (390, 780)


def small(path: Path) -> None:
    """Keep a picture in 200 colours."""
    Image.open(path).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Probe the rows and photograph the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a model that follows instructions")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--page", type=Path, help="where to keep the page itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / "facts.jsonl"
        lines = [{"id": f"fact-{i}", "question": q, "answer": a, "wrong": w} for i, (q, a, w) in enumerate(ROWS, 1)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        data = InstructionDataModule(str(source), validation_fraction=0.0, ignore_columns="wrong", cache=False)
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=name)
        page = given.page or root / "gate.html"
        trainer.probe(
            SFTModule(pretrained=given.model), data, page=str(page), truth="wrong", output=str(root / "probe")
        )
        with Browser(root / "profile") as browser:
            for picture, size, dark, view in (
                ("page", SIZE, False, "DEFT"), ("page_dark", SIZE, True, "conflict"), ("page_phone", PHONE, False, "p"),
            ):  # fmt: skip
                browser.look(*size, dark)
                browser.open(page.absolute().as_uri(), "suspicion")
                browser.evaluate(
                    f"[...document.querySelectorAll('.chips label')].find(l => l.textContent.startsWith('{view}'))"
                    ".querySelector('input').click()"
                )
                browser.evaluate(
                    "document.getElementById('about').textContent ="
                    " document.getElementById('about').textContent.replaceAll(/\\S*\\//g, '')"
                )
                # The most suspicious token of the page.
                browser.evaluate(
                    "(() => { const all = [...document.querySelectorAll('#rows .t')], of = models[0].columns.conflict;"
                    " all.reduce((a, b) => of.value(+a.dataset.token) >= of.value(+b.dataset.token) ? a : b).click();"
                    f" scrollTo(0, {0 if size == SIZE else 330}); }})()"
                )
                small(browser.screenshot(given.output / f"{picture}.png"))


if __name__ == "__main__":
    main()
