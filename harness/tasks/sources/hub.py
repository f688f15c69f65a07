"""Read data sets of the Hugging Face hub from a folder of copies, the hub's cache, or the hub.

A data set is always read from a local folder: a copy that the user made, `<folder>/<owner>/<name>`
(a clone, or the output of `hf download --repo-type dataset --local-dir`), or the snapshot that
huggingface_hub keeps. Data sets from the hub are pinned: the revision found at first use is stored
in the cache and used from then on. Data set scripts are never run.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.tasks.files import folder_digests
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import replacing

if TYPE_CHECKING:
    import datasets

_MAIN = "main"
# Branch on which the hub keeps a parquet copy of data sets that are only scripts.
PARQUET = "refs/convert/parquet"
# Why the hub did not answer; this process does not ask it again.
_SILENT: list[str] = []


@dataclass(frozen=True)
class HubData:
    """A data set of the hub.

    Attributes:
        path: `<owner>/<name>`.
        config: its configuration; empty for the only one.
        data_dir: the folder within it to read; empty for all.
        revision: a commit or branch; empty for the main branch.
    """

    path: str
    config: str = ""
    data_dir: str = ""
    revision: str = ""

    def __str__(self) -> str:
        """Return the path, configuration, folder and revision."""
        parts = [self.path, self.config, self.data_dir, self.revision and f"@{self.revision}"]
        return " ".join(part for part in parts if part)


def missing(data: HubData, folder: str | None) -> str | None:
    """Return why a data set is unavailable and where it was searched; download nothing."""
    from huggingface_hub import constants

    if _local(data, folder) is not None or _snapshot(data) is not None:
        return None
    looked = [str(Path(folder) / data.path)] if folder else ["no folder of copies (folder=)"]
    looked.append(f"the hub's cache {constants.HF_HUB_CACHE}")
    try:
        _revision(data)
    except PhatgooseError as error:
        return f"data set {data} is not in: {', '.join(looked)}; {error}"
    return None


def identity(data: HubData, folder: str | None) -> Any:
    """Return what determines the rows: a revision, or names and hashes of the files of a copy.

    Raises:
        PhatgooseError: the data set is unavailable.
    """
    local = _local(data, folder)
    if local is not None:
        return folder_digests(local / data.data_dir)
    return [data.path, data.config, data.data_dir, _revision(data)]


def rows(data: HubData, split: str, folder: str | None) -> "datasets.Dataset":
    """Return the rows of one split, mapped from disk. Iterate over them; do not list them.

    Raises:
        PhatgooseError: the data set is unavailable, is a script, or has no such configuration,
            folder or split.
    """
    import datasets  # slow, and needed only here

    local = _local(data, folder) or _snapshot(data)
    if local is None:
        problem = missing(data, folder)
        if problem:
            raise PhatgooseError(problem)
        local = _download(data)
    place = local / data.data_dir
    if not place.is_dir():
        raise PhatgooseError(f"data set {data}: {local} has no folder {data.data_dir}")
    datasets.disable_progress_bars()
    try:
        if (place / "dataset_dict.json").exists():  # written by save_to_disk
            found = datasets.load_from_disk(str(place))
            if split not in found:
                raise PhatgooseError(f"data set {data} has no split {split}; it has {list(found)}")
            return found[split]
        return datasets.load_dataset(
            str(local),
            data.config or None,
            data_dir=data.data_dir or None,
            split=split,
            # datasets' own cache does not notice that files of a folder have changed.
            cache_dir=str(cache_dir() / "datasets" / _hash(identity(data, folder))),
        )
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise PhatgooseError(
            f"data set {data} is a script, and scripts are never run. Name a copy in parquet, or "
            f"try revision: {PARQUET} with data_dir: <its configuration>."
        ) from error
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise PhatgooseError(f"data set {data}, split {split}: {reason_of(error)}") from error


def origin(data: HubData, folder: str | None) -> dict[str, str]:
    """Return where the data comes from, to be stored with it."""
    local = _local(data, folder)
    where = {"data_set": str(data)}
    return where | ({"copy": str(local)} if local else {"revision": _revision(data)})


def _local(data: HubData, folder: str | None) -> Path | None:
    """Return the user's own copy, if there is one."""
    if folder is None:
        return None
    path = Path(folder).expanduser() / data.path
    return path if path.is_dir() else None


def _patterns(data: HubData) -> str | None:
    return f"{data.data_dir}/**" if data.data_dir else None


def _snapshot(data: HubData) -> Path | None:
    """Return the snapshot that was downloaded before, of the pinned revision if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = _pinned(data) or data.revision or _MAIN
    try:
        path = snapshot_download(
            data.path, repo_type="dataset", revision=revision, local_files_only=True
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    return Path(path) if (Path(path) / data.data_dir).is_dir() else None


def _download(data: HubData) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            data.path,
            repo_type="dataset",
            revision=_revision(data),
            allow_patterns=_patterns(data),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PhatgooseError(f"data set {data} cannot be downloaded: {reason_of(error)}") from error
    return Path(path)


def _revision(data: HubData) -> str:
    """Return the commit to use: the pinned one, else the cached one, else the newest."""
    pinned = _pinned(data)
    if pinned is not None:
        return pinned
    snapshot = _snapshot(data)
    commit = snapshot.name if snapshot is not None else _newest(data.path, data.revision or _MAIN)
    note = _note(data)
    note.parent.mkdir(parents=True, exist_ok=True)
    with replacing(note) as file:
        file.write_text(json.dumps({"data_set": data.path, "revision": commit}))
    return commit


def _pinned(data: HubData) -> str | None:
    """Return the commit that was used before, if any."""
    note = _note(data)
    return str(json.loads(note.read_bytes())["revision"]) if note.exists() else None


def _note(data: HubData) -> Path:
    name = f"{data.path}@{data.revision or _MAIN}".replace("/", "--")
    return cache_dir() / "hub" / f"{name}.json"


@lru_cache
def _newest(path: str, revision: str) -> str:
    """Ask the hub for the commit of a branch."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        raise PhatgooseError("the hub is not accessed (HF_HUB_OFFLINE is set)")
    if _SILENT:
        raise PhatgooseError(_SILENT[0])
    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=20).sha)
    except HfHubHTTPError as error:
        raise PhatgooseError(f"the hub does not provide it: {reason_of(error)}") from error
    except Exception as error:  # any network failure; a second request would wait as long
        _SILENT.append(f"the hub cannot be reached: {reason_of(error)}")
        raise PhatgooseError(_SILENT[0]) from error


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
