import dataclasses
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutedLinear, RoutingLog
from phatgoose.ops import route
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.routers import make_router
from phatgoose.routers.random import Random
from tests.support.plain import plain_logits
from tests.support.tiny import make_experts, state

CONTEXT, TARGET = [5, 9, 11, 20, 33, 8], [12, 30, 7]
QUESTIONS = [
    Question([5, 9, 11, 20], [[12, 30, 1], [7, 1], [1]]),
    Question([8, 40], [[6, 1]]),
    Question([9, 9, 9, 31, 17, 22, 3], [[14, 15, 16, 17, 1], [14, 1]]),
]


@torch.no_grad()
def logits(base: Base) -> Tensor:
    return plain_logits(base, CONTEXT, TARGET)


def attach(base: Base, experts: list[Expert], router: str, **options: object) -> RoutedModel:
    routed = RoutedModel(base, Pool.from_experts(experts))
    routed.set_router(make_router(router, **options))
    return routed


def product(expert: Expert, linear: str) -> Tensor:
    """Return the matrix that an expert adds to a linear's weight."""
    factors = expert.linears[linear]
    return expert.card.scale * factors.lora_B_OR @ factors.lora_A_RD


@pytest.mark.parametrize("count", [2, 9])  # as factors, and as matrices
def test_merged_is_the_mean_of_the_products_added_to_the_weights(base: Base, count: int) -> None:
    experts = make_experts(base, count)
    dense = load_base(base.name)
    for name in base.linears:
        delta = torch.stack([product(expert, name) for expert in experts]).mean(dim=0)
        dense.model.get_parameter(f"{name}.weight").data += delta
    attach(base, experts, "merged")
    first = base.model.get_submodule(base.linears[0])
    assert isinstance(first, RoutedLinear)
    assert first._delta is not None
    assert len(first._delta) == (2 if count == 2 else 1)
    torch.testing.assert_close(logits(base), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 40])
def test_single_matches_peft_with_the_same_factors(base: Base, rank: int) -> None:
    experts = make_experts(base, 3, rank=rank)
    expert, other = experts[1], load_base(base.name)
    alpha: Any = rank * expert.card.scale  # PEFT accepts fractional values too
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(base.linears))
    wrapped: Any = get_peft_model(other.model, config)
    for name, factors in expert.linears.items():
        layer = wrapped.get_base_model().get_submodule(name)
        layer.get_parameter("lora_A.default.weight").data.copy_(factors.lora_A_RD)
        layer.get_parameter("lora_B.default.weight").data.copy_(factors.lora_B_OR)
    attach(base, experts, "single:e1")
    expected = logits(dataclasses.replace(other, model=wrapped.eval()))
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["phatgoose", "random"])
def test_a_pool_of_one_expert_routes_everything_to_it(base: Base, router: str) -> None:
    experts = make_experts(base, 1)
    routed = attach(base, experts, router)
    by_token = logits(base)
    routed.set_router(make_router("single:e0"))
    torch.testing.assert_close(by_token, logits(base), rtol=1e-4, atol=1e-4)


def test_keeping_all_experts_with_equal_gates_equals_merging(base: Base) -> None:
    experts = make_experts(base, 3)
    routed = attach(base, experts, "merged")
    merged = logits(base)
    routed.detach()
    gates = {name: factors.gate_D for name, factors in experts[0].linears.items()}
    alike = [
        Expert(
            expert.card,
            {
                name: dataclasses.replace(factors, gate_D=gates[name])
                for name, factors in expert.linears.items()
            },
        )
        for expert in experts
    ]
    attach(base, alike, "phatgoose", top_k=3)
    torch.testing.assert_close(logits(base), merged, rtol=1e-4, atol=1e-4)


def test_the_base_router_and_detaching_give_the_exact_outputs_of_the_base(base: Base) -> None:
    bare, before = logits(base), state(base)
    modules = {name: base.model.get_submodule(name) for name in base.linears}
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 3)))
    assert torch.equal(logits(base), bare)  # no router yet
    for router in ("phatgoose", "random", "merged", "single:e2"):
        routed.set_router(make_router(router))
        assert routed.router == make_router(router)
        assert not torch.equal(logits(base), bare)
        routed.set_router(make_router("base"))
        assert torch.equal(logits(base), bare)
    routed.set_router(make_router("phatgoose"))
    routed.detach()
    assert torch.equal(logits(base), bare)
    assert all(base.model.get_submodule(name) is module for name, module in modules.items())
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_setting_a_router_again_gives_identical_outputs(base: Base) -> None:
    routed = attach(base, make_experts(base, 5), "random", seed=3)
    first = logits(base)
    for router, options in (("phatgoose", {}), ("merged", {}), ("random", {"seed": 4})):
        routed.set_router(make_router(router, **options))
        assert not torch.equal(logits(base), first)
    routed.set_router(make_router("random", seed=3))
    assert torch.equal(logits(base), first)


