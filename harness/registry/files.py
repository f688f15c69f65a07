"""The registry's small files: their names, their contents, and how to read them.

    jobs/<job>.json        {"object": content hash, "name": expert's name, "code": digest of the
                            source code that trained it, "sha256": checksum}
    code/<digest>.json     {module: hash of its source code}
    check-<token>          empty: whoever finds this name sees the same folder as who wrote it
    manifests/<n>.json     {"schema": 2, "number": n, "parent": n - 1, "base_fingerprint": hash,
                            "experts": {name: content hash}, "sha256": checksum}

The checksum covers the rest, so every changed bit is noticed. Files of earlier versions have none.
Contents are checked before any of them becomes part of a path. Files with other names are ignored.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness.storage import Folder
from phatgoose.card import validate_name
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.profile import Profile

SCHEMA_VERSION = 2
# How a profile is measured, and a digest of the measuring code (not in version 0.1.0).
_PROFILE_ID = r"[0-9a-f]{8,64}(?:-[0-9a-f]{16})?"


@dataclass(frozen=True)
class Manifest:
    """The pool at one moment: expert name -> content hash. Number 0 is the empty pool."""

    number: int
    parent: int | None
    base_fingerprint: str
    experts: dict[str, str]

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        return _to_json({"schema": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True)
class Record:
    """The result of a finished job, and a digest of the source code that made it.

    The digest is empty for imported experts, and for experts of version 0.1.0.
    """

    object: str
    name: str
    code: str = ""

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        return _to_json(asdict(self))


@dataclass(frozen=True)
class Access:
    """What another process needs to write to a registry's folder, if it sees that folder.

    Attributes:
        uri: the registry's folder.
        base_fingerprint: the base of its experts.
        token: a random number in the name of a file of the folder, see `check_file`.
    """

    uri: str
    base_fingerprint: str
    token: str


def check_file(token: str) -> str:
    """Return the file that proves which folder this is; raise PhatgooseError if it is invalid.

    A path alone proves nothing, since other machines may have other disks there.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", token):
        raise PhatgooseError(f"{token!r} is not a token: use 32 hexadecimal digits")
    return f"check-{token}"


def object_file(content_hash: str) -> str:
    """Return the file of an expert; raise PhatgooseError unless this is a content hash."""
    if not re.fullmatch(r"[0-9a-f]{64}", content_hash):
        raise PhatgooseError(f"{content_hash!r} is not a content hash: use 64 hexadecimal digits")
    return f"objects/{content_hash}.arrow"


def profile_file(content_hash: str, profile_id: str) -> str:
    """Return the file of an expert's profile; raise PhatgooseError if either id is invalid."""
    object_file(content_hash)
    if not re.fullmatch(_PROFILE_ID, profile_id):
        raise PhatgooseError(f"{profile_id!r} is not a profile id: use 8 to 64 hexadecimal digits")
    return f"profiles/{content_hash}-{profile_id}.safetensors"


@dataclass(frozen=True)
class ProfileFile:
    """The file of a profile, the content hash of its expert, and the profile's id."""

    file: str
    expert: str
    profile_id: str


def profile_files(folder: Folder) -> list[ProfileFile]:
    """Return the files of all profiles."""
    pattern = rf"profiles/([0-9a-f]{{64}})-({_PROFILE_ID})\.safetensors"
    matches = (re.fullmatch(pattern, name) for name in folder.names("profiles/"))
    return [ProfileFile(match[0], match[1], match[2]) for match in matches if match]


