import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.routers import make_router
from tests.support.adapters import (
    TENSORS,
    Q,
    edit_config,
    edit_tensors,
    key_of,
    logits,
    merged_logits,
    save_adapter,
)
from tests.support.tiny import make_card, make_experts


def routed_logits(base: Base, expert: Expert) -> Tensor:
    routed = RoutedModel(base, Pool.from_experts([expert]))
    routed.set_router(make_router(f"single:{expert.card.name}"))
    said = logits(base)
    routed.detach()
    return said


def delta(expert: Expert, linear: str) -> Tensor:
    factors = expert.linears[linear]
    return expert.card.scale * factors.lora_B_OR.double() @ factors.lora_A_RD.double()


CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 4},
    {"r": 3, "lora_alpha": 5},
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
    {"r": 40, "lora_alpha": 3, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"r": 4, "rank_pattern": {"q|q_proj": 7}},
    {"r": 4, "lora_alpha": 3, "alpha_pattern": {r".*\.0\..*(o|o_proj)": 11, "q|q_proj": 1}},
    {"r": 4, "use_rslora": True, "rank_pattern": {"o|o_proj": 2}, "alpha_pattern": {"v|v_proj": 9}},
    {"r": 2, "lora_alpha": 4, "target_modules": ["q", "q_proj"]},
    {"r": 2, "target_modules": r".*(wi_0|up_proj)", "fan_in_fan_out": True},
    {"r": 2, "layers_to_transform": [1], "target_modules": ["v", "v_proj"]},
    {"r": 2, "init_lora_weights": "orthogonal", "exclude_modules": ["q", "q_proj"]},
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_imported_adapter_gives_the_outputs_of_peft(
    base: Base, tmp_path: Path, config: dict[str, Any]
) -> None:
    expected = save_adapter(base, tmp_path / "adapter", **config)
    expert = Expert.from_peft(tmp_path / "adapter")
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    torch.testing.assert_close(merged_logits(base, expert), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed_logits(base, expert), expected, rtol=1e-5, atol=1e-5)


