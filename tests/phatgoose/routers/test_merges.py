from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool, PoolLinear
from phatgoose.question import Question
from phatgoose.routers import Merge, make_router
from tests.support.plain import plain_generate, plain_logits, plain_score
from tests.support.pools import FakeEncoder, make_uneven_experts, pool_of
from tests.support.textbook import Facts, base_plus, facts_of
from tests.support.tiny import make_experts

# A function from the facts about the experts on one linear to the merge's weight delta.
Formula = Callable[[Facts], Tensor]

QUESTIONS = [
    ("Question: which bird flies in the flock?\nAnswer:", (" the goose", " swan", " a")),
    ("Is the lake deep?", (" yes", " no")),
    ("", ("the",)),
]


def deltas_of(facts: Facts) -> list[Tensor]:
    """Return each expert's delta, zeros if it does not adapt the linear."""
    like_OD = next(fact for fact in facts if fact is not None).delta_OD
    return [torch.zeros_like(like_OD) if fact is None else fact.delta_OD for fact in facts]


def mean_of_products(facts: Facts) -> Tensor:
    deltas = deltas_of(facts)
    return sum(deltas[1:], deltas[0]) / len(deltas)


def product_of_means(facts: Facts) -> Tensor:
    present = [fact for fact in facts if fact is not None]
    rank = max(len(fact.lora_A_RD) for fact in present)
    lora_A_RD = torch.zeros(rank, present[0].lora_A_RD.shape[1], dtype=torch.float64)
    lora_B_OR = torch.zeros(len(present[0].lora_B_OR), rank, dtype=torch.float64)
    for fact in present:
        lora_A_RD[: len(fact.lora_A_RD)] += fact.lora_A_RD / len(facts)
        lora_B_OR[:, : len(fact.lora_A_RD)] += fact.lora_B_OR / len(facts)
    return lora_B_OR @ lora_A_RD


def weighted_sum(weight: float) -> Formula:
    return lambda facts: weight * torch.stack(deltas_of(facts)).sum(dim=0)


def second_expert(facts: Facts) -> Tensor:
    return deltas_of(facts)[1]


def ties(density: float, weight: float) -> Formula:
    """Compute TIES entry by entry, in loops."""

    def formula(facts: Facts) -> Tensor:
        trimmed = []
        for delta_OD in deltas_of(facts):
            entries = delta_OD.flatten().tolist()
            order = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))
            kept = set(order[: max(1, round(density * len(entries)))])
            trimmed.append([v if i in kept else 0.0 for i, v in enumerate(entries)])
        merged = []
        for column in zip(*trimmed, strict=True):
            positive = sum(column) > 0
            agree = [value for value in column if value and (value > 0) == positive]
            merged.append(weight * sum(agree) / len(agree) if agree and sum(column) else 0.0)
        return torch.tensor(merged, dtype=torch.float64).view_as(deltas_of(facts)[0])

    return formula


CASES: list[tuple[str, dict[str, Any], Formula]] = [
    ("merged", {}, mean_of_products),
    ("merged_factors", {}, product_of_means),
    ("task_arithmetic", {}, weighted_sum(0.3)),
    ("task_arithmetic", {"weight": -0.5}, weighted_sum(-0.5)),
    ("ties", {}, ties(0.2, 1.0)),
    ("ties", {"density": 1.0, "weight": 0.7}, ties(1.0, 0.7)),
    ("ties", {"density": 1e-6}, ties(1e-6, 1.0)),
    ("dare", {"drop": 0.0}, mean_of_products),
    ("dare", {"drop": 0.0, "weight": 0.4}, weighted_sum(0.4)),
    ("single", {"expert": "e1"}, second_expert),
]


def merged_delta(pool: Pool, linear: str, name: str, **options: Any) -> Tensor:
    """Return the matrix that a merge adds to a linear's weight, float32 [O, D]."""
    router = make_router(name, **options)
    assert isinstance(router, Merge)
    matrices = router.merge(pool, linear)
    return matrices[0] if len(matrices) == 1 else matrices[1] @ matrices[0]


def encode(base: Base) -> list[Question]:
    return [Question.encode(base, context, choices) for context, choices in QUESTIONS]


@torch.no_grad()
def logits(base: Base) -> Tensor:
    return plain_logits(base, [5, 9, 11, 20, 33, 8], [12, 30, 7])


