"""The registry: every expert of one base, as immutable objects and numbered manifests.

    objects/<hash>.arrow   one expert each, named by the hash of its content
    jobs/<job>.json        which object a finished job made, and under which name
    manifests/<n>.json     name -> hash of the complete pool; the highest number counts
    code/<digest>.json     the source code that made experts and profiles, as hashes by module
    profiles/<hash>-<id>.safetensors   what routers know about an expert besides weights, measured
                                       in the way that the id identifies

`publish` writes them in this order. A job is finished once its record exists. The next call that
reads the record completes whatever a crash left undone. `put_object` and `put_record` are its two
halves: a training actor has the expert, and the registry actor keeps the records. A crash between
them leaves an object that nothing names; the repeated job names it, or `gc` removes it.

`remove` and `rename` delete the record before they write the manifest, so no concurrent call adds
the name again. So every method may be repeated at any time.

Any number of processes may share a registry. Each record and manifest is created only if it does
not exist (`Folder.create`); a process that comes second reads the existing one and builds on it.
Two runs with different recipes or data may make different experts of one name. Both are stored,
each run finds its own by its job, and the name in the pool refers to the one added last.

The command line is in harness/registry/__main__.py.
"""

import dataclasses
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.registry.files import (
    Access,
    Manifest,
    Record,
    check_file,
    code_file,
    job_file,
    job_files,
    manifest_file,
    manifest_numbers,
    object_file,
    profile_file,
    profile_files,
    read_expert,
    read_manifest,
    read_profile,
    read_record,
    read_records,
)
from harness.source_code import digest
from harness.storage import Folder
from phatgoose.card import Card, validate_name, with_job
from phatgoose.errors import PhatgooseError, near_names
from phatgoose.expert import Expert
from phatgoose.profile import Profile

# Up to this many jobs are looked up one by one.
_FEW = 8


