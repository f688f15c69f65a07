"""The checkpoint of a training job: one file of the run folder, replaced during training."""

import logging
import time
from collections.abc import Collection
from pathlib import PurePosixPath

from harness.source_code import TRAINING, code_of, digest
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.training.checkpoint import State, owner_of
from phatgoose.training.recipe import Recipe

_LOG = logging.getLogger(__name__)


class FolderCheckpoints:
    """The checkpoint of one job. Its file is written atomically.

    Args:
        folder: the run folder.
        job: the job's id.
        recipe: the job's recipe. A state of another recipe is not resumed.
        seconds: the age at which a checkpoint is replaced.
        given: the file's bytes, if several ranks must resume from the same state.
        writes: whether this rank writes the file.
    """

    def __init__(
        self,
        folder: Folder,
        job: str,
        recipe: Recipe | None = None,
        seconds: float = 60,
        *,
        given: bytes | None = None,
        writes: bool = True,
    ) -> None:
        self._folder, self._file = folder, f"checkpoints/{job}.safetensors"
        # Includes the code, so that no expert is trained half by one version and half by another.
        code = digest(code_of(TRAINING))
        self._owner = "" if recipe is None else owner_of(f"{job} {code}", recipe)
        self._seconds, self._saved = seconds, time.monotonic()
        self._given, self._writes = given, writes

    def read(self) -> bytes:
        """Return the file's bytes; empty if it is missing or cannot be read."""
        try:
            if self._folder.exists(self._file):
                return self._folder.read(self._file)
        except PhatgooseError as error:
            _LOG.warning(
                "%s is not used, so the job starts from the beginning: %s", self._file, error
            )
        return b""

    def load(self) -> State | None:
        """Return the state to resume from, or None; log why a file cannot be used."""
        data = self.read() if self._given is None else self._given
        if not data:
            return None
        try:
            state = State.from_bytes(data, self._owner)
        except PhatgooseError as error:
            _LOG.warning(
                "%s is not used, so the job starts from the beginning: %s", self._file, error
            )
            return None
        _LOG.info("resuming from step %d of stage %s", state.step, state.stage)
        return state

    def due(self) -> bool:
        """Return whether this process's newest checkpoint is old enough to be replaced."""
        return self._writes and time.monotonic() - self._saved >= self._seconds

    def save(self, state: State) -> None:
        """Write the file; log a failure, and let training continue."""
        if not self._writes:
            return
        try:
            self._folder.write(self._file, state.to_bytes(self._owner))
        except PhatgooseError as error:
            _LOG.warning("no checkpoint at step %d: %s", state.step, error)
        self._saved = time.monotonic()

    def delete(self) -> None:
        """Delete the file if it exists."""
        self._folder.delete(self._file, missing_ok=True)


def delete_checkpoints(folder: Folder, jobs: Collection[str]) -> None:
    """Delete the checkpoints of these jobs: a run may end between publishing and deleting."""
    for file in folder.names("checkpoints/"):
        job = PurePosixPath(file).stem
        if job in jobs:
            FolderCheckpoints(folder, job).delete()
