"""LoRA adapters of PEFT: read one as an expert, write an expert as one.

Shape suffixes: D input features of a linear, O its output features, R LoRA rank.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. The file holds
`base_model.model.<linear>.lora_A.weight` [R, D] and `....lora_B.weight` [O, R], and the linear
becomes `y = W x + s B A x` with `s = alpha / R`, or `alpha / sqrt(R)` for rank-stabilized LoRA
(arXiv 2312.03732). Patterns in the configuration may give linears their own R and alpha.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.architecture import linear_sizes
from phatgoose.base import Base, bare_model, fingerprint, locate_base
from phatgoose.card import Card, LoraFactors, validate_name, with_job
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import replacing

# The fields of a configuration that determine what an adapter adds, or that tell how it was made.
_RECIPE = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "lora_dropout", "task_type", "base_model_name_or_path", "revision"),
)
# Fields that say how factors were trained or found, and nothing about what they add.
_HARMLESS = (
    *("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"),
)
# Any other field must be as PEFT starts it. Why, for those in use:
_REFUSED = {
    "modules_to_save": "it trained whole modules: train it without modules_to_save",
    "use_dora": "DoRA also scales the base's weights: train it without use_dora",
    "bias": 'it trained the base\'s biases: train it with bias="none"',
    "lora_bias": "its B has a bias: train it with lora_bias=False",
    "layer_replication": "it repeats layers of the base: train it without layer_replication",
    "trainable_token_indices": "it trained embeddings: train it without trainable_token_indices",
    "target_parameters": "it adapts bare parameters: train it with target_modules only",
    "alora_invocation_tokens": "it acts on some tokens only: train it without invocation tokens",
}
# Initializations that leave the base's weights as they are.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Those that change them in a way that PEFT can undo when it saves the adapter.
_REVERSIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")
_NAMED = 5
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")

# From the name of each adapted linear to what an expert adds to it.
Linears = dict[str, LoraFactors]


@dataclass(frozen=True)
class _Target:
    """What an adapter is checked against; the model may be without weights."""

    name: str
    fingerprint: str
    model: PreTrainedModel
    linears: tuple[str, ...]


def read_adapter(
    folder: str | Path, *, base: Base | None = None, name: str | None = None
) -> tuple[Card, Linears]:
    """Read a LoRA adapter saved by PEFT, as the card and the factors of an expert without gates.

    The card's scale is the one that most linears have; where a linear has another, its B is
    multiplied by the quotient, in float32 or wider. The card's `data_fingerprint` is `unknown`,
    its `job` the beginning of a hash over name, base and factors.

    Args:
        folder: of the adapter, with adapter_config.json and adapter_model.safetensors.
        base: the base it was trained on; looked up under the name that the adapter gives if None.
        name: of the expert; the folder's if None.

    Raises:
        PhatgooseError: there is no adapter, its base is unavailable, it does not fit the base, its
            factors are not those of the linears that its configuration names, or it is more than
            plain LoRA factors on linears.
    """
    folder = Path(folder)
    name = validate_name(folder.resolve().name if name is None else name)
    config = _read_config(folder)
    factors = _read_factors(folder)
    target = _find_base(folder, config) if base is None else base
    for linear, (A_RD, B_OR) in factors.items():
        check_fits(f"adapter {folder}", linear, A_RD, B_OR, target)
    _check_complete(folder, config, factors, target)
    scales = {linear: _scale(folder, config, linear, A_RD) for linear, (A_RD, _) in factors.items()}
    scale = statistics.mode(scales.values())
    card = Card(
        name=name,
        task=name,
        base=target.name,
        base_fingerprint=target.fingerprint,
        data_fingerprint="unknown",
        job="",
        scale=scale,
        recipe={"peft": {field: getattr(config, field) for field in _RECIPE}},
        metrics={},
    )
    linears = {
        linear: LoraFactors(A_RD, _fold(B_OR, scales[linear], scale))
        for linear, (A_RD, B_OR) in factors.items()
    }
    return with_job(card, linears), linears


def write_adapter(
    card: Card, linears: Linears, folder: str | Path, *, base: Base | None = None
) -> None:
    """Write an expert as an adapter that `peft.PeftModel.from_pretrained(model, folder)` loads.

    The model with the adapter gives what the base gives with the expert alone, at weight 1. PEFT
    has no place for the gates and the card: they are not written, nor is any third file.

    Args:
        card, linears: the parts of the expert to write.
        folder: where to; made if it is not there. An earlier export of the same expert is replaced.
        base: the expert's base, so that the adapter says whether it is an encoder and decoder.

    Raises:
        PhatgooseError: the folder holds something else or cannot be written, or the expert was
            made with another base.
    """
    folder = Path(folder)
    if base is not None and base.fingerprint != card.base_fingerprint:
        raise PhatgooseError(
            f"expert {card.name!r} was made with the base {card.base_fingerprint[:12]}, and "
            f"{base.name} is {base.fingerprint[:12]}: pass the base that it was made with"
        )
    try:
        _check_free(folder, card.name)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt", "expert": card.name}
        with replacing(folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
            save_file(_peft_tensors(linears), temporary, metadata=metadata)
            # The configuration comes last: without it, an interrupted export is no adapter.
            (folder / CONFIG_NAME).unlink(missing_ok=True)
        _peft_config(card, linears, base).save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise PhatgooseError(
            f"cannot write expert {card.name!r} to {folder} ({error}): choose a writable folder "
            "with space"
        ) from error


def check_fits(
    where: str, linear: str, lora_A_RD: Tensor, lora_B_OR: Tensor, base: Base | _Target
) -> None:
    """Raise PhatgooseError, which begins with `where`, if factors do not fit the base's linear."""
    if linear not in base.linears:
        raise PhatgooseError(
            f"{where}: {linear!r} is not a linear that experts of {base.name} adapt (such as "
            f"{base.linears[0]}): was it made for another base?"
        )
    inputs, outputs = linear_sizes(base.model.get_submodule(linear))
    A, B = list(lora_A_RD.shape), list(lora_B_OR.shape)
    if len(A) != 2 or 0 in A or (A[1], B) != (inputs, [outputs, A[0]]):
        raise PhatgooseError(
            f"{where}: A {A} and B {B} on {linear} do not fit [R, {inputs}] and [{outputs}, R] of "
            f"{base.name}: was it made for another base?"
        )


