"""Object stores by URI: S3 and compatible stores, Google Cloud Storage, Azure.

They are accessed through obstore. Its conditional put is one atomic request. A URI takes the same
options as pyarrow's filesystems:

    s3://[key:secret@]bucket/folder?region=...&endpoint_override=host:port&scheme=http
    gs://[anonymous@]bucket/folder?endpoint_override=host:port&scheme=http
    az://container/folder
    memory:///folder               in this process only, for tests

Credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, ...). For
S3, a profile of ~/.aws/credentials comes next, then the machine's role.
"""

import os
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store
from pyarrow import fs

from harness.storage.stores import Entry

SCHEMES = ("s3", "gs", "gcs", "az", "memory")

_S3_OPTIONS = {
    "region", "scheme", "endpoint_override", "tls_ca_file_path", "force_virtual_addressing"
}  # fmt: skip
_KEYS = ("access_key_id", "secret_access_key", "session_token")
_GCS_OPTIONS = {"scheme", "endpoint_override", "retry_limit_seconds"}
# Retry for long enough to survive a short outage. A mistyped address fails after almost a minute.
_RETRIES: Any = {"max_retries": 10, "backoff": {"max_backoff": timedelta(seconds=10)}}
# S3 takes at most 10,000 pieces, so a file of up to 312 GiB. Memory holds one piece per upload.
_CHUNK_BYTES = 32 * 2**20
_UPLOADS = 4
_TIMEOUT = timedelta(minutes=10)  # per request: an expert of a large base over a slow connection


class ObjectStore:
    """A bucket of an object store. A leading slash of a path is ignored."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        return obstore.get(self._store, path).bytes().to_bytes()

    def read_part(self, path: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`."""
        return obstore.get_range(self._store, path, start=start, length=length).to_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        obstore.put(self._store, path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file in one request unless it exists; return whether this call created it."""
        try:
            obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def read_chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a large file in pieces."""
        for chunk in obstore.get(self._store, path).stream(_CHUNK_BYTES):
            yield bytes(chunk)

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a large file atomically from its pieces, replacing an existing one."""
        # Not `put` of an iterator: it must not use a store itself, as the renewal of a claim does.
        writer = obstore.open_writer(
            self._store, path, buffer_size=_CHUNK_BYTES, max_concurrency=_UPLOADS
        )
        for chunk in chunks:
            writer.write(chunk)
        writer.close()  # without it, after an error, the file does not appear

    def delete(self, path: str) -> None:
        """Delete a file. Check first that it exists, since S3 does not report a missing file."""
        obstore.head(self._store, path)
        obstore.delete(self._store, path)

    def exists(self, path: str) -> bool:
        """Return whether a file exists."""
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder, page by page."""
        for page in obstore.list(self._store, folder):
            for meta in page:
                yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())


def open_store(uri: str) -> tuple[ObjectStore, str]:
    """Return the bucket that a URI names, and the folder in it.

    Raises:
        ValueError: the URI names no bucket or has an unknown option.
    """
    parts = urlsplit(uri)
    bucket, folder = parts.hostname or "", unquote(parts.path).strip("/")
    options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    if parts.scheme == "memory":
        return ObjectStore(MemoryStore()), folder
    if not bucket:
        raise ValueError("it names no bucket")
    make = {"s3": _s3, "az": _azure}.get(parts.scheme, _gcs)
    return ObjectStore(make(bucket, parts, options)), folder


def _s3(bucket: str, parts: Any, options: dict[str, str]) -> S3Store:
    _check_options(options, _S3_OPTIONS)
    config: dict[str, Any] = {}
    if parts.username is not None:
        config["access_key_id"] = unquote(parts.username)
        config["secret_access_key"] = unquote(parts.password or "")
    elif "AWS_ACCESS_KEY_ID" not in os.environ:
        config |= _profile()
    client = _client(options)
    endpoint = _endpoint(options) or os.environ.get(
        "AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if _is_true(options, "force_virtual_addressing"):
        config["virtual_hosted_style_request"] = True
    if "region" in options:
        config["region"] = options["region"]
    elif not endpoint and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        config["region"] = fs.resolve_s3_region(bucket)
    return S3Store(bucket, client_options=client, retry_config=_RETRIES, **config)


def _profile() -> dict[str, str]:
    """Return the keys of the profile AWS_PROFILE or the default; none if there is no profile."""
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    profiles = ConfigParser(interpolation=None)
    profiles.read(Path(file).expanduser())
    name = os.environ.get("AWS_PROFILE", "default")
    keys = dict(profiles.items(name)) if profiles.has_section(name) else {}
    found = {key: keys.get(f"aws_{key}") for key in _KEYS}
    return {key: value for key, value in found.items() if value}


def _gcs(bucket: str, parts: Any, options: dict[str, str]) -> GCSStore:
    _check_options(options, _GCS_OPTIONS)
    client = _client(options)
    config: dict[str, Any] = {}
    if endpoint := _endpoint(options):
        config["base_url"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if parts.username == "anonymous":
        config["skip_signature"] = True
    return GCSStore(bucket, client_options=client, retry_config=_RETRIES, **config)


def _azure(container: str, parts: Any, options: dict[str, str]) -> AzureStore:
    _check_options(options, set())
    return AzureStore(container, client_options=_client(options), retry_config=_RETRIES)


def _check_options(options: dict[str, str], known: set[str]) -> None:
    if unknown := options.keys() - known:
        names = ", ".join(sorted(known)) or "there are none"
        raise ValueError(f"unknown options {', '.join(sorted(unknown))} (known: {names})")


def _client(options: dict[str, str]) -> Any:
    client: dict[str, Any] = {"timeout": _TIMEOUT}
    if certificate := options.get("tls_ca_file_path"):
        client["root_certificate"] = Path(certificate).read_bytes()
    return client


def _endpoint(options: dict[str, str]) -> str | None:
    place = options.get("endpoint_override")
    if not place or "://" in place:
        return place
    return f"{options.get('scheme', 'https')}://{place}"


def _is_true(options: dict[str, str], name: str) -> bool:
    return options.get(name, "false").lower() in ("1", "true")
