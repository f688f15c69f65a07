import dataclasses
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert, read_checkpoint
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.routers import make_router
from tests.support.plain import plain_logits

RANK, COUNT = 4, 3
WORDS = "shared.weight"
Q = "encoder.block.0.layer.0.SelfAttention.q"
LAYER1, LAYER2 = f"{Q}._addons.expert_lora.layer1", f"{Q}._addons.expert_lora.layer2"
GATE = f"{Q}._addons.router.expert_embeddings"


def checkpoint(base: Base, count: int = COUNT, *, gates: bool = True) -> dict[str, Tensor]:
    """Return a checkpoint of random values in the format of the authors' scripts/concatenate.py."""
    generator = torch.Generator().manual_seed(0)
    shared = base.model.get_parameter(WORDS).detach().bfloat16()
    tensors = OrderedDict(
        {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared.clone()}
    )
    for i in range(count):
        for linear in base.linears:
            outputs, inputs = base.model.get_parameter(f"{linear}.weight").shape
            shapes: dict[str, tuple[int, ...]] = {
                "expert_lora.layer1": (inputs, RANK),
                "expert_lora.layer2": (RANK, outputs),
                "router.expert_embeddings": (inputs,),
            }
            for part, shape in shapes.items():
                if gates or "router" not in part:
                    tensor = torch.randn(shape, generator=generator)
                    tensors[f"{linear}._addons.{part}__{i}"] = tensor
    return tensors


def write_pt(tensors: Any, folder: Path) -> Path:
    torch.save(tensors, folder / "best.pt")
    return folder / "best.pt"


def write_old_pt(tensors: Any, folder: Path) -> Path:
    torch.save(tensors, folder / "best.pt", _use_new_zipfile_serialization=False)
    return folder / "best.pt"


def write_safetensors(tensors: Any, folder: Path) -> Path:
    save_file(tensors, folder / "best.safetensors")
    return folder / "best.safetensors"


def refuse(path: Path, base: Base, match: str, **options: Any) -> None:
    with pytest.raises(PhatgooseError, match=match) as caught:
        read_checkpoint(path, base, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_pt, write_old_pt, write_safetensors])
@pytest.mark.parametrize("gates", [True, False])
def test_every_value_is_imported(
    t5: Base, tmp_path: Path, write: Callable[[Any, Path], Path], gates: bool
) -> None:
    tensors = checkpoint(t5, gates=gates)
    experts = read_checkpoint(write(tensors, tmp_path), t5)
    assert [expert.card.name for expert in experts] == ["expert-000", "expert-001", "expert-002"]
    assert len(t5.linears) == 36
    read = 2  # the token embeddings
    for i, expert in enumerate(experts):
        assert set(expert.linears) == set(t5.linears)
        for linear, factors in expert.linears.items():
            for row in range(RANK):
                layer1 = tensors[f"{linear}._addons.expert_lora.layer1__{i}"]
                layer2 = tensors[f"{linear}._addons.expert_lora.layer2__{i}"]
                assert torch.equal(factors.lora_A_RD[row], layer1[:, row])
                assert torch.equal(factors.lora_B_OR[:, row], layer2[row])
            read += 2
            if gates:
                gate = tensors[f"{linear}._addons.router.expert_embeddings__{i}"]
                assert factors.gate_D is not None
                assert torch.equal(factors.gate_D, gate)
                read += 1
            else:
                assert factors.gate_D is None
    assert read == len(tensors)


def test_an_expert_matches_the_layer_of_the_authors(t5: Base, tmp_path: Path) -> None:
    """Check that their layer adds `x layer1 layer2 / R` to the linear's output."""
    tensors = checkpoint(t5)
    expert = read_checkpoint(write_pt(tensors, tmp_path), t5)[1]
    other = load_base(t5.name)
    for linear in t5.linears:
        layer1 = tensors[f"{linear}._addons.expert_lora.layer1__1"] * 0.1
        layer2 = tensors[f"{linear}._addons.expert_lora.layer2__1"]

        def hook(
            module: Any, args: Any, said: Tensor, a: Tensor = layer1, b: Tensor = layer2
        ) -> Tensor:
            return said + torch.matmul(torch.matmul(args[0], a), b) / RANK

        other.model.get_submodule(linear).register_forward_hook(hook)
    small = {
        name: dataclasses.replace(factors, lora_A_RD=factors.lora_A_RD * 0.1)
        for name, factors in expert.linears.items()
    }
    routed = RoutedModel(t5, Pool.from_experts([Expert(expert.card, small)]))
    routed.set_router(make_router("single:expert-001"))
    with torch.no_grad():
        said, expected = (plain_logits(x, [5, 9, 11, 20], [12, 30]) for x in (t5, other))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


