"""Compare GPT-2, whose weights are stored as [inputs, outputs], with PEFT and plain products."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from harness.planning.plan import _expert_bytes
from phatgoose.architecture import linear_sizes
from phatgoose.base import Base, bare_model, load_base
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.training.gated_lora import attach_expert, attach_lora, detach_lora, read_factors
from tests.support.adapters import logits, merged_logits, save_adapter
from tests.support.tiny import make_decoder, make_experts, state

# Inputs and outputs of a layer's linears, in model order.
SIZES = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64)}
SIZES |= {"mlp.c_proj": (64, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("bases") / "gpt2", "gpt2")


@pytest.fixture
def gpt2(folder: Path) -> Base:
    return load_base(str(folder))


def single(base: Base, rank: int) -> tuple[RoutedModel, Tensor]:
    """Return a model with `e1` attached at full strength, and its logits."""
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 2, rank=rank)), "single:e1")
    return routed, logits(base)


def test_sizes_are_given_as_inputs_and_outputs(gpt2: Base) -> None:
    expected = [SIZES[name.split(".", 3)[3]] for name in gpt2.linears]

    def sizes(base: Base) -> list[tuple[int, int]]:
        return [linear_sizes(base.model.get_submodule(name)) for name in base.linears]

    assert sizes(gpt2) == expected
    layers = attach_lora(gpt2.model, gpt2.linears, rank=3, scale=1.0, init_std=0.1, seed=0)
    assert sizes(gpt2) == expected
    factors = read_factors(layers)
    assert [(f.lora_A_RD.shape[1], f.lora_B_OR.shape[0]) for f in factors.values()] == expected
    detach_lora(gpt2.model, layers)
    RoutedModel(gpt2, Pool.from_experts(make_experts(gpt2)))
    assert sizes(gpt2) == expected


@pytest.mark.parametrize("rank", [2, 40])  # as factors, and as a product
def test_an_expert_adds_the_same_as_peft(gpt2: Base, rank: int) -> None:
    expert, other = make_experts(gpt2, 2, rank=rank)[1], load_base(gpt2.name)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * expert.card.scale,  # type: ignore[arg-type]
        target_modules=list(gpt2.linears),
        fan_in_fan_out=True,
    )
    wrapped = get_peft_model(other.model, config)
    for name, factors in expert.linears.items():
        layer = wrapped.get_base_model().get_submodule(name)
        layer.get_parameter("lora_A.default.weight").data.copy_(factors.lora_A_RD)
        layer.get_parameter("lora_B.default.weight").data.copy_(factors.lora_B_OR)
    expected = logits(other, wrapped)
    _, said = single(gpt2, rank)
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged_logits(gpt2, expert), expected, rtol=1e-4, atol=1e-4)
    trained = load_base(gpt2.name)
    attach_expert(trained.model, expert)
    torch.testing.assert_close(logits(trained), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pass_base", [True, False])
def test_a_peft_adapter_is_read(gpt2: Base, tmp_path: Path, pass_base: bool) -> None:
    expected = save_adapter(gpt2, tmp_path, r=3, lora_alpha=5, fan_in_fan_out=True)
    expert = Expert.from_peft(tmp_path, base=gpt2 if pass_base else None, name="e")
    assert expert.linears.keys() == set(gpt2.linears)
    RoutedModel(gpt2, Pool.from_experts([expert]), "single:e")
    torch.testing.assert_close(logits(gpt2), expected, rtol=1e-4, atol=1e-4)


def test_peft_accepts_an_export_for_gpt2(gpt2: Base, tmp_path: Path) -> None:
    """Check that PEFT loads it without a warning and can merge it into the transposed weights."""
    expert = make_experts(gpt2, 2)[1]
    expert.to_peft(tmp_path / "out", base=gpt2)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(load_base(gpt2.name).model, str(tmp_path / "out"))
    expected = merged_logits(gpt2, expert)
    torch.testing.assert_close(logits(gpt2, model), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(gpt2, merged), expected, rtol=1e-4, atol=1e-4)
    back = Expert.from_peft(tmp_path / "out", base=gpt2, name="e1")
    for name, factors in expert.linears.items():
        assert torch.equal(back.linears[name].lora_A_RD, factors.lora_A_RD)
        assert torch.equal(back.linears[name].lora_B_OR, factors.lora_B_OR)
    RoutedModel(gpt2, Pool.from_experts([expert]))  # also while linears are wrapped
    expert.to_peft(tmp_path / "wrapped", base=gpt2)
    config = (tmp_path / "wrapped" / "adapter_config.json").read_text()
    assert config == (tmp_path / "out" / "adapter_config.json").read_text()


def test_a_llama_is_not_exported_as_transposed(llama: Base, tmp_path: Path) -> None:
    make_experts(llama, 1)[0].to_peft(tmp_path / "out", base=llama)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False


def test_transposed_factors_are_refused(gpt2: Base, tmp_path: Path) -> None:
    expert = make_experts(gpt2, 1)[0]
    name = next(linear for linear in gpt2.linears if linear.endswith("c_fc"))
    f = expert.linears[name]
    turned = LoraFactors(f.lora_B_OR.T.contiguous(), f.lora_A_RD.T.contiguous())
    wrong = dataclasses.replace(expert, linears={**expert.linears, name: turned})
    with pytest.raises(PhatgooseError, match=rf"\(64, 16\) on {name}, the base \(16, 64\)"):
        attach_expert(gpt2.model, wrong)
    with pytest.raises(PhatgooseError, match=rf"\(64, 16\) on {name}, the base \(16, 64\)"):
        RoutedModel(gpt2, Pool.from_experts([wrong]))
    wrong.to_peft(tmp_path / "e")
    with pytest.raises(PhatgooseError, match=r"do not fit \[R, 16\] and \[64, R\]"):
        Expert.from_peft(tmp_path / "e", base=gpt2)


def test_detaching_restores_the_base(gpt2: Base) -> None:
    bare, before = logits(gpt2), state(gpt2)
    routed, said = single(gpt2, 3)
    assert not torch.allclose(said, bare)
    routed.detach()
    assert torch.equal(logits(gpt2), bare)
    assert all(torch.equal(t, before[n]) for n, t in gpt2.model.state_dict().items())
    assert all(type(gpt2.model.get_submodule(name)) is Conv1D for name in gpt2.linears)


def test_the_plan_computes_the_size_of_an_expert(gpt2: Base, llama: Base, t5: Base) -> None:
    for base in (gpt2, llama, t5):
        bare, linears = bare_model(base.name, Path(base.name))
        planned = dataclasses.replace(base, model=bare, linears=linears)
        expert = make_experts(base, 1, rank=3)[0]
        tensors = [t for f in expert.linears.values() for t in (f.lora_A_RD, f.lora_B_OR, f.gate_D)]
        assert _expert_bytes(planned, 3) == sum(t.nbytes for t in tensors if t is not None)
