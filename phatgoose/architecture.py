"""Architectures: which linears of a model an expert adapts, and how its contexts may be read.

One record of `ARCHITECTURES` describes one architecture, under the `model_type` that its
configuration has. Adding an architecture is adding a record. Everything else reads the record:
training, routing, scoring, generating, importing adapters and planning.
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import PhatgooseError

_LOG = logging.getLogger(__name__)

# What an expert can adapt; GPT-2's Conv1D is a linear whose weight is stored as [inputs, outputs].
Linear = nn.Linear | Conv1D

# The kinds of layers whose attention masks scoring can write.
_MASKED_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Architecture:
    """How to adapt and to read the models of one architecture.

    All patterns are regular expressions. Those of `linears`, `query` and `skipped` match the end of
    a linear's name, after a dot; that of `encoder` matches the whole name.

    Attributes:
        linears: the linears that an expert adapts: every one of the attention and feed-forward
            blocks (PHATGOOSE, section 5.1).
        query: those among them that make queries, alone or fused with keys and values; some routers
            read the input of the last one.
        skipped: linears that no expert adapts, such as projections of the embeddings.
        encoder: the linears that read the encoder's tokens; None without an encoder.
        window: which layers see only the last `sliding_window` tokens, if the configuration has a
            window: none of them; all of them; or those that `layer_types` names, in which case the
            model takes a dictionary of masks.
        shares_context: True if a test of this project shows that reading a context once for all
            choices gives the numbers of separate rows. Without it, each base is tested at load.
    """

    linears: str
    query: str
    skipped: str | None = None
    encoder: str | None = None
    window: Literal["none", "all", "layer_types"] = "none"
    shares_context: bool = False

    def side_of(self, linear: str) -> str:
        """Return whose tokens a linear reads, `encoder` or `decoder`."""
        reads_encoder = self.encoder is not None and re.fullmatch(self.encoder, linear)
        return "encoder" if reads_encoder else "decoder"

    def windows(self, config: PreTrainedConfig) -> dict[str, int | None]:
        """Return the window of each kind of layer; None for a kind that sees all tokens."""
        window = getattr(config, "sliding_window", None)
        if self.window == "layer_types":
            kinds = dict.fromkeys(config.layer_types)
            return {kind: window if kind == "sliding_attention" else None for kind in kinds}
        if window and self.window == "all":
            return {"sliding_attention": window}
        return {"full_attention": None}

    def masks(self, config: PreTrainedConfig) -> bool:
        """Return whether scoring can write the masks of all layers."""
        return self.windows(config).keys() <= _MASKED_KINDS


_T5 = Architecture(
    linears=r"(SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)",
    query=r"SelfAttention\.q",
    encoder=r"encoder\..*|.*\.EncDecAttention\.[kv]",
    shares_context=True,
)
_LLAMA = Architecture(
    linears=r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj",
    query=r"self_attn\.q_proj",
    shares_context=True,
)
_WINDOWED_LLAMA = Architecture(
    linears=_LLAMA.linears, query=_LLAMA.query, window="layer_types", shares_context=True
)

ARCHITECTURES = {
    "t5": _T5,
    "mt5": _T5,
    **dict.fromkeys(("llama", "olmo", "olmo2", "granite", "gemma"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"), _WINDOWED_LLAMA),
    "mistral": Architecture(
        linears=_LLAMA.linears, query=_LLAMA.query, window="all", shares_context=True
    ),
    # Mixtures of experts: the feed-forward blocks are single tensors, which no expert adapts.
    "mixtral": Architecture(
        linears=r"self_attn\.[qkvo]_proj", query=_LLAMA.query, window="all", shares_context=True
    ),
    "qwen3_moe": Architecture(
        linears=_LLAMA.linears, query=_LLAMA.query, window="all", shares_context=True
    ),
    "phi3": Architecture(
        linears=r"self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj",
        query=r"self_attn\.qkv_proj",
        window="all",
        shares_context=True,
    ),
    "phi": Architecture(
        linears=r"self_attn\.([qkv]_proj|dense)|mlp\.fc[12]",
        query=r"self_attn\.q_proj",
        shares_context=True,
    ),
    "opt": Architecture(
        linears=r"self_attn\.([qkv]|out)_proj|fc[12]",
        query=r"self_attn\.q_proj",
        skipped=r"project_(in|out)",
        shares_context=True,
    ),
    "gpt2": Architecture(
        linears=r"attn\.c_(attn|proj)|mlp\.c_(fc|proj)", query=r"attn\.c_attn", shares_context=True
    ),
    "gpt_neox": Architecture(
        linears=r"attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h)",
        query=r"attention\.query_key_value",
        shares_context=True,
    ),
    # Falcon has rotary positions or a bias by column; short convolutions read neighboring columns.
    **dict.fromkeys(
        ("falcon", "bloom"),
        Architecture(
            linears=r"self_attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h)",
            query=r"self_attention\.query_key_value",
        ),
    ),
    "mpt": Architecture(linears=r"attn\.(Wqkv|out_proj)|ffn\.(up|down)_proj", query=r"attn\.Wqkv"),
    "lfm2": Architecture(
        linears=(r"self_attn\.([qkv]|out)_proj|conv\.(in|out)_proj|feed_forward\.w[123]"),
        query=r"self_attn\.q_proj",
    ),
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the record of a model's architecture.

    Raises:
        PhatgooseError: there is no record, or the weights are quantized.
    """
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise PhatgooseError(
            f"model_type={kind}: the weights are quantized (quantization_config in config.json), "
            "and experts are trained on, and merged into, plain weights. Give a base whose "
            "weights are float32, bfloat16 or float16."
        )
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    known = ", ".join(sorted(ARCHITECTURES))
    if config.is_encoder_decoder:
        raise PhatgooseError(
            f"model_type={kind}: of encoders with a decoder only T5's are supported (t5, mt5): "
            "scoring and generating rely on T5's start token and on its relative positions. Give a "
            "T5-like base, or a decoder-only one."
        )
    raise PhatgooseError(
        f"model_type={kind}: there is no record of this architecture (known: {known}). Add one to "
        f"ARCHITECTURES in phatgoose/architecture.py: {kind!r}: Architecture(linears=<pattern of "
        "the attention and feed-forward linears>, query=<pattern of the query projections>), with "
        "window= if its layers have sliding windows."
    )


