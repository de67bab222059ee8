"""The site in a real browser: readable in both palettes, no wider than a phone, nothing from other hosts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser
from docs_site import built_site  # noqa: F401 - the fixture `site`
from worlds import ROOT

pytestmark = pytest.mark.slow
CONTRAST = (ROOT / "tests" / "contrast.js").read_text(encoding="utf-8")
PAGES = ["index.html", "guides/monitors.html", "guides/coming_from.html", "api/objectives.html", "contributing.html"]
STATE = """JSON.stringify({
  ready: document.readyState,
  at: location.pathname,
  scheme: document.body?.dataset.mdColorScheme,
  wide: document.scrollingElement?.scrollWidth - innerWidth,
  hosts: [...new Set(performance.getEntriesByType("resource").map(entry => new URL(entry.name).hostname))],
})"""


class Quiet(SimpleHTTPRequestHandler):
    """A server that does not log."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all pages."""
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def visit(browser: Browser, url: str) -> dict[str, object]:
    """Open a page and return its state once it is loaded."""
    browser.call("Page.navigate", url=url)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)
        state: dict[str, object] = json.loads(browser.evaluate(STATE) or "{}")
        if state.get("ready") == "complete" and url.endswith(str(state.get("at"))) and state.get("scheme"):
            return state
    raise AssertionError(f"{url} did not load in a minute")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_is_readable_and_stands_alone(page: str, dark: bool, width: int, address: str, browser: Browser) -> None:
    browser.look(width, 900, dark)
    state = visit(browser, f"{address}/{page}")
    assert state["scheme"] == ("slate" if dark else "default")
    assert state["hosts"] == ["127.0.0.1"]
    assert int(str(state["wide"])) <= 0
    assert browser.evaluate(CONTRAST) == ""


def test_the_search_finds_a_word_of_the_glossary(address: str, browser: Browser) -> None:
    browser.look(1280, 900)
    visit(browser, f"{address}/index.html")
    browser.click("input.md-search__input")
    browser.call("Input.insertText", text="room for choice")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.3)
        if "Room for choice" in (
            browser.evaluate("document.querySelector('.md-search-result__list')?.innerText") or ""
        ):
            return
    raise AssertionError(browser.evaluate("document.querySelector('.md-search-result')?.innerText"))


def test_the_contrast_of_grey_on_grey_is_found(address: str, browser: Browser) -> None:
    browser.look(1280, 900)
    visit(browser, f"{address}/index.html")
    browser.evaluate("document.querySelector('h1').innerHTML = '<span style=\"font-size:12px;color:#999\">grey</span>'")
    assert "span grey" in browser.evaluate(CONTRAST)