def test_a_random_choice_depends_only_on_the_token(llama: Base) -> None:
    pool = Pool.from_experts(make_experts(llama, 6))
    name, other = llama.linears[0], llama.linears[1]
    x_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    rule = Random(seed=1).rule(pool, name)
    weights_TK, indices_TK = rule(x_TD, None)
    for token in range(9):
        alone = rule(x_TD[token : token + 1], None)
        assert torch.equal(alone[1][0], indices_TK[token])
        torch.testing.assert_close(alone[0][0], weights_TK[token])
    again = Random(seed=1).rule(pool, name)(x_TD, None)
    assert torch.equal(again[0], weights_TK)
    for changed in (
        Random(seed=2).rule(pool, name),
        Random(seed=1).rule(pool, other),
    ):
        assert not torch.equal(changed(x_TD, None)[1], indices_TK)
    assert len(set(indices_TK[:, 0].tolist())) > 2  # not one expert for everything


def test_a_pool_of_another_base_is_refused(llama: Base) -> None:
    pool = dataclasses.replace(Pool.from_experts(make_experts(llama)), base_fingerprint="0" * 64)
    with pytest.raises(PhatgooseError, match=rf"base 000000000000, .* {llama.fingerprint[:12]}"):
        RoutedModel(llama, pool)


def test_a_pool_that_does_not_fit_is_refused_and_leaves_the_base_unchanged(llama: Base) -> None:
    bare = logits(llama)
    pool = Pool.from_experts(make_experts(llama))
    first, last = llama.linears[0], llama.linears[-1]
    wrong = dataclasses.replace(
        pool, linears={**pool.linears, last: pool.linears["model.layers.0.mlp.up_proj"]}
    )
    with pytest.raises(PhatgooseError, match=rf"\(32, 48\) on {last}, the base \(48, 32\)"):
        RoutedModel(llama, wrong)
    unknown = dataclasses.replace(pool, linears={"model.other": pool.linears[first]})
    with pytest.raises(PhatgooseError, match=r"no module model\.other"):
        RoutedModel(llama, unknown)
    with pytest.raises(PhatgooseError, match="no linear"):
        RoutedModel(llama, dataclasses.replace(pool, linears={}))
    assert torch.equal(logits(llama), bare)
    assert not any(isinstance(module, RoutedLinear) for module in llama.model.modules())


def test_a_base_takes_one_pool_at_a_time(base: Base) -> None:
    pool = Pool.from_experts(make_experts(base))
    routed = RoutedModel(base, pool)
    with pytest.raises(PhatgooseError, match="adapted already"):
        RoutedModel(base, pool)
    routed.detach()
    RoutedModel(base, pool)


def test_an_unsupported_router_is_refused_and_the_old_one_stays(base: Base) -> None:
    routed = attach(base, make_experts(base, gates=False), "random")
    before = logits(base)
    with pytest.raises(PhatgooseError, match="router phatgoose needs gates"):
        routed.set_router(make_router("phatgoose"))
    with pytest.raises(PhatgooseError, match=r"no expert 'e9': .*it has e0, e1, e2"):
        routed.set_router(make_router("single:e9"))
    assert torch.equal(logits(base), before)
    assert routed.router == make_router("random")


@pytest.mark.parametrize("router", ["phatgoose", "merged", "single:e0", "random"])
def test_pools_use_the_dtype_of_the_base(base: Base, router: str) -> None:
    experts = make_experts(base, 3)
    attach(base, experts, router)
    half = load_base(base.name, dtype="bfloat16")
    attach(half, experts, router)
    said = logits(half)
    assert said.dtype == torch.bfloat16
    difference = (said.float() - logits(base)).norm() / logits(base).norm()
    # Where two experts have equal scores, rounding may choose the other one.
    assert difference < (0.5 if router in ("phatgoose", "random") else 0.1)


def record(base: Base, questions: list[Question], routed: RoutedModel) -> RoutingLog:
    with routed.recording(RoutingLog()) as log:
        routed.score(questions)
    return log


@pytest.mark.parametrize("router", ["phatgoose", "random"])
def test_the_log_counts_every_token_once_and_no_padding(base: Base, router: str) -> None:
    routed = attach(base, make_experts(base, 4), router)
    log = record(base, QUESTIONS, routed)
    contexts = sum(len(question.context) for question in QUESTIONS)
    written = sum(len(choice) - 1 for question in QUESTIONS for choice in question.choices)
    assert set(log.tokens) == set(log.weights) == set(base.linears)
    for name in base.linears:
        if not base.is_encoder_decoder:
            expected = contexts + written
        elif name.startswith("encoder.") or re.search(r"EncDecAttention\.[kv]$", name):
            expected = contexts  # for any number of choices
        else:  # the start token of every question, and all before the last token of each choice
            expected = len(QUESTIONS) + written
        assert log.tokens[name] == expected, name
        assert log.weights[name].shape == (4,)
        assert log.weights[name].dtype == torch.float64
        assert float(log.weights[name].sum()) == pytest.approx(expected, rel=1e-4)


