"""Packs: a pool's experts stacked into one file that all actors of a machine map."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.leftovers import temporary_name
from harness.registry import Registry
from phatgoose.cache import cache_dir
from phatgoose.expert import Expert
from phatgoose.pool import Pool


@dataclass(frozen=True)
class Members:
    """The experts of a pool: content hash by name, and profile id by name if profiles count."""

    experts: Mapping[str, str]
    profiles: Mapping[str, str] | None = None


def pool_id(experts: Mapping[str, str]) -> str:
    """What identifies a pool: a hash over its experts' names and content hashes, in its order."""
    return hashlib.sha256(json.dumps(list(experts.items())).encode()).hexdigest()[:16]


def open_pool(
    registry: Registry, experts: Mapping[str, str], load: Callable[[str], Expert]
) -> Pool:
    """Map the pack of these experts, making it first if this machine has none.

    It lies in the registry where that is a local folder, else in the cache. It can be made again
    at any time, and two processes that make it at once do not disturb each other.

    Args:
        registry: where the experts are kept.
        experts: content hash by name, in the pool's order.
        load: reads and verifies the expert of a hash.
    """
    packs = registry.folder.local("packs") or cache_dir() / "packs"
    folder = packs / pool_id(experts)
    if not folder.exists():
        packs.mkdir(parents=True, exist_ok=True)
        temporary = packs / temporary_name()
        try:
            temporary.mkdir()
            Pool.from_experts([load(content) for content in experts.values()]).save(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # else another process was first, and its pack is the same
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Pool.open(folder)
