"""Check the best state by validation, and the share of each rank."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.errors import Diverged, PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.scoring import Score
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.training.checkpoint import NoCheckpoints
from phatgoose.training.engine import PlainEngine, TargetLoss, copies
from phatgoose.training.gated_lora import GatedLora, attach_lora
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import CurveRow, Example, Hooks, train_expert
from phatgoose.training.trainer import TrainingJob
from tests.support.tiny import make_card

WORDS = ("the goose", "the swan", "a bird", "the lake", "the flock")
EXAMPLES = [
    Example(f"Question: is {word} {how}?\nAnswer:", answer)
    for word in WORDS
    for how, answer in (("grey", " yes"), ("deep", " no"), ("dry", " nine"), ("two", " five"))
]
EVALUATION = [Example("Is the goose grey?", " yes"), Example("two and two is", " four")]
RECIPE = Recipe(
    rank=4,
    scale=1.0,
    init_std=0.1,
    lora=Stage(steps=6, lr=1.0, warmup=0.0),
    gates=Stage(steps=6, lr=2.0, warmup=0.0),
    batch_size=4,
    micro_batch_size=2,
    validate_every=2,
    validation_examples=2,
    dtype="float32",
)


class Watched(PlainEngine):
    """An engine that records its weights after each step, and its inputs."""

    made: list["Watched"]

    def __init__(
        self, module: TargetLoss, parameters: list[nn.Parameter], stage: Stage, recipe: Recipe
    ) -> None:
        super().__init__(module, parameters, stage, recipe)
        self.after: list[list[Tensor]] = []
        self.trained_on: list[Question] = []
        self.scored: list[list[Question]] = []
        self.accumulation = recipe.accumulation
        self.parts = 0
        self.own = parameters
        self.made.append(self)

    def loss(self, questions: Sequence[Question]) -> Tensor:
        self.trained_on += questions
        return super().loss(questions)

    def step(self) -> None:
        super().step()
        self.parts += 1
        if self.parts % self.accumulation == 0:
            self.after.append(copies(self.own))

    def score(self, questions: Sequence[Question]) -> list[Score]:
        self.scored.append(list(questions))
        return super().score(questions)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    made: list[Watched] = []
    monkeypatch.setattr(Watched, "made", made, raising=False)
    return made


def train(
    base: Base, examples: Sequence[Any] = EXAMPLES, **changes: Any
) -> tuple[Expert, list[CurveRow]]:
    rows: list[CurveRow] = []
    recipe = dataclasses.replace(RECIPE, **changes)
    trained = train_expert(
        base,
        make_card("task", base, scale=recipe.scale),
        examples,
        EVALUATION,
        recipe,
        Hooks(engine=Watched, report=rows.append),
    )
    return trained, rows


def validations(rows: list[CurveRow], stage: str) -> dict[int, float]:
    return {r.step: r.loss for r in rows if (r.stage, r.split) == (stage, "validation")}


def own(expert: Expert, *names: str) -> list[Tensor]:
    return [getattr(factors, name) for factors in expert.linears.values() for name in names]


def same(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_each_stage_ends_with_the_state_of_its_lowest_validation_loss(
    base: Base, engines: list[Watched]
) -> None:
    """Check with learning rates so high that the last state may not be the best.

    Which one is depends on rounding, see `test_the_first_of_equal_states_is_the_best` for each.
    """
    rate = 1.0 if base.is_encoder_decoder else 0.3
    expert, rows = train(base, lora=Stage(steps=6, lr=rate, warmup=0.0))
    for engine, stage, names in (
        (engines[0], "lora", ("lora_A_RD", "lora_B_OR")),
        (engines[1], "gates", ("gate_D",)),
    ):
        losses = validations(rows, stage)
        assert list(losses) == [2, 4, 6]
        assert len(engine.after) == 6
        best = min(losses, key=losses.__getitem__)
        assert same(own(expert, *names), engine.after[best - 1])


def test_the_last_evaluation_measures_the_best_state(base: Base, engines: list[Watched]) -> None:
    expert, rows = train(base, gates=None)
    pool = Pool.from_experts([expert])
    routed = RoutedModel(base, pool, f"single:{expert.card.name}")
    questions = [Question.encode(base, e.input, [e.target]) for e in EVALUATION]
    means = [scores[0].mean for scores in routed.score(questions)]
    last = [row for row in rows if row.split == "evaluation"][-1]
    assert last.loss == pytest.approx(-sum(means) / len(means), abs=1e-4)
    assert expert.card.metrics["nll_lora"] == last.loss


def test_validation_examples_are_never_trained_on(base: Base, engines: list[Watched]) -> None:
    _, rows = train(base)
    kept_out = [Question.encode(base, e.input, [e.target]) for e in EXAMPLES[-2:]]
    rest = [Question.encode(base, e.input, [e.target]) for e in EXAMPLES[:-2]]
    for engine in engines:
        assert all(question in rest for question in engine.trained_on)
        assert len({str(q) for q in engine.trained_on}) == len(rest)  # 24 draws, each at least once
        for asked in engine.scored[1:-1]:
            assert sorted(asked, key=str) == sorted(kept_out, key=str)
    assert {row.split for row in rows} == {"train", "evaluation", "validation"}


@pytest.mark.parametrize(
    ("examples", "validation_examples", "kept_out"),
    [(20, 1, 1), (20, 500, 2), (19, 500, 1), (9, 500, 0), (20, 0, 0)],
)
def test_at_most_a_tenth_is_held_out(
    llama: Base, engines: list[Watched], examples: int, validation_examples: int, kept_out: int
) -> None:
    _, rows = train(llama, EXAMPLES[:examples], validation_examples=validation_examples, gates=None)
    assert len(validations(rows, "lora")) == (3 if kept_out else 0)
    for asked in engines[0].scored[1:-1]:
        assert len(asked) == kept_out


@pytest.mark.parametrize("validate_every", [0, 7])
def test_without_validation_all_examples_are_used_and_the_last_state_is_kept(
    llama: Base, engines: list[Watched], validate_every: int
) -> None:
    expert, rows = train(llama, validate_every=validate_every)
    assert validations(rows, "lora") == validations(rows, "gates") == {}
    assert len({str(q) for q in engines[0].trained_on}) == len(EXAMPLES)
    assert same(own(expert, "lora_A_RD", "lora_B_OR"), engines[0].after[-1])
    assert same(own(expert, "gate_D"), engines[1].after[-1])


class Scripted(Watched):
    """An engine whose losses on two validation examples are given."""

    losses: tuple[float, ...] = ()

    def score(self, questions: Sequence[Question]) -> list[Score]:
        found = super().score(questions)
        place = len(self.scored) - 2
        if not 0 <= place < len(self.losses):
            return found
        loss = self.losses[place]
        return [dataclasses.replace(s, loglikelihood=0.0, eos_loglikelihood=-loss * (s.tokens + 1))
                for s in found]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "best"),
    [((1.0, 2.0, 3.0), 2), ((3.0, 2.0, 1.0), 6), ((2.0, 1.0, 3.0), 4), ((2.0, 2.0, 2.0), 2),
     ((2.0, 1.0, 1.0), 4), ((0.0, 1.0, 0.0), 2)],
)  # fmt: skip
def test_the_first_of_equal_states_is_the_best(
    base: Base,
    engines: list[Watched],
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    best: int,
) -> None:
    monkeypatch.setattr(Scripted, "losses", losses)
    recipe = dataclasses.replace(RECIPE, gates=None)
    card = make_card("task", base, scale=recipe.scale)
    rows: list[CurveRow] = []
    expert = train_expert(
        base, card, EXAMPLES, EVALUATION, recipe, Hooks(engine=Scripted, report=rows.append)
    )
    assert [*validations(rows, "lora").values()] == pytest.approx(losses)
    assert same(own(expert, "lora_A_RD", "lora_B_OR"), engines[0].after[best - 1])


def test_training_ends_on_a_validation_loss_that_is_not_finite(
    llama: Base, engines: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "losses", (1.0, float("nan")))
    card = make_card("task", llama, scale=RECIPE.scale)
    with pytest.raises(Diverged, match="validation loss became nan at step 4 of stage lora"):
        train_expert(llama, card, EXAMPLES, EVALUATION, RECIPE, Hooks(engine=Scripted))


# Several ranks, one after the other in this process.


class Rank(PlainEngine):
    """One of several ranks; `total` records the values to be summed."""

    def __init__(self, rank: int, ranks: int, *made_of: Any) -> None:
        super().__init__(*made_of)
        self.rank, self.ranks = rank, ranks
        self.given: list[list[float]] = []
        self.losses: list[list[Question]] = []
        self.scored: list[list[Question]] = []
        self.steps = 0

    def loss(self, questions: Sequence[Question]) -> Tensor:
        self.losses.append(list(questions))
        return super().loss(questions)

    def step(self) -> None:
        self.steps += 1

    def score(self, questions: Sequence[Question]) -> list[Score]:
        self.scored.append(list(questions))
        return super().score(questions)

    def total(self, values: Sequence[float]) -> list[float]:
        self.given.append(list(values))
        return list(values)


def job_of(base: Base, heartbeat: Callable[[], None] = lambda: None, **changes: Any) -> TrainingJob:
    recipe = dataclasses.replace(RECIPE, **changes)
    layers = attach_lora(base.model, base.linears, rank=4, scale=1.0, init_std=0.1, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.lora_B_OR.data = torch.randn(layer.lora_B_OR.shape, generator=generator) / 4
    return TrainingJob(base, layers, EXAMPLES, EXAMPLES[:11], recipe, Hooks(heartbeat=heartbeat))


def rank_of(job: TrainingJob, rank: int, ranks: int) -> Rank:
    module = TargetLoss(job.base, job.recipe.dtype)
    return Rank(rank, ranks, module, job.factors, job.recipe.lora, job.recipe)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_evaluation(base: Base, ranks: int) -> None:
    """Check 11 examples in parts of 4 (micro-batches of 1): 3 parts, and idle ranks repeat."""
    heartbeats: list[None] = []
    job = job_of(base, lambda: heartbeats.append(None), micro_batch_size=1, batch_size=4)
    whole = job.measure(rank_of(job, 0, 1), "evaluation")
    heartbeats.clear()
    engines = [rank_of(job, rank, ranks) for rank in range(ranks)]
    for engine in engines:
        job.measure(engine, "evaluation")
    sums = [sum(values) for values in zip(*(engine.given[0] for engine in engines), strict=True)]
    assert sums[0] / 11 == pytest.approx(whole.loss, rel=1e-5)
    assert sums[1] / 11 == whole.exact_match
    calls = {1: 3, 2: 2, 4: 1}[ranks]
    assert [len(engine.scored) for engine in engines] == [calls] * ranks  # all run the model
    assert len(heartbeats) == calls * ranks
    read = [part for engine in engines for part in engine.scored]
    assert {len(part) for part in read} == {4, 3}
    assert {str(q) for part in read for q in part} == {str(q) for q in job.evaluation}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_batch(base: Base, ranks: int) -> None:
    """Check that each rank takes a part, and gradients sum to those of one rank."""
    job = job_of(base, batch_size=8, micro_batch_size=2)
    batch = [job.encode(example) for example in EXAMPLES[:8]]

    def gradients(engines: list[Rank]) -> list[Tensor]:
        for parameter in job.factors:
            parameter.grad = None
        for engine in engines:
            job.take_step(engine, batch)
        return [p.grad for p in job.factors if p.grad is not None]

    expected = gradients([rank_of(job, 0, 1)])
    engines = [rank_of(job, rank, ranks) for rank in range(ranks)]
    actual = gradients(engines)
    assert len(expected) == len(actual) == len(job.factors)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert [engine.steps for engine in engines] == [4 // ranks] * ranks
    parts = [part for engine in engines for part in engine.losses]
    assert sorted(str(q) for part in parts for q in part) == sorted(map(str, batch))
    lengths = [max(q.length for q in part) - min(q.length for q in part) for part in parts]
    assert max(lengths) <= 2  # rows of similar length together


def test_a_step_reports_the_mean_over_the_target_tokens_of_its_batch(base: Base) -> None:
    job = job_of(base, batch_size=4, micro_batch_size=2)
    batch = [job.encode(example) for example in EXAMPLES[:4]]
    engine = rank_of(job, 0, 1)
    loss, due = job.take_step(engine, batch)
    scores = engine.score(batch)
    tokens = sum(score.tokens + 1 for score in scores)
    expected = -sum(s.loglikelihood + s.eos_loglikelihood for s in scores) / tokens
    assert loss == pytest.approx(expected, rel=1e-5)
    assert due is False


class Due(NoCheckpoints):
    """Checkpoints that are always due."""

    def due(self) -> bool:
        return True


def test_a_checkpoint_is_due_if_any_rank_requests_it(llama: Base) -> None:
    job = job_of(llama)
    job.hooks = dataclasses.replace(job.hooks, checkpoints=Due())
    batch = [job.encode(example) for example in EXAMPLES[:4]]
    assert job.take_step(rank_of(job, 0, 2), batch)[1] is True


def test_a_weight_that_is_not_finite_after_the_last_step_is_refused(llama: Base) -> None:
    class Broken(PlainEngine):
        def weights(self) -> list[Tensor]:
            found = super().weights()
            found[-1].view(-1)[-1] = float("inf")
            return found

    card = make_card("task", llama, scale=RECIPE.scale)
    recipe = dataclasses.replace(RECIPE, validate_every=0)
    with pytest.raises(Diverged, match=r"NaN or infinite in the last step of stage lora: lower"):
        train_expert(llama, card, EXAMPLES, EVALUATION, recipe, Hooks(engine=Broken))


def test_examples_may_be_given_as_token_ids(base: Base, engines: list[Watched]) -> None:
    questions = [Question.encode(base, e.input, [e.target]) for e in EXAMPLES]
    from_text, rows = train(base)
    from_ids, again = train(base, questions)
    assert from_ids.content_hash() == from_text.content_hash()
    assert [row.loss for row in again] == [row.loss for row in rows]


def test_a_factor_that_changes_with_the_gates_is_named(llama: Base) -> None:
    class Moving(PlainEngine):
        def close(self) -> None:
            if self._stage == RECIPE.gates:
                for module in self._module.modules():
                    if isinstance(module, GatedLora):
                        module.lora_B_OR.data += 1
                        return

    card = make_card("wanderer", llama, scale=RECIPE.scale)
    with pytest.raises(PhatgooseError, match="expert wanderer: a LoRA factor moved while gates"):
        train_expert(llama, card, EXAMPLES, EVALUATION, RECIPE, Hooks(engine=Moving))


def with_gates_at_zero(count: int) -> type[PlainEngine]:
    class Still(PlainEngine):
        def weights(self) -> list[Tensor]:
            found = super().weights()
            if self._stage == RECIPE.gates:
                for gate_D in found[:count]:
                    gate_D.zero_()
            return found

    return Still


def test_one_gate_may_stay_at_zero_but_not_all(llama: Base) -> None:
    card = make_card("task", llama, scale=RECIPE.scale)
    recipe = dataclasses.replace(RECIPE, validate_every=0)
    first, *rest = llama.linears
    engine = with_gates_at_zero(1)
    expert = train_expert(llama, card, EXAMPLES, EVALUATION, recipe, Hooks(engine=engine))
    gates = {name: factors.gate_D for name, factors in expert.linears.items()}
    assert not gates[first].any()  # type: ignore[union-attr]
    assert all(gates[name].any() for name in rest)  # type: ignore[union-attr]
    engine = with_gates_at_zero(len(llama.linears))
    with pytest.raises(PhatgooseError, match="expert task: no gate moved: the recipe's gates need"):
        train_expert(llama, card, EXAMPLES, EVALUATION, recipe, Hooks(engine=engine))
