"""A hub on this machine with one dataset, so that the way over the network is tested without the network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "owner/lines"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def local_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files as the dataset ``NAME`` at ``COMMIT``; yields the address for ``HF_ENDPOINT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        dataset, resolved = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/{COMMIT}/"
        if path in (dataset, f"{dataset}/revision/main", f"{dataset}/revision/{COMMIT}"):
            self._json({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        elif path.startswith(f"{dataset}/revision/"):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{dataset}/tree/"):
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in self.files.items()])
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.files:
            content = self.files[path.removeprefix(resolved)]
            self._answer(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith(resolved):
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
