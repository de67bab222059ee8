"""The pages of docs: the site builds without a warning, no link is broken, nothing is fetched, sentences are short."""

from __future__ import annotations

import ast
import re
import runpy
from dataclasses import fields
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from docs_site import built_site  # noqa: F401 - the fixture `site`
from readability import sentences, words
from worlds import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LONGEST, MEDIAN = 35, 18


def name_of(page: Path) -> str:
    """The name of a test: where the page is."""
    return page.relative_to(DOCS).as_posix()


class Page(HTMLParser):
    """What a page links to, what it loads by itself, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload", "modulepreload"):
            self.loads.append(given.get("href") or "")
        elif given.get("src"):
            self.loads.append(str(given["src"]))


@cache
def read(path: Path) -> Page:
    """Read a page of the site."""
    return Page(path)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file(), page
    assert "Add an objective" in (site / "contributing.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site: Path) -> None:
    broken, seen = [], 0
    for path in site.rglob("*.html"):
        if path.name == "404.html":
            continue
        for link in [*read(path).links, *read(path).loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            seen += 1
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            place = unquote(urldefrag(link)[1])
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}: no such file")
            elif place and not place.startswith("__") and target.suffix == ".html" and place not in read(target).places:
                broken.append(f"{path.relative_to(site)}: {link}: no such place")
    assert seen > 1000
    assert not broken, "\n".join(broken)


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [load for load in read(path).loads if urlsplit(load).netloc] == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_the_api_has_every_public_name(site: Path) -> None:
    places = set().union(*(read(path).places for path in (site / "api").glob("*.html")))
    ends = {place.rpartition(".")[2] for place in places if place.startswith("deft_lightning.")}
    missing, names = [], 0
    for path in sorted((ROOT / "deft_lightning").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                listed = set(ast.literal_eval(node.value)) - {
                    "__version__"
                }  # a number; the first page of the API says it
                names += len(listed)
                missing += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(listed - ends)]
    assert names > 200
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=str)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert urlsplit(link).scheme or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_row_of_a_table_is_on_one_line(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        bars = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in table.splitlines()]
        assert len(set(bars)) == 1, table


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_options_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"(?<![\w/.-])((?:configs|docs|tests|deft_lightning)/[\w./-]+\.(?:py|ya?ml|md|json|png|svg))", text
    ):
        assert (ROOT / name).is_file() or "NAME" in name, name
    source = source_text()
    for option in set(re.findall(r"--(?:data|model|checkpoint|predictions|gate_monitor|noise_estimate)\.(\w+)", text)):
        assert re.search(rf"\b{option}\b", source), option


@cache
def source_text() -> str:
    """All of the package."""
    return "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deft_lightning").rglob("*.py"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=str)
def test_sentences_are_short(page: Path) -> None:
    said = sentences(page.read_text(encoding="utf-8"))
    assert [sentence for sentence in said if words(sentence) > LONGEST] == []


def test_half_of_all_sentences_have_few_words() -> None:
    said = [sentence for page in PAGES for sentence in sentences(page.read_text(encoding="utf-8"))]
    assert len(said) > 1000
    assert median(map(words, said)) <= MEDIAN


def test_words_are_counted_in_prose_alone() -> None:
    page = """---
hide: [toc]
---

# A heading of five words

One two `--code with blanks` [four five](x.md#y). Then 6 %!

| a table | is no prose |
|---|---|

```
code of no sentence
```

    formula = 1

* an item
  goes on. And ends
* ![a picture](x.png)
"""
    assert [words(sentence) for sentence in sentences(page)] == [5, 2, 4, 2]


def test_every_figure_and_number_file_has_its_command() -> None:
    page = (DOCS / "evidence" / "index.md").read_text(encoding="utf-8")
    for path in [*(DOCS / "evidence" / "figures").iterdir(), *(DOCS / "evidence" / "data").iterdir()]:
        assert f"]({path.relative_to(DOCS / 'evidence').as_posix()})" in page, path
    for row in re.findall(r"^\| \[.*$", page, re.MULTILINE):
        assert "`python " in row or ".md)" in row, row


def test_tags_of_the_failure_modes_are_those_of_the_monitors() -> None:
    page = (DOCS / "guides" / "failure_modes.md").read_text(encoding="utf-8")
    known = "".join((DOCS / "guides" / name).read_text(encoding="utf-8") for name in ("monitors.md", "evaluation.md"))
    known = (
        known.replace("SOURCE", "<source>")
        + "`val/nll` `val/token_accuracy` `train/nll` `prob/mean` `test/<benchmark>/truncated`"
    )
    tags = re.findall(r"`((?:gate|noise|val|val_noisy|train|prob|focus|test)/[\w</>]+)`", page)
    assert len(tags) > 10
    assert [tag for tag in tags if f"`{tag}`" not in known] == []


def test_the_words_of_the_glossary_are_linked_from_other_pages() -> None:
    glossary = (DOCS / "concepts" / "glossary.md").read_text(encoding="utf-8")
    places = {
        heading.lower().replace(",", "").replace(" ", "-")
        for heading in re.findall(r"^## (.*)$", glossary, re.MULTILINE)
    }
    linked = set(re.findall(r"glossary\.md#([\w-]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert linked <= places
    assert linked >= {"gate", "focus", "collision", "ess", "locked", "chance"}


# Of the column of TRL: names of peft, of Transformers, of columns and of methods.
NOT_OF_THE_CONFIG = {
    "lora_alpha", "target_modules", "modules_to_save", "merge_and_unload", "attn_implementation", "BitsAndBytesConfig",
    "TrainingArguments", "messages", "prompt", "completion", "text", "datasets",
}  # fmt: skip


@pytest.mark.slow
def test_the_names_and_defaults_of_trl_are_those_of_the_installed_version() -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[test]'")
    held = {field.name: field.default for field in fields(trl.SFTConfig)}
    page = (DOCS / "guides" / "coming_from.md").read_text(encoding="utf-8")
    assert f"TRL {trl.__version__.rpartition('.')[0]}" in page
    rows = [row for row in re.findall(r"^\| (?!here).*\|$", page, re.MULTILINE) if "---" not in row]
    names = {name for row in rows for name in re.findall(r"`(\w+)(?:: \w+)?`", row.split(" | ")[1])}
    assert len(names) > 20
    assert names - NOT_OF_THE_CONFIG - set(held) == set()
    defaults = [
        pair
        for row in rows
        for pair in re.findall(
            r"`(\w+)`(?:, default| the default)? (true|false|[a-z]+|[\d.e-]*\d)(?= \||,|$)", row.split(" | ")[1] + " |"
        )
    ]
    assert len(defaults) >= 9
    for name, said in defaults:
        assert str(held[name]).lower() == said or float(held[name]) == float(said), (name, said, held[name])


@pytest.mark.slow
def test_the_python_of_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        file = tmp_path / f"block{number}.py"
        file.write_text(block, encoding="utf-8")
        assert "loss" in runpy.run_path(str(file)) or (tmp_path / "my-model" / "model.safetensors").is_file()
