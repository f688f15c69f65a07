"""The checkpoint of a training job: one file of the run folder, replaced as the job goes on."""

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
    """Where a job's checkpoint is. The file is whole or not there, however a writer ends.

    Args:
        folder: the run folder.
        job: the job's id.
        recipe: how the job is trained: a state of another recipe is not gone on from.
        seconds: how old a checkpoint gets before it is replaced.
        given: the file's bytes, where several ranks must go on from the same.
        writes: whether this rank is the one that writes.
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
        # With the code, so that a job is not half of one and half of another.
        code = digest(code_of(TRAINING))
        self._owner = "" if recipe is None else owner_of(f"{job} {code}", recipe)
        self._seconds, self._saved = seconds, time.monotonic()
        self._given, self._writes = given, writes

    def read(self) -> bytes:
        """The file's bytes; none if there is no file, or if it cannot be read."""
        try:
            if self._folder.exists(self._file):
                return self._folder.read(self._file)
        except PhatgooseError as error:
            _LOG.warning("%s is not used, the job starts afresh: %s", self._file, error)
        return b""

    def load(self) -> State | None:
        """The state to go on from; of a file that cannot be used, a line in the log says why."""
        data = self.read() if self._given is None else self._given
        if not data:
            return None
        try:
            state = State.from_bytes(data, self._owner)
        except PhatgooseError as error:
            _LOG.warning("%s is not used, the job starts afresh: %s", self._file, error)
            return None
        _LOG.info("going on from step %d of stage %s", state.step, state.stage)
        return state

    def due(self) -> bool:
        """Whether the newest checkpoint of this process is old enough."""
        return self._writes and time.monotonic() - self._saved >= self._seconds

    def save(self, state: State) -> None:
        """Write the file; one that cannot be written is reported, and training goes on."""
        if not self._writes:
            return
        try:
            self._folder.write(self._file, state.to_bytes(self._owner))
        except PhatgooseError as error:
            _LOG.warning("no checkpoint at step %d: %s", state.step, error)
        self._saved = time.monotonic()

    def delete(self) -> None:
        """Delete it, if it is there."""
        self._folder.delete(self._file, missing_ok=True)


def delete_checkpoints(folder: Folder, jobs: Collection[str]) -> None:
    """Delete what is left of these jobs: a run may end between publishing and deleting."""
    for file in folder.names("checkpoints/"):
        job = PurePosixPath(file).stem
        if job in jobs:
            FolderCheckpoints(folder, job).delete()
