"""A Hugging Face Hub on loopback: enough of its protocol for snapshot_download, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one repository, org/name, at `url`. `requests` lists what was asked, as "METHOD path [range]"."""

    def __init__(self, files: dict[str, bytes], *, token: str | None = None) -> None:
        self.files, self.token = files, token
        self.cut: dict[str, int] = {}  # file -> bytes after which its connection breaks, the first time
        self.broken: set[str] = set()  # files that are answered by HTTP 500
        self.lies: dict[str, int] = {}  # file -> size stated instead of the true one
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path, asked = request.path.partition("?")[0], request.headers.get("Range")
        self.requests.append(f"{request.command} {path}" + (f" {asked}" if asked else ""))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._send(request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body=body)
        elif path in ("/api/models/org/name/revision/main", f"/api/models/org/name/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self._json(request, {"id": "org/name", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            self._json(request, [{"type": "file", "path": n, "size": self._size(n), "oid": "0"} for n in self.files])
        elif path.startswith("/api/models/org/name/revision/"):
            self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif path.startswith("/org/name/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            self._file(request, name, asked, body=body)
        else:
            self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _size(self, name: str) -> int:
        return self.lies.get(name, len(self.files[name]))

    def _file(self, request: BaseHTTPRequestHandler, name: str, asked: str | None, *, body: bool) -> None:
        data = self.files[name]
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if not body:
            self._send(request, 200, b"", {**headers, "Content-Length": str(self._size(name))}, body=False)
        elif name in self.broken:
            self._send(request, 500, b"", {}, body=True)
        elif (cut := self.cut.pop(name, None)) is not None:
            request.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data[:cut])
            request.close_connection = True
        else:
            self._send(request, 206 if begin else 200, data[begin:], headers, body=True)

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=True)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], *, body: bool
    ) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)
