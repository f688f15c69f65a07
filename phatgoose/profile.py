"""A profile: what some routers need to know about an expert besides its weights and gates.

Shape suffixes: D input features of a linear, N examples, S features of a sentence embedding.

It is measured on examples of the expert's own task (`phatgoose.measure_profile`), at the end of
training or later, and kept beside the expert: the expert does not depend on it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from phatgoose.card import raw_bytes
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import safetensors_metadata

_MEAN, _NORMS = "mean_activation/", "norms/"
# What reading a damaged file may raise.
_DAMAGE = (OSError, SafetensorError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class ProfileConfig:
    """How a profile is measured.

    Attributes:
        encoder: name of the sentence encoder (`phatgoose.sentence_encoder.load_encoder`).
        embedded_examples: at most so many training examples are embedded.
        activation_examples: at most so many are run through the base with the expert attached.
        batch_size: so many of them at a time.
        max_input_tokens: inputs are cut to it there.
        max_target_tokens: and targets to it.
    """

    encoder: str = "all-minilm-l6-v2"
    embedded_examples: int = 1000
    activation_examples: int = 1000
    batch_size: int = 16
    max_input_tokens: int = 512
    max_target_tokens: int = 512

    def __post_init__(self) -> None:
        """Raise PhatgooseError if a value cannot be."""
        for name, value in asdict(self).items():
            if name != "encoder" and value < 1:
                raise PhatgooseError(f"profile.{name} is {value}: it must be at least 1")


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """What routers know of an expert.

    Attributes:
        mean_activation: per linear, its input averaged over an example's tokens, then over
            examples, with the expert attached, float32 [D].
        norms: per linear, mean and standard deviation over those tokens of the norm of what the
            expert adds, float32 [2].
        embeddings_NS: unit-length embeddings of training examples.
        encoder: the sentence encoder that made them.
        encoder_fingerprint: what it was.
        description: what the expert's task is about.
    """

    mean_activation: dict[str, Tensor]
    norms: dict[str, Tensor]
    embeddings_NS: Tensor
    encoder: str
    encoder_fingerprint: str
    description: str

    def __repr__(self) -> str:
        """Its sizes, without the tensors."""
        return f"Profile({len(self.norms)} linears, {len(self.embeddings_NS)} embedded examples)"

    def to_bytes(self) -> bytes:
        """Return the profile as the bytes of a safetensors file."""
        tensors = {f"{_MEAN}{linear}": t for linear, t in self.mean_activation.items()}
        tensors |= {f"{_NORMS}{linear}": t for linear, t in self.norms.items()}
        tensors["embeddings"] = self.embeddings_NS
        texts = {
            "encoder": self.encoder,
            "encoder_fingerprint": self.encoder_fingerprint,
            "description": self.description,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        texts["sha256"] = _checksum(tensors, texts)
        # One entry only: the library writes several in an order that changes.
        return save(tensors, metadata={"profile": json.dumps(texts)})

    @staticmethod
    def load(path: str | Path) -> "Profile":
        """Map a saved profile.

        Raises:
            PhatgooseError: the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _from_parts(tensors, file.metadata())
        except _DAMAGE as error:
            raise _damaged(str(path), error) from error

    @staticmethod
    def from_bytes(data: bytes, source: str) -> "Profile":
        """Read the bytes of a saved profile; `source` names them in errors."""
        try:
            return _from_parts(load(data), safetensors_metadata(data))
        except _DAMAGE as error:
            raise _damaged(source, error) from error


def _from_parts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Profile:
    texts = json.loads(metadata["profile"])
    checksum = texts.pop("sha256", None)  # earlier versions wrote none
    if checksum is not None and checksum != _checksum(tensors, texts):
        raise ValueError("its checksum does not fit")
    return Profile(
        mean_activation=_below(_MEAN, tensors),
        norms=_below(_NORMS, tensors),
        embeddings_NS=tensors["embeddings"],
        **texts,
    )


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """Return the SHA-256 of the file's content, independent of its order."""
    sha256 = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(raw_bytes(tensor))
    return sha256.hexdigest()


def _damaged(source: str, error: Exception) -> PhatgooseError:
    return PhatgooseError(
        f"{source} is not a complete profile ({reason_of(error)}): delete it, and the next run "
        "measures it again"
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
