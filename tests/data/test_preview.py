"""The page of examples: every letter, the right classes, and nothing that the data could smuggle in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deft_lightning import InstructionDataModule
from deft_lightning.__main__ import main
from deft_lightning.data import Noise, TokenReplace

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
# Far too big to build here: whoever asks for a preview does not wait for weights.
HUGE = [
    "--model.architecture.model_type", "llama", "--model.architecture.hidden_size", "65536",
    "--model.architecture.intermediate_size", "262144", "--model.architecture.num_hidden_layers", "500",
    "--model.architecture.num_attention_heads", "64",
]  # fmt: skip
Preview = Callable[..., "Page"]


class Span(NamedTuple):
    kind: str
    note: str
    text: str


class Article(NamedTuple):
    header: str
    spans: list[Span]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    def of(self, *kinds: str) -> str:
        return "".join(span.text for span in self.spans if span.kind in kinds)

    @property
    def counts(self) -> dict[str, int]:
        found = re.findall(r"(\d+) (tokens|supervised|noisy|cut off)", self.header.split(": ", 1)[1])
        return {name: int(count) for count, name in found}


class Page(HTMLParser):
    """What a browser would make of the page: its articles, and every tag and attribute there is."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html, self.articles, self.tags = html, list[Article](), Counter[str]()
        self.attributes: set[str] = set()
        self._stack: list[str] = []
        self._paragraph: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self._stack.append(tag)
        if tag == "article":
            self.articles.append(Article("", []))
        if tag == "span" and "article" in self._stack:
            given = dict(attrs)
            self.articles[-1].spans.append(Span(given["class"] or "", given.get("title") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag  # well nested

    def handle_data(self, data: str) -> None:
        if "article" not in self._stack:
            return
        last = self.articles[-1]
        if self._stack[-1] == "header":
            self.articles[-1] = last._replace(header=last.header + data)
        elif self._stack[-1] == "span":
            last.spans[-1] = last.spans[-1]._replace(text=last.spans[-1].text + data)
        else:
            assert not data.strip(), data  # a token outside any span has no class


@pytest.fixture
def preview(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Preview:
    """Write a page through the command line in this process, and read it."""

    def call(rows: Iterable[object], *options: str, output: str = "page.html") -> Page:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [
            "deft_lightning", "preview", *HUGE, "--data.source", str(source), "--data.validation_fraction", "0",
            "--output", output, *options,
        ])  # fmt: skip
        main()
        return Page((tmp_path / output).read_text(encoding="utf-8"))

    return call


WORDS = ["naïve", "Ünïcödé", "日本語", "😀😀", "👩‍👩‍👧‍👦", "é", "🇫🇷", "a\tb", "x  y", "\n\n", "٣", "ok"]


def three_talks(count: int) -> list[dict[str, str]]:
    pick = [WORDS[(7 * i + i // 5) % len(WORDS)] for i in range(6 * count)]
    return [
        {"id": f"t{i}", "question": " ".join([str(i), *pick[i : i + 3]]), "answer": " ".join([*pick[2 * i :][:4], "."])}
        for i in range(count)
    ]


def rendered(row: dict[str, str]) -> str:
    return f"<|user|>{row['question']}<|end|><|assistant|>{row['answer']}<|end|>"


def letters(text: str) -> int:
    """Tokens of a text of one-byte letters, one token a byte and one a marker."""
    return len(re.sub(r"<\|\w+\|>", "#", text))


def ready(folder: Path, **options: Any) -> InstructionDataModule:
    """The data of the page once more, to count in its tensors."""
    data = InstructionDataModule(str(folder / "rows.jsonl"), **{"validation_fraction": 0.0, "batch_size": 1, **options})
    data.setup("fit")
    return data


def batches_by_id(data: InstructionDataModule) -> dict[str, dict[str, Any]]:
    return {batch["example_id"][0]: batch for batch in data.train_dataloader()}


def by_id(page: Page) -> dict[str, Article]:
    found = {article.header.split(": ", 1)[0]: article for article in page.articles}
    assert len(found) == len(page.articles)
    return found


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 400])
def test_every_letter_is_there_and_the_response_alone_is_learnt(preview: Preview, size: int) -> None:
    rows = three_talks(12)
    found = by_id(preview(rows, "--data.tokenizer_size", str(size)))
    assert len(found) == 12
    for row in rows:
        article = found[row["id"]]
        assert article.text == rendered(row)
        assert article.of("supervised") == f"{row['answer']}<|end|>"
        assert article.of("context") == f"<|user|>{row['question']}<|end|><|assistant|>"


def test_letters_of_which_some_bytes_are_noisy_are_still_whole(preview: Preview) -> None:
    rows = three_talks(12)
    op = {"class_path": "TokenReplace", "init_args": {"rate": 0.3}}
    page = preview(rows, "--data.tokenizer_size", "0", "--data.noise.ops", json.dumps([op]))
    assert any(span.kind == "noisy" for article in page.articles for span in article.spans)
    found = by_id(page)
    # The labels are wrong, what is read is not.
    assert {id: article.text for id, article in found.items()} == {row["id"]: rendered(row) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("length", [20, 21, 22, 23])  # within a letter of four bytes, wherever it begins
def test_a_letter_that_is_cut_in_two_is_shown_once(preview: Preview, length: int, keep: str) -> None:
    rows = [{"id": "only", "question": "😀", "answer": "😀😀😀😀😀😀😀"}]
    page = preview(
        rows, "--data.tokenizer_size", "0", "--data.max_length", str(length), "--data.keep", keep
    )  # fmt: skip
    (article,) = page.articles
    assert article.text == rendered(rows[0])
    assert article.counts["cut off"] > 0


def metaspace(folder: Path) -> str:
    """A tokenizer that writes blanks as ▁ and puts one before the first word, as those of sentencepiece do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["user assistant im_start is it a b ok . what the answer"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "metaspace")
    return str(folder / "metaspace")


def stories_model(folder: Path) -> str:
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [metaspace, stories_model])
@pytest.mark.parametrize("rate", ["0", "0.3"])
def test_blanks_of_a_sentencepiece_tokenizer_are_kept(
    preview: Preview, tmp_path: Path, make: Callable[[Path], str], rate: str
) -> None:
    rows = [
        {"id": f"t{i}", "question": f"what is  {i} ?", "answer": f"it is\n {i} . ok  a b naïve 😀 is ok"}
        for i in range(6)
    ]
    op = {"class_path": "TokenReplace", "init_args": {"rate": float(rate)}}
    folder = make(tmp_path)
    found = by_id(preview(rows, "--data.tokenizer", folder, "--data.noise.ops", json.dumps([op])))
    data = ready(tmp_path, tokenizer=folder, noise=Noise(ops=[TokenReplace(float(rate))]))
    assert found.keys() == batches_by_id(data).keys()
    for id, batch in batches_by_id(data).items():
        assert found[id].text == data.tokenizer.decode(batch["input_ids"][0].tolist())
        assert f"what is  {id[1:]} ?" in found[id].text and f"it is\n {id[1:]} . ok  a b naïve 😀" in found[id].text


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_the_classes_count_as_many_tokens_as_the_tensors(
    preview: Preview, tmp_path: Path, supervise: str, keep: str
) -> None:
    # One token a letter: what the page marks can be counted.
    rows = [{"id": f"t{i}", "question": f"q{i}" * 5, "answer": f"a{i} " * (3 + i) + "."} for i in range(16)]
    op = {"class_path": "TokenReplace", "init_args": {"rate": 0.2}}
    page = preview(
        rows, "--data.tokenizer_size", "0", "--data.noise.ops", json.dumps([op]), "--data.max_length", "48",
        "--data.supervise", supervise, "--data.keep", keep,
    )  # fmt: skip
    data = ready(
        tmp_path, tokenizer_size=0, noise=Noise(ops=[TokenReplace(0.2)]), max_length=48, supervise=supervise, keep=keep
    )
    expected, found = batches_by_id(data), by_id(page)
    assert found.keys() == expected.keys() and len(found) == 16
    cuts = 0
    for row in rows:
        batch, article = expected[row["id"]], found[row["id"]]
        learnt, noisy = batch["labels"][0] != -100, batch["noise_code"][0] > 0
        size, whole = len(learnt), letters(rendered(row))
        assert article.counts == {
            key: value
            for key, value in {
                "tokens": size, "supervised": int(learnt.sum()), "noisy": int(noisy.sum()), "cut off": whole - size,
            }.items()
            if value or key in ("tokens", "supervised")
        }  # fmt: skip
        assert letters(article.of("supervised")) == int((learnt & ~noisy).sum())
        assert letters(article.of("noisy")) == int(noisy.sum())
        assert letters(article.of("context")) == int((~learnt).sum())
        assert article.text == rendered(row) or whole - size > 32  # more than that is counted, not shown
        cuts += whole > size
        # Place by place, not in number alone.
        kinds = [span.kind for span in article.spans for _ in range(letters(span.text)) if span.kind != "cut"]
        names = ["noisy" if n else "supervised" if s else "context" for n, s in zip(noisy, learnt, strict=True)]
        assert kinds == names
    assert cuts > 5


def test_a_noisy_token_says_what_is_learnt_instead_and_who_did_it(preview: Preview, tmp_path: Path) -> None:
    rows = [{"id": f"t{i}", "question": f"q{i}", "answer": f"answer {i}"} for i in range(9)]
    ops = [
        {"class_path": "ResponseSwap", "init_args": {"rate": 0.0}},
        {"class_path": "TokenReplace", "init_args": {"rate": 0.1}},
    ]
    page = preview(rows, "--data.tokenizer_size", "0", "--data.noise.ops", json.dumps(ops))
    notes = [span.note for article in page.articles for span in article.spans if span.kind == "noisy"]
    assert notes and all(re.fullmatch(r"learnt as .+, TokenReplace", note) for note in notes)
    assert not [span for article in page.articles for span in article.spans if span.note and span.kind != "noisy"]


def test_a_swapped_response_is_noisy_though_its_labels_are_what_is_read(preview: Preview, tmp_path: Path) -> None:
    rows = [{"id": f"t{i}", "question": f"q{i}", "answer": f"answer {i}"} for i in range(12)]
    op = {"class_path": "ResponseSwap", "init_args": {"rate": 0.5}}
    found = by_id(preview(rows, "--data.tokenizer_size", "0", "--data.noise.ops", json.dumps([op])))
    swapped = 0
    for row in rows:
        article = found[row["id"]]
        truth = f"{row['answer']}<|end|>"
        learnt, noisy = article.of("supervised"), article.of("noisy")
        assert (learnt == truth and not noisy) or (not learnt and noisy != truth and noisy.endswith("<|end|>"))
        assert [span.note for span in article.spans if span.kind == "noisy"] == ["ResponseSwap"] * bool(noisy)
        swapped += bool(noisy)
    assert 2 < swapped < 12


def test_tokens_far_behind_the_cut_are_counted(preview: Preview) -> None:
    row = {"id": "long", "question": "q", "answer": "a" * 500}
    (article,) = preview([row], "--data.tokenizer_size", "0", "--data.max_length", "50").articles
    assert article.counts == {"tokens": 50, "supervised": 46, "cut off": letters(rendered(row)) - 50}
    shown = article.of("cut")
    (hidden,) = map(int, re.findall(r"(\d+) more tokens", shown))
    assert hidden + shown.count("a") == letters(rendered(row)) - 50


# --- the page --------------------------------------------------------------------------------------------------------

NASTY = [
    {
        "id": "<b>&amp;",
        "question": "</pre><script>alert(1)</script>",
        "answer": "\"quoted\" & <img onerror=x> 'it' &lt;",
    },
    {"id": "two", "question": "<!-- no", "answer": "</span></article><style>body{display:none}</style>"},
]


def test_markup_in_the_data_is_text(preview: Preview) -> None:
    op = {"class_path": "TokenReplace", "init_args": {"rate": 0.5}}
    page = preview(NASTY, "--data.tokenizer_size", "0", "--data.noise.ops", json.dumps([op]))
    assert {id: article.text for id, article in by_id(page).items()} == {row["id"]: rendered(row) for row in NASTY}
    assert "<script" not in page.html.lower() and "<img" not in page.html.lower() and "<b>" not in page.html
    assert page.tags["article"] == 2 and page.tags["style"] == 1 and page.tags["script"] == page.tags["img"] == 0
    assert page.attributes <= {"class", "title", "lang", "charset", "name", "content"}


def test_the_page_needs_nothing_but_itself(preview: Preview) -> None:
    page = preview(three_talks(3))
    for word in ("http", "src=", "href", "url(", "@import", "<script", "<link", "<iframe"):
        assert word not in page.html.lower(), word
    assert 'charset="utf-8"' in page.html and page.html.startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "shown"), [("1", 1), ("5", 5), ("12", 12), ("99", 12)])
def test_as_many_different_examples_as_asked_for(preview: Preview, asked: str, shown: int) -> None:
    assert len(by_id(preview(three_talks(12), "--examples", asked))) == shown


@pytest.mark.slow
def test_pages_of_the_validation_examples(preview: Preview) -> None:
    split = ["--data.validation_fraction", "0.4"]
    op = {"class_path": "TokenReplace", "init_args": {"rate": 0.5}}
    noise = ["--data.noise.ops", json.dumps([op]), "--data.noise.splits", '["train", "validation"]']
    pages = {
        name: by_id(preview(three_talks(30), *split, *noise, "--split", name, "--examples", "99"))
        for name in ("train", "validation", "validation_noisy")
    }
    assert pages["validation"].keys() == pages["validation_noisy"].keys()
    assert not pages["train"].keys() & pages["validation"].keys()
    assert len(pages["train"]) + len(pages["validation"]) == 30
    assert not any(article.of("noisy") for article in pages["validation"].values())
    assert all(article.of("noisy") for article in pages["validation_noisy"].values())


def test_a_preview_prints_where_the_page_is_and_two_examples(
    preview: Preview, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": f"t{i}", "question": f"q{i}", "answer": f"answer {i}"} for i in range(9)]
    with caplog.at_level("INFO"):
        preview(rows, output="deep/below/page.html")
    said = caplog.text + "".join(capfd.readouterr())
    assert str(tmp_path / "deep" / "below" / "page.html") in said
    assert len({line for line in said.splitlines() if "<|assistant|>[answer" in line}) == 2
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.safetensors"))


def failed(call: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data.source", "./nothing.jsonl"], ["./nothing.jsonl", "--data.source"]),
        (["--split", "validatoin"], ["validatoin", "validation"]),
        (["--examples", "0"], ["--examples"]),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_one_line(
    preview: Preview, capfd: pytest.CaptureFixture[str], options: list[str], says: list[str]
) -> None:
    line = failed(lambda: preview(three_talks(3), *options), capfd)
    assert all(word in line for word in says)


def test_a_split_without_examples_is_said_to_be_empty(preview: Preview, capfd: pytest.CaptureFixture[str]) -> None:
    # A page of no examples would look like a page that failed.
    assert "validation" in failed(lambda: preview(three_talks(3), "--split", "validation"), capfd)


def test_without_any_source_the_option_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["deft_lightning", "preview", *HUGE])
    assert "--data.source" in failed(main, capfd)
    assert not (tmp_path / "preview.html").exists()


# --- a browser -------------------------------------------------------------------------------------------------------


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium here")
    return found


def opened(page: Path, profile: Path) -> tuple[str, str]:
    """The document as the browser has it once it is loaded, and what the browser's console says."""
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0",
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_a_browser_finds_the_same_articles_and_nothing_to_complain_of(preview: Preview, tmp_path: Path) -> None:
    browser()
    op = {"class_path": "TokenReplace", "init_args": {"rate": 0.3}}
    rows = [*NASTY, *three_talks(8)]
    page = preview(
        rows, "--data.tokenizer_size", "400", "--data.noise.ops", json.dumps([op]), "--data.max_length", "30"
    )
    html, console = opened(tmp_path / "page.html", tmp_path / "profile")
    seen = Page(html)
    assert len(seen.articles) == len(page.articles) > 4 and console == ""
    assert seen.tags["script"] == seen.tags["img"] == 0

    def classes(page: Page) -> Counter[str]:
        return Counter(span.kind for article in page.articles for span in article.spans)

    assert classes(seen) == classes(page) and set(classes(page)) == {"context", "supervised", "noisy", "cut"}
    assert [article.spans for article in seen.articles] == [article.spans for article in page.articles]


@pytest.mark.slow
def test_the_browser_would_have_complained(tmp_path: Path) -> None:
    browser()
    (tmp_path / "page.html").write_text("<!doctype html><body><script>missing()</script></body>")
    assert "missing" in opened(tmp_path / "page.html", tmp_path / "profile")[1]