class Registry:
    """The registry of one base in the folder `uri` (a path or URI).

    Raises PhatgooseError if the registry there belongs to another base.
    """

    def __init__(self, uri: str | Path, base_fingerprint: str) -> None:
        """Open the registry, which is empty if the folder is; write nothing yet."""
        self.folder = Folder(uri)
        self.base_fingerprint = base_fingerprint
        self.manifest()

    @classmethod
    def open(cls, uri: str | Path) -> "Registry":
        """Open the registry at `uri`, of any base; raise PhatgooseError if there is none."""
        folder = Folder(uri)
        numbers = manifest_numbers(folder)
        if not numbers:
            raise PhatgooseError(
                f"no registry here: {folder} has no manifests/<n>.json; give a folder that has "
                "(a run's is <run.dir>/registry)"
            )
        return cls(uri, read_manifest(folder, max(numbers)).base_fingerprint)

    def publish(
        self,
        expert: Expert,
        *,
        replace: bool = True,
        add_to_manifest: bool = True,
        code: Mapping[str, str] | None = None,
    ) -> str:
        """Store an expert under its card's job and name; return its content hash.

        `code` is the source code that trained it, see `harness.source_code`.

        Publishing an expert twice makes one object and one manifest. Work may be delivered twice,
        and training may differ in the last bits: the first expert of a job is stored, and its hash
        is returned for later ones. An expert of another job takes over the name of an existing one;
        with `replace=False` it is refused.
        """
        card = expert.card
        self._check_base(card)
        record = self._record(card.job)
        if record is None:
            if not replace:
                self._check_free(self.manifest(), card.name, expert.content_hash())
            record = self._store(expert, self.put_code(code) if code else "")
        if add_to_manifest:
            self._add_to_manifest({card.job: record}, replace)
        return record.object

    def put_object(self, expert: Expert) -> str:
        """Write an expert's object; return its content hash. No record names it yet.

        An existing object is written again. Its content is the same, but its age is not: `gc`
        takes old objects that nothing names for garbage.
        """
        self._check_base(expert.card)
        content_hash = expert.content_hash()
        self.folder.write(object_file(content_hash), expert.to_bytes())
        return content_hash

    def put_record(self, job: str, record: Record) -> Record | None:
        """Record the object that a job made; return the job's valid record.

        That is the first one whose object exists. Return None if the object is missing, because
        `gc` removed it while nothing named it: write it again, and repeat this call.
        """
        file = job_file(job)
        if not self.folder.create(file, record.to_bytes()):
            first = self._record(job)
            if first is not None:
                return first  # another process finished the same job in the meantime
            self.folder.write(file, record.to_bytes())  # the old record's object is gone
        # After the record: from then on gc keeps the object, or writes it back.
        return record if self.folder.exists(object_file(record.object)) else None

    def add_to_manifest(self, jobs: Iterable[str]) -> dict[str, str]:
        """Add the experts of these finished jobs to the pool, with one new manifest.

        Return the content hash of each job's expert; unfinished jobs are left out. If several jobs'
        experts have one name, the last one counts.
        """
        records = self._records(jobs)
        self._add_to_manifest(records)
        return {job: record.object for job, record in records.items()}

    def recorded(self, job: str) -> str | None:
        """Return what `finished` returns, without any change."""
        record = self._record(job)
        return None if record is None else record.object

    def records(self, jobs: Iterable[str]) -> dict[str, Record]:
        """Return the records of the finished jobs among these, without any change."""
        return self._records(jobs)

    def put_code(self, code: Mapping[str, str]) -> str:
        """Store the hashes of source code under their digest; return the digest."""
        name = digest(code)
        if not self.folder.exists(code_file(name)):
            self.folder.create(code_file(name), json.dumps(code, sort_keys=True).encode())
        return name

    def code(self, name: str) -> dict[str, str]:
        """Return the hashes of source code with this digest; empty if they are unknown."""
        data = self.folder.find(code_file(name))
        try:
            return {str(k): str(v) for k, v in json.loads(data or b"{}").items()}
        except (AttributeError, ValueError):
            return {}  # damaged: it is only displayed

    def recorded_all(self, jobs: Iterable[str]) -> dict[str, str]:
        """Return what `add_to_manifest` returns, without any change."""
        return {job: record.object for job, record in self._records(jobs).items()}

    def finished(self, job: str) -> str | None:
        """Return the hash of the expert that a job made; None if the job is not finished.

        Afterwards the newest manifest names the expert, even if a crash interrupted the publishing
        or another job's expert took over the name. A job whose object was deleted is not finished.
        """
        return self.add_to_manifest([job]).get(job)

    def remove(self, name: str) -> str | None:
        """Remove a name from the pool; return its hash, or None if the pool does not have it.

        The record of the expert's job is deleted, so the next run that needs the expert trains it
        again. The object stays, because older manifests name it.
        """
        while True:
            newest = self.manifest()
            if name not in newest.experts:
                return None
            content_hash = newest.experts[name]
            self._forget(content_hash)
            rest = {key: value for key, value in newest.experts.items() if key != name}
            if self._follow(newest, rest):
                return content_hash

    def rename(self, old: str, new: str) -> str:
        """Give an expert another name; return the hash of the renamed expert.

        An object never changes, and its card holds the name, so the renamed expert is another
        object. A job has one name, so it is also the expert of another job: the job that an import
        under the new name would have (a hash of its content). It is stored with that job's record,
        as `publish` does. The old job's record is deleted. One manifest drops `old` and adds `new`.
        So a run whose pool has `old` trains it again, next to `new`. An imported adapter is then
        the same as if it had been imported as `new`.

        Raises PhatgooseError if `old` is missing, if `new` exists, or if it is not a valid name.
        """
        validate_name(new)
        while True:
            newest = self.manifest()
            content_hash = self._named(newest, [old])[old]
            if new in newest.experts:
                raise PhatgooseError(
                    f"the registry {self.folder} has an expert {new}: choose another name, or "
                    "remove or rename that one first"
                )
            expert = self.load(content_hash)
            card = with_job(dataclasses.replace(expert.card, name=new), expert.linears)
            renamed = self._store(dataclasses.replace(expert, card=card)).object
            self._forget(content_hash)
            rest = {key: value for key, value in newest.experts.items() if key != old}
            if self._follow(newest, {**rest, new: renamed}):
                return renamed

    def load(self, content_hash: str) -> Expert:
        """Read one expert and verify its content; on a local disk it is mapped, read-only.

        Raises PhatgooseError, naming the file, if it is missing, truncated or altered.
        """
        return read_expert(self.folder, content_hash)

    def has(self, content_hash: str) -> bool:
        """Return whether this process can read the expert's file."""
        return self.folder.exists(object_file(content_hash))

    def open_access(self) -> Access:
        """Return what another process needs to write objects and profiles itself."""
        access = Access(self.folder.uri, self.base_fingerprint, uuid.uuid4().hex)
        self.renew_access(access.token)
        return access

    def renew_access(self, token: str) -> None:
        """Write the file that proves which folder this is, in case `gc` removed it."""
        self.folder.create(check_file(token), b"")

    def close_access(self, token: str) -> None:
        """Delete the file that `open_access` wrote."""
        self.folder.delete(check_file(token), missing_ok=True)

    def put_profile(self, content_hash: str, profile_id: str, data: bytes) -> None:
        """Store the profile of an expert, `Profile.to_bytes`, unless it exists."""
        self.folder.create(profile_file(content_hash, profile_id), data)

    def has_profile(self, content_hash: str, profile_id: str) -> bool:
        """Return whether the profile of an expert has been measured in this way."""
        return self.folder.exists(profile_file(content_hash, profile_id))

    def profiles(self) -> set[tuple[str, str]]:
        """Return the content hash of the expert and the profile id of every profile."""
        return {(found.expert, found.profile_id) for found in profile_files(self.folder)}

    def profile(self, content_hash: str, profile_id: str) -> Profile:
        """Read a profile; on a local disk it is mapped.

        Raises PhatgooseError, naming the file, if it is missing or damaged.
        """
        return read_profile(self.folder, profile_file(content_hash, profile_id))

    def manifest(self) -> Manifest:
        """Return the newest manifest; number 0 without experts if there is none.

        Raises PhatgooseError if it cannot be read, or if it belongs to another base.
        """
        numbers = manifest_numbers(self.folder)
        if not numbers:
            return Manifest(0, None, self.base_fingerprint, {})
        newest = read_manifest(self.folder, max(numbers))
        if newest.base_fingerprint != self.base_fingerprint:
            raise PhatgooseError(
                f"the registry {self.folder} was made with base {newest.base_fingerprint[:12]}, "
                f"but this base is {self.base_fingerprint[:12]}: choose another folder with "
                "registry=..., or the base it was made with"
            )
        return newest

    def experts(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of these experts by name; raise PhatgooseError if any are missing."""
        return self._named(self.manifest(), list(names))

    def find(self, name: str) -> str:
        """Return the hash of the expert of this name; raise PhatgooseError if it is missing."""
        return self.experts([name])[name]

    def _named(self, manifest: Manifest, names: list[str]) -> dict[str, str]:
        """Return the hashes of these names in one manifest."""
        pool = manifest.experts
        missing = [name for name in names if name not in pool]
        if missing:
            near = sorted({near for name in missing for near in near_names(name, pool)})
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else "`python -m harness.registry list` shows its experts"
            )
            raise PhatgooseError(
                f"the registry {self.folder} has no experts {', '.join(missing)}: {hint}"
            )
        return {name: pool[name] for name in names}

    def _check_free(self, manifest: Manifest, name: str, content_hash: str) -> None:
        if manifest.experts.get(name, content_hash) != content_hash:
            raise PhatgooseError(
                f"the registry {self.folder} has another expert {name}: choose another name with "
                "--name, or replace it with --replace"
            )

    def _store(self, expert: Expert, code: str = "") -> Record:
        """Write the object, then the job's record; return the valid record."""
        while True:
            record = Record(self.put_object(expert), expert.card.name, code)
            valid = self.put_record(expert.card.job, record)
            if valid is not None:
                return valid

    def _check_base(self, card: Card) -> None:
        if card.base_fingerprint != self.base_fingerprint:
            raise PhatgooseError(
                f"expert {card.name!r} was made with base {card.base_fingerprint[:12]}, but the "
                f"registry {self.folder} is for base {self.base_fingerprint[:12]}: publish it in "
                "a registry of its own base"
            )

    def _record(self, job: str) -> Record | None:
        """Return the record of a job if it exists and its object does."""
        record = read_record(self.folder, job_file(job))
        return record if record and self.folder.exists(object_file(record.object)) else None

    def _records(self, jobs: Iterable[str]) -> dict[str, Record]:
        """Return the records of these jobs that exist and whose objects do.

        For many jobs, the files are listed instead of looked up one by one.
        """
        jobs = list(dict.fromkeys(jobs))
        if len(jobs) <= _FEW:
            found = ((job, self._record(job)) for job in jobs)
            return {job: record for job, record in found if record is not None}
        there = set(self.folder.names("jobs/"))
        files = {job_file(job): job for job in jobs}
        records = {}
        for file, record in read_records(self.folder, [file for file in files if file in there]):
            if isinstance(record, PhatgooseError):
                raise record
            if record is not None:
                records[files[file]] = record
        # After the records, whose objects were written before them.
        objects = set(self.folder.names("objects/"))
        return {job: r for job, r in records.items() if object_file(r.object) in objects}

    def _forget(self, content_hash: str) -> None:
        """Delete the records of the jobs that made this object."""
        for file, record in read_records(self.folder, job_files(self.folder)):
            if isinstance(record, PhatgooseError):
                raise record
            if record and record.object == content_hash:
                self.folder.delete(file, missing_ok=True)

    def _add_to_manifest(self, records: Mapping[str, Record], replace: bool = True) -> None:
        """Add the existing objects of these jobs' records to the newest manifest."""
        last = {record.name: job for job, record in records.items()}
        while True:
            newest = self.manifest()
            pool = newest.experts
            missing = [j for name, j in last.items() if pool.get(name) != records[j].object]
            # Read after the manifest: a `remove` that has deleted a record since then writes the
            # next manifest, so either that call or this one has to try again.
            there = self._records(missing)
            added = {r.name: r.object for job, r in there.items() if r == records[job]}
            if not added:
                return
            if not replace:
                for name, content_hash in added.items():
                    self._check_free(newest, name, content_hash)
            if self._follow(newest, {**pool, **added}):
                return

    def _follow(self, newest: Manifest, experts: dict[str, str]) -> bool:
        """Write the manifest after `newest`; return False if another process has written it."""
        number = newest.number + 1
        following = Manifest(number, newest.number, self.base_fingerprint, experts)
        return self.folder.create(manifest_file(number), following.to_bytes())
