"""Check that `Expert.from_peft` refuses everything beyond LoRA factors of a base's linears."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support.adapters import (
    TENSORS,
    Q,
    edit_config,
    edit_tensors,
    family,
    key_of,
    logits,
    merged_logits,
    save_adapter,
)


def refuse(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(PhatgooseError, match=match) as caught:
        Expert.from_peft(folder, **{"name": "e", **options})
    assert "\n" not in str(caught.value)


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Path:
    """Return a valid adapter of each base, to be damaged by a test."""
    save_adapter(base, tmp_path / "adapter", target_modules=["q", "q_proj"])
    return tmp_path / "adapter"


SPOILT: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "kind ADALORA: only LORA"),
    ({"peft_type": None}, "kind None: only LORA"),
    ({"modules_to_save": ["score"]}, r'modules_to_save = \["score"\].*without modules_to_save'),
    ({"use_dora": True}, "DoRA also scales .* without use_dora"),
    ({"bias": "all"}, "trained the base's biases"),
    ({"lora_bias": True}, "B has a bias"),
    ({"layer_replication": [[0, 1], [0, 1]]}, "repeats layers"),
    ({"trainable_token_indices": [1, 2]}, "trained embeddings"),
    ({"target_parameters": ["experts.up"]}, "bare parameters"),
    ({"alora_invocation_tokens": [5]}, "some tokens only"),
    ({"use_qalora": True}, "use_qalora = true, an expert is plain LoRA factors"),
    ({"kasa_config": {"beta": 0.1}}, "kasa_config .* an expert is plain LoRA factors"),
    ({"a_field_of_next_year": 3}, "does not know it: update PEFT"),
    ({"init_lora_weights": "pissa"}, "changes the base's .*path_initial_model_for_weight"),
    ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights"),
    ({"init_lora_weights": "olora"}, "changes the base's .*path_initial_model_for_weight"),
    ({"init_lora_weights": "corda"}, "changes the base's .*path_initial_model_for_weight"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "plain initialization"),
    ({"init_lora_weights": "of_next_year"}, "plain initialization"),
    ({"r": 5}, r"gives .* rank 5, its file 8: save it again"),
    ({"rank_pattern": {"q|q_proj": 3}}, r"gives .* rank 3, its file 8"),
    ({"lora_alpha": 0}, "alpha 0 .*: correct lora_alpha"),
    ({"lora_alpha": "eight"}, "alpha eight .*: correct lora_alpha"),
    ({"task_type": "POETRY"}, "PEFT does not take"),
    ({"base_model_name_or_path": None}, "does not name its base: load the base and pass"),
    ({"base_model_name_or_path": "/no/such"}, "/no/such, which cannot be opened .*: load the base"),
]


def test_anything_beyond_plain_lora_is_refused(adapter: Path) -> None:
    for changes, match in SPOILT:
        folder = adapter.parent / "spoilt"
        shutil.copytree(adapter, folder)
        edit_config(folder, **changes)
        refuse(folder, match)
        shutil.rmtree(folder)


def test_disabled_fields_of_other_versions_are_ignored(adapter: Path) -> None:
    before = Expert.from_peft(adapter).card.job
    edit_config(adapter, a_field_of_next_year=False, enable_lora=None, rank_pattern=None)
    edit_config(adapter, use_dora=None, modules_to_save=[], runtime_config={"x": 1}, bias=None)
    assert Expert.from_peft(adapter).card.job == before


def test_keys_that_are_not_factors_are_refused(base: Base, adapter: Path) -> None:
    A, B = key_of(base, "A"), key_of(base, "B")
    spoilt: list[tuple[dict[str, Tensor | None], str]] = [
        ({"base_model.model.embed.lora_embedding_A": torch.ones(2, 9)}, "lora_embedding_A"),
        ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}, "magnitude"),
        ({B.replace("weight", "bias"): torch.ones(32)}, "not a LoRA factor"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 3)}, "lm_head.* not a LoRA factor"),
        (
            {A: torch.ones(8, 32, 1, 1)},
            r"\[8, 32, 1, 1\], .* not a LoRA factor .*convolutions",
        ),
        ({A: None}, f"A of {Q[family(base)]} is missing"),
        ({B: None}, f"B of {Q[family(base)]} is missing"),
        ({A.replace("weight", "second.weight"): torch.ones(8, 32)}, "holds two A"),
        ({A: torch.full((8, 32), math.nan)}, "NaN or infinity"),
        ({A: torch.ones(8, 32, dtype=torch.int8)}, "int8: convert it"),
        (dict.fromkeys(load_file(adapter / TENSORS)), "holds no factors"),
    ]
    for changes, match in spoilt:
        folder = adapter.parent / "spoilt"
        shutil.copytree(adapter, folder)
        edit_tensors(folder, **changes)
        refuse(folder, match)
        refuse(folder, match, base=base)
        shutil.rmtree(folder)


def test_linears_and_shapes_must_match_the_base(base: Base, adapter: Path) -> None:
    tensors = load_file(adapter / TENSORS)
    A, B = key_of(base, "A"), key_of(base, "B")
    q = Q[family(base)]
    for options in ({}, {"base": base}):
        for head in ("lm_head", q.replace(".0.", ".7."), "model"):
            added = {key.replace(q, head): tensors[key].clone() for key in (A, B)}
            save_file({**tensors, **added}, adapter / TENSORS)
            refuse(adapter, rf"'{head}' is not a linear that experts of .* adapt", **options)
        for key, shape in ((A, (8, 31)), (B, (31, 8)), (B, (32, 7))):
            save_file({**tensors, key: torch.ones(shape)}, adapter / TENSORS)
            refuse(adapter, rf"A .* and B .* on {q} do not fit \[R, 32\] and \[32, R\]", **options)


def test_an_adapter_of_another_family_is_refused(llama: Base, t5: Base, tmp_path: Path) -> None:
    save_adapter(llama, tmp_path, target_modules=["q_proj"])
    refuse(tmp_path, "is not a linear that experts of .* adapt", base=t5)


def test_files_that_are_not_an_adapter_are_refused(llama: Base, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no adapter in .*nowhere")
    save_adapter(llama, tmp_path / "a" / "second", target_modules=["q_proj"])
    refuse(tmp_path / "a", r"pass .*second")
    folder = tmp_path / "a" / "second"
    whole, config = (folder / TENSORS).read_bytes(), (folder / "adapter_config.json").read_text()
    (folder / TENSORS).write_bytes(whole[:-5])
    refuse(folder, f"cannot read .*{TENSORS}.*: save the adapter again")
    (folder / TENSORS).unlink()
    refuse(folder, f"no {TENSORS}: check the folder")
    torch.save({}, folder / "adapter_model.bin")
    refuse(folder, "load adapter_model.bin with PEFT and save it as safetensors")
    for broken in (config[:-9], "[]", "\udcff"):
        (folder / "adapter_config.json").write_bytes(broken.encode(errors="surrogateescape"))
        refuse(folder, r"cannot read .*adapter_config.json")
    refuse(folder, "cannot name an expert", name="../e")
    kind = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompts = get_peft_model(llama.model, kind)
    prompts.save_pretrained(str(tmp_path / "prompts"))
    refuse(tmp_path / "prompts", "kind PROMPT_TUNING")


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_variants_saved_by_peft_itself_are_refused(
    llama: Base, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Check adapters with and without the configuration entry of their variant."""
    save_adapter(llama, tmp_path, target_modules=["q_proj"], **config)
    refuse(tmp_path, f"has {next(iter(config))} = ")
    if config != {"bias": "all"}:  # this base has no biases for PEFT to save
        edit_config(tmp_path, use_dora=False, modules_to_save=None)
        refuse(tmp_path, "not a LoRA factor")