@pytest.mark.parametrize(("name", "options", "formula"), CASES)
def test_a_merge_adds_one_matrix_to_each_weight_of_the_base(
    base: Base, name: str, options: dict[str, Any], formula: Formula
) -> None:
    experts = make_uneven_experts(base)
    pool = pool_of(experts)
    deltas = {linear: formula(facts_of(experts, linear)) for linear in base.linears}
    for linear in base.linears:
        actual = merged_delta(pool, linear, name, **options).double()
        torch.testing.assert_close(actual, deltas[linear], rtol=1e-4, atol=1e-5)
    dense = base_plus(base, deltas)
    routed = RoutedModel(base, pool, make_router(name, **options))
    torch.testing.assert_close(logits(base), logits(dense), rtol=1e-4, atol=1e-4)
    questions = encode(base)
    for question, scores in zip(questions, routed.score(questions), strict=True):
        for choice, score in zip(question.choices, scores, strict=True):
            expected = plain_score(dense, question.context, choice)
            assert score.mean == pytest.approx(expected.mean, abs=1e-4)
    prompts = [context for context, _ in QUESTIONS]
    for question, text in zip(questions, routed.generate(prompts, 4), strict=True):
        ids = plain_generate(dense, question.context, 4)
        assert text == base.tokenizer.decode(ids, skip_special_tokens=True)


def test_uniform_matches_merged_computed_expert_by_expert(base: Base) -> None:
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 7)), "merged")
    questions = encode(base)
    merged, of_merged = logits(base), routed.score(questions)
    routed.set_router("uniform")
    # Relative to the logits, which are about 10: 1e-6 is also added to the sum of the weights.
    torch.testing.assert_close(logits(base), merged, rtol=1e-5, atol=5e-5)
    for scores, expected in zip(routed.score(questions), of_merged, strict=True):
        for one, other in zip(scores, expected, strict=True):
            assert one.mean == pytest.approx(other.mean, abs=1e-4)


def test_uniform_leaves_out_experts_that_do_not_adapt_a_linear(base: Base) -> None:
    """Check that `uniform` is the mean over the experts present there, and `merged` over all."""
    experts = make_uneven_experts(base)
    deltas = {}
    for linear in base.linears:
        present = [fact for fact in facts_of(experts, linear) if fact is not None]
        deltas[linear] = torch.stack([fact.delta_OD for fact in present]).mean(dim=0)
    RoutedModel(base, pool_of(experts), "uniform")
    expected = logits(base_plus(base, deltas))
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_ties_keeps_the_requested_share_of_entries(llama: Base, density: float) -> None:
    """Check that with one expert, which has no conflicts, its largest entries remain."""
    (expert,) = make_experts(llama, 1)
    pool, linear = Pool.from_experts([expert]), llama.linears[0]
    (fact,) = facts_of([expert], linear)
    assert fact is not None
    merged_OD = merged_delta(pool, linear, "ties", density=density)
    kept_OD = merged_OD != 0
    assert int(kept_OD.sum()) == round(density * kept_OD.numel())
    torch.testing.assert_close(merged_OD[kept_OD].double(), fact.delta_OD[kept_OD])
    assert fact.delta_OD[~kept_OD].abs().max() < fact.delta_OD[kept_OD].abs().min()


def test_ties_matches_an_example_computed_by_hand() -> None:
    """Check three experts of rank 1, each with a delta of one row of three entries."""
    rows = [[4.0, -1.0, 3.0], [2.0, 5.0, -9.0], [-1.0, 7.0, 2.0]]
    pool = row_pool(rows)
    # Density 2/3 leaves [4, 0, 3], [0, 5, -9], [0, 7, 2]; the signs of the sums are +, +, -.
    assert merged_delta(pool, "l", "ties", density=2 / 3).tolist() == [[4.0, 6.0, -9.0]]
    # Density 1: the signs of 5, 11 and -4.
    assert merged_delta(pool, "l", "ties", density=1.0).tolist() == [[3.0, 6.0, -9.0]]
    assert merged_delta(pool, "l", "ties", density=1.0, weight=2.0).tolist() == [[6.0, 12.0, -18.0]]


def row_pool(rows: Sequence[Sequence[float]]) -> Pool:
    """Return a pool of experts that map to one output, each by its row."""
    lora_A_ERD = torch.tensor(rows).unsqueeze(1)
    factors = PoolLinear(lora_A_ERD, torch.ones(len(rows), 1, 1))
    return Pool("", tuple(f"e{i}" for i in range(len(rows))), {"l": factors})