def test_the_card_records_the_source_of_an_expert(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", r=3, lora_alpha=6, target_modules=["q", "q_proj"])
    card = Expert.from_peft(tmp_path / "adapter").card
    assert (card.name, card.task, card.scale) == ("adapter", "adapter", 2.0)
    assert (card.base, card.base_fingerprint) == (base.name, base.fingerprint)
    assert (card.data_fingerprint, card.metrics) == ("unknown", {})
    assert card.recipe["peft"]["r"] == 3
    assert card.recipe["peft"]["lora_alpha"] == 6
    assert len(card.job) == 32
    assert Expert.from_peft(tmp_path / "adapter", base=base, name="other").card.name == "other"


def test_a_job_id_depends_on_the_content_and_the_name(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "one", target_modules=["q", "q_proj"])
    first = Expert.from_peft(tmp_path / "one")
    shutil.copytree(base.name, tmp_path / "base")
    moved = load_base(str(tmp_path / "base"))
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "one")
    edit_config(tmp_path / "elsewhere" / "one", peft_version="0.0.0", inference_mode=False)
    assert Expert.from_peft(tmp_path / "elsewhere" / "one", base=moved).card.job == first.card.job
    assert Expert.from_peft(tmp_path / "one", name="two").card.job != first.card.job
    edit_config(tmp_path / "one", lora_alpha=9)
    other_scale = Expert.from_peft(tmp_path / "one").card.job
    edit_tensors(tmp_path / "one", **{key_of(base, "A"): torch.ones(8, 32)})
    assert len({first.card.job, other_scale, Expert.from_peft(tmp_path / "one").card.job}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_factors_are_imported_exactly(llama: Base, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(llama, tmp_path, r=3, lora_alpha=5, target_modules=["q_proj"])
    halved = {key: x.to(dtype) for key, x in load_file(tmp_path / TENSORS).items()}
    edit_tensors(tmp_path, **halved)
    expert = Expert.from_peft(tmp_path, name="e")
    for linear, factors in expert.linears.items():
        key = f"base_model.model.{linear}.lora_"
        assert factors.lora_A_RD.dtype == factors.lora_B_OR.dtype == dtype
        assert torch.equal(factors.lora_A_RD, halved[f"{key}A.weight"])
        assert torch.equal(factors.lora_B_OR, halved[f"{key}B.weight"])


def test_folding_the_scale_does_not_round_to_half_precision(llama: Base, tmp_path: Path) -> None:
    pattern = {"alpha_pattern": {"layers.0.self_attn.q_proj": 7}}
    save_adapter(llama, tmp_path, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **pattern)
    tensors = {key: x.bfloat16() for key, x in load_file(tmp_path / TENSORS).items()}
    edit_tensors(tmp_path, **tensors)
    expert = Expert.from_peft(tmp_path, name="e")
    assert expert.card.scale == 5 / 3
    A, B = (tensors[key_of(llama, letter)].double() for letter in "AB")
    torch.testing.assert_close(delta(expert, Q["llama"]), 7 / 3 * B @ A, rtol=1e-6, atol=1e-7)
    assert expert.linears["model.layers.1.self_attn.q_proj"].lora_B_OR.dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    alphas=st.lists(st.floats(1e-3, 1e3) | st.integers(1, 64), min_size=4, max_size=4),
    rslora=st.booleans(),
)
def test_every_linear_has_its_own_scale(
    tmp_path_factory: pytest.TempPathFactory,
    llama_folder: Path,
    ranks: list[int],
    alphas: list[float],
    rslora: bool,
) -> None:
    names = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in (0, 1) for x in "qo"]
    config = LoraConfig(
        r=16,
        use_rslora=rslora,
        target_modules=names,
        rank_pattern=dict(zip(names, ranks, strict=True)),
        alpha_pattern=dict(zip(names, alphas, strict=True)),
        base_model_name_or_path=str(llama_folder),
    )
    folder = tmp_path_factory.mktemp("adapter")
    config.save_pretrained(str(folder))
    tensors = {}
    for name, rank in zip(names, ranks, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.full((rank, 32), 0.5)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.full((32, rank), 3.0)
    save_file(tensors, folder / TENSORS)
    expert = Expert.from_peft(folder, name="e")
    for name, rank, alpha in zip(names, ranks, alphas, strict=True):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        expected = torch.full((32, 32), scale * 1.5 * rank, dtype=torch.float64)
        torch.testing.assert_close(delta(expert, name), expected, rtol=1e-6, atol=0)


def test_keys_may_contain_the_name_of_the_adapter(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path, target_modules=["q", "q_proj"])
    plain = Expert.from_peft(tmp_path, name="e")
    tensors = load_file(tmp_path / TENSORS)
    for rename in (
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
    ):
        save_file({rename(key): x for key, x in tensors.items()}, tmp_path / TENSORS)
        assert Expert.from_peft(tmp_path, name="e").content_hash() == plain.content_hash()


def test_an_expert_does_not_depend_on_the_folder_of_its_adapter(
    llama: Base, tmp_path: Path
) -> None:
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    expert = Expert.from_peft(tmp_path / "a")
    before = expert.content_hash()
    (tmp_path / "a" / TENSORS).write_bytes(b"")  # in place, as in PEFT's own saving
    assert expert.content_hash() == before


def test_an_adapter_can_be_read_while_a_pool_is_attached(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path)
    before = Expert.from_peft(tmp_path, base=base, name="e").content_hash()
    RoutedModel(base, Pool.from_experts(make_experts(base)))
    assert Expert.from_peft(tmp_path, base=base, name="e").content_hash() == before


# Export


def assert_same_outputs(base: Base, expert: Expert, folder: Path) -> None:
    model = PeftModel.from_pretrained(load_base(base.name).model, str(folder))
    torch.testing.assert_close(logits(base, model), merged_logits(base, expert))
    torch.testing.assert_close(logits(base, model), routed_logits(base, expert))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_peft_loads_what_is_exported(
    base: Base, tmp_path: Path, rank: int, with_base: bool
) -> None:
    expert = make_experts(base, 2, rank=rank)[1]
    expert.to_peft(tmp_path / "out" / "e1", base=base if with_base else None)
    written = {path.name for path in (tmp_path / "out" / "e1").iterdir()}
    assert written == {"adapter_config.json", TENSORS}
    assert_same_outputs(base, expert, tmp_path / "out" / "e1")
    config = json.loads((tmp_path / "out" / "e1" / "adapter_config.json").read_text())
    kind = "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM"
    assert config["task_type"] == (kind if with_base else None)
    assert config["target_modules"] == sorted(base.linears)
    assert config["base_model_name_or_path"] == base.name
    assert config["inference_mode"] is True
    assert config["lora_alpha"] == pytest.approx(rank / 3)
    assert isinstance(config["lora_alpha"], int) == (rank == 3)


def test_the_round_trip_through_peft_is_exact(base: Base, tmp_path: Path) -> None:
    expected = save_adapter(base, tmp_path / "in", r=4, lora_alpha=8, use_rslora=True)
    expert = Expert.from_peft(tmp_path / "in")
    expert.to_peft(tmp_path / "out")
    written = load_file(tmp_path / "out" / TENSORS)
    for key, tensor in load_file(tmp_path / "in" / TENSORS).items():
        assert torch.equal(written.pop(key), tensor)
    assert not written
    model = PeftModel.from_pretrained(load_base(base.name).model, str(tmp_path / "out"))
    assert torch.equal(logits(base, model), expected)
    again = Expert.from_peft(tmp_path / "out", name="in")
    assert again.card.job == expert.card.job


def test_an_export_adapts_only_its_own_linears(base: Base, tmp_path: Path) -> None:
    """Check linears with different ranks, some of whose names end like others."""
    whole = make_experts(base, 1)[0]
    linears = {}
    for index, linear in enumerate(base.linears[::2]):
        factors, rank = whole.linears[linear], 1 + index % 4
        linears[linear] = LoraFactors(factors.lora_A_RD[:rank], factors.lora_B_OR[:, :rank])
    expert = Expert(make_card("e", base, scale=0.3), linears)
    expert.to_peft(tmp_path)
    model = PeftModel.from_pretrained(load_base(base.name).model, str(tmp_path))
    assert isinstance(model.base_model, LoraModel)
    adapted = {
        name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == set(linears)
    for linear, factors in linears.items():
        layer = model.base_model.model.get_submodule(linear)
        assert layer.scaling["default"] == pytest.approx(0.3, rel=1e-12)
        assert torch.equal(layer.lora_A["default"].weight, factors.lora_A_RD)
    assert_same_outputs(base, expert, tmp_path)
    back = Expert.from_peft(tmp_path, name="e")
    assert back.card.scale == pytest.approx(0.3, rel=1e-12)
    assert all(torch.equal(back.linears[x].lora_B_OR, f.lora_B_OR) for x, f in linears.items())


def test_tensors_that_share_memory_are_exported(llama: Base, tmp_path: Path) -> None:
    """Check slices of a pool, and a saved expert's mapped and transposed factors."""
    A, B = torch.randn(2, 32), torch.randn(2, 32).T
    expert = Expert(
        make_card("e", llama),
        {x: LoraFactors(A, B) for x in llama.linears if x.endswith(("q_proj", "o_proj"))},
    )
    expert.to_peft(tmp_path / "out")
    assert_same_outputs(llama, expert, tmp_path / "out")
    expert.save(tmp_path / "e.arrow")
    Expert.load(tmp_path / "e.arrow").to_peft(tmp_path / "again")
    written, again = (load_file(tmp_path / name / TENSORS) for name in ("out", "again"))
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


def test_an_export_replaces_only_an_earlier_export(llama: Base, tmp_path: Path) -> None:
    expert, other = make_experts(llama, 2)
    expert.to_peft(tmp_path / "e0")
    changed = Expert(dataclasses.replace(expert.card, scale=0.25), expert.linears)
    changed.to_peft(tmp_path / "e0")
    assert Expert.from_peft(tmp_path / "e0").card.scale == 0.25

    def refused(folder: Path, who: Expert) -> None:
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(PhatgooseError, match=r"something else .*: choose a new folder"):
            who.to_peft(folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    refused(tmp_path / "e0", other)
    save_adapter(llama, tmp_path / "trained", target_modules=["q_proj"])
    (tmp_path / "trained" / "README.md").unlink()
    refused(tmp_path / "trained", expert)
    (tmp_path / "e0" / "notes.txt").write_text("mine")
    refused(tmp_path / "e0", expert)
    (tmp_path / "file").write_text("")
    with pytest.raises(PhatgooseError, match=r"cannot write expert 'e0' .*: choose a writable"):
        expert.to_peft(tmp_path / "file")


def test_an_expert_is_not_exported_with_another_base(llama: Base, t5: Base, tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=f"base {llama.fingerprint[:12]}.*pass the base"):
        make_experts(llama, 1)[0].to_peft(tmp_path / "out", base=t5)
    assert not (tmp_path / "out").exists()
