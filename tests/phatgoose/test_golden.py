"""Compare with independent numbers: a textbook in numpy (tests/golden), and the authors' modules.

tests/golden/authors/README.md describes the authors' cases.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from phatgoose.architecture import adapted_linears
from phatgoose.base import Base
from phatgoose.inference.model import RoutedModel
from phatgoose.ops import mix, mix_reference, route, top_k_softmax
from phatgoose.pool import Pool, PoolLinear
from phatgoose.routers import make_router
from phatgoose.routers.arrow import arrow_scorer
from phatgoose.routers.retrieval import nearest_example
from phatgoose.training.gated_lora import GatedLora
from tests.support.tiny import llama_tokenizer

OWN = Path(__file__).parents[1] / "golden"
AUTHORS = OWN / "authors"
TOLERANCE = 1e-5


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare relative to the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.detach() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


def own_cases() -> dict[str, dict[str, Tensor]]:
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(OWN / "cases.safetensors").items():
        case, _, name = name.rpartition(".")
        cases.setdefault(case, {})[name] = tensor
    return cases


OWN_CASES = own_cases()


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", OWN / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_cases_match_the_generator(tmp_path: Path) -> None:
    load_generator().main(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    committed = load_file(OWN / "cases.safetensors")
    assert again.keys() == committed.keys()
    for name, tensor in committed.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(OWN_CASES.keys() - {"gate_training"}))
def test_routing_matches_the_textbook(name: str) -> None:
    case, sizes = OWN_CASES[name], load_generator().ROUTED[name]
    weights_TK, indices_TK = route(case["x_TD"], case["gates_ED"], top_k=sizes[4])
    assert torch.equal(indices_TK, case["indices_TK"])
    # Precise enough to detect the 1e-6 that is added to the sum of the kept shares.
    assert_near(weights_TK, case["weights_TK"], tolerance=2e-6)
    for mixer in (mix, mix_reference):
        y_TO = mixer(
            case["x_TD"],
            case["lora_A_ERD"],
            case["lora_B_EOR"],
            indices_TK,
            weights_TK,
            scale=1 / sizes[5],
        )
        assert_near(y_TO, case["y_TO"])


def gated_lora(lora_A_RD: Tensor, lora_B_OR: Tensor, gate_D: Tensor) -> GatedLora:
    """Return a gated expert on a linear of zeros, with a given state."""
    (rank, inputs), outputs = lora_A_RD.shape, lora_B_OR.shape[0]
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    nn.init.zeros_(linear.weight)
    layer = GatedLora(linear, lora_A_RD, lora_B_OR, 1 / rank)
    layer.add_gate()
    assert layer.gate_D is not None
    layer.gate_D.data.copy_(gate_D)
    return layer


def test_gate_training_matches_the_textbook() -> None:
    case = OWN_CASES["gate_training"]
    layer = gated_lora(case["lora_A_RD"], case["lora_B_OR"], case["gate_D"])
    y_TO = layer(case["x_TD"])
    assert_near(y_TO, case["y_TO"])
    (y_TO**2 / 2).sum().backward()
    assert layer.gate_D is not None
    assert layer.gate_D.grad is not None
    assert_near(layer.gate_D.grad, case["gradient_D"])
    assert layer.lora_A_RD.grad is None
    assert layer.lora_B_OR.grad is None


@pytest.mark.parametrize("name", ["small", "top1", "top5", "166", "one_expert"])
def test_tokenwise_routing_matches_the_authors(name: str) -> None:
    sizes = json.loads((AUTHORS / "cases.json").read_text())[f"tokenwise_{name}"]
    case = load_file(AUTHORS / f"tokenwise_{name}.safetensors")
    hidden_TD = case["hidden"].flatten(0, 1)
    weights_TK, indices_TK = route(hidden_TD, case["gate"], sizes["top_k"])
    kept_TK = case["routing_probability"].flatten(0, 1).gather(1, indices_TK)
    assert_near(weights_TK, kept_TK / (kept_TK.sum(1, keepdim=True) + 1e-6))
    for mixer in (mix, mix_reference):
        y_TO = mixer(
            hidden_TD,
            case["lora_A"],
            case["lora_B"],
            indices_TK,
            weights_TK,
            scale=1 / sizes["rank"],
        )
        assert_near(y_TO, case["lora_output"].flatten(0, 1))


def test_arrow_matches_the_authors() -> None:
    """Check Arrow as compared with by PHATGOOSE's authors: divided by sqrt(D), outputs mixed."""
    sizes = json.loads((AUTHORS / "cases.json").read_text())["arrow_scores"]
    case = load_file(AUTHORS / "arrow_scores.safetensors")
    hidden_TD = case["hidden"].flatten(0, 1)
    score = arrow_scorer(case["gate"], temperature=1.0, divide_by_sqrt_d=True)
    weights_TK, indices_TK = top_k_softmax(score(hidden_TD), sizes["top_k"])
    kept_TK = case["routing_probability"].flatten(0, 1).gather(1, indices_TK)
    assert_near(weights_TK, kept_TK / (kept_TK.sum(1, keepdim=True) + 1e-6))
    for mixer in (mix, mix_reference):
        factors = case["lora_A"], case["lora_B"]
        y_TO = mixer(hidden_TD, *factors, indices_TK, weights_TK, scale=1 / sizes["rank"])
        assert_near(y_TO, case["lora_output"].flatten(0, 1))


def test_retrieval_matches_the_authors() -> None:
    case = load_file(AUTHORS / "retrieval.safetensors")
    chosen_Q = nearest_example(case["query"], list(case["library"]))
    assert torch.equal(chosen_Q, case["chosen_expert"].long())


def test_gate_training_matches_the_authors() -> None:
    case = load_file(AUTHORS / "gate_training.safetensors")
    layer = gated_lora(case["lora_A"], case["lora_B"], case["gate"])
    y = layer(case["hidden"])
    assert_near(y, case["lora_output"])
    (y**2).sum().backward()
    assert layer.gate_D is not None
    assert layer.gate_D.grad is not None
    assert_near(layer.gate_D.grad, case["gate_grad_of_sum_squares"])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_full_model_matches_the_authors(kind: str) -> None:
    folder = AUTHORS / "full_model" / kind
    case = json.loads((folder / "case.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    family = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = family.from_config(config)
    weights = load_file(folder / "base.safetensors")
    if "lm_head.weight" in weights:  # transformers ties every T5, unlike the authors' checkpoints
        model.lm_head.weight = nn.Parameter(weights["lm_head.weight"].clone())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("embed_tokens" in name or "lm_head" in name for name in missing)
    linears = adapted_linears(model.eval())
    assert sorted(linears) == sorted(case["adapted"])

    experts = load_file(folder / "experts.safetensors")
    pool = Pool(
        base_fingerprint="golden",
        experts=tuple(f"e{i}" for i in range(case["experts"])),
        linears={
            name: PoolLinear(
                lora_A_ERD=experts[f"{name}.lora_A"],
                lora_B_EOR=experts[f"{name}.lora_B"] / case["rank"],
                gate_ED=experts[f"{name}.gate"],
            )
            for name in linears
        },
    )
    base = Base("golden", "golden", model, llama_tokenizer(), linears)
    tensors = load_file(folder / "io.safetensors")
    inputs = {name: value for name, value in tensors.items() if "logits" not in name}
    with torch.inference_mode():
        assert_near(model(**inputs).logits, tensors["base_logits"])
        routed = RoutedModel(base, pool)
        routed.set_router(make_router("phatgoose", top_k=case["top_k"]))
        assert_near(model(**inputs).logits, tensors["routed_logits"])
