"""Compare training with a plain loop: hooks on the base's linears, own loss, AdamW, warmup."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.question import Question
from phatgoose.tokenization import encode_context
from phatgoose.training.engine import PlainEngine, TargetLoss
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import CurveRow, Example, Hooks, train_expert
from tests.support.plain import plain_generate, plain_logits, plain_score
from tests.support.tiny import make_card, state

EXAMPLES = [
    Example("Is the lake deep?", " yes"),
    Example("Question: which bird flies in the flock?\nAnswer:", " the goose"),
    Example("two and three is", " five"),
    Example("The grey goose flies over", " the lake"),
    Example("Is the lake dry?", " no"),
    Example("five and four is", " nine"),
    Example("the swan", " swims."),
    Example("Answer:", " no"),
]
EVALUATION = [Example("Is the goose grey?", " yes"), Example("two and two is", " four")]
RECIPE = Recipe(
    rank=4,
    scale=1.0,
    lora=Stage(steps=6, lr=2e-2, warmup=0.5),
    gates=Stage(steps=4, lr=5e-2, warmup=0.5),
    batch_size=8,
    micro_batch_size=4,
    dtype="float32",
)


class Spy(PlainEngine):
    """An engine that records its arguments and inputs."""

    made: list["Spy"]

    def __init__(
        self, module: TargetLoss, parameters: list[nn.Parameter], stage: Stage, recipe: Recipe
    ) -> None:
        super().__init__(module, parameters, stage, recipe)
        self.parameters, self.start = parameters, [p.detach().clone() for p in parameters]
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.batches: list[list[Question]] = []
        self.closed = False
        self.made.append(self)

    def loss(self, questions: Sequence[Question]) -> Tensor:
        self.batches.append(list(questions))
        return super().loss(questions)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    """Return the engines made in a test, one for each stage."""
    made: list[Spy] = []
    monkeypatch.setattr(Spy, "made", made, raising=False)
    return made


def train(
    base: Base,
    *,
    examples: Sequence[Example] = EXAMPLES,
    evaluation: Sequence[Example] | Sequence[Question] = EVALUATION,
    engine: Any = Spy,
    **changes: Any,
) -> tuple[Expert, list[CurveRow]]:
    """Train on the examples with changes to the recipe."""
    rows: list[CurveRow] = []
    recipe = dataclasses.replace(RECIPE, **changes)
    card = make_card("task", base, scale=recipe.scale)
    trained = train_expert(
        base, card, examples, evaluation, recipe, Hooks(engine=engine, report=rows.append)
    )
    return trained, rows


def losses(rows: list[CurveRow], stage: str) -> list[float]:
    return [row.loss for row in rows if row.stage == stage and row.split == "train"]


# The plain loop follows.

Adapter = Callable[[str, Tensor], Tensor]


def hook_linears(base: Base, add: Adapter) -> list[torch.utils.hooks.RemovableHandle]:
    """Add `add(linear, its input)` to the output of every adapted linear."""
    handles = []
    for name in base.linears:
        module = base.model.get_submodule(name)

        def hook(_: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
            return output + add(name, args[0])

        handles.append(module.register_forward_hook(hook))
    return handles


def plain_steps(
    base: Base, weights: list[Tensor], stage: Stage, batches: list[list[Question]], clip: float
) -> list[float]:
    """Yield the mean token loss of each batch, and take an optimizer step after it."""
    optimizer = torch.optim.AdamW(weights, lr=0.0, eps=1e-8, weight_decay=0.0)
    warm = round(stage.steps * stage.warmup)
    found = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = stage.lr * min(1.0, (step + 1) / warm)
        nlls = [
            -plain_logits(base, question.context, question.choices[0][:-1])
            .log_softmax(dim=-1)
            .gather(1, torch.tensor(question.choices[0]).unsqueeze(1))
            for question in batch
        ]
        loss = torch.cat(nlls).mean()
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.stack([(g**2).sum() for g in gradients]).sum().sqrt()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * min(1.0, clip / (float(norm) + 1e-6))
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def whole_batches(spy: Spy, recipe: Recipe) -> list[list[Question]]:
    """Return the micro-batches that an engine was given, joined into batches."""
    micro, number = spy.batches, recipe.accumulation
    assert len(micro) % number == 0
    groups = [micro[i : i + number] for i in range(0, len(micro), number)]
    return [list(chain.from_iterable(group)) for group in groups]


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_losses_and_weights_match_a_plain_loop(base: Base, spies: list[Spy], clip: float) -> None:
    trained, rows = train(base, clip=clip)
    lora, gates = spies
    starts = iter(lora.start)
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for name in base.linears:
        A[name], B[name] = (next(starts).requires_grad_() for _ in range(2))
    recipe = dataclasses.replace(RECIPE, clip=clip)

    handles = hook_linears(base, lambda name, x: recipe.scale * (x @ A[name].T) @ B[name].T)
    weights = [tensor for name in base.linears for tensor in (A[name], B[name])]
    expected = plain_steps(base, weights, recipe.lora, whole_batches(lora, recipe), clip)
    for handle in handles:
        handle.remove()
    assert losses(rows, "lora") == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0] - 0.1  # it learned something

    V = {name: torch.zeros(A[name].shape[1], requires_grad=True) for name in base.linears}
    for tensor in weights:
        tensor.requires_grad_(False)

    def gated(name: str, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ V[name])[..., None] * recipe.scale * (x @ A[name].T) @ B[name].T

    handles = hook_linears(base, gated)
    assert recipe.gates is not None
    expected = plain_steps(base, list(V.values()), recipe.gates, whole_batches(gates, recipe), clip)
    for handle in handles:
        handle.remove()
    assert losses(rows, "gates") == pytest.approx(expected, rel=1e-4)
    for name, factors in trained.linears.items():
        torch.testing.assert_close(factors.lora_A_RD, A[name], rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(factors.lora_B_OR, B[name], rtol=1e-2, atol=2e-3)
        assert factors.gate_D is not None
        torch.testing.assert_close(factors.gate_D, V[name].detach(), rtol=1e-2, atol=5e-3)


def test_gates_start_at_zero_and_only_they_change(base: Base, spies: list[Spy]) -> None:
    before = state(base)
    trained, _ = train(base)
    lora, gates = spies
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {*map(id, lora.trained)} == {*map(id, lora.parameters)}
    assert {*map(id, gates.trained)} == {*map(id, gates.parameters)}
    assert len(gates.parameters) == len(base.linears)
    assert not any(start.any() for start in gates.start)
    assert all(gate.any() for gate in gates.parameters)
    # The expert contains the result of the first stage.
    factors = iter(lora.parameters)
    for name in base.linears:
        assert torch.equal(trained.linears[name].lora_A_RD, next(factors))
        assert torch.equal(trained.linears[name].lora_B_OR, next(factors))
    assert lora.closed
    assert gates.closed


def test_micro_batches_sum_to_the_batch(base: Base, spies: list[Spy]) -> None:
    whole, rows = train(base, micro_batch_size=8)
    for size in (4, 2, 1):
        parts, part_rows = train(base, micro_batch_size=size)
        for stage in ("lora", "gates"):
            assert losses(part_rows, stage) == pytest.approx(losses(rows, stage), rel=1e-4)
        for name, factors in whole.linears.items():
            other = parts.linears[name]
            torch.testing.assert_close(other.lora_B_OR, factors.lora_B_OR, rtol=1e-2, atol=2e-3)
    assert len(spies[0].batches) == 6
    assert len(spies[-2].batches) == 6 * 8


def test_the_curve_is_complete(base: Base, spies: list[Spy]) -> None:
    trained, rows = train(base)
    for stage, steps, lr in (("lora", 6, 2e-2), ("gates", 4, 5e-2)):
        own = [row for row in rows if row.stage == stage]
        assert [row.split for row in own] == ["evaluation", *["train"] * steps, "evaluation"]
        assert [row.step for row in own] == [0, *range(steps), steps]
        warm = steps // 2
        assert [row.lr for row in own[1:-1]] == pytest.approx(
            [lr * min(1.0, (step + 1) / warm) for step in range(steps)]
        )
        assert all(row.exact_match is None for row in own[1:-1])
        tokens = [row.tokens for row in own]
        per_step = sum(question.length for question in spies[0].batches[0] + spies[0].batches[1])
        assert tokens == [0, *(per_step * (step + 1) for step in range(steps)), per_step * steps]
        assert all(0 <= a.seconds <= b.seconds for a, b in pairwise(own))
    evaluations = [row.loss for row in rows if row.split == "evaluation"]
    assert list(trained.card.metrics.values()) == evaluations
    assert list(trained.card.metrics) == ["nll_base", "nll_lora", "nll_gates_start", "nll_gates"]


def test_the_first_evaluation_measures_the_bare_base(base: Base, spies: list[Spy]) -> None:
    context = encode_context(base, "Answer:")
    right_but_for_its_end = [*plain_generate(base, context, 1), base.tokenizer.eos_token_id]
    evaluation = [Question.encode(base, e.input, [e.target]) for e in EVALUATION]
    evaluation.append(Question(context, [right_but_for_its_end]))
    expected = [plain_score(base, q.context, q.choices[0]) for q in evaluation]
    assert any(s.is_greedy and not s.ends_greedy for s in expected)
    trained, rows = train(base, evaluation=evaluation, micro_batch_size=1)
    assert trained.card.metrics["nll_base"] == pytest.approx(
        -sum(s.mean for s in expected) / len(expected), rel=1e-4
    )
    right = [s.is_greedy and s.ends_greedy for s in expected]
    assert rows[0].exact_match == sum(right) / len(right)


def test_memorized_examples_are_exact_matches(llama: Base, spies: list[Spy]) -> None:
    rows: list[CurveRow] = []
    recipe = dataclasses.replace(
        RECIPE, lora=Stage(steps=30, lr=3e-2), batch_size=2, micro_batch_size=2
    )
    train_expert(
        llama, make_card("t", llama), EVALUATION, EVALUATION, recipe, Hooks(report=rows.append)
    )
    before, after = (row for row in rows if row.stage == "lora" and row.split == "evaluation")
    assert before.exact_match == 0
    assert after.exact_match == 1
    assert after.loss < before.loss / 2


def test_the_seed_determines_the_result(llama: Base, spies: list[Spy]) -> None:
    hashes = [train(llama, seed=seed, batch_size=4)[0].content_hash() for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def order(spy: Spy) -> list[tuple[int, ...]]:
    return [tuple(question.context) for batch in spy.batches for question in batch]


def test_every_example_is_used_once_before_any_is_repeated(llama: Base, spies: list[Spy]) -> None:
    sizes: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 4}
    train(llama, **sizes, seed=1)
    train(llama, **sizes, seed=2)
    first, gates, other, _ = map(order, spies)
    assert len(first) == 6 * 4
    for start in (0, 8, 16):  # three passes over eight examples
        assert len(set(first[start : start + 8])) == 8
    rounds = [
        [frozenset(first[i : i + 4]) for i in range(start, start + 8, 4)] for start in (0, 8, 16)
    ]
    assert len({tuple(sets) for sets in rounds}) > 1  # in a new order
    assert gates == first[:16]  # both stages see the same ones
    assert [frozenset(first[i : i + 4]) for i in range(0, 24, 4)] != [
        frozenset(other[i : i + 4]) for i in range(0, 24, 4)
    ]


def test_batches_larger_than_the_data_repeat_examples(llama: Base, spies: list[Spy]) -> None:
    train(llama, examples=EXAMPLES[:3], batch_size=8, micro_batch_size=8)
    seen = order(spies[0])[:8]
    assert {seen.count(context) for context in set(seen)} == {2, 3}


def test_the_number_of_examples_is_limited(llama: Base, spies: list[Spy]) -> None:
    train(llama, max_examples=2)
    assert len(set(order(spies[0]))) == 2


@pytest.mark.usefixtures("spies")
@pytest.mark.parametrize("at", [0, 5])
def test_targets_without_tokens_are_not_trained_on(base: Base, at: int) -> None:
    """Otherwise only the end token would be trained."""
    examples = [*EXAMPLES]
    examples[at] = Example("Is the lake deep?", "")
    with pytest.raises(PhatgooseError, match=r"target='': .*Is the lake deep\?'\)\. Give the"):
        train(base, examples=examples)


def test_long_examples_are_truncated(base: Base, spies: list[Spy]) -> None:
    train(base, max_input_tokens=3, max_target_tokens=2)
    for question in (q for spy in spies for batch in spy.batches for q in batch):
        assert len(question.context) <= 3
        assert len(question.choices[0]) <= 2
        assert question.choices[0][-1] == base.tokenizer.eos_token_id


def test_weights_trained_over_a_bfloat16_base_are_float32(base: Base, spies: list[Spy]) -> None:
    _, full_rows = train(base)
    half = load_base(base.name, dtype="bfloat16")
    before = state(half)
    autocast: list[bool] = []
    handle = half.model.register_forward_hook(
        lambda *_: autocast.append(torch.is_autocast_enabled("cpu"))
    )
    trained, rows = train(half, dtype="bfloat16")
    handle.remove()
    assert autocast.count(True) == sum(len(spy.batches) for spy in spies[2:])
    for spy in spies:
        assert {p.dtype for p in spy.parameters} == {torch.float32}
    assert {t.dtype for f in trained.linears.values() for _, t in f.tensors()} == {torch.float32}
    after = half.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert losses(rows, "lora") == pytest.approx(losses(full_rows, "lora"), rel=0.1)
    assert losses(rows, "lora")[-1] < losses(rows, "lora")[0]


class Failing(Spy):
    def step(self) -> None:
        if len(self.batches) == 3:
            raise RuntimeError("the machine is gone")
        super().step()


class Diverging(Spy):
    """An engine whose loss is not finite from some step of some stage on."""

    at: tuple[int, int]

    def loss(self, questions: Sequence[Question]) -> Tensor:
        loss = super().loss(questions)
        stage, micro_batch = self.at
        bad = len(self.made) == stage and len(self.batches) > micro_batch
        return loss * float("nan") if bad else loss


def assert_is_bare(base: Base, before: dict[str, Tensor]) -> None:
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(isinstance(base.model.get_submodule(name), nn.Linear) for name in base.linears)


def test_the_base_is_restored_after_an_error(base: Base, spies: list[Spy]) -> None:
    before = state(base)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(base, engine=Failing)
    assert spies[0].closed
    assert_is_bare(base, before)
    with pytest.raises(TypeError):
        train_expert(base, make_card("t", base), EXAMPLES, [Example("a", None)], RECIPE)  # type: ignore[arg-type]
    assert_is_bare(base, before)
    train(base)


@pytest.mark.parametrize(
    ("at", "where"), [((1, 0), "step 0 of stage lora"), ((2, 2), "step 1 of stage gates")]
)
def test_training_ends_on_a_loss_that_is_not_finite(
    llama: Base, spies: list[Spy], monkeypatch: pytest.MonkeyPatch, at: tuple[int, int], where: str
) -> None:
    monkeypatch.setattr(Diverging, "at", at, raising=False)
    before = state(llama)
    with pytest.raises(PhatgooseError, match=f"loss became nan at {where}: lower the recipe's"):
        train(llama, engine=Diverging)
    assert all(spy.closed for spy in spies)
    assert_is_bare(llama, before)


class Moving(Spy):
    """An engine that changes the factors while it trains gates."""

    def close(self) -> None:
        if len(self.made) == 2:
            self.made[0].parameters[0].data[0, 0] += 1


def test_changing_more_than_the_gates_is_an_error(llama: Base, spies: list[Spy]) -> None:
    with pytest.raises(PhatgooseError, match="task: a LoRA factor moved while gates"):
        train(llama, engine=Moving)


def test_gates_that_stay_at_zero_are_an_error(llama: Base, spies: list[Spy]) -> None:
    with pytest.raises(PhatgooseError, match="no gate moved"):
        train(llama, gates=Stage(steps=2, lr=1e-60))  # too small for a float32


def test_missing_inputs_are_named(llama: Base, spies: list[Spy]) -> None:
    card = make_card("task", llama)
    with pytest.raises(PhatgooseError, match="task task: 0 training and 2 evaluation examples"):
        train_expert(llama, card, [], EVALUATION, RECIPE)
    with pytest.raises(PhatgooseError, match="8 training and 0 evaluation"):
        train_expert(llama, card, EXAMPLES, [], RECIPE)
    with pytest.raises(PhatgooseError, match=r"is torch\.float32, .*bfloat16: load it so"):
        train(llama, dtype="bfloat16")
    assert not spies