def test_the_log_of_a_batch_is_the_sum_of_the_logs_of_its_questions(base: Base) -> None:
    routed = attach(base, make_experts(base, 4), "phatgoose")
    together = record(base, QUESTIONS, routed)
    alone = [record(base, [question], routed) for question in QUESTIONS]
    for name in base.linears:
        expected = torch.stack([log.weights[name] for log in alone]).sum(dim=0)
        torch.testing.assert_close(together.weights[name], expected, rtol=1e-4, atol=1e-4)
        assert together.tokens[name] == sum(log.tokens[name] for log in alone)


def test_the_log_records_the_routing(llama: Base) -> None:
    pool = Pool.from_experts(make_experts(llama, 4))
    routed = RoutedModel(llama, pool)
    routed.set_router(make_router("phatgoose"))
    name = llama.linears[0]
    inputs: list[Tensor] = []
    module = llama.model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    log = record(llama, [QUESTIONS[0]], routed)
    handle.remove()
    gate_ED = pool.linears[name].gate_ED
    assert gate_ED is not None
    expected = torch.zeros(4, dtype=torch.float64)
    weights_TK, indices_TK = route(inputs[0].flatten(0, 1), gate_ED, 2)
    for weights, experts in zip(weights_TK, indices_TK, strict=True):
        expected[experts] += weights.double()
    torch.testing.assert_close(log.weights[name], expected)


def test_nothing_is_recorded_without_routing_or_after_recording_ends(base: Base) -> None:
    routed = attach(base, make_experts(base), "merged")
    assert record(base, QUESTIONS, routed).tokens == {}
    routed.set_router(make_router("phatgoose"))
    log = record(base, QUESTIONS, routed)
    tokens = dict(log.tokens)
    routed.score(QUESTIONS)
    assert log.tokens == tokens


def test_generated_tokens_are_counted_without_padding(base: Base) -> None:
    """Check that each prompt and the tokens written before the end of a row count once."""
    prompts = ["Is the lake deep?", "the goose", "The grey goose flies over the lake, and"]
    routed = attach(base, make_experts(base, 4), "phatgoose")
    with routed.recording(RoutingLog()) as together:
        texts = routed.generate(prompts, 6)
    alone = []
    for prompt, text in zip(prompts, texts, strict=True):
        with routed.recording(RoutingLog()) as log:
            assert routed.generate([prompt], 6) == [text]
        alone.append(log)
    for name in base.linears:
        assert together.tokens[name] == sum(log.tokens[name] for log in alone), name
        expected = torch.stack([log.weights[name] for log in alone]).sum(dim=0)
        torch.testing.assert_close(together.weights[name], expected, rtol=1e-3, atol=1e-3)


def test_experts_that_adapt_different_linears_share_a_pool(base: Base) -> None:
    """Check that an expert gets and adds nothing in linears it does not adapt."""
    whole, part = make_experts(base, 2)
    left_out = [name for name in base.linears if re.search(r"\.(q|q_proj)$", name)]
    kept = {name: f for name, f in part.linears.items() if name not in left_out}
    routed = RoutedModel(base, Pool.from_experts([whole, dataclasses.replace(part, linears=kept)]))
    routed.set_router("phatgoose")
    with routed.recording(RoutingLog()) as log:
        routed.score(QUESTIONS)
    for name in base.linears:
        assert (log.weights[name] > 0).tolist() == [True, name not in left_out]
        if name in left_out:
            assert float(log.weights[name][0]) == pytest.approx(log.tokens[name], rel=1e-5)
    zeros = {
        name: f if name in kept else dataclasses.replace(f, lora_B_OR=torch.zeros_like(f.lora_B_OR))
        for name, f in part.linears.items()
    }
    for router in ("merged", "single:e1"):
        routed.set_router(router)
        said = logits(base)
        routed.detach()
        alike = RoutedModel(
            base, Pool.from_experts([whole, dataclasses.replace(part, linears=zeros)])
        )
        alike.set_router(router)
        torch.testing.assert_close(said, logits(base))
        alike.detach()
        routed = RoutedModel(base, routed.pool)


@pytest.mark.parametrize("router", ["phatgoose", "merged"])
def test_the_compiled_model_gives_the_same_outputs(llama: Base, router: str) -> None:
    attach(llama, make_experts(llama, 3), router)
    expected = logits(llama)
    compiled = torch.compile(llama.model, backend="eager")
    with torch.no_grad():
        ids = llama.tokenizer("the goose flies", return_tensors="pt").input_ids
        torch.testing.assert_close(
            compiled(input_ids=ids).logits, llama.model(input_ids=ids).logits
        )
    assert torch.equal(logits(llama), expected)