def test_dare_keeps_entries_at_random_and_rescales_them(llama: Base) -> None:
    (expert,) = make_experts(llama, 1)
    pool, linear = Pool.from_experts([expert]), llama.linears[-1]
    (fact,) = facts_of([expert], linear)
    assert fact is not None
    merged_OD = merged_delta(pool, linear, "dare", drop=0.75).double()
    kept_OD = merged_OD != 0
    torch.testing.assert_close(merged_OD[kept_OD], 4 * fact.delta_OD[kept_OD], rtol=1e-4, atol=1e-6)
    assert float(kept_OD.double().mean()) == pytest.approx(0.25, abs=0.04)
    # Not by size: kept entries are as large as the others.
    ratio = fact.delta_OD[kept_OD].abs().mean() / fact.delta_OD.abs().mean()
    assert float(ratio) == pytest.approx(1.0, abs=0.15)


def test_dare_drops_different_entries_of_each_expert(llama: Base) -> None:
    experts = make_experts(llama, 3)
    pool, linear = Pool.from_experts(experts), llama.linears[0]
    merged_OD = merged_delta(pool, linear, "dare", drop=0.5).double()
    deltas = [fact.delta_OD for fact in facts_of(experts, linear) if fact is not None]
    # Every entry is one of the eight sums of possibly kept entries, and each of them occurs.
    choices = [[bool(i & (1 << e)) for e in range(3)] for i in range(8)]
    sums = torch.stack(
        [
            torch.stack([2 / 3 * d * k for d, k in zip(deltas, choice, strict=True)]).sum(dim=0)
            for choice in choices
        ]
    )
    distance = (sums - merged_OD).abs()
    assert float(distance.amin(dim=0).max()) < 1e-5
    counts = distance.argmin(dim=0).flatten().bincount(minlength=8) / merged_OD.numel()
    assert float((counts - 1 / 8).abs().max()) < 0.04


def test_dare_equals_merged_on_average(llama: Base) -> None:
    experts = make_uneven_experts(llama, 3)
    pool, linear = pool_of(experts), llama.linears[0]
    draws = [merged_delta(pool, linear, "dare", seed=seed) for seed in range(400)]
    expected_OD = mean_of_products(facts_of(experts, linear)).float()
    error = (torch.stack(draws).mean(dim=0) - expected_OD).norm() / expected_OD.norm()
    alone = (draws[0] - expected_OD).norm() / expected_OD.norm()
    assert float(error) < 3 * float(alone) / 400**0.5  # shrinks like a mean of 400


def test_dare_depends_only_on_the_seed_and_the_linear(llama: Base) -> None:
    pool = pool_of(make_experts(llama, 3))
    first, other = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    again = merged_delta(pool, first, "dare")
    torch.manual_seed(5)
    assert torch.equal(merged_delta(pool, first, "dare"), again)
    assert not torch.equal(merged_delta(pool, first, "dare", seed=1) != 0, again != 0)
    assert not torch.equal(merged_delta(pool, other, "dare") != 0, again != 0)


@pytest.mark.parametrize(
    ("name", "options"),
    # With one entry left per expert, rounding changes which one that is.
    [(name, options) for name, options, _ in CASES if options != {"density": 1e-6}],
)
def test_merges_of_a_bfloat16_pool_are_close(
    base: Base, name: str, options: dict[str, Any]
) -> None:
    pool, half = pool_of(make_uneven_experts(base)), load_base(base.name, dtype="bfloat16")
    routed = RoutedModel(half, pool, make_router(name, **options))
    assert logits(half).dtype == torch.bfloat16
    for linear in base.linears:
        expected_OD = merged_delta(pool, linear, name, **options)
        actual_OD = merged_delta(routed.pool, linear, name, **options)
        assert actual_OD.dtype == torch.bfloat16
        error = (actual_OD.float() - expected_OD).norm() / expected_OD.norm()
        # Rounding may change which entries TIES trims and which sign it elects.
        assert float(error) < (0.2 if name == "ties" else 0.01)


def test_a_static_merge_needs_neither_texts_nor_profiles(base: Base, encoder: FakeEncoder) -> None:
    experts = make_experts(base, 2, gates=False)
    routed = RoutedModel(base, Pool.from_experts(experts))
    for name, options, _ in CASES:
        routed.set_router(make_router(name, **options))
        assert len(routed.score(encode(base))) == len(QUESTIONS)
    assert encoder.asked == []
