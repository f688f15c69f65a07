"""Is a registry whole? Looks at objects, jobs and manifests, and changes nothing."""

from dataclasses import dataclass

from harness.registry import Registry
from harness.registry_files import (
    job_files,
    manifest_numbers,
    object_file,
    object_files,
    read_manifest,
    read_record,
)
from phatgoose.errors import PhatgooseError


@dataclass(frozen=True)
class Check:
    """What `verify` found.

    Attributes:
        objects: how many experts were read.
        problems: one line for each thing that is damaged or missing, with its mend.
        orphans: the files of objects that no manifest names; they do no harm.
    """

    objects: int
    problems: list[str]
    orphans: list[str]


def verify(registry: Registry, *, every_manifest: bool = False) -> Check:
    """Read every expert that the newest manifest names, or any manifest, and all small files.

    A problem is: an object that is missing, cut short, or has another hash than its name; a
    manifest or record that cannot be read; a record whose object is missing.
    """
    folder = registry.folder
    # Listed before the manifests are read: what is published meanwhile must not look unnamed.
    objects = object_files(folder)
    newest = registry.manifest().experts
    wanted = {content: f"expert {name}" for name, content in newest.items()}
    named: set[str] = set()
    problems = []
    for number in manifest_numbers(folder):
        try:
            experts = read_manifest(folder, number).experts
        except PhatgooseError as error:
            problems.append(str(error))
            continue
        named.update(map(object_file, experts.values()))
        if every_manifest:
            for name, content in experts.items():
                wanted.setdefault(content, f"expert {name} of manifest {number}")
    for content, what in wanted.items():
        try:
            registry.load(content)
        except PhatgooseError as error:
            problems.append(f"{what}: {error}")
    problems += _record_problems(registry)
    return Check(len(wanted), problems, [file for file in objects if file not in named])


def _record_problems(registry: Registry) -> list[str]:
    folder, problems = registry.folder, []
    for file in job_files(folder):
        try:
            record = read_record(folder, file)
        except PhatgooseError as error:
            problems.append(str(error))
            continue
        if record and not folder.exists(object_file(record.object)):
            problems.append(
                f"{folder.path(file)} names {object_file(record.object)}, which is missing: delete "
                f"the record, or run again, and expert {record.name} is trained again"
            )
    return problems