def job_file(job: str) -> str:
    """Return the file of a job's record; raise PhatgooseError unless this is a job id."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", job):
        raise PhatgooseError(f"{job!r} is not a job id: use 8 to 64 hexadecimal digits")
    return f"jobs/{job}.json"


def code_file(digest: str) -> str:
    """Return the file of the source code with a digest; raise PhatgooseError if it is invalid."""
    if not re.fullmatch(r"[0-9a-f]{16}", digest):
        raise PhatgooseError(f"{digest!r} is not a digest of code: use 16 hexadecimal digits")
    return f"code/{digest}.json"


def manifest_file(number: int) -> str:
    """Return the file of a manifest."""
    return f"manifests/{number}.json"


def object_files(folder: Folder) -> list[str]:
    """Return the files of all experts."""
    names = folder.names("objects/")
    return [name for name in names if re.fullmatch(r"objects/[0-9a-f]{64}\.arrow", name)]


def job_files(folder: Folder) -> list[str]:
    """Return the files of all records."""
    names = folder.names("jobs/")
    return [name for name in names if re.fullmatch(r"jobs/[0-9a-f]{8,64}\.json", name)]


def manifest_numbers(folder: Folder) -> list[int]:
    """Return the numbers of all manifests, in order."""
    matches = (re.fullmatch(r"manifests/([1-9]\d*)\.json", n) for n in folder.names("manifests/"))
    return sorted(int(match[1]) for match in matches if match)


def read_record(folder: Folder, file: str) -> Record | None:
    """Return the record in a file; None if the file does not exist.

    Raises PhatgooseError, naming the file, if it is malformed.
    """
    data = folder.find(file)
    return None if data is None else _to_record(folder, file, data)


def read_records(
    folder: Folder, files: Iterable[str]
) -> Iterator[tuple[str, Record | PhatgooseError | None]]:
    """Yield each file with its record, None if it is missing, or the error if it is malformed."""
    for file, data in folder.find_all(files):
        try:
            if isinstance(data, PhatgooseError):
                raise data
            yield file, None if data is None else _to_record(folder, file, data)
        except PhatgooseError as error:
            yield file, error


def _to_record(folder: Folder, file: str, data: bytes) -> Record:
    try:
        content, _ = _from_json(data)
        record = Record(**content)
        validate_name(record.name)
        object_file(record.object)
        if record.code:
            code_file(record.code)
    except (AttributeError, TypeError, ValueError, PhatgooseError) as error:
        raise _malformed(folder, file, error, "the next run trains it again") from error
    return record


def read_manifest(folder: Folder, number: int) -> Manifest:
    """Return the manifest of this number.

    Raises PhatgooseError, naming the file, if it is malformed or from a newer version.
    """
    file = manifest_file(number)
    data = folder.read(file)
    try:
        content, has_checksum = _from_json(data)
        schema = int(content.pop("schema"))
        if schema == SCHEMA_VERSION and not has_checksum:
            raise ValueError("it has no checksum")
        manifest = _to_manifest(content, number) if schema <= SCHEMA_VERSION else None
    except (AttributeError, LookupError, TypeError, ValueError, PhatgooseError) as error:
        fix = "finished jobs are added again by the next run"
        raise _malformed(folder, file, error, fix) from error
    if manifest is None:
        raise PhatgooseError(f"{folder}/{file} has the newer schema {schema}: update phatgoose")
    return manifest


def read_expert(folder: Folder, content_hash: str) -> Expert:
    """Read one expert and verify its content; on a local disk it is mapped, read-only.

    Raises PhatgooseError, naming the file, if it is missing, truncated or altered.
    """
    name = object_file(content_hash)
    path, local = f"{folder}/{name}", folder.local(name)
    data = None if local else folder.find(name)
    if data is None and not (local and local.exists()):
        raise PhatgooseError(
            f"{path} is missing: start the run again, which trains its expert again; if it was "
            "imported or renamed, do that again"
        )
    expert = Expert.load(local) if local else Expert.from_buffer(data, path)
    actual = expert.content_hash()
    if actual != content_hash:
        raise PhatgooseError(
            f"{path} was altered (its content hash is {actual[:12]}): delete it, and the next "
            "run trains it again; if it was imported or renamed, do that again"
        )
    return expert


def read_profile(folder: Folder, file: str) -> Profile:
    """Read a profile; on a local disk it is mapped.

    Raises PhatgooseError, naming the file, if it is missing or damaged.
    """
    local = folder.local(file)
    if local:
        return Profile.load(local)
    return Profile.from_bytes(folder.read(file), f"{folder}/{file}")


def _to_manifest(content: dict[str, Any], number: int) -> Manifest:
    manifest = Manifest(**content)
    if manifest.number != number:
        raise ValueError(f"its content has the number {manifest.number}")
    for name, content_hash in manifest.experts.items():
        validate_name(name)
        object_file(content_hash)
    return manifest


def _malformed(folder: Folder, file: str, error: Exception, fix: str) -> PhatgooseError:
    return PhatgooseError(f"{folder}/{file} is malformed ({error}): delete it, and {fix}")


def _to_json(content: dict[str, Any]) -> bytes:
    checked = {**content, "sha256": content_checksum(content)}
    return json.dumps(checked, indent=1, sort_keys=True).encode()


def _from_json(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return a file's content, and whether it has a checksum; raise ValueError if it differs."""
    content: dict[str, Any] = json.loads(data)
    checksum = content.pop("sha256", None)
    if checksum is not None and checksum != content_checksum(content):
        raise ValueError("its checksum differs")
    return content, checksum is not None


def content_checksum(content: dict[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, that a JSON file stores beside its content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
