"""A registry as training actors use it: its folder if they see it, else the registry actor.

The driver opens the access. The registry actor then keeps a file with a random name in its folder.
An actor that finds this name under the registry's path or URI sees the same folder, and writes
objects and profiles itself. A folder of the same path on another machine's disk does not have the
file, and neither has a bucket of the same name on another server: nothing is written there, and
experts go through the registry actor. Records and manifests are always the registry actor's.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from harness.registry import Registry
from harness.registry.files import Access, check_file
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# Tokens that this process did not find: waiting for an unreachable server takes a minute each time.
_UNSEEN: set[str] = set()


@dataclass(frozen=True)
class RegistryClient:
    """A registry that other processes use.

    Attributes:
        actor: the registry actor.
        access: how to reach its folder.
    """

    actor: Any
    access: Access

    def put_object(self, expert: Expert) -> str | None:
        """Write an expert's object; return its content hash, or None if this process cannot."""
        return self._directly(lambda registry: registry.put_object(expert))

    def put_profile(self, content_hash: str, profile_id: str, data: bytes) -> bool:
        """Write the profile of an expert; return False if this process cannot."""

        def put(registry: Registry) -> bool:
            registry.put_profile(content_hash, profile_id, data)
            return True

        return self._directly(put) or False

    def load(self, content_hash: str) -> Expert:
        """Read an expert, through the registry actor if this process does not see its file."""
        registry = self._registry()
        if registry is not None and registry.has(content_hash):
            return registry.load(content_hash)
        expert: Expert = answer_of(self.actor.load.remote(content_hash))
        return expert

    def _directly(self, write: Callable[[Registry], _Result]) -> _Result | None:
        registry = self._registry()
        if registry is None:
            return None
        try:
            return write(registry)
        except PhatgooseError as error:  # for example, the folder is mounted read-only
            _LOG.warning("through the registry actor: %s", error)
            return None

    def _registry(self) -> Registry | None:
        """Return the registry if this process sees its folder now."""
        access, file = self.access, check_file(self.access.token)
        if access.token in _UNSEEN:
            return None
        try:
            folder = Folder(access.uri)
            if not folder.exists(file):
                # gc removes such a file after a day.
                answer_of(self.actor.renew_access.remote(access.token))
            if folder.exists(file):
                return _open(access.uri, access.base_fingerprint)
            why = "the folder of that name on this node is another one"
        except PhatgooseError as error:
            why = str(error)
        _UNSEEN.add(access.token)
        _LOG.info("experts go through the registry actor, because %s", why)
        return None


@functools.cache
def _open(uri: str, base_fingerprint: str) -> Registry:
    return Registry(uri, base_fingerprint)


@contextlib.contextmanager
def opened_access(actor: Any) -> Iterator[RegistryClient]:
    """Give other processes access to the folder of a registry actor during the block."""
    access: Access = answer_of(actor.open_access.remote())
    try:
        yield RegistryClient(actor, access)
    finally:
        # What stays of it is harmless, and must not hide an error of the block.
        with contextlib.suppress(RayError, PhatgooseError):
            answer_of(actor.close_access.remote(access.token))


def answer_of(reference: Any) -> Any:
    """Return what the registry actor returned; raise its PhatgooseError unchanged."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PhatgooseError):
            raise error.cause from None
        raise