def _read_config(folder: Path) -> LoraConfig:
    """Return the adapter's configuration; raise PhatgooseError unless it is plain LoRA."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        nested = [str(found.parent) for found in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
        fix = f"pass {' or '.join(nested)}" if nested else "pass a folder that PEFT saved"
        raise PhatgooseError(f"no adapter in {folder}, it has no {CONFIG_NAME}: {fix}")
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise PhatgooseError(f"cannot read {path} ({error}): save the adapter again") from error
    if kind != "LORA":
        raise PhatgooseError(f"adapter {folder} is of the kind {kind}: only LORA can be an expert")
    _check_plain(folder, raw)
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    given = {field: value for field, value in raw.items() if field in known and value is not None}
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise PhatgooseError(
            f"PEFT does not take {path} ({error}): update PEFT or save the adapter again"
        ) from error


def _check_plain(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse what would make the adapter more than `s B A x` next to an unchanged base."""
    plain = LoraConfig().to_dict()
    for field, value in raw.items():
        usual = plain.get(field)
        if value is None or value == usual or not (value or usual):
            continue
        if field in (*_RECIPE, *_HARMLESS):
            continue
        reason = _REFUSED.get(field, "an expert is plain LoRA factors: train it without")
        if field not in plain:
            reason = "this version of PEFT does not know it: update PEFT"
        raise PhatgooseError(f"adapter {folder} has {field} = {json.dumps(value)}, {reason}")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
        return
    fix = "train it with a plain initialization"
    if init.lower().startswith(_REVERSIBLE_INITS):
        fix = "save it again with path_initial_model_for_weight_conversion, which makes it plain"
    raise PhatgooseError(
        f"adapter {folder} has init_lora_weights = {init!r}, which changes the base's weights: "
        f"{fix}"
    )


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by linear; raise PhatgooseError if the file holds anything else."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        fix = "check the folder"
        if (folder / WEIGHTS_NAME).exists():
            fix = f"load {WEIGHTS_NAME} with PEFT and save it as safetensors (pickles run code)"
        raise PhatgooseError(f"adapter {folder} has no {SAFETENSORS_WEIGHTS_NAME}: {fix}")
    try:
        # Not mapped: PEFT saves in place, which would cut a mapped expert off.
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise PhatgooseError(f"cannot read {path} ({error}): save the adapter again") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix("base_model.model."))
        if match is None or tensor.ndim != 2:
            raise PhatgooseError(
                f"adapter {folder} holds {key} {list(tensor.shape)}, which is not a LoRA factor of "
                "a linear: train it without embeddings, convolutions and whole modules"
            )
        linear, letter = match.groups()
        if letter in found.setdefault(linear, {}):
            raise PhatgooseError(f"adapter {folder} holds two {letter} of {linear}: save one only")
        found[linear][letter] = tensor
    for linear, letters in found.items():
        if len(letters) < 2:
            missing = "B" if "A" in letters else "A"
            raise PhatgooseError(
                f"adapter {folder}: {missing} of {linear} is missing: save it again"
            )
    if not found:
        raise PhatgooseError(f"adapter {folder} holds no factors: save it again")
    return {linear: (letters["A"], letters["B"]) for linear, letters in found.items()}


