"""Adapters made and saved by PEFT itself, and the logits of a base with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phatgoose.base import Base, load_base
from phatgoose.expert import Expert
from tests.support.plain import plain_logits
from tests.support.tiny import add_to_weight

CONTEXT, TARGET = [5, 9, 11, 20, 33, 8], [12, 30, 7]
Q = {"llama": "model.layers.0.self_attn.q_proj", "t5": "encoder.block.0.layer.0.SelfAttention.q"}
TENSORS = "adapter_model.safetensors"


def family(base: Base) -> str:
    return "t5" if base.is_encoder_decoder else "llama"


@torch.no_grad()
def logits(base: Base, model: nn.Module | None = None) -> Tensor:
    """Return the logits of a base, or of another model in its place."""
    if model is not None:
        base = dataclasses.replace(base, model=model.eval())  # type: ignore[arg-type]
    return plain_logits(base, CONTEXT, TARGET)


def save_adapter(base: Base, folder: Path, **config: Any) -> Tensor:
    """Save a PEFT adapter of random factors; return the logits of PEFT's own model."""
    config.setdefault("target_modules", list(base.linears))
    model = get_peft_model(load_base(base.name).model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for key, weight in model.named_parameters():
        if ".lora_" in key:
            # Small enough that T5, which does not scale its attention, does not amplify rounding.
            weight.data = (
                0.4 * torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
            )
    model.save_pretrained(str(folder))
    return logits(base, model)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Add tensors under keys, or remove them."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / TENSORS), **changes}
    save_file({key: x.clone() for key, x in tensors.items() if x is not None}, folder / TENSORS)


def key_of(base: Base, letter: str) -> str:
    return f"base_model.model.{Q[family(base)]}.lora_{letter}.weight"


def merged_logits(base: Base, expert: Expert) -> Tensor:
    """Return the logits of the base with `s B A` added to its weights."""
    other = load_base(base.name)
    for linear, factors in expert.linears.items():
        product = factors.lora_B_OR.double() @ factors.lora_A_RD.double()
        delta_OD = (expert.card.scale * product).float()
        add_to_weight(other.model.get_submodule(linear), delta_OD)
    return logits(other)
