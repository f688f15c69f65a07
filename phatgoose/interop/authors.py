"""The checkpoints that PHATGOOSE's authors released (arXiv 2402.05859), as experts.

Shape suffixes: D input features of a linear, O its output features, R LoRA rank.

One file holds all experts of a pool. For expert i and each adapted linear it has

    <linear>._addons.expert_lora.layer1__i            [D, R]   A, transposed
    <linear>._addons.expert_lora.layer2__i            [R, O]   B, transposed
    <linear>._addons.router.expert_embeddings__i      [D]      the gate, if gates were trained

with T5's own names for the linears, and the base's token embeddings. The authors divide
`x layer1 layer2` by R, so the scale is 1/R. The experts are in the order of the data sets in the
authors' scripts/concatenate.py; the file does not name them. In the checkpoint of the average-
activation baseline, mean activations take the place of the gates.
"""

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phatgoose.base import Base
from phatgoose.card import Card, LoraFactors, validate_name, with_job
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.interop.peft import Linears, check_fits

_A, _B, _GATE = "expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings"
_KEY = re.compile(
    rf"(.+)\._addons\.({re.escape(_A)}|{re.escape(_B)}|{re.escape(_GATE)})__(0|[1-9]\d*)"
)
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# What reading a file that is not a checkpoint may raise.
_DAMAGE = (
    *(OSError, EOFError, SafetensorError, pickle.UnpicklingError),
    *(RuntimeError, ValueError, LookupError),
)


def read_checkpoint(
    path: str | Path,
    base: Base,
    names: Sequence[str] | None = None,
    scale: float | None = None,
) -> list[tuple[Card, Linears]]:
    """Read every expert of a checkpoint; nothing in the file is run, and its tensors are mapped.

    Leave the file as it is while the experts are in use: they view it. A card's
    `data_fingerprint` is `unknown`, its `job` the beginning of a hash over name, base and factors.

    Args:
        path: a file of torch.save, or one that ends in `.safetensors`.
        base: the base that the experts were trained on; the authors' is google/t5-xl-lm-adapt.
        names: of the experts, in the file's order; `expert-000`, `expert-001`, ... if None.
        scale: what `B A x` is multiplied by; 1/R if None, as the authors do.

    Raises:
        PhatgooseError: the file cannot be read or tensors are missing, it does not fit the base, or
            `names` are not one valid name for each expert.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    for key in _EMBEDDINGS:
        if key in tensors:
            _check_embeddings(path, tensors.pop(key), base)
    count, linears = _check_keys(path, tensors, base)
    if names is None:
        names = [f"expert-{index:03d}" for index in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise PhatgooseError(
            f"{len(set(names))} different names for the {count} experts of {path}: give one for "
            "each, in the file's order"
        )
    parts = []
    for index, name in enumerate(names):
        factors = _factors(tensors, linears, index)
        for linear, found in factors.items():
            check_fits(f"{path}, expert {index}", linear, found.lora_A_RD, found.lora_B_OR, base)
        card = Card(
            name=validate_name(name),
            task=name,
            base=base.name,
            base_fingerprint=base.fingerprint,
            data_fingerprint="unknown",
            job="",
            scale=_scale(path, index, factors) if scale is None else scale,
            recipe={"authors": {"file": path.name, "index": index}},
            metrics={},
        )
        parts.append((with_job(card, factors), factors))
    return parts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only files of the zip format, torch's for years, can be mapped.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except _DAMAGE as error:
        raise PhatgooseError(
            f"cannot read the checkpoint {path} ({reason_of(error)}): check the path, or copy it "
            "again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise PhatgooseError(f"{path} is not a dictionary of tensors: pass the authors' best.pt")
    return dict(state)


def _check_embeddings(path: Path, found: Tensor, base: Base) -> None:
    """Compare the file's token embeddings with the base's, which reveals a mix-up of bases."""
    embedding = base.model.get_input_embeddings()
    expected = embedding.get_parameter("weight").detach().cpu().float()
    # Either may have been rounded to bfloat16, by 2^-8 of its value at most.
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=2**-7):
        raise PhatgooseError(
            f"the token embeddings in {path} are not those of {base.name}: load the base that its "
            "experts were trained on"
        )


def _check_keys(path: Path, tensors: dict[str, Tensor], base: Base) -> tuple[int, list[str]]:
    """Return the number of experts and the linears they adapt, after checking all keys."""
    found: dict[str, None] = {}
    parts, count, adapted = [_A, _B], 0, set(base.linears)
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise PhatgooseError(
                f"{path} holds {key}, which is not part of an expert: pass a checkpoint of all "
                "experts"
            )
        linear, part, index = match.groups()
        if linear not in adapted:
            raise PhatgooseError(
                f"{path} holds {key}, and experts of {base.name} adapt no linear {linear!r}: was "
                "it made for another base?"
            )
        found[linear] = None
        parts += [part] if part not in parts else []
        count = max(count, int(index) + 1)
    if count == 0:
        raise PhatgooseError(f"{path} holds no expert: pass a checkpoint of all experts")
    # Keys are unique, so that their number tells whether there is one of each.
    if len(tensors) != count * len(found) * len(parts):
        wanted = (_key(n, p, i) for i in range(count) for n in found for p in parts)
        missing = next(key for key in wanted if key not in tensors)
        raise PhatgooseError(
            f"{path} holds {count} experts of {len(found)} linears, and {missing} is missing: "
            "copy it again"
        )
    return count, list(found)


def _key(linear: str, part: str, index: int) -> str:
    return f"{linear}._addons.{part}__{index}"


def _factors(tensors: dict[str, Tensor], linears: list[str], index: int) -> Linears:
    """Return the factors of one expert; `transpose`, as `.T` refuses all but matrices."""
    return {
        linear: LoraFactors(
            tensors[_key(linear, _A, index)].transpose(0, -1),
            tensors[_key(linear, _B, index)].transpose(0, -1),
            tensors.get(_key(linear, _GATE, index)),
        )
        for linear in linears
    }


def _scale(path: Path, index: int, factors: Linears) -> float:
    """Return what the authors multiply `B A x` by: 1/R."""
    ranks = {f.lora_A_RD.shape[0] for f in factors.values()}
    if len(ranks) > 1:
        raise PhatgooseError(
            f"{path}, expert {index}: its linears have the ranks {sorted(ranks)}, so 1/R is "
            "ambiguous: give the scale"
        )
    return 1 / max(ranks)
