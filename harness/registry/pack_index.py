"""The index of a pack: which experts it holds, and the hash of its file.

    packs/<id>/pack.json   {"experts": [[name, content hash], ...], "code": digest of the source
                            code that stacked them, "xxh3_128": hash of pool.safetensors,
                            "sha256": checksum}

Packs of version 0.1.0 have neither code nor checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from harness.registry.files import content_checksum

POOL_FILE, INDEX_FILE = "pool.safetensors", "pack.json"


def pool_id(experts: Mapping[str, str]) -> str:
    """Return the id of a pool: a hash over its experts' names and content hashes, in order."""
    return hashlib.sha256(json.dumps(list(experts.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PackIndex:
    """The index of a pack.

    Attributes:
        experts: content hash by name, in the pool's order.
        content: the hash of the pool's file.
        code: a digest of the code that stacked the experts; None for packs of version 0.1.0.
    """

    experts: dict[str, str]
    content: str
    code: str | None

    @staticmethod
    def from_bytes(data: bytes, pack: str) -> "PackIndex":
        """Read the index of the pack of this id.

        Raises:
            LookupError, TypeError, ValueError: it is damaged, or belongs to another pack.
        """
        index = json.loads(data)
        experts = {str(name): str(content) for name, content in index["experts"]}
        if pool_id(experts) != pack:
            raise ValueError("its experts differ")
        is_of_0_1_0 = index.keys() == {"experts", "xxh3_128"}
        if not is_of_0_1_0 and index.pop("sha256") != content_checksum(index):
            raise ValueError(f"{INDEX_FILE} was altered")
        return PackIndex(experts, index["xxh3_128"], index.get("code"))

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        index = {"experts": list(self.experts.items()), "code": self.code, "xxh3_128": self.content}
        return json.dumps({**index, "sha256": content_checksum(index)}).encode()