def test_pissa_is_accepted_after_peft_converts_it_to_plain_lora(
    llama: Base, tmp_path: Path
) -> None:
    """Check the advice of the refusal: the difference from the start is plain LoRA of rank 2 R."""
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_base(llama.name).model, config)
    found = model.peft_config["default"]
    assert isinstance(found, LoraConfig)
    found.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    found.init_lora_weights = "pissa"
    for key, weight in model.named_parameters():
        if ".lora_" in key:
            weight.data += 0.1 * torch.ones_like(weight)
    expected = logits(llama, model)
    model.save_pretrained(str(tmp_path / "pissa"))
    refuse(tmp_path / "pissa", "path_initial_model_for_weight_conversion")
    model.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    expert = Expert.from_peft(tmp_path / "plain")
    assert expert.linears[Q["llama"]].lora_A_RD.shape == (8, 32)
    torch.testing.assert_close(merged_logits(llama, expert), expected, rtol=1e-4, atol=1e-4)


def without(folder: Path, *linears: str) -> None:
    """Remove the factors of these linears from an adapter's file."""
    keys = [f"base_model.model.{n}.lora_{letter}.weight" for n in linears for letter in "AB"]
    edit_tensors(folder, **dict.fromkeys(keys))


def test_missing_factors_are_named(base: Base, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "a")
    without(tmp_path / "a", *base.linears[1:3])
    refuse(
        tmp_path / "a",
        rf"is missing the factors of 2 linears \({base.linears[1]}, {base.linears[2]}\)",
        base=base,
    )
    without(tmp_path / "a", *base.linears[3:])
    count = len(base.linears) - 1
    refuse(tmp_path / "a", rf"is missing the factors of {count} linears \(.*, \.\.\.\)", base=base)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {
            "target_modules": ["q_proj", "k_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
        },
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    ],
    ids=["names", "pattern", "layers", "one layer", "all", "excluded"],
)
def test_the_expected_linears_are_those_that_peft_adapts(
    llama: Base, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Check an adapter saved by PEFT: accepted when complete, refused with one linear missing."""
    folder = tmp_path / "a"
    save_adapter(llama, folder, **config)
    expert = Expert.from_peft(folder, name="e", base=llama)
    last = list(expert.linears)[-1]
    without(folder, last)
    refuse(folder, rf"is missing the factors of 1 linears \({last}\)", base=llama)


@pytest.mark.parametrize("other", ["lm_head", "embed_tokens"])
def test_missing_factors_of_unsupported_modules_are_named_too(
    llama: Base, tmp_path: Path, other: str
) -> None:
    save_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    edit_config(tmp_path / "a", target_modules=["q_proj", other])
    refuse(tmp_path / "a", rf"is missing the factors of 1 linears \(.*{other}\)", base=llama)


def test_factors_not_named_by_the_configuration_are_refused(llama: Base, tmp_path: Path) -> None:
    """PEFT would ignore them."""
    folder = tmp_path / "a"
    save_adapter(llama, folder, target_modules=["q_proj", "v_proj"])
    edit_config(folder, target_modules=["q_proj"])
    refuse(
        folder, r"also has factors of 2 linears \(model\.layers\.0\.self_attn\.v_proj", base=llama
    )
