"""The journal of a run: each answered chunk in a file of its own, so that no answer is lost."""

import hashlib
import json
from dataclasses import asdict
from pathlib import PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from harness.evaluation.chunks import Answer
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.files import safetensors_metadata
from phatgoose.inference.scoring import Score


class DamagedAnswer(PhatgooseError):
    """A stored answer that was altered or truncated."""


class Journal:
    """The answered chunks of a run, in one file each. Files are written atomically."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def keys(self) -> set[str]:
        """Return the keys of all answered chunks."""
        files = self._folder.names("journal/")
        return {PurePosixPath(name).stem for name in files if name.endswith(".safetensors")}

    def read(self, key: str) -> Answer:
        """Return the answer to a chunk.

        Raises:
            DamagedAnswer: the file is missing, was altered or was truncated.
        """
        name = _file(key)
        data = self._folder.find(name)
        if data is None:
            raise DamagedAnswer(f"{self._folder}/{name} is missing")
        try:
            return _from_bytes(key, data)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise DamagedAnswer(f"{self._folder}/{name} is damaged") from error

    def write(self, key: str, answer: Answer) -> None:
        """Store the answer to a chunk."""
        self._folder.write(_file(key), _to_bytes(key, answer))


def _file(key: str) -> str:
    return f"journal/{key}.safetensors"


def _to_bytes(key: str, answer: Answer) -> bytes:
    linears = list(answer.routing)
    content = {
        "scores": [[asdict(score) for score in scores] for scores in answer.scores],
        "texts": answer.texts,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "linears": linears,
        "routed": [answer.routed[linear] for linear in linears],
        "cut": answer.cut,
    }
    weights = [answer.routing[linear] for linear in linears]
    weights_LE = torch.stack(weights) if weights else torch.zeros(0, 0, dtype=torch.float64)
    text, tensors = json.dumps(content), {"routing": weights_LE.contiguous()}
    return save(tensors, metadata={"answer": text, "sha256": _checksum(key, text, weights_LE)})


def _checksum(key: str, text: str, weights_LE: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{key}\n{text}".encode())
    digest.update(weights_LE.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_bytes(key: str, data: bytes) -> Answer:
    metadata = safetensors_metadata(data)
    weights_LE = load(data)["routing"]
    if metadata["sha256"] != _checksum(key, metadata["answer"], weights_LE):
        raise ValueError("its checksum differs")
    content = json.loads(metadata["answer"])
    linears = content["linears"]
    return Answer(
        scores=[[Score(**score) for score in scores] for scores in content["scores"]],
        texts=content["texts"],
        tokens=content["tokens"],
        seconds=content["seconds"],
        routing=dict(zip(linears, weights_LE, strict=True)),
        routed=dict(zip(linears, content["routed"], strict=True)),
        cut=content["cut"],
    )
