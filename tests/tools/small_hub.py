"""A hub on the loopback interface: it speaks the calls of huggingface_hub that a download takes, and can misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback import Quiet, listening

LFS = "application/vnd.git-lfs+json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `models`, name -> folder; `log` has (method, path, range) of each request."""

    def __init__(
        self, models: dict[str, Path], *, gated: tuple[str, ...] = (), cut: int = 0, busy: int = 0, wrong: int = 0
    ) -> None:
        self.models, self.gated = models, gated
        self.busy = busy  # answers to ranged requests that are 503
        self.wrong = wrong  # answers of more than a header that have a flipped bit
        self.cut = cut  # answers of weights that end in the middle, before one is whole
        self.private: dict[str, bool] = {}
        self.pushed: dict[str, dict[str, bytes]] = {}  # by model: files of its last commit
        self.blobs: dict[str, bytes] = {}  # large files by their sha256, which arrive before the commit
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
    class Handler(Quiet):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            with hub.lock:
                hub.log.append(("PUT", self.path, ""))
                cut, hub.cut = hub.cut > 0, max(0, hub.cut - 1)
            if cut:
                return self.fail(403, "")
            hub.blobs[self.path.rpartition("/")[2]] = data
            return self.send(b"{}", "application/json", body=True)

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                said = json.loads(data)
                name = f"{said['organization']}/{said['name']}"
                if said["organization"] == "forbidden":
                    return self.fail(403, "")
                hub.pushed.setdefault(name, {})
                hub.private[name] = said.get("private", said.get("visibility") == "private")
                return self.send(json.dumps({"url": f"{hub.url}/{name}"}).encode(), "application/json", body=True)
            if path == "/api/validate-yaml":
                return self.send(b'{"errors": [], "warnings": []}', "application/json", body=True)
            if "/preupload/" in path:
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in json.loads(data)["files"]
                ]
                return self.send(json.dumps({"files": modes}).encode(), "application/json", body=True)
            if path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(data)["objects"]
                objects = [
                    {"oid": one["oid"], "size": one["size"]}
                    | (
                        {}
                        if one["oid"] in hub.blobs
                        else {"actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}", "header": {}}}}
                    )
                    for one in wanted
                ]
                return self.send(json.dumps({"transfer": "basic", "objects": objects}).encode(), LFS, body=True)
            if "/commit/" in path:
                name = path.split("/api/models/")[1].split("/commit/")[0]
                files = hub.pushed[name]
                for line in map(json.loads, data.decode().splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.blobs[value["oid"]]
                    elif line["key"] == "deletedFile":
                        files.pop(value["path"])
                said = {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                return self.send(json.dumps(said).encode(), "application/json", body=True)
            return self.fail(404, "")

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
            api = tree or re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name, revision = (api or file)[1] if api or file else "", ((api or file)[2] if api or file else None)
            if name in hub.pushed and api:
                files = [{"type": "file", "path": one, "size": 1, "oid": "0" * 40} for one in hub.pushed[name]]
                siblings = [{"rfilename": one["path"]} for one in files]
                said = files if tree else {"id": name, "sha": COMMIT, "private": True, "siblings": siblings}
                return self.send(json.dumps(said).encode(), "application/json", body=body)
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
            siblings = [self.sibling(path, folder) for path in files]
            return {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings}

        def sibling(self, path: Path, folder: Path) -> dict[str, object]:
            said: dict[str, object] = {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                said["lfs"] = {"size": said["size"], "sha256": sha256, "pointerSize": 134}
            return said

        def file(self, path: Path, *, body: bool) -> None:
            if not path.is_file():
                self.fail(404, "EntryNotFound")
                return
            if body and self.headers.get("Range") and hub.busy:
                hub.busy -= 1
                self.fail(503, "")
                return
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first, last = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data) - 1)
            with hub.lock:
                hub.log.append((self.command, self.path, f"{first}-{last}/{len(data)}"))
                cut = body and path.suffix == ".safetensors" and last == len(data) - 1 and hub.cut > 0
                hub.cut -= cut
            part = data[first : last + 1]
            if body and len(part) > 70_000 and hub.wrong:
                hub.wrong -= 1
                part = bytes([part[0] ^ 1]) + part[1:]
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

    with listening(Handler) as hub.url:
        yield hub
