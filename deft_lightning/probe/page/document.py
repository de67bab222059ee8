"""The HTML file: style, script and packed data in one, which needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from html import escape
from importlib.resources import files

SCRIPTS = ("numbers.js", "state.js", "rows.js", "panel.js")  # one script, in this order


def document(title: str, parts: Mapping[str, bytes]) -> str:
    """Return the HTML of a page.

    What is the user's is in it deflated and in base64, so that no text of a row can be markup. A policy lets nothing
    run but this script, and nothing be loaded.

    Args:
        title: Of the page.
        parts: Data for the script, by the id of the element that holds it.
    """
    folder = files("deft_lightning.probe.page") / "web"
    style, body, *scripts = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.html", *SCRIPTS)
    )
    script = "".join(scripts)
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    packed = "\n".join(
        f'<script type="application/octet-stream" id="{name}">{_base64(zlib.compress(part, 9))}</script>'
        for name, part in parts.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n{packed}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _hash(content: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(content.encode()).digest())}'"
