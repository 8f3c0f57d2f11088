"""A web server on the loopback interface for the files of a folder, with ranges or without."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

from loopback import Quiet, listening


@contextmanager
def serving(folder: Path, *, ranges: bool = True, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    class Handler(Quiet):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if ranges else None
            part = data[int(found[1]) : int(found[2]) + 1] if found else data
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
            if found:
                self.send_header("Content-Range", f"bytes {found[1]}-{found[2]}/{len(data)}")
            self.end_headers()
            if body:
                self.wfile.write(part)

    with listening(Handler, tls) as url:
        yield url
