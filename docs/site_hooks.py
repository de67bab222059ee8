"""Hooks of the site: pages that are files of the repository, and links that lead out of the site.

``contributing.md`` and ``changelog.md`` show CONTRIBUTING.md and CHANGELOG.md, with links as they are from ``docs/``. A
link to a file of the package or the tests becomes a link into the repository if ``repo_url`` is set, and else its text.
Short pieces of code stay on one line: an option is hard to read with its dashes on the line before. A figure leads to
itself, so that a phone can enlarge it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
SHORT = re.compile(r"<code>(?=[^<]{1,30}</code>)")
FIGURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*/?>')
OPTIONAL = {"guides/trl.md": ("Guides", "In TRL's trainer")}  # pages that have a place once they are written
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Give optional pages that are there a place at the end of their section."""
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    for page, (section, title) in OPTIONAL.items():
        if (ROOT / "docs" / page).is_file():
            sections[section].append({title: page})
    return config


def on_page_markdown(markdown: str, /, *, page: Any, config: Any, files: Any) -> str:
    """Return the text of a page with what it includes, its links leading somewhere."""
    path = page.file.src_uri
    place = posixpath.join("docs", path)
    if path in INCLUDED:
        place = INCLUDED[path]
        markdown = (ROOT / place).read_text(encoding="utf-8")
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _link(link, place, path, config.repo_url), part) for part in parts[::2]]
    return "".join(parts)


def _link(link: re.Match[str], place: str, page: str, repository: str | None) -> str:
    """Return a link as the site has it: ``place`` is the file that it stands in, ``page`` the page that shows it."""
    text, path, anchor = link[1], link[2], link[3] or ""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    page_of = {file: name for name, file in INCLUDED.items()}
    if target == "README.md":
        target = "docs/index.md"
    target = posixpath.join("docs", page_of[target]) if target in page_of else target
    if target.startswith("docs/"):
        inside = target.removeprefix("docs/")
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / target).exists():
        return link[0]  # MkDocs names it
    if repository:
        return f"[{text}]({repository.rstrip('/')}/blob/main/{target}{anchor})"
    return text if "`" in text else f"`{text}`"


def on_page_content(html: str, /, **kwargs: Any) -> str:
    """Return a page whose short pieces of code are marked and whose figures are links."""
    html = SHORT.sub('<code class="short">', html)
    return FIGURE.sub(lambda figure: f'<a href="{figure[1]}">{figure[0]}</a>', html)