def test_experts_have_a_complete_card(t5: Base, tmp_path: Path) -> None:
    tensors = checkpoint(t5)
    path = write_pt(tensors, tmp_path)
    first, second, third = read_checkpoint(path, t5, names=["P3Agnews", "b", "c"])
    card = first.card
    assert (card.name, card.task, card.scale) == ("P3Agnews", "P3Agnews", 1 / RANK)
    assert (card.base, card.base_fingerprint) == (t5.name, t5.fingerprint)
    assert (card.data_fingerprint, card.metrics) == ("unknown", {})
    assert card.recipe == {"authors": {"file": "best.pt", "index": 0}}
    assert len({x.card.job for x in (first, second, third)}) == 3
    assert len(card.job) == 32
    assert read_checkpoint(path, t5, scale=0.5)[0].card.scale == 0.5
    # A job depends on the experts, not on how they were stored.
    again = read_checkpoint(write_safetensors(tensors, tmp_path), t5, names=["P3Agnews", "b", "c"])
    assert [x.card.job for x in again] == [x.card.job for x in (first, second, third)]
    tensors[f"{LAYER1}__0"][3, 1] += 1
    (tmp_path / "other").mkdir()
    changed = read_checkpoint(
        write_pt(tensors, tmp_path / "other"), t5, names=["P3Agnews", "b", "c"]
    )
    assert changed[0].card.job != first.card.job
    assert changed[1].card.job == second.card.job


def test_experts_can_be_stored(t5: Base, tmp_path: Path) -> None:
    """Check that this works although their factors are transposed views of a mapped file."""
    experts = read_checkpoint(write_pt(checkpoint(t5), tmp_path), t5)
    for expert in experts:
        expert.save(tmp_path / "e.arrow")
        assert Expert.load(tmp_path / "e.arrow").content_hash() == expert.content_hash()
    gate_ED = Pool.from_experts(experts).linears[Q].gate_ED
    assert gate_ED is not None
    assert gate_ED.shape == (COUNT, 32)


def test_a_checkpoint_may_adapt_some_linears_and_omit_embeddings(t5: Base, tmp_path: Path) -> None:
    some = {key: x for key, x in checkpoint(t5).items() if "SelfAttention.q." in key}
    experts = read_checkpoint(write_pt(some, tmp_path), t5)
    assert len(experts) == COUNT
    assert len(experts[0].linears) == 4


def test_names_match_the_experts_one_to_one(t5: Base, tmp_path: Path) -> None:
    path = write_pt(checkpoint(t5), tmp_path)
    refuse(path, t5, "2 different names for the 3 experts", names=["a", "b"])
    refuse(path, t5, "2 different names for the 3 experts", names=["a", "b", "a"])
    refuse(path, t5, "4 different names for the 3 experts", names=list("abcd"))
    refuse(path, t5, r"'\.\./c' cannot name an expert", names=["a", "b", "../c"])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda x: x.pop(f"{LAYER1}__1"), rf"3 experts of 36 linears, and {LAYER1}__1 is missing"),
        (lambda x: x.pop(f"{LAYER2}__0"), rf"and {LAYER2}__0 is missing: copy it again"),
        (lambda x: x.pop(f"{GATE}__2"), rf"and {GATE}__2 is missing"),
        (
            lambda x: [x.pop(key) for key in list(x) if key.endswith("__1")],
            r"and .*__1 is missing: copy it again",
        ),
        (
            lambda x: [x.pop(key) for key in list(x) if key.endswith("__0")],
            r"and .*__0 is missing: copy it again",
        ),
        (
            lambda x: x.update({f"{LAYER1}__999999999": torch.ones(32, RANK)}),
            r"__3 is missing",
        ),
        (
            lambda x: x.update({f"{LAYER1}__01": torch.ones(32, RANK)}),
            "layer1__01, which is not",
        ),
        (
            lambda x: x.update({"lm_head.weight": torch.ones(2)}),
            "lm_head.weight, which is not",
        ),
        (
            lambda x: x.update({f"{Q}._addons.expert_lora.expert_input_gate": torch.ones(32)}),
            "expert_input_gate, which is not part of an expert",
        ),
        (
            lambda x: x.update({f"{LAYER1}__0".replace(".q.", ".query."): torch.ones(32, RANK)}),
            "adapt no linear 'encoder.block.0.layer.0.SelfAttention.query'",
        ),
        (
            lambda x: x.update({"encoder._addons.router.expert_embeddings__0": torch.ones(9)}),
            "adapt no linear 'encoder'",
        ),
        (
            lambda x: x.update({f"{LAYER1}__1": torch.ones(RANK, 32)}),
            rf"expert 1: A \[32, 4\] and B \[32, 4\] on {Q} do not fit \[R, 32\]",
        ),
        (lambda x: x.update({f"{LAYER1}__1": torch.ones(31, RANK)}), "expert 1: .* do not fit"),
        (lambda x: x.update({f"{LAYER2}__1": torch.ones(RANK, 33)}), "expert 1: .* do not fit"),
        (lambda x: x.update({f"{LAYER2}__1": torch.ones(5, 32)}), "expert 1: .* do not fit"),
        (lambda x: x.update({f"{LAYER2}__1": torch.ones(())}), "expert 1: .* do not fit"),
        (lambda x: x.update({f"{LAYER1}__1": torch.ones(32, 2, RANK)}), "expert 1: .* do not fit"),
        (
            lambda x: x.update(
                {f"{LAYER1}__2": torch.ones(32, 0), f"{LAYER2}__2": torch.ones(0, 32)}
            ),
            "expert 2: .* do not fit",
        ),
        (lambda x: x.update({f"{GATE}__0": torch.ones(33)}), r"gate_D \[33\] do not fit"),
        (lambda x: x.update({f"{GATE}__0": torch.full((32,), math.nan)}), "gate_D holds NaN"),
        (lambda x: x.update({f"{LAYER2}__1": torch.ones(RANK, 32).int()}), "is int32: convert it"),
        (
            lambda x: x.update(
                {f"{LAYER1}__1": torch.ones(32, 2), f"{LAYER2}__1": torch.ones(2, 32)}
            ),
            r"expert 1: its linears have the ranks \[2, 4\].*give the scale",
        ),
        (
            lambda x: x.update({"encoder.embed_tokens.weight": torch.ones(3, 32)}),
            "token embeddings in .* are not those of",
        ),
        (
            lambda x: x["decoder.embed_tokens.weight"].mul_(1.1),
            "token embeddings in .* are not those of .*: load the base",
        ),
        (lambda x: x.clear(), "holds no expert"),
        (lambda x: x.update(epoch=3), "is not a dictionary of tensors"),
    ],
)
def test_incomplete_or_unrelated_checkpoints_are_refused(
    t5: Base, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], match: str
) -> None:
    tensors = dict(checkpoint(t5))
    spoil(tensors)
    refuse(write_pt(tensors, tmp_path), t5, match)


