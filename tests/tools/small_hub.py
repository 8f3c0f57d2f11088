"""A hub on the loopback interface: it speaks the calls of huggingface_hub that a download takes, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `models`, name -> folder; `log` has (method, path, range) of each request."""

    def __init__(self, models: dict[str, Path], *, gated: tuple[str, ...] = (), cut: int = 0) -> None:
        self.models, self.gated = models, gated
        self.cut = cut  # answers of weights that end in the middle, before one is whole
        self.log: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()
        self.url = ""

    def sent(self, part: str) -> int:
        """Bytes of files with this in their path that were asked for."""
        return sum(_length(ranged) for method, path, ranged in self.log if method == "GET" and part in path)


def _length(ranged: str) -> int:
    found = re.fullmatch(r"(\d+)-(\d*)/(\d+)", ranged)
    return int(found[2] or int(found[3]) - 1) - int(found[1]) + 1 if found else 0


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
            api = tree or re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name, revision = (api or file)[1] if api or file else "", ((api or file)[2] if api or file else None)
            if name not in hub.models:
                return self.fail(401, "RepoNotFound")
            if revision not in (None, "main", "v1", COMMIT):
                return self.fail(404, "RevisionNotFound")
            if name in hub.gated and file:
                return self.fail(403, "GatedRepo")
            if api:
                said = self.tree(name) if tree else self.info(name)
                return self.send(json.dumps(said).encode(), "application/json", body=body)
            return self.file(hub.models[name] / file[3], body=body)

        def tree(self, name: str) -> list[dict[str, object]]:
            return [
                {"type": "file", "path": one["rfilename"], "size": one["size"], "oid": "0" * 40}
                for one in self.info(name)["siblings"]
            ]

        def info(self, name: str) -> dict[str, object]:
            folder = hub.models[name]
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
            return {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}

        def file(self, path: Path, *, body: bool) -> None:
            if not path.is_file():
                self.fail(404, "EntryNotFound")
                return
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first, last = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data) - 1)
            with hub.lock:
                hub.log.append((self.command, self.path, f"{first}-{last}/{len(data)}"))
                cut = body and path.suffix == ".safetensors" and last == len(data) - 1 and hub.cut > 0
                hub.cut -= cut
            part = data[first : last + 1]
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(len(part)))
            if found:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(part[: len(part) // 2] if cut else part)
                self.close_connection = bool(cut)

        def send(self, data: bytes, kind: str, *, body: bool) -> None:
            with hub.lock:
                hub.log.append((self.command, self.path, ""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if body else b"")

        def fail(self, code: int, error: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
