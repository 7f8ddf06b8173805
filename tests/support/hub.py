"""A model hub on this machine: enough of its interface that the real download code runs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SHA = hashlib.sha1(b"tiny").hexdigest()


@dataclass
class Hub:
    """Repositories by id, refusals by id (status and error code), and every request that came."""

    endpoint: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {r.partition(f"/{SHA}/")[2] for r in self.requests if r.startswith("GET") and "/resolve/" in r}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port while the context lasts; branch ``main`` and commit `SHA` exist."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            parts = urlsplit(self.path).path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            if len(parts) < 5:  # something else than a model, such as telemetry
                self._refuse(404, "")
                return
            parts = parts[2:] if api else parts
            repository, action, revision = "/".join(parts[:2]), parts[2], parts[3]
            if repository not in hub.repositories:
                self._refuse(404, "RepoNotFound")
            elif revision not in ("main", SHA):
                self._refuse(404, "RevisionNotFound")
            elif repository in hub.refused and not api:
                self._refuse(*hub.refused[repository])
            elif action == "revision":
                self._json({"id": repository, "sha": SHA, "siblings": []})
            elif action == "tree":
                self._json(tree(hub.repositories[repository]))
            else:
                content = (hub.repositories[repository] / "/".join(parts[4:])).read_bytes()
                self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        do_HEAD = do_GET

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code} if code else {})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"X-Repo-Commit": SHA, "Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are recorded, not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tree(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