def test_ranks_may_differ_if_a_scale_is_given(t5: Base, tmp_path: Path) -> None:
    tensors = dict(checkpoint(t5))
    tensors |= {f"{LAYER1}__1": torch.ones(32, 2), f"{LAYER2}__1": torch.ones(2, 32)}
    experts = read_checkpoint(write_pt(tensors, tmp_path), t5, scale=0.25)
    assert experts[1].linears[Q].lora_A_RD.shape == (2, 32)


def test_another_base_is_refused(t5: Base, llama: Base, tmp_path: Path) -> None:
    path = write_pt(checkpoint(t5), tmp_path)
    refuse(path, llama, "token embeddings")
    other = {key: x for key, x in checkpoint(t5).items() if "embed_tokens" not in key}
    refuse(write_pt(other, tmp_path), llama, "adapt no linear 'encoder.block.0")


def test_embeddings_rounded_to_bfloat16_match_the_base(t5_folder: Path, tmp_path: Path) -> None:
    half = load_base(str(t5_folder), dtype="bfloat16")
    tensors = checkpoint(load_base(str(t5_folder)), 1)
    read_checkpoint(write_pt(tensors, tmp_path), half)
    exact = load_base(str(t5_folder)).model.get_parameter(WORDS).detach()
    tensors["encoder.embed_tokens.weight"] = exact
    read_checkpoint(write_pt(tensors, tmp_path), half)


class Bomb:
    """An object that runs code when it is unpickled without precautions."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_no_code_in_a_file_is_run(t5: Base, tmp_path: Path) -> None:
    for write in (write_pt, write_old_pt):
        path = write({f"{LAYER1}__0": Bomb(tmp_path / "ran")}, tmp_path)
        refuse(path, t5, r"cannot read the checkpoint .*: check the path")
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refuse(path, t5, "cannot read the checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["best.pt", "best.safetensors"])
def test_damaged_files_are_refused(t5: Base, tmp_path: Path, name: str) -> None:
    refuse(tmp_path / name, t5, "cannot read the checkpoint")
    write = write_pt if name == "best.pt" else write_safetensors
    path = write(checkpoint(t5, 1), tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", b"{}", whole[:100], whole[:-50]):
        path.write_bytes(damaged)
        refuse(path, t5, "cannot read the checkpoint")
    if name == "best.pt":
        refuse(write_pt([torch.ones(2)], tmp_path), t5, "is not a dictionary of tensors")
