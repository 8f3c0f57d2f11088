"""Which library fetches faster: obstore or fsspec (its s3fs and its HTTP), as `scratch_disk` asks them.

    pip install obstore boto3 "moto[server]" fsspec s3fs aiohttp
    python benchmarks/bench_cloud.py [--mib 256]

Pieces of 8 MiB, eight at a time, of one object: from moto's S3 and from a plain web server, both on the loopback
interface and in a process of their own. Each is timed three times in turns, and its bytes held against what was put
there before a time is printed. Servers in Python are slow, and share the cores with what is measured: ratios, no rates
of a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lox_stream.journal import version
from lox_stream.objects import place_at
from lox_stream.remote import PIECE_BYTES
from lox_stream.scratch_disk import CONNECTIONS

Fetch = Callable[[int, int], bytes]
MOTO = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
WEB = """
import sys, pathlib, small_web
with small_web.serving(pathlib.Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def of_obstore(address: str, name: str) -> Fetch:
    place = place_at(address)
    return lambda start, end: place.read(name, start, end)


def of_fsspec(address: str, name: str) -> Fetch:
    import fsspec

    told = {"client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}} if address.startswith("s3:") else {}
    system = fsspec.filesystem(address.partition(":")[0], **told)
    return lambda start, end: system.cat_file(f"{address}/{name}", start=start, end=end)


def fetch_all(fetch: Fetch, n_bytes: int) -> tuple[float, str, float]:
    """Seconds, the checksum of what came, and seconds of this process's cores."""
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        starts = range(0, n_bytes, PIECE_BYTES)
        pieces = list(pool.map(lambda start: fetch(start, min(start + PIECE_BYTES, n_bytes)), starts))
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(piece))
    return elapsed_s, digest.hexdigest(), cpu_s


def compared(address: str, name: str, n_bytes: int, expected: str) -> dict[str, dict[str, float]]:
    """Median seconds of each library, in turns."""
    fetches = {"obstore": of_obstore(address, name), "fsspec": of_fsspec(address, name)}
    times: dict[str, list[tuple[float, float]]] = {library: [] for library in fetches}
    for turn in range(4):
        for library, fetch in fetches.items():
            elapsed_s, found, cpu_s = fetch_all(fetch, n_bytes)
            if found != expected:
                raise SystemExit(f"{library}: other bytes came from {address}")
            if turn:  # the first one warms up
                times[library].append((elapsed_s, cpu_s))
    return {
        library: {
            "elapsed_s": statistics.median(elapsed_s for elapsed_s, _ in found),
            "cpu_s": statistics.median(cpu_s for _, cpu_s in found),
        }
        for library, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the object")
    mib = parser.parse_args().mib
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "object.bin"
        block = os.urandom(1 << 20)
        path.write_bytes(b"".join(block[i:] + block[:i] for i in range(mib)))
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        found["s3"] = in_a_bucket(path, expected)
        found["web"] = on_the_web(path, expected)
    print("| server | obstore | fsspec | fsspec / obstore | cores' time, fsspec / obstore |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for server, row in found.items():
        ours, theirs = row["obstore"], row["fsspec"]
        ratios = [theirs[what] / ours[what] for what in ("elapsed_s", "cpu_s")]
        times = f"{ours['elapsed_s']:.2f} s | {theirs['elapsed_s']:.2f} s"
        print(f"| {server} | {times} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    versions = {package: version(package) for package in ("obstore", "fsspec", "s3fs", "aiohttp", "moto")}
    print(json.dumps({"mib": mib, "cores": os.cpu_count(), "versions": versions, "found": found}))


def in_a_bucket(path: Path, expected: str) -> dict[str, dict[str, float]]:
    port = "5555"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    os.environ |= keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen([sys.executable, "-c", MOTO, port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import boto3

        for _ in range(100):
            try:
                boto3.client("s3").create_bucket(Bucket="bench")
                break
            except Exception:  # it is not up yet
                time.sleep(0.2)
        place_at("s3://bench/models").put(path.name, path)
        return compared("s3://bench/models", path.name, path.stat().st_size, expected)
    finally:
        server.terminate()
        server.wait()


def on_the_web(path: Path, expected: str) -> dict[str, dict[str, float]]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "tests" / "tools")}
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", WEB, str(path.parent)]
    server = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=env, text=True)
    try:
        assert server.stdout is not None, "it is a pipe"
        return compared(server.stdout.readline().strip(), path.name, path.stat().st_size, expected)
    finally:
        server.communicate()


if __name__ == "__main__":
    main()
