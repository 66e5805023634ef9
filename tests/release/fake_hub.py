"""A model hub on loopback: as much of the protocol as an upload needs, with its own bookkeeping of what it was sent.

It hashes what it receives itself and keeps every request, so that a test asks the server what happened, not the client.
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

LARGE_BYTES = 100_000  # files from here on travel as LFS objects
FIRST = "0" * 40


@dataclass
class FakeHub:
    """What the hub knows: files by name, commits, every request; and how it is to misbehave."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    private: bool = False
    created: dict[str, Any] | None = None
    refuse: dict[str, int] = field(default_factory=dict)  # part of a path: status
    damage: str | None = None  # this file is stored otherwise than it was sent

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in sorted(self.files.items()):
            blob = hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name in self.large:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def commit(self, lines: list[dict[str, Any]]) -> None:
        self.commits.append({"lines": lines})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
                self.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        if self.damage in self.files:
            content = bytearray(self.files[self.damage])
            content[0] ^= 1
            self.files[self.damage] = bytes(content)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Answer(BaseHTTPRequestHandler):
    """One request; the protocol's version keeps each on a connection of its own."""

    hub: FakeHub

    def do_GET(self) -> None:
        if self._refused():
            return
        if "/tree/" in self.path:
            self._send(self.hub.tree())
        else:
            sha = f"{len(self.hub.commits):040d}"
            self._send({"id": "me/repo", "sha": sha, "private": self.hub.private, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        hub = self.hub
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self._send({"url": f"{hub.url}/me/repo", "name": "me/repo"})
        elif self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] >= LARGE_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            hub.commit([json.loads(line) for line in body.splitlines()])
            sha = f"{len(hub.commits):040d}"
            self._send({"success": True, "commitUrl": f"{hub.url}/me/repo/commit/{sha}", "commitOid": sha})
        else:
            self._send({})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._refused():
            self.hub.objects[hashlib.sha256(body).hexdigest()] = body
            self._send({})

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _refused(self) -> bool:
        """As real hubs do not, this one repeats the token in its error: nothing of it may reach the screen."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens |= {token} - {""}
        self.hub.requests.append((self.command, self.path))
        status = next((status for part, status in self.hub.refuse.items() if part in self.path), None)
        if status is not None:
            self._send({"error": f"no, not with {token}"}, status, {"X-HF-Warning": f"auth; I saw {token}"})
        return status is not None

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)
