"""Models on the hub: planned from their headers, then downloaded by huggingface_hub into its own cache and checked
there (`hub_cache`), or fetched shard by shard (`scratch_disk`).

`org/name`, or `org/name@revision`, may stand wherever the command takes a folder. What is already in the cache is not
downloaded again; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from lox_stream.errors import CheckpointError, LoxError, OutputError
from lox_stream.hub_cache import promised_offline, wrong_files
from lox_stream.installed import way_to
from lox_stream.journal import version
from lox_stream.manifest import read_manifest
from lox_stream.names import address_of, listing, printable, without_secrets
from lox_stream.objects import files_at
from lox_stream.output_rules import MANIFEST
from lox_stream.remote import (
    FIRST_PAUSE_S,
    OTHERS,
    TRIES,
    RemoteFile,
    first_line,
    lay_out,
    lay_out_tables,
    tells_by_headers,
    wanted,
)

T = TypeVar("T")
MISSING = (
    "huggingface_hub is not installed; expected it for models on the hub. Install it, which is the extra [hub]: "
    + way_to("hub")
)
ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w][\w./-]*))?")
LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
OF_TORCH = ("*.bin", "*.bin.index*.json")
TIMEOUT_S = 120.0  # for each part of an answer
BUSY = (429, 500, 502, 503, 504)  # that a server answers which may have time later


def is_hub_id(path: str | Path) -> bool:
    """Whether something is a model's name on the hub: two words with a slash, and no folder or file here.

    >>> is_hub_id("meta-llama/Llama-3.1-8B"), is_hub_id("org/name@v1.0"), is_hub_id("./a/b"), is_hub_id("model")
    (True, True, False, False)
    """
    text = str(path)
    return (
        not address_of(path)
        and ID.fullmatch(text) is not None
        and not os.path.lexists(text.partition("@")[0])
        and not os.path.lexists(text)
    )


@contextmanager
def headers_of(name: str | Path) -> Iterator[Path | None]:
    """A folder that looks like the model to a plan: its small files, and of its weights the headers; the rest is holes.

    Some kilobytes a shard are read. None where these do not tell what is in it (weights in other files than
    safetensors, an adapter), and offline. Raises CheckpointError.
    """
    if is_hub_id(name) and is_offline():
        yield None
        return
    found = files_elsewhere(name)
    with tempfile.TemporaryDirectory(prefix="lox-stream-headers-") as temporary:
        folder = Path(temporary) / str(name).replace("/", "--")
        plain = tells_by_headers(found)
        for file in found if plain else []:
            lay_out(file, folder, dry=True)
        if plain:
            lay_out_tables(found, folder)
        yield folder if plain else None


def lies_elsewhere(path: str | Path) -> bool:
    """Whether a path is an address or a name on the hub."""
    return bool(address_of(path)) or is_hub_id(path)


def files_elsewhere(path: str | Path) -> list[RemoteFile]:
    """The files of a model at an address or on the hub. Raises CheckpointError."""
    address = address_of(path)
    return files_at(address) if address else files_of(path)


def is_offline() -> bool:
    """Whether the hub may not be asked (HF_HUB_OFFLINE)."""
    return bool(_library().constants.HF_HUB_OFFLINE)


def files_of(name: str | Path) -> list[RemoteFile]:
    """The files of a model on the hub, of one commit of it. Raises CheckpointError."""
    return _files_of(name)[1]


def _files_of(name: str | Path) -> tuple[str, list[RemoteFile]]:
    """The commit, and its files."""
    hub, (repo, revision) = _library(), _parts(str(name))
    with _explained(hub, repo, revision, given=True):
        info = _patiently(lambda: hub.HfApi().model_info(repo, revision=revision, files_metadata=True), _is_busy)
    found = []
    for one in info.siblings:
        remote = _Remote(hub, repo, revision, hub.hf_hub_url(repo, one.rfilename, revision=info.sha))
        sha256 = one.lfs.sha256 if one.lfs is not None else ""
        found.append(RemoteFile(one.rfilename, remote.url, one.size or 0, remote.read, sha256=sha256))
    return info.sha, wanted(found)


def _patiently(ask: Callable[[], T], may_pass: Callable[[BaseException], bool]) -> T:
    """What a call of huggingface_hub returns, made again where that may help."""
    for attempt in range(TRIES - 1):
        try:
            return ask()
        except Exception as error:  # its HTTP library differs between versions
            if not may_pass(error):
                raise
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    return ask()


def _is_busy(error: BaseException | None) -> bool:
    """Whether a server's answer, somewhere behind this error, was that it may have time later."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in BUSY or (error is not None and _is_busy(error.__cause__))


def _has_broken(error: BaseException | None) -> bool:
    """The same, or that a connection broke; not where the hub said no, nor where this machine did."""
    if error is None or _is_busy(error):
        return True
    of_machine = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError)
    return not of_machine and getattr(error, "response", None) is None and _has_broken(error.__cause__)


