"""A hub of this machine: an HTTP server that speaks the calls by which huggingface_hub makes and fills a repository.

Large files take the way of git LFS, with their digest checked; those of the chunked storage are not spoken
(``HF_HUB_DISABLE_XET=1``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the server has and saw.

    Attributes:
        address: For ``HF_ENDPOINT``.
        repos: Private or not, by name.
        files: Content by name of the repository and path.
        calls: Method and path of every request.
        role: Of the token.
        broken: Ends of paths that are answered with an error of the server.
    """

    address: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    role: str = "write"
    broken: tuple[str, ...] = ()

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables under which a client talks to it."""
        return {
            "HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more,
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers from the hub that the server has."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        """Answer what has no valid token, and what is broken."""
        self.hub.calls.append(f"{self.command} {self.path}")
        if any(self.path.endswith(end) for end in self.hub.broken):
            self.answer({"error": "out of order"}, 500)
            return True
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/objects/"):
            self.answer({"error": "Invalid username or password."}, 401)
            return True
        return False

    def do_GET(self) -> None:
        self.body()
        if self.refused():
            return
        if self.path == "/api/whoami-v2":
            orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
            self.answer({"type": "user", "name": "ada", "orgs": orgs, "auth": {"accessToken": {"role": self.hub.role}}})
            return
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name not in self.hub.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": path.partition(":")[2]} for path in self.hub.files if path.startswith(f"{name}:")]
        self.answer(
            {"_id": "1", "id": name, "private": self.hub.repos[name], "sha": "0" * 40, "siblings": siblings, "tags": [],
             "downloads": 0, "likes": 0}
        )  # fmt: skip

    def do_PUT(self) -> None:
        data = self.body()
        if self.refused():
            return
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if name in self.hub.repos:
                self.answer({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
                return
            self.hub.repos[name] = asked.get("visibility") == "private"
            self.answer({"url": f"{self.hub.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            text = json.loads(data)["content"]
            found = yaml.safe_load(text.split("---")[1])
            wrong = [] if isinstance(found, dict) and found.get("library_name") else [{"message": "no metadata"}]
            self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(data)["files"]
            ]  # fmt: skip
            self.answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/objects/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], data)
        else:
            self.answer({"error": f"{self.path} is not spoken here"}, 501)

    def commit(self, name: str, data: bytes) -> None:
        for line in map(json.loads, data.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.hub.files[f"{name}:{value['path']}"] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                if hashlib.sha256(content).hexdigest() != value["oid"] or len(content) != value["size"]:
                    self.answer({"error": "another content than was announced"}, 422)
                    return
                self.hub.files[f"{name}:{value['path']}"] = content
        url = f"{self.hub.address}/{name}/commit/{'0' * 40}"
        self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})


@contextmanager
def serving(**settings: Any) -> Iterator[Hub]:
    """Serve a hub on a free port of this machine until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", **settings)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
