"""A headless browser for tests, spoken to through a pipe: what a page shows, and how it looks."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

# All text of the page, inside web components too.
TEXT = """(() => {
  const found = [];
  const walk = node => {
    if (node.shadowRoot) walk(node.shadowRoot);
    for (const child of node.childNodes) {
      if (child.nodeType !== Node.TEXT_NODE) walk(child);
      else if (child.parentNode.nodeName !== 'STYLE' && child.parentNode.nodeName !== 'SCRIPT')
        found.push(child.textContent.trim());
    }
  };
  walk(document.body);
  return found.filter(text => text).join('\\n');
})()"""

# The browser reads from descriptor 3 and writes to 4; the pipes may hold either number for another end.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in enumerate(ends, start=3):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Chromium with one page; the test is skipped where there is none."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if program is None:
            pytest.skip("there is no chromium here")
        (there, self._out), (self._in, back) = os.pipe(), os.pipe()
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--remote-debugging-pipe", "--window-size=1400,1800",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(there), str(back), *command],
            pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)}, start_new_session=True,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self._number, self._rest, self._session = 0, b"", ""

    def __enter__(self) -> Self:
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with all its helpers
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something and return its answer."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps({"id": self._number, "method": method, "params": params, **session}).encode())
        os.write(self._out, b"\0")
        end = time.monotonic() + 30
        while True:
            while b"\0" not in self._rest:
                ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
                more = os.read(self._in, 1 << 16) if ready else b""
                if not more:
                    raise RuntimeError(f"the browser does not answer {method}")
                self._rest += more
            message, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(message)
            if answer.get("id") == self._number:
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """Return the value of a script in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str, *awaited: str, gone: str | None = None, seconds: float = 45) -> str:
        """Open a page and return its text, once it has everything awaited and no more of `gone`, or the time is up."""
        self.call("Page.navigate", url=url)
        end, text = time.monotonic() + seconds, ""
        while time.monotonic() < end and not (
            text and all(word in text for word in awaited) and (gone is None or gone not in text)
        ):
            time.sleep(0.3)
            text = self.evaluate(TEXT) or ""
        return text

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the window, a phone's below 600, and what the system prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def point(self, selector: str) -> tuple[float, float]:
        """Move the mouse to the first element that matches, scrolled into view, and return where it is."""
        script = f"""(() => {{
          const node = document.querySelector({json.dumps(selector)});
          node.scrollIntoView({{block: "center"}});
          const box = node.getClientRects()[0];
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.evaluate(script)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str) -> None:
        """Click the first element that matches."""
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys one after another: letters, or names such as `ArrowRight`."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
            code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def screenshot(self, path: Path) -> Path:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path
