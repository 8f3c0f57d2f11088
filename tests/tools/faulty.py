"""A proxy on the loopback interface that passes requests on to a server, and misbehaves as it is told."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection

from loopback import Quiet, listening

LARGE = 70_000  # bytes, of a body: a shard, and not a header, a sample or a listing


@dataclass
class Proxy:
    """`faults` are taken one by one, each for an answer or an upload that is large: see `_Handler`."""

    upstream: tuple[str, int]
    faults: list[str] = field(default_factory=list)
    uploads_left: int | None = None  # large ones that are let through, before all are 503
    log: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes of the larger body
    authorizations: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else ""


@contextmanager
def in_front_of(host: str, port: int, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    proxy = Proxy((host, port))

    class Handler(Quiet):
        """Faults: 429, 503 (before anything is passed on), cut, short, wrong (of the answer), slow."""

        def handle_any(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.authorizations.add(self.headers.get("Authorization") or "")
            fault = proxy.next_fault() if len(sent) > LARGE else ""
            if len(sent) > LARGE and proxy.uploads_left is not None:
                fault = "" if proxy.uploads_left else "503"
                proxy.uploads_left -= not fault
            if fault.isdecimal():
                return self.give(int(fault), [], b"busy")
            upstream = HTTPConnection(*proxy.upstream, timeout=60)
            upstream.request(self.command, self.path, sent, dict(self.headers.items()))
            answer = upstream.getresponse()
            body = answer.read()
            upstream.close()
            with proxy.lock:
                proxy.log.append((self.command, self.path, max(len(sent), len(body))))
            if len(body) > LARGE:
                fault = proxy.next_fault()
                if fault.isdecimal():
                    return self.give(int(fault), [], b"busy")
            if fault == "wrong":
                body = bytes([body[0] ^ 1]) + body[1:] if body else body
            if fault == "slow":
                time.sleep(1)
            if fault == "short":
                body = body[:-7]
            skipped = ("content-length", "transfer-encoding", "connection", "date", "server")
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in skipped]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return self.give(answer.status, headers, body, cut=fault == "cut")

        def give(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    with listening(Handler, tls) as proxy.url:
        yield proxy
