import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.utils.cpp_extension

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import CurveRow, Example, Hooks, train_expert
from tests.support import interrupted
from tests.support.tiny import make_card, state

pytestmark = pytest.mark.slow(seconds=30)

RECIPE = Recipe(
    rank=4,
    scale=1.0,
    init_std=0.1,
    lora=Stage(steps=6, lr=2e-2, warmup=0.5),
    gates=Stage(steps=4, lr=2e-2),
    batch_size=6,
    micro_batch_size=2,
    clip=0.05,  # small enough to clip every step
    evaluation_examples=4,
    dtype="float32",
)
WORDS = ["goose", "swan", "lake", "bird", "flock", "two", "three", "five"]
TRAIN = [
    Example(f"the grey {word} is", " ".join(WORDS[: i % 3 + 1])) for i, word in enumerate(WORDS)
]
EVALUATION = [Example(f"the {word}", "goose") for word in WORDS[:4]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder where DeepSpeed would put compiled code; compiling itself fails."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        for name in ("load", "load_inline"):
            patch.setattr(torch.utils.cpp_extension, name, _refuse)
        yield folder


def _refuse(*arguments: Any, **_: Any) -> None:
    raise AssertionError(f"this would be compiled: {arguments}")


@pytest.fixture(scope="module")
def deepspeed(compiled: Path) -> Iterator[Any]:
    """Return the engine of a process that is a single-rank DeepSpeed group."""
    from harness.training.engine import DeepSpeedEngine, start_deepspeed

    start_deepspeed()
    start_deepspeed()  # an actor may request it again
    yield DeepSpeedEngine
    dist.destroy_process_group()


def train(base: Base, recipe: Recipe = RECIPE, **options: Any) -> tuple[Expert, list[CurveRow]]:
    rows: list[CurveRow] = []
    card = make_card("toy", base)
    hooks = Hooks(report=rows.append, **options)
    return train_expert(base, card, TRAIN, EVALUATION, recipe, hooks), rows


@pytest.mark.parametrize("micro_batch_size", [6, 2], ids=["whole", "accumulated"])
def test_deepspeed_trains_like_plain_pytorch(
    base: Base, deepspeed: Any, micro_batch_size: int
) -> None:
    recipe = dataclasses.replace(RECIPE, micro_batch_size=micro_batch_size, clip=1e9)
    before = state(base)
    plain, expected = train(base, recipe)
    expert, rows = train(base, recipe, engine=deepspeed)
    assert_alike(rows, expected, 1e-6)
    for name, factors in plain.linears.items():
        for field, tensor in vars(factors).items():
            trained = getattr(expert.linears[name], field)
            assert torch.allclose(trained, tensor, rtol=1e-4, atol=1e-5), (name, field)
    for name, weight in state(base).items():
        assert torch.equal(weight, before[name])
    losses = [row.loss for row in rows if (row.stage, row.split) == ("lora", "train")]
    assert losses[-1] < losses[0]  # it learns


@pytest.mark.parametrize("micro_batch_size", [6, 2], ids=["whole", "accumulated"])
def test_deepspeed_clips_like_plain_pytorch(
    base: Base, deepspeed: Any, micro_batch_size: int
) -> None:
    recipe = dataclasses.replace(RECIPE, micro_batch_size=micro_batch_size)
    _, clipped = train(base, recipe, engine=deepspeed)
    # The norms differ in the last bit, and AdamW amplifies gradients that are almost zero.
    assert_alike(clipped, train(base, recipe)[1], 2e-4)
    _, free = train(base, dataclasses.replace(recipe, clip=1e9))
    assert clipped[-1].loss != pytest.approx(free[-1].loss, rel=2e-3)


def assert_alike(rows: list[CurveRow], expected: list[CurveRow], tolerance: float) -> None:
    assert len(rows) == len(expected) == 6 + 4 + 4
    for row, other in zip(rows, expected, strict=True):
        assert (row.stage, row.split, row.step) == (other.stage, other.split, other.step)
        assert row.loss == pytest.approx(other.loss, rel=tolerance)
        assert (row.lr, row.exact_match, row.tokens) == (other.lr, other.exact_match, other.tokens)


def test_the_same_job_gives_identical_weights(llama: Base, deepspeed: Any) -> None:
    first, _ = train(llama, engine=deepspeed)
    second, _ = train(llama, engine=deepspeed)
    assert first.content_hash() == second.content_hash()


def test_a_failed_job_leaves_the_engine_usable(llama: Base, deepspeed: Any) -> None:
    before = state(llama)
    too_fast = dataclasses.replace(RECIPE, lora=Stage(steps=6, lr=1e30, warmup=0.0))
    with pytest.raises(PhatgooseError, match=r"lower the recipe's lora\.lr"):
        train(llama, too_fast, engine=deepspeed)
    assert all(torch.equal(weight, before[name]) for name, weight in state(llama).items())
    expert, _ = train(llama, engine=deepspeed)
    plain, _ = train(llama)
    assert expert.card.metrics == pytest.approx(plain.card.metrics, rel=1e-4)


@pytest.mark.parametrize("at", [[3], [12], [19], [24], [7, 9, 4]])
def test_an_interrupted_job_gives_identical_weights(
    base: Base, deepspeed: Any, at: list[int]
) -> None:
    expected, rows = interrupted.train(base, engine=deepspeed)
    expert, resumed, _ = interrupted.train_interrupted(base, at, engine=deepspeed)
    assert interrupted.timeless(resumed) == interrupted.timeless(rows)
    assert expert.content_hash() == expected.content_hash()


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_gives_identical_weights(
    base: Base, deepspeed: Any, zero_stage: int
) -> None:
    engine = functools.partial(deepspeed, zero_stage=zero_stage)
    expected, rows = train(base, engine=engine)
    recipe = dataclasses.replace(RECIPE, gradient_checkpointing=True)
    expert, checkpointed = train(base, recipe, engine=engine)
    assert [row.loss for row in checkpointed] == [row.loss for row in rows]
    assert expert.content_hash() == expected.content_hash()


def test_a_single_rank_sums_no_gradients(llama: Base, deepspeed: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.DeepSpeedEngine.allreduce_gradients", _refuse)
        expert, _ = train(llama, engine=deepspeed)
    assert expert.card.metrics == pytest.approx(train(llama)[0].card.metrics, rel=1e-4)


def test_nothing_is_compiled(deepspeed: Any, compiled: Path) -> None:
    assert list(compiled.rglob("*")) == []
