"""Models on the hub: planned from their headers, then downloaded by huggingface_hub into its own cache.

`org/name`, or `org/name@revision`, may stand wherever the command takes a folder. What is already in the cache is not
downloaded again; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from pathlib import Path
from typing import Any

from lox_stream.adapters import CONFIG as ADAPTER
from lox_stream.adapters import WEIGHTS
from lox_stream.errors import CheckpointError, LoxError, OutputError
from lox_stream.journal import version
from lox_stream.layout import is_index
from lox_stream.manifest import read_manifest
from lox_stream.names import listing, printable
from lox_stream.output_rules import MANIFEST
from lox_stream.shards import MAX_HEADER_BYTES

MISSING = (
    "huggingface_hub is not installed; expected it for models on the hub. Install it, which is the extra [hub]: "
    "pip install huggingface_hub"
)
ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w][\w./-]*))?")
OTHERS = (  # formats of the same weights, and what no model needs
    *("*.gguf", "*.onnx*", "*.msgpack", "*.h5", "*.ot", "*.tflite", "*.mlmodel*", "*.pth", "*.pt", "*.ckpt", "*.npz"),
    *("original/*", "consolidated*", "*.png", "*.jpg", "*.gif", "*.mp4"),
)
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
OF_TORCH = ("*.bin", "*.bin.index*.json")
BUSY = (429, 500, 502, 503, 504)  # that a server answers which may have time later
FIRST_BYTES = 1 << 16  # of a file of weights: most headers end within
SMALL_BYTES = 1 << 20  # files of JSON that a plan may look at


def is_hub_id(path: str | Path) -> bool:
    """Whether something is a model's name on the hub: two words with a slash, and no folder or file here.

    >>> is_hub_id("meta-llama/Llama-3.1-8B"), is_hub_id("org/name@v1.0"), is_hub_id("./a/b"), is_hub_id("model")
    (True, True, False, False)
    """
    text = str(path)
    return ID.fullmatch(text) is not None and not os.path.lexists(text.partition("@")[0]) and not os.path.lexists(text)


@contextmanager
def headers_of(name: str | Path) -> Iterator[Path | None]:
    """A folder that looks like the model to a plan: its small files, and of its weights the headers; the rest is holes.

    Some kilobytes a shard are read. None where these do not tell what is in it (weights in other files than
    safetensors, an adapter), and offline. Raises CheckpointError.
    """
    hub, (repo, revision) = _library(), _parts(str(name))
    if hub.constants.HF_HUB_OFFLINE:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="lox-stream-headers-") as temporary:
        folder = Path(temporary) / repo.replace("/", "--")
        with _explained(hub, repo, revision):
            info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
            wanted = _wanted([(one.rfilename, one.size or 0) for one in info.siblings])
            names = {file for file, _ in wanted}
            plain = any(file.endswith(".safetensors") for file in names) and ADAPTER not in names
            for file, size in wanted if plain else []:
                _mirror(_Remote(hub, hub.hf_hub_url(repo, file, revision=info.sha), size), folder / file)
        yield folder if plain else None


@dataclass(frozen=True, slots=True)
class _Remote:
    """A file on the hub."""

    hub: Any
    url: str
    size: int

    def read(self, start: int, end: int) -> bytes:
        """Its bytes [start, end)."""
        if start >= end:
            return b""
        wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        headers = self.hub.utils.build_hf_headers() | wanted
        answer = self.hub.utils.http_backoff(
            "GET", self.url, headers=headers, retry_on_status_codes=BUSY, max_retries=5
        )
        self.hub.utils.hf_raise_for_status(answer)
        found = bytes(answer.content)
        if answer.status_code == HTTPStatus.OK:  # a server that knows no ranges gives the whole
            found = found[start:end]
        if len(found) != end - start:
            raise OSError(f"{self.url}: {len(found)} bytes came, expected {end - start}")
        return found


def _mirror(remote: _Remote, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        path.write_bytes(_header(remote))
        os.truncate(path, remote.size)
    elif path.suffix == ".json" and remote.size <= SMALL_BYTES:
        path.write_bytes(remote.read(0, remote.size))
    else:
        path.touch()


def _header(remote: _Remote) -> bytes:
    """The header of a safetensors file, its length in front, as far as that can be one; who opens it judges it."""
    first = remote.read(0, min(FIRST_BYTES, remote.size))
    length = 8 + int.from_bytes(first[:8], "little")
    if length <= len(first) or length > min(remote.size, 8 + MAX_HEADER_BYTES):
        return first
    return first + remote.read(len(first), length)


def downloaded(name: str | Path) -> Path:
    """The model's folder in the cache of huggingface_hub, with what is missing of it downloaded.

    Of weights those in safetensors where there are any, else pytorch_model.bin. Raises CheckpointError: no such model,
    a gated one, no network, and whatever the hub says.
    """
    hub, (repo, revision) = _library(), _parts(str(name))
    with _explained(hub, repo, revision):
        if hub.constants.HF_HUB_OFFLINE:  # nobody knows what the hub has: what we would not have fetched may be missing
            return Path(hub.snapshot_download(repo, revision=revision, ignore_patterns=[*OTHERS, ".*", *OF_TORCH]))
        info = hub.HfApi().model_info(repo, revision=revision)
        names = [file for file, _ in _wanted([(one.rfilename, 0) for one in info.siblings])]
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=names))


def _parts(name: str) -> tuple[str, str | None]:
    found = ID.fullmatch(name)
    if found is None:
        raise CheckpointError([f"{printable(name)}: is no name on the hub, expected org/name or org/name@revision"])
    return found[1], found[2]


def _wanted(files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The files of a model, with their sizes: no other formats, and of torch's only where there are no safetensors."""
    plain = any(name.endswith(".safetensors") for name, _ in files)
    return [
        (name, size)
        for name, size in files
        if not any(fnmatchcase(name, glob) for glob in OTHERS)
        and not name.startswith(".")
        and not (plain and _of_torch(name))
    ]


