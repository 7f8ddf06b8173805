"""A hub on this machine that takes uploads: repositories, branches, large files and commits."""

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
from urllib.parse import urlsplit

TOKEN = "hf_local"


@dataclass
class UploadHub:
    """Files by repository, branch and path; repositories that are private; large objects by SHA-256."""

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@contextmanager
def running_upload_hub() -> Iterator[UploadHub]:
    """Serve a hub on a free port while the context lasts."""
    hub = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "who?"})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[-1] == "batch":
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.hub.endpoint}/object/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif parts[4] == "branch":
            self.hub.repositories["/".join(parts[2:4])].setdefault(parts[5], {})
            self._answer(200, {})
        elif parts[4] == "preupload":
            modes = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for entry in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        else:
            self._commit("/".join(parts[2:4]), parts[5], body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = {"main": {}}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
        self._answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}"})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = self.hub.repositories[repository][branch]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        self.hub.commits += 1
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.endpoint}/{repository}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        name = "/".join(parts[2:4])
        if name not in self.hub.repositories:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif parts[4:5] == ["tree"]:
            files = self.hub.repositories[name][parts[5]]
            self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        else:
            self._answer(200, {"id": name, "sha": "0" * 40, "private": name in self.hub.private, "siblings": []})

    do_HEAD = do_GET

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for key, value in (given | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
