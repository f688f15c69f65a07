"""The registry: every expert of one base, as immutable objects and numbered manifests.

    objects/<hash>.arrow   one expert each, named by the hash of its content
    jobs/<job>.json        which object a finished job made, and under which name
    manifests/<n>.json     name -> hash of the whole pool; the highest number counts

A publish writes them in this order. Once the job's record is there the job is finished, and
whatever a crash then left undone is done by the next call that meets the record. So every method
may be repeated at any time, and any number of processes may share a registry.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert, validate_name

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The pool at one moment: expert name -> content hash. Number 0 is the empty pool."""

    number: int
    parent: int | None
    base_fingerprint: str
    experts: dict[str, str]


@dataclass(frozen=True)
class _Record:
    """What a finished job made."""

    object: str
    name: str


class Registry:
    """The registry of one base in the folder `uri` (a path or URI).

    Raises PhatgooseError if the registry there belongs to another base.
    """

    def __init__(self, uri: str | Path, base_fingerprint: str) -> None:
        """Open the registry, which is empty if nothing is there; nothing is written yet."""
        self.folder = Folder(uri)
        self.base_fingerprint = base_fingerprint
        self.manifest()

    def publish(self, expert: Expert) -> str:
        """Store a trained expert under its card's job and name; return its content hash.

        The same expert twice makes one object and one manifest. Work may be delivered twice, and
        training may differ in the last bits: the first expert of a job is kept and its hash is
        returned for the later ones. Another job's expert of the same name takes over that name.
        """
        card = expert.card
        if card.base_fingerprint != self.base_fingerprint:
            raise PhatgooseError(
                f"expert {card.name!r} was made with base {card.base_fingerprint[:12]}, but the "
                f"registry {self.folder} is for base {self.base_fingerprint[:12]}: publish it in "
                "a registry of its own base"
            )
        record = self._record(card.job) or self._store(expert)
        self._enter(record)
        return record.object

    def recorded(self, job: str) -> str | None:
        """As `finished`, but changes nothing: for looking before any work."""
        record = self._record(job)
        return None if record is None else record.object

    def finished(self, job: str) -> str | None:
        """The hash of the expert that a job made; None if the job is still to be done.

        The newest manifest names the expert afterwards, even if a crash cut the publish short or
        another job's expert took over the name. None also where the object was deleted.
        """
        record = self._record(job)
        if record is None:
            return None
        self._enter(record)
        return record.object

    def load(self, content_hash: str) -> Expert:
        """Read one expert and verify its content; on a local disk it is mapped, read-only.

        Raises PhatgooseError, naming the file, if it is missing, truncated or altered.
        """
        name = _object_file(content_hash)
        path = self.folder.path(name)
        if not self.folder.exists(name):
            raise PhatgooseError(f"{path} is missing: run again, and its expert is trained again")
        local = self.folder.local(name)
        expert = Expert.load(local) if local else Expert.from_buffer(self.folder.read(name), path)
        actual = expert.content_hash()
        if actual != content_hash:
            raise PhatgooseError(
                f"{path} was altered (its content hash is {actual[:12]}): delete it, and the next "
                "run trains it again"
            )
        return expert

    def manifest(self) -> Manifest:
        """The newest manifest; number 0 and no experts if there is none.

        Raises PhatgooseError if it cannot be read, or if it is of another base.
        """
        names = self.folder.names("manifests/")
        numbers = [
            int(m[1]) for m in (re.fullmatch(r"manifests/([1-9]\d*)\.json", n) for n in names) if m
        ]
        if not numbers:
            return Manifest(0, None, self.base_fingerprint, {})
        newest = self._read_manifest(max(numbers))
        if newest.base_fingerprint != self.base_fingerprint:
            raise PhatgooseError(
                f"the registry {self.folder} was made with base {newest.base_fingerprint[:12]}, "
                f"but this base is {self.base_fingerprint[:12]}: choose another folder with "
                "registry=..., or the base it was made with"
            )
        return newest

    def experts(self, names: Iterable[str]) -> dict[str, str]:
        """The hashes of the experts of these names; PhatgooseError lists all that are missing."""
        wanted, pool = list(names), self.manifest().experts
        missing = [name for name in wanted if name not in pool]
        if missing:
            near = sorted({n for name in missing for n in difflib.get_close_matches(name, pool)})
            hint = f"did you mean {', '.join(near)}?" if near else "train them first"
            raise PhatgooseError(
                f"the registry {self.folder} has no experts {', '.join(missing)}: {hint}"
            )
        return {name: pool[name] for name in wanted}

    def find(self, name: str) -> str:
        """The hash of the expert of this name; PhatgooseError if there is none."""
        return self.experts([name])[name]

    def _store(self, expert: Expert) -> _Record:
        """Write the object, then the job's record; return the record that counts."""
        record = _Record(expert.content_hash(), expert.card.name)
        if not self.folder.exists(_object_file(record.object)):
            self.folder.write(_object_file(record.object), expert.to_bytes())
        file = _job_file(expert.card.job)
        if not self.folder.create(file, _to_json(asdict(record))):
            first = self._record(expert.card.job)
            if first is not None:
                return first  # another process finished the same job in the meantime
            self.folder.write(file, _to_json(asdict(record)))  # the old record's object is gone
        return record

    def _record(self, job: str) -> _Record | None:
        """The record of a job, if there is one and its object still exists."""
        file = _job_file(job)
        if not self.folder.exists(file):
            return None
        data = self.folder.read(file)
        try:
            record = _Record(**json.loads(data))
            validate_name(record.name)
            object_file = _object_file(record.object)
        except (TypeError, ValueError, PhatgooseError) as error:
            raise self._malformed(file, error, "the next run trains it again") from error
        return record if self.folder.exists(object_file) else None

    def _enter(self, record: _Record) -> None:
        """Make the newest manifest name the record's object."""
        while True:
            newest = self.manifest()
            if newest.experts.get(record.name) == record.object:
                return
            experts = {**newest.experts, record.name: record.object}
            number = newest.number + 1
            following = Manifest(number, newest.number, self.base_fingerprint, experts)
            data = _to_json({"schema": SCHEMA_VERSION, **asdict(following)})
            if self.folder.create(f"manifests/{number}.json", data):
                return
            # Another process took this number: build on its manifest.

    def _read_manifest(self, number: int) -> Manifest:
        file = f"manifests/{number}.json"
        data = self.folder.read(file)
        try:
            content = json.loads(data)
            schema = int(content.pop("schema"))
            manifest = _to_manifest(content, number) if schema <= SCHEMA_VERSION else None
        except (AttributeError, LookupError, TypeError, ValueError, PhatgooseError) as error:
            mend = "finished jobs are entered again by the next run"
            raise self._malformed(file, error, mend) from error
        if manifest is None:
            raise PhatgooseError(
                f"{self.folder.path(file)} has the newer schema {schema}: update phatgoose"
            )
        return manifest

    def _malformed(self, file: str, error: Exception, mend: str) -> PhatgooseError:
        return PhatgooseError(
            f"{self.folder.path(file)} is malformed ({error}): delete it, and {mend}"
        )


RegistryActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Registry)


def registry_actor(uri: str | Path, base_fingerprint: str) -> Any:
    """This Ray job's actor over `Registry(uri, base_fingerprint)`; its methods are the registry's.

    Ray restarts it and repeats calls that were under way, which every method allows. Each Ray job
    has its own, because an actor ends with the driver that made it. Raises what Registry raises.
    """
    folder = Registry(uri, base_fingerprint).folder  # a mistake shows here, not in an actor
    absolute = folder.uri
    # A local folder is this node's: an actor elsewhere would write to another disk.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place = {"scheduling_strategy": here} if folder.local("objects") else {}
    job = ray.get_runtime_context().get_job_id()
    key = hashlib.sha256(f"{absolute}\n{base_fingerprint}\n{job}".encode()).hexdigest()[:16]
    return RegistryActor.options(
        name=f"registry-{key}", namespace="phatgoose", get_if_exists=True, **place
    ).remote(absolute, base_fingerprint)


def _to_manifest(content: dict[str, Any], number: int) -> Manifest:
    manifest = Manifest(**content)
    if manifest.number != number:
        raise ValueError(f"it says that it is number {manifest.number}")
    for name, content_hash in manifest.experts.items():
        validate_name(name)
        _object_file(content_hash)
    return manifest


def _object_file(content_hash: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", content_hash):
        raise PhatgooseError(f"{content_hash!r} is no content hash: use 64 hexadecimal digits")
    return f"objects/{content_hash}.arrow"


def _job_file(job: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8,64}", job):
        raise PhatgooseError(f"{job!r} is no job id: use 8 to 64 hexadecimal digits")
    return f"jobs/{job}.json"


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()
