"""A hub of one repository on this machine: as much of its HTTP API as creating it and uploading a folder takes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub has seen, and how it answers.

    Attributes:
        refusals: path prefix -> (status, message) of an answer in place of the usual one.
        lfs: whether files of weights go to LFS, or all into the commit.
        files: path in the repository -> content, once committed.
        tokens: the ``Authorization`` headers of all requests.
    """

    url: str = ""
    exists: bool = False
    private: bool = False
    lfs: bool = False
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        for prefix, (status, message) in self.refusals.items():
            if path.startswith(prefix):
                return status, {"error": message}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            created = self.created[-1]
            if self.exists:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/me/tiny"}
            self.exists = True
            return 200, {"url": f"{self.url}/{created['organization']}/{created['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": self._mode(n), "shouldIgnore": False} for n in names]}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [o | {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in wanted],
            }
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                self._commit(json.loads(line))
            return 200, {"commitUrl": f"{self.url}/me/tiny/commit/abc", "commitOid": "abc"}
        if path.endswith("/tree/main"):
            return 200, [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()]
        if path.startswith("/api/models/") and method == "GET":
            known = {"id": "me/tiny", "sha": "abc", "private": self.private}
            return (200, known) if self.exists else (404, {"error": "Repository not found"})
        return 404, {"error": f"{method} {path}: not here"}

    def _mode(self, name: str) -> str:
        return "lfs" if self.lfs and name.endswith(".safetensors") else "regular"

    def _commit(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "deletedFile":
            del self.files[value["path"]]
        elif line["key"] == "file":
            assert value["encoding"] == "base64"
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = self.objects[value["oid"]]
            assert sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            self.files[value["path"]] = content


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at ``hub.url`` for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization"))
            status, value = hub.answer(self.command, path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        do_GET = do_POST = do_PUT = do_HEAD = _reply

        def log_message(self, *arguments: Any) -> None:
            """Nothing: the test looks at `hub.requests`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