def adapted_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the linears that an expert of this model adapts, in the model's order.

    Raises:
        PhatgooseError: there is no record of the architecture, the record does not cover all of
            the model's linears, or the weights are quantized.
    """
    kind, record = model.config.model_type, architecture_of(model.config)
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, Linear) and m is not head]
    adapted = [name for name in names if re.fullmatch(rf".*\.({record.linears})", name)]
    skipped = rf".*\.({record.skipped})" if record.skipped else "$"
    missed = [n for n in names if n not in set(adapted) and not re.fullmatch(skipped, n)]
    if missed or not adapted:
        example = missed[0] if missed else "it has none"
        raise PhatgooseError(
            f"model_type={kind}: its record covers {len(adapted)} linears and leaves out "
            f"{len(missed)} (first: {example}). Correct the record's `linears`, or `skipped`, in "
            "ARCHITECTURES in phatgoose/architecture.py."
        )
    for name in adapted:
        weight = model.get_parameter(f"{name}.weight")
        if not weight.is_floating_point():
            raise PhatgooseError(
                f"model_type={kind}: the weight of {name} is quantized ({weight.dtype}), and "
                "experts are trained on, and merged into, plain weights. Load the base without "
                "quantization."
            )
    return tuple(adapted)


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the input and output features of a linear, also while an expert is attached to it."""
    linear = getattr(linear, "base", linear)
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def warn_of_unadapted(name: str, model: PreTrainedModel, linears: tuple[str, ...]) -> None:
    """Log a warning if the base has weights, besides embeddings, that no expert adapts.

    An example are the blocks of a mixture of experts that are stored as 3-D tensors.

    Args:
        name: of the base.
        model: the base, with or without weights.
        linears: the adapted ones.
    """
    adapted, head = set(linears), model.get_output_embeddings()
    sizes: Counter[str] = Counter()
    for path, module in model.named_modules():
        if path in adapted or module is head or isinstance(module, nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:  # biases and the scales of norms are never adapted
                place = re.sub(r"\.\d+(?=\.)", ".*", f"{path}.{parameter_name}")
                sizes[place] += parameter.numel()
    if sizes:
        total = sum(parameter.numel() for parameter in model.parameters())
        places = ", ".join(sizes)
        _LOG.warning(
            f"base={name}: no expert adapts {sizes.total():,} of its {total:,} parameters "
            f"({places}): they stay as they are, in training and in every router."
        )


def find_linear(model: nn.Module, name: str) -> Linear:
    """Return the linear `name` of `model`; raise PhatgooseError if it is missing or adapted."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PhatgooseError(
            f"the base has no module {name}: was this made for another base?"
        ) from None
    if not isinstance(module, Linear):
        raise PhatgooseError(
            f"{name} is a {type(module).__name__}, not a plain linear: is the base adapted "
            "already? Detach the adapter first."
        )
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module `name` of `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
