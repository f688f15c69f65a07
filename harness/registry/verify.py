"""Verify that a registry is intact: read every file of it, and change nothing."""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from harness.registry.bucket_packs import bucket_pack_experts
from harness.registry.files import (
    Manifest,
    Record,
    job_files,
    manifest_file,
    manifest_numbers,
    object_file,
    object_files,
    profile_files,
    read_expert,
    read_manifest,
    read_profile,
    read_records,
)
from harness.registry.pack_index import INDEX_FILE
from harness.registry.packs import pack_folders, read_index
from harness.storage import Folder
from phatgoose.card import Card
from phatgoose.errors import PhatgooseError

# How many objects are read at once, and so are in memory.
_READERS = 4


@dataclass(frozen=True)
class Check:
    """The result of `verify`.

    Attributes:
        objects: how many experts were read.
        problems: one line for each thing that is damaged or missing, with the fix.
        orphans: objects that neither a manifest nor a record names, and profiles of deleted
            objects; they are harmless, and `gc` removes them.
        unnamed: records of experts that no manifest names yet; the next run adds them.
    """

    objects: int
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def verify(folder: Folder, *, every_manifest: bool = False) -> Check:
    """Read the experts that the newest manifest or a record names, and all other files.

    Problems are objects that are missing, truncated, have another hash than their name, or whose
    card contradicts what names them; and manifests, records, profiles and packs that cannot be read
    or were altered.

    Args:
        folder: of the registry.
        every_manifest: also read the experts that only older manifests name, and orphans.
    """
    # Listed before the files that name them, so that concurrent publishing leaves no false orphans.
    objects = set(object_files(folder))
    profiles = profile_files(folder)
    records, bad_records = _records(folder)
    manifests, bad_manifests = _manifests(folder)
    named = {object_file(c) for manifest in manifests for c in manifest.experts.values()}
    recorded = {object_file(record.object) for record in records.values()}
    newest = manifests[-1] if manifests else None
    wanted = _wanted(newest, records)
    if every_manifest:
        for manifest in manifests:
            for name, content in manifest.experts.items():
                wanted.setdefault(content, f"expert {name} of manifest {manifest.number}")
        for file in sorted(objects - named - recorded):
            wanted.setdefault(_content(file), file)
    cards, bad_objects = _cards(folder, wanted)
    problems = [
        *bad_manifests,
        *bad_objects,
        *(_misfits(newest, cards) if newest else ()),
        *bad_records,
        *_record_problems(folder, records, objects, cards),
        *_profile_problems(folder, [p.file for p in profiles if object_file(p.expert) in objects]),
        *_pack_problems(folder),
    ]
    orphans = sorted(objects - named - recorded)
    orphans += [p.file for p in profiles if object_file(p.expert) not in objects]
    unnamed = [f for f, r in records.items() if object_file(r.object) in objects - named]
    return Check(len(wanted), problems, orphans, unnamed)


def _content(file: str) -> str:
    return file.removeprefix("objects/").removesuffix(".arrow")


def _wanted(newest: Manifest | None, records: dict[str, Record]) -> dict[str, str]:
    """Return what to read, by content hash, and what to call it."""
    pool = newest.experts if newest else {}
    wanted = {content: f"expert {name}" for name, content in pool.items()}
    for record in records.values():
        wanted.setdefault(record.object, f"expert {record.name}")
    return wanted


def _records(folder: Folder) -> tuple[dict[str, Record], list[str]]:
    """Return the records by file, and the problems of the others."""
    records, problems = {}, []
    for file, record in read_records(folder, job_files(folder)):
        if isinstance(record, PhatgooseError):
            problems.append(str(record))
        elif record is not None:
            records[file] = record
    return records, problems


def _manifests(folder: Folder) -> tuple[list[Manifest], list[str]]:
    """Return the readable manifests in order, and the problems of the others."""
    manifests, problems = [], []
    numbers = manifest_numbers(folder)
    for number in numbers:
        try:
            manifests.append(read_manifest(folder, number))
        except PhatgooseError as error:
            if not folder.exists(manifest_file(number)):
                continue  # collected meanwhile
            problem = str(error)
            if number == numbers[-1]:
                good = manifests[-1] if manifests else None
                problem += (
                    f"; manifest {good.number} ({len(good.experts)} experts) is the newest good one"
                    if good
                    else "; there is no other"
                )
            problems.append(problem)
    return manifests, problems


def _cards(folder: Folder, wanted: dict[str, str]) -> tuple[dict[str, Card], list[str]]:
    """Return the cards of these experts by content hash, and the problems of the others."""

    def card(content: str) -> Card | str:
        try:
            return read_expert(folder, content).card
        except PhatgooseError as error:
            return f"{wanted[content]}: {error}"

    with ThreadPoolExecutor(_READERS) as readers:
        found = dict(zip(wanted, readers.map(card, wanted), strict=True))
    cards = {content: card for content, card in found.items() if isinstance(card, Card)}
    return cards, [problem for problem in found.values() if isinstance(problem, str)]


def _misfits(newest: Manifest, cards: dict[str, Card]) -> Iterator[str]:
    """Yield a problem for each expert of the pool whose card has another name or base."""
    for name, content in newest.experts.items():
        card = cards.get(content)
        if card and (card.name != name or card.base_fingerprint != newest.base_fingerprint):
            yield (
                f"manifest {newest.number} calls {object_file(content)} {name}, but it is expert "
                f"{card.name} of base {card.base_fingerprint[:12]}: remove {name}, and the next "
                "run trains it again"
            )


def _record_problems(
    folder: Folder, records: dict[str, Record], objects: set[str], cards: dict[str, Card]
) -> Iterator[str]:
    for file, record in records.items():
        wanted = object_file(record.object)
        if wanted not in objects and not folder.exists(wanted):
            yield (
                f"{folder}/{file} names {wanted}, which is missing: delete "
                f"the record, or start the run again, and expert {record.name} is trained again"
            )
        card = cards.get(record.object)
        job = file.removeprefix("jobs/").removesuffix(".json")
        if card and (card.name, card.job) != (record.name, job):
            yield (
                f"{folder}/{file} names {wanted}, which is expert {card.name} of job "
                f"{card.job}: delete the record, and the next run trains {record.name} again"
            )


def _profile_problems(folder: Folder, files: Iterable[str]) -> Iterator[str]:
    for file in files:
        try:
            read_profile(folder, file)
        except PhatgooseError as error:
            yield str(error)


def _pack_problems(folder: Folder) -> Iterator[str]:
    root = folder.local("packs")
    if root is None:
        yield from _bucket_pack_problems(folder)
        return
    for pack in pack_folders(root.parent):
        try:
            read_index(pack)
        except PhatgooseError as error:
            yield str(error)


def _bucket_pack_problems(folder: Folder) -> Iterator[str]:
    """Yield the problems of packs that have an index; others may be under way."""
    names = (
        re.fullmatch(rf"packs/([0-9a-f]{{16}})/{INDEX_FILE}", n) for n in folder.names("packs/")
    )
    for pack in [name[1] for name in names if name]:
        try:
            if bucket_pack_experts(folder, pack, reads=True) is None:
                yield f"{folder}/packs/{pack} is incomplete: delete it, or run `gc`"
        except PhatgooseError as error:
            yield str(error)
