"""Models in buckets and on web servers, by obstore: files listed, read in ranges, and uploaded whole.

obstore and not fsspec: benchmarks/results/cloud.md says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lox_stream.adapters import CONFIG as ADAPTER
from lox_stream.adapters import WEIGHTS as ADAPTER_WEIGHTS
from lox_stream.companions import OWN_FILES
from lox_stream.errors import CheckpointError, LoxError, OutputError
from lox_stream.installed import way_to
from lox_stream.layout import INDEX_SUFFIX
from lox_stream.names import is_plain_relative, printable, without_secrets
from lox_stream.remote import PIECE_BYTES, RemoteFile, first_line, wanted
from lox_stream.shards import parse_json

MISSING = (
    "obstore is not installed; expected it for s3:// and https:// addresses. Install it, which is the extra [cloud]: "
    + way_to("cloud")
)
NO_PROFILES = (
    "boto3 is not installed; expected it for the profile that AWS_PROFILE names. Install it, which is in the extra "
    "[cloud], or set AWS_ACCESS_KEY_ID and its kin: " + way_to("cloud")
)
METADATA_SERVER = "169.254.169.254"  # where a machine of a cloud finds its own key
CLIENT = {"timeout": "2 minutes", "connect_timeout": "20 seconds"}  # of one request, which is for 8 MiB at most
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(minutes=2)}  # of a request; `RemoteFile.read` asks again, too
ON_THE_WEB = (  # what travels with a model, by its usual names: web servers list nothing
    *(ADAPTER, *ADAPTER_WEIGHTS, "model.safetensors", f"model{INDEX_SUFFIX}", "config.json", OWN_FILES[0]),
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder in a bucket, or on a web server."""

    address: str
    store: Any

    def at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def head(self, name: str) -> RemoteFile | None:
        """A file of it, None where there is none."""
        with self._explained(name):
            library = _library()
            absent: tuple[type[Exception], ...] = (FileNotFoundError,)
            if not self.address.startswith("s3:"):  # open buckets, read by https, forbid what is not there
                absent += (library.exceptions.PermissionDeniedError, library.exceptions.UnauthenticatedError)
            try:
                return self._file(name, library.head(self.store, name))
            except absent:
                return None

    def files(self) -> list[RemoteFile]:
        """All of them, in its folders too; of a bucket only. Without the empty objects that stand for folders."""
        with self._explained(""):
            rows = [row for page in _library().list(self.store) for row in page]
        folders = {row["path"].rpartition("/")[0] for row in rows} | {""}
        return [self._file(row["path"], row) for row in rows if row["size"] or row["path"] not in folders]

    def _file(self, name: str, meta: Any) -> RemoteFile:
        modified_ns = int(meta["last_modified"].timestamp()) * 10**9
        etag = (meta["e_tag"] or "").strip('"')
        tag = meta["e_tag"]
        fetch = partial(self.read, name, tag=None if tag and tag.startswith("W/") else tag)
        s3 = self.address.startswith("s3:")
        return RemoteFile(name, self.at(name), meta["size"], fetch, modified_ns, etag=etag if s3 else "")

    def read(self, name: str, start: int, end: int, tag: str | None = None) -> Any:
        """The bytes [start, end) of a file that still has its ETag. Raises ConnectionError, CheckpointError."""
        options: dict[str, Any] = {"range": (start, end)} | ({"if_match": tag} if tag else {})
        with self._explained(name, ConnectionError):
            return _library().get(self.store, name, options=options).bytes()

    def put(self, name: str, content: bytes | Path, *, new: bool = False) -> None:
        """Upload a file, which appears when it is whole; `new`: OutputError where there is one already."""
        library = _library()
        with self._explained(name, OutputError):
            try:
                if isinstance(content, Path):
                    n_bytes = content.stat().st_size
                    library.put(self.store, name, content, chunk_size=_part_bytes(n_bytes), max_concurrency=8)
                else:
                    n_bytes = len(content)
                    library.put(self.store, name, content, mode="create" if new else "overwrite", use_multipart=False)
            except library.exceptions.AlreadyExistsError as error:
                problem = "is there already: another run has just begun here. Wait for it, or choose another --out"
                raise OutputError(f"{self.at(name)}: {problem}") from error
            found = library.head(self.store, name)["size"]
        if found != n_bytes:
            raise OutputError(f"{self.at(name)}: has {found} bytes, expected the {n_bytes} that were sent. Try again")

    def delete(self, names: list[str]) -> None:
        """Remove files; silent for those that are not there."""
        library = _library()
        for name in names:
            with self._explained(name, OutputError):
                try:
                    library.delete(self.store, name)
                except FileNotFoundError:
                    continue

    @contextmanager
    def _explained(self, name: str, failed: type[Exception] = CheckpointError) -> Iterator[None]:
        """Turn what obstore raises into one message; of the server and the way to it into `failed`."""
        errors = _library().exceptions
        at = printable(self.at(name) if name else self.address)
        kind = OutputError if failed is OutputError else CheckpointError
        try:
            yield
        except LoxError:
            raise
        except FileNotFoundError as error:
            raise _problem(kind, f"{at}: is not there any more. Put it back, and go on") from error
        except errors.PreconditionError as error:
            problem = "was modified since the run looked at it. Run again with --overwrite to be sure"
            raise _problem(kind, f"{at}: {problem}") from error
        except (errors.PermissionDeniedError, errors.UnauthenticatedError, PermissionError) as error:
            problem = "this account may not do that. Look at AWS_PROFILE, or AWS_ACCESS_KEY_ID and its kin; for a "
            problem += "bucket that is open to all set AWS_SKIP_SIGNATURE=true"
            raise _problem(kind, f"{at}: {first_line(error)} It seems that {problem}") from error
        except Exception as error:  # of a Rust library, which has one class for all that it does not name
            if failed is ConnectionError:
                raise ConnectionError(_words(error)) from error
            raise _problem(kind, f"{at}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong and the way out, as far as obstore's words tell; these are in the first line, or further down."""
    said, found = str(error).lower(), first_line(error)
    if "nosuchbucket" in said or ("404" in said and "list" in said):
        return f"there is no such bucket: {found} Look at its name, and at AWS_ENDPOINT_URL for a server of your own"
    if METADATA_SERVER in said:
        return (
            "no key for it is known: a cloud machine's own was asked for, and there is none. Set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and its kin; for a bucket that is open to all AWS_SKIP_SIGNATURE=true"
        )
    return f"the server, or the way to it, failed: {_words(error)} Try again"


def _words(error: Exception) -> str:
    """What obstore says in its first line; of a certificate it speaks further down."""
    distrusted = "its certificate is not one that this machine trusts. " if "certificate" in str(error).lower() else ""
    return distrusted + first_line(error)


def _problem(kind: type[LoxError], text: str) -> LoxError:
    return CheckpointError([text]) if kind is CheckpointError else kind(text)


def _part_bytes(n_bytes: int) -> int:
    """Of an upload in parts, of which S3 takes 10,000."""
    return max(PIECE_BYTES, -(-n_bytes // 9000))


def place_at(address: str) -> Place:
    """The folder at an address, which may not be there. Raises CheckpointError."""
    scheme, _, rest = address.partition("://")
    strange = any(character in address for character in "@?#%\\") or not is_plain_relative(rest)
    if scheme not in ("s3", "https", "http") or strange:
        expected = "s3://bucket/folder or https://host/folder, of plain names, without a password, '?', '#' or '%'"
        raise CheckpointError([f"{without_secrets(address)}: is no address that can be read; expected {expected}"])
    library = _library()
    try:
        if scheme == "s3":
            return Place(address, _bucket(address))
        client = CLIENT | {"allow_http": scheme == "http"}
        return Place(address, library.store.from_url(address, client_options=client, retry_config=RETRIES))
    except (ValueError, library.exceptions.BaseError) as error:
        raise CheckpointError([f"{printable(address)}: is no address: {first_line(error)} Correct it"]) from error


def _bucket(address: str) -> Any:
    """As the environment says (AWS_*), else as the profiles of the AWS command have it, where boto3 is installed."""
    library = _library()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    options = CLIENT | {"allow_http": endpoint.startswith("http:")}
    config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    more: dict[str, Any] = {}
    if "AWS_ACCESS_KEY_ID" not in os.environ and "AWS_SKIP_SIGNATURE" not in os.environ:
        more = _profile()
    return library.store.from_url(
        address, client_options=options, retry_config=RETRIES, **more, **({"config": config} if config else {})
    )


def _profile() -> dict[str, Any]:
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if os.environ.get("AWS_PROFILE"):
            raise LoxError(NO_PROFILES) from error
        return {}
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return {}
    except BotoCoreError as error:
        problem = f"the profile of the AWS command cannot be used: {first_line(error)} Look at AWS_PROFILE"
        raise CheckpointError([problem]) from error
    region = {"region": session.region_name} if session.region_name else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}


def files_at(address: str) -> list[RemoteFile]:
    """The files of the model at an address: a folder, or one file of weights. Raises CheckpointError."""
    if address.endswith(".safetensors"):
        folder, _, name = address.rpartition("/")
        found = place_at(folder).head(name)
        files = [found] if found is not None else []
    elif address.startswith("s3:"):
        files = wanted(place_at(address).files())
    else:
        files = wanted(_on_the_web(place_at(address)))
    files = list({file.name: file for file in files}.values())
    if not files:
        expected = f"model.safetensors or model{INDEX_SUFFIX} there"
        problem = f"nothing is there, or nothing that may be read; expected {expected}. Check the address"
        raise CheckpointError([f"{printable(address)}: {problem}"])
    return files


def _on_the_web(place: Place) -> list[RemoteFile]:
    """Those of the usual names that are there, and the shards that the index names."""
    found = [file for name in ON_THE_WEB if (file := place.head(name)) is not None]
    for index in [file for file in found if file.name.endswith(INDEX_SUFFIX)]:
        try:
            said = parse_json(bytes(index.read(0, index.size)))[0]
            shards = sorted({str(name) for name in said["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # who opens the index says what is wrong with it
        found += [file for name in shards if (file := place.head(name)) is not None]
    return found


def _library() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise LoxError(MISSING) from error
    return obstore