def _of_torch(name: str) -> bool:
    return (name.endswith(".bin") and name not in WEIGHTS) or (is_index(name) and ".bin." in name)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise LoxError(MISSING) from error
    return huggingface_hub


@contextmanager
def _explained(hub: Any, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message with its way out."""
    errors = hub.errors
    at = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        problem = f"{at}: is gated: this account may not read it. Ask for access at {hub.constants.ENDPOINT}/{repo}"
        raise CheckpointError([f"{problem}, and {LOG_IN}"]) from error
    except errors.RevisionNotFoundError as error:
        problem = f"{repo}: has no revision {revision!r}, expected a branch, tag or commit of it. Look at its files"
        raise CheckpointError([problem]) from error
    except errors.RepositoryNotFoundError as error:
        problem = (
            f"{at}: no such model on {hub.constants.ENDPOINT}, or one that this account may not see, and no folder"
        )
        raise CheckpointError([f"{problem} of that name here. Check the name, or {LOG_IN}"]) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(
            [
                f"{at}: is not in the cache ({hub.constants.HF_HUB_CACHE}), and the hub cannot be reached: "
                f"{_first_line(error)} Connect, or give a folder"
            ]
        ) from error
    except LoxError:
        raise
    except Exception as error:  # of its HTTP library, which differs between versions, and its own
        problem = f"{at}: the hub, or the way to it, failed: {_first_line(error)} Try again: what has arrived is kept"
        raise CheckpointError([problem]) from error


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return printable(text if text.endswith(".") else f"{text}.")


@contextmanager
def planned_first(*paths: Path) -> Iterator[list[Path] | None]:
    """The paths with the headers of models in place of those on the hub, or None where they tell too little."""
    with ExitStack() as stack:
        found = [stack.enter_context(headers_of(path)) if is_hub_id(path) else path for path in paths]
        yield None if None in found else [path for path in found if path is not None]


def local(path: str | Path) -> Path:
    """The folder that a path names, which for a model on the hub is its folder in the cache."""
    return downloaded(path) if is_hub_id(path) else Path(path)


def prepared(name: str) -> str:
    """The name of a model on the hub that may be pushed to; it is made there, private, if it was not.

    Raises CheckpointError: no name, no account, no right to write, no network.
    """
    hub, (repo, revision) = _library(), _parts(name)
    if revision is not None:
        problem = f"{printable(name)}: names a revision, expected org/name: a push makes a new commit of main"
        raise CheckpointError([problem])
    with _explained(hub, repo, None):
        hub.HfApi().create_repo(repo, private=True, exist_ok=True)
    return repo


def push(folder: Path, name: str) -> str:
    """Upload a finished output, or an adapter, to the hub, in one commit; returns its address there.

    One commit: whoever loads the model meanwhile gets all of the old one or all of the new. Weights that the commit
    does not bring are removed by it. Where it is interrupted nothing has changed; the same call goes on, and does not
    send again what has arrived. Raises OutputError for a folder that is none, CheckpointError for what the hub says.
    """
    said = read_manifest(folder)
    names = [*said["shards"], *(said.get("files") or {}), MANIFEST]
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise OutputError(f"{folder}: lacks {listing(lost)}, expected what its manifest names. Mend it with --repair")
    repo = prepared(name)
    hub = _library()
    with _explained(hub, repo, None):
        commit = hub.HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[_literal(name) for name in names],
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            commit_message=f"LoX: low-rank extrapolation, by lox-stream {version('lox-stream')}",
        )
    return str(commit.repo_url)


def _literal(name: str) -> str:
    """A name as a glob that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)
