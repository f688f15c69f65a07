"""Check devices and dtypes on a GPU; skipped without one.

These tests need neither Ray nor lm-eval, so that they run on a bare machine (benchmarks/gpu.sh).
"""

import pytest
import torch

from harness.evaluation.answering import answer_shard
from harness.evaluation.encoding import EncodedShard, encode
from harness.evaluation.shards import Request
from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel
from phatgoose.ops import mix, mix_factors, mix_reference, route
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.routers import make_router
from tests.support.tiny import make_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ROUTERS = [
    "base",
    "phatgoose",
    "arrow",
    "spectr",
    "lag",
    "random",
    "uniform",
    "merged",
    "ties",
    "logo",
]
REQUESTS = [
    Request("Q: Is the lake deep?\nA:", (" yes", " no")),
    Request("The grey goose flies over the", (" lake", " swan", " flock")),
]


@pytest.fixture(params=["llama", "t5"])
def bases(request: pytest.FixtureRequest) -> tuple[Base, Base]:
    """Return the same tiny base on the CPU and on the GPU."""
    on_cpu: Base = request.getfixturevalue(request.param)
    return on_cpu, load_base(on_cpu.name, device="cuda")


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (60, 2), (200, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_mixing_matches_the_reference(
    tokens: int, experts: int, top_k: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, 64, generator=generator).to(dtype)
    lora_A_ERD = (torch.randn(experts, 16, 64, generator=generator) / 8).to(dtype)
    lora_B_EOR = (torch.randn(experts, 96, 16, generator=generator) / 4).to(dtype)
    gates_ED = torch.randn(experts, 64, generator=generator)
    weights_TK, indices_TK = route(x_TD.float(), gates_ED, top_k)
    expected = mix_reference(
        x_TD.double(), lora_A_ERD.double(), lora_B_EOR.double(), indices_TK, weights_TK.double()
    )
    factors = lora_A_ERD.cuda(), lora_B_EOR.cuda()
    arguments = (x_TD.cuda(), *factors, indices_TK.cuda(), weights_TK.cuda())
    torch.testing.assert_close(
        mix(*arguments).cpu().double(), expected, rtol=tolerance, atol=tolerance
    )
    assert mix_factors(*arguments).shape == (tokens, 96)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_gpu_gives_the_answers_of_the_cpu(bases: tuple[Base, Base], router: str) -> None:
    answers = []
    for base in bases:
        model = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), make_router(router))
        shard = EncodedShard("choices", "score", [encode(base, REQUESTS, "")])
        answers.append(answer_shard(base, model, shard))
    on_cpu, on_gpu = answers
    for ours, theirs in zip(on_cpu.scores, on_gpu.scores, strict=True):
        assert [s.loglikelihood for s in theirs] == pytest.approx(
            [s.loglikelihood for s in ours], abs=1e-3
        )
    assert on_gpu.routed == on_cpu.routed
    for linear, weights_E in on_gpu.routing.items():
        # A head without a GPU must be able to read it.
        assert weights_E.device.type == "cpu"
        torch.testing.assert_close(weights_E, on_cpu.routing[linear], rtol=1e-3, atol=1e-3)


def test_generation_on_a_gpu_matches_the_cpu(bases: tuple[Base, Base]) -> None:
    written = [
        RoutedModel(b, Pool.from_experts(make_experts(b, 4)), "phatgoose").generate(
            ["the goose", "two and three is"], 6
        )
        for b in bases
    ]
    assert written[0] == written[1]


def test_a_training_step_runs_on_a_gpu(bases: tuple[Base, Base]) -> None:
    from phatgoose.card import Card
    from phatgoose.training.recipe import Recipe, Stage
    from phatgoose.training.train import Example, train_expert

    stage = Stage(steps=3, lr=1e-2)
    recipe = Recipe(
        rank=2,
        scale=1.0,
        init_std=0.1,
        lora=stage,
        gates=stage,
        batch_size=4,
        micro_batch_size=2,
        evaluation_examples=2,
        dtype="float32",
    )
    examples = [Example(f"the {word} is", "deep") for word in ("lake", "goose", "swan", "bird")]
    losses = []
    for base in bases:
        card = Card("e", "e", base.name, base.fingerprint, "d", "j" * 8, 1.0, {}, {})
        losses.append(train_expert(base, card, examples, examples[:2], recipe).card.metrics)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bfloat16_routes_like_float32(bases: tuple[Base, Base]) -> None:
    """Check that routing scores are float32, so that only the base's own rounding differs."""
    _, on_gpu = bases
    half = load_base(on_gpu.name, device="cuda", dtype="bfloat16")
    model = RoutedModel(half, Pool.from_experts(make_experts(half, 4)), "phatgoose")
    questions = [Question.encode(half, "the goose flies over", [" the lake"])]
    assert len(model.score(questions)[0]) == 1