@dataclass(frozen=True, slots=True)
class _Remote:
    """A file on the hub."""

    hub: Any
    repo: str
    revision: str | None
    url: str

    def read(self, start: int, end: int) -> bytes:
        """Its bytes [start, end). Raises CheckpointError; ConnectionError where asking again may help."""
        with _explained(self.hub, self.repo, self.revision, again=True):
            return self._read(start, end)

    def _read(self, start: int, end: int) -> bytes:
        asked = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        headers = self.hub.utils.build_hf_headers() | asked
        answer = self.hub.utils.http_backoff(
            "GET", self.url, headers=headers, timeout=TIMEOUT_S, retry_on_status_codes=BUSY, max_retries=5
        )
        self.hub.utils.hf_raise_for_status(answer)
        found = bytes(answer.content)
        if answer.status_code == HTTPStatus.OK:  # a server that knows no ranges gives the whole
            found = found[start:end]
        return found


def downloaded(name: str | Path, *, shown: bool = False) -> Path:
    """The model's folder in the cache of huggingface_hub, with what is missing of it downloaded, and checked.

    Of weights those in safetensors where there are any, else pytorch_model.bin. A file whose bytes are not those that
    the hub promises is downloaded once more. `shown`: with the progress bars of huggingface_hub. Raises
    CheckpointError: no such model, a gated one, no network, wrong bytes, and whatever the hub says.
    """
    hub, (repo, revision) = _library(), _parts(str(name))

    def fetch(**which: Any) -> Path:
        with _explained(hub, repo, revision), nullcontext() if shown else hushed():
            return Path(_patiently(lambda: hub.snapshot_download(repo, revision=revision, **which), _has_broken))

    if is_offline():  # nobody knows what the hub has: what we would not have fetched may be missing
        folder = fetch(ignore_patterns=[*OTHERS, ".*", *OF_TORCH])
        wrong = wrong_files(folder, promised_offline(folder))
        way_out = "The cache is damaged. Run once with a connection, which downloads them again"
    else:
        commit, found = _files_of(name)
        folder = fetch(allow_patterns=[_literal(file.name) for file in found])
        missing = any(not (folder / file.name).is_file() for file in found)
        if missing or folder.name != commit:  # huggingface_hub gives what it has where the hub does not answer
            problem = "the hub's files changed while they were fetched, or it did not answer. Try again"
            raise CheckpointError([f"{printable(name)}: {problem}"])
        promised = {file.name: file.sha256 for file in found if file.sha256}
        wrong = wrong_files(folder, promised)
        if wrong:
            fetch(allow_patterns=[_literal(name) for name in wrong], force_download=True)
            wrong = wrong_files(folder, {name: promised[name] for name in wrong})
        way_out = "A second download did not help: they are damaged there, or on the way. Try again, or another network"
    if wrong:
        problem = f"{listing(wrong)}: the bytes are not what was promised (sha256), expected the same. {way_out}"
        raise CheckpointError([f"{printable(name)}: {problem}"])
    return folder


@contextmanager
def hushed() -> Iterator[None]:
    """huggingface_hub without its progress bars and warnings, in all threads."""
    hub = _library()
    utils, free = hub.utils, hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    bars, verbosity = free and not utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    if bars:
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()


def _parts(name: str) -> tuple[str, str | None]:
    found = ID.fullmatch(name)
    if found is None:
        raise CheckpointError([f"{printable(name)}: is no name on the hub, expected org/name or org/name@revision"])
    return found[1], found[2]


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise LoxError(MISSING) from error
    return huggingface_hub


@contextmanager
def _explained(
    hub: Any, repo: str, revision: str | None, *, again: bool = False, given: bool = False
) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message with its way out; `again`: ConnectionError if that may pass.

    `given`: the name may have been meant for a path.
    """
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
                f"{at}: no folder of that name is here, nor a model in the cache ({hub.constants.HF_HUB_CACHE}), and "
                f"the hub cannot be reached: {first_line(error)} Connect, or give a folder"
            ]
        ) from error
    except LoxError:
        raise
    except Exception as error:  # of its HTTP library, which differs between versions, and its own
        if again:
            raise ConnectionError(first_line(error)) from error
        taken = "no folder of that name is here, so it is taken for a model on the hub; " if given else ""
        problem = f"{at}: {taken}the hub, or the way to it, failed: {first_line(error)} "
        way_out = f"{'Correct the path, or try' if given else 'Try'} again: what has arrived is kept"
        raise CheckpointError([problem + way_out]) from error


@contextmanager
def planned_first(*paths: Path) -> Iterator[list[Path] | None]:
    """The paths with the headers of models in place of those elsewhere, or None where they tell too little."""
    with ExitStack() as stack:
        found = [stack.enter_context(headers_of(path)) if lies_elsewhere(path) else path for path in paths]
        yield None if None in found else [path for path in found if path is not None]


def local(path: str | Path, *, shown: bool = False) -> Path:
    """The folder that a path names, which for a model on the hub is its folder in the cache (`downloaded`).

    Raises CheckpointError for an address, of which only shards that are in work are fetched.
    """
    if address := address_of(path):
        problem = (
            "is an address, which `run`, `adapter`, `apply` and `inspect` read; expected a folder here. Copy it first"
        )
        raise CheckpointError([f"{without_secrets(address)}: {problem}"])
    return downloaded(path, shown=shown) if is_hub_id(path) else Path(path)


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