def _check_complete(
    folder: Path, config: LoraConfig, factors: Container[str], base: Base | _Target
) -> None:
    """Compare the factors in the file with the linears that the configuration says were adapted."""
    targets = config.target_modules
    if targets is None:
        return  # PEFT chose them by the kind of model
    everything = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    wanted = {n for n in base.linears if everything or check_target_module_exists(config, n)}
    # What experts do not adapt, such as the vocabulary's projection, may be named as well.
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    others = [n for n, m in base.model.named_modules() if isinstance(m, kinds)]
    others = [] if everything else [n for n in others if check_target_module_exists(config, n)]
    named = list(dict.fromkeys([*(n for n in base.linears if n in wanted), *others]))
    missing = [name for name in named if name not in factors]
    extra = [name for name in base.linears if name not in wanted and name in factors]
    for names, what in ((missing, "is missing the factors of"), (extra, "also has factors of")):
        if names:
            shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise PhatgooseError(
                f"adapter {folder}: its file {what} {len(names)} linears ({shown}), compared with "
                "target_modules, exclude_modules and layers_to_transform of its configuration. "
                "Save it again, or correct these."
            )


def _find_base(folder: Path, config: LoraConfig) -> _Target:
    """Return the base that the adapter names, as a model without weights."""
    name = config.base_model_name_or_path
    fix = "load the base and pass it as `base`"
    if not name:
        raise PhatgooseError(f"adapter {folder} does not name its base: {fix}")
    try:
        local = locate_base(name, revision=config.revision)
        model, linears = bare_model(name, local)
    except (PhatgooseError, OSError, ValueError) as error:
        raise PhatgooseError(
            f"adapter {folder} was trained on {name}, which cannot be opened "
            f"({reason_of(error)}): {fix}"
        ) from error
    return _Target(name, fingerprint(local), model, linears)


def _scale(folder: Path, config: LoraConfig, linear: str, lora_A_RD: Tensor) -> float:
    """Return what PEFT multiplies `B A x` by on a linear, after checking the rank."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), linear), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), linear), config.lora_alpha)
    if rank != lora_A_RD.shape[0]:
        raise PhatgooseError(
            f"adapter {folder}: its configuration gives {linear} rank {rank}, its file "
            f"{lora_A_RD.shape[0]}: save it again"
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise PhatgooseError(
            f"adapter {folder}: with alpha {alpha} on {linear} it adds nothing: correct lora_alpha"
        )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _fold(lora_B_OR: Tensor, own: float, scale: float) -> Tensor:
    """Rescale B so that `scale * B` is what `own * B` was."""
    if math.isclose(own, scale, rel_tol=1e-9):
        return lora_B_OR
    # Half precision would round the products away from what PEFT computes.
    return lora_B_OR.to(torch.promote_types(lora_B_OR.dtype, torch.float32)) * (own / scale)


def _check_free(folder: Path, name: str) -> None:
    """Refuse a folder that holds anything but an earlier export of the expert."""
    entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if not entries:
        return
    if entries <= {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME} and _exported(folder) == name:
        return
    raise PhatgooseError(
        f"{folder} holds something else than an earlier export of expert {name!r}: choose a new "
        "folder"
    )


def _exported(folder: Path) -> str | None:
    """Return the name of the expert that was exported to a folder; None if there is none."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return (file.metadata() or {}).get("expert")
    except (OSError, SafetensorError):
        return None


def _peft_tensors(linears: Linears) -> dict[str, Tensor]:
    tensors = {}
    for linear, factors in linears.items():
        for letter, matrix in (("A", factors.lora_A_RD), ("B", factors.lora_B_OR)):
            # A copy, since a file takes no tensors that share memory.
            copy = matrix.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{linear}.lora_{letter}.weight"] = copy
    return tensors


def _peft_config(card: Card, linears: Linears, base: Base | None) -> LoraConfig:
    ranks = {linear: f.lora_A_RD.shape[0] for linear, f in linears.items()}
    rank = statistics.mode(ranks.values())
    # PEFT reads the keys as regular expressions.
    others = {f"^{re.escape(linear)}": own for linear, own in ranks.items() if own != rank}
    alphas = {own: _alpha(card.scale, own) for own in ranks.values()}
    family = None
    if base is not None:
        family = TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM
    config = LoraConfig(
        task_type=family,
        base_model_name_or_path=card.base if base is None else base.name,
        r=rank,
        lora_alpha=alphas[rank],  # type: ignore[arg-type]  # declared, not enforced, as integer
        rank_pattern=others,
        alpha_pattern={key: alphas[own] for key, own in others.items()},
        fan_in_fan_out=base is not None and _stored_transposed(base),
        inference_mode=True,
    )
    # Set afterwards: the constructor makes a set of it, whose order changes from run to run.
    config.target_modules = sorted(linears)
    return config


def _stored_transposed(base: Base) -> bool:
    """Return whether the adapted weights are stored as [inputs, outputs], as GPT-2's are."""
    linear = base.model.get_submodule(base.linears[0])
    return isinstance(getattr(linear, "base", linear), Conv1D)


def _alpha(scale: float, rank: int) -> float:
    """Return what PEFT divides by the rank to get the scale, as an integer where possible."""
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha
