import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference import routed_linear
from phatgoose.inference.model import RoutedModel
from phatgoose.ops.mixtures import merged_output
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import QueryRouter, make_router
from phatgoose.routers.ariadne import Ariadne
from phatgoose.routers.interface import Probe
from phatgoose.routers.lorauter import Lorauter
from phatgoose.routers.retrieval import Retrieval, nearest_example
from phatgoose.routers.stacked_profiles import embed
from tests.support.plain import plain_generate, plain_logits, plain_score
from tests.support.pools import (
    FakeEncoder,
    fake_embedding,
    make_profiles,
    make_uneven_experts,
    pool_of,
    queries_of,
    without,
)
from tests.support.textbook import Fact, base_with, facts_of, mixed

QUERIES = [
    Query("Question: which bird flies in the flock?\nAnswer:", (" the goose", " swan", " a")),
    Query("Is the lake deep?", (" yes", " no")),
    Query("two and three is", (" five", " four and four")),
    Query("", ("the",)),
    Query("The grey goose flies over the lake, and the", (" swan",)),
    Query("lake"),
]
# The texts that are embedded for them.
TEXTS = [
    "Answer Choices: the goose, swan, a, "
    "Instance: Question: which bird flies in the flock?\nAnswer:",
    "Answer Choices: yes, no, Instance: Is the lake deep?",
    "Answer Choices: five, four and four, Instance: two and three is",
    "Answer Choices: the, Instance: ",
    "Answer Choices: swan, Instance: The grey goose flies over the lake, and the",
    "Answer Choices: None, Instance: lake",
]
# The query projections of the last block, of the encoder if there is one.
PROBED = {
    "llama": "model.layers.1.self_attn.q_proj",
    "t5": "encoder.block.1.layer.0.SelfAttention.q",
}


def silent() -> Tensor:
    raise AssertionError("this router needs no probe")


NO_PROBE = Probe("", silent)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def library_of(pool: Pool) -> list[np.ndarray]:
    assert pool.profiles is not None
    return [profile.embeddings_NS.double().numpy() for profile in pool.profiles]


def retrieved(query_S: np.ndarray, library: Sequence[np.ndarray]) -> int:
    best, chosen = -2.0, -1
    for expert, rows in enumerate(library):
        for row in rows:
            if cosine(query_S, row) > best:
                best, chosen = cosine(query_S, row), expert
    return chosen


@pytest.fixture
def pool(llama: Base) -> Pool:
    return pool_of(make_uneven_experts(llama, 7))


def test_retrieval_chooses_the_expert_of_the_nearest_example(
    pool: Pool, encoder: FakeEncoder
) -> None:
    weights_Q1, indices_Q1 = Retrieval().mixture(pool, QUERIES, NO_PROBE)
    assert encoder.asked == TEXTS
    library = library_of(pool)
    expected = [[retrieved(fake_embedding(text).double().numpy(), library)] for text in TEXTS]
    assert indices_Q1.tolist() == expected
    assert len({row[0] for row in expected}) > 2
    assert torch.equal(weights_Q1, torch.ones(6, 1))


def test_cosine_similarity_ignores_length() -> None:
    query_QS = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    library = [torch.tensor([[0.5, 0.0], [-1.0, 0.0]]), torch.tensor([[9.0, 9.0]])]
    assert nearest_example(query_QS, library).tolist() == [0, 1]


def test_a_text_is_embedded_once(pool: Pool, encoder: FakeEncoder) -> None:
    rows_QS = embed(pool, ["a", "b", "a"])
    again_QS = embed(pool, ["b", "c"])
    assert encoder.asked == ["a", "b", "c"]
    assert torch.equal(rows_QS, torch.stack([fake_embedding(text) for text in "aba"]))
    assert torch.equal(again_QS, torch.stack([fake_embedding(text) for text in "bc"]))


def test_an_encoder_other_than_that_of_the_profiles_is_refused(
    pool: Pool, encoder: FakeEncoder
) -> None:
    encoder.fingerprint = "other" * 12
    with pytest.raises(PhatgooseError, match=r"encoder fake fakefakefake, .* otherotherot: use"):
        Retrieval().mixture(pool, QUERIES, NO_PROBE)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 99}, {"temperature": 1.0}, {"examples": 2}]
)
def test_lorauter_mixes_the_nearest_tasks(
    pool: Pool, encoder: FakeEncoder, options: dict[str, Any]
) -> None:
    router = Lorauter(**options)
    weights_QK, indices_QK = router.mixture(pool, QUERIES, NO_PROBE)
    assert weights_QK.shape == indices_QK.shape == (6, min(router.top_k, 7))
    for text, weights, indices in zip(TEXTS, weights_QK, indices_QK, strict=True):
        query_S = fake_embedding(text).double().numpy()
        cosines = []
        for rows in library_of(pool):
            rows = rows[: options.get("examples", 200)]
            cosines.append(cosine(query_S, sum(rows) / len(rows)))
        kept = sorted(range(7), key=lambda e: -cosines[e])[: options.get("top_k", 3)]
        warm = [math.exp(cosines[e] / options.get("temperature", 0.2)) for e in kept]
        assert indices.tolist() == kept
        assert weights.tolist() == pytest.approx([w / sum(warm) for w in warm], abs=1e-5)


def test_ariadne_with_one_centroid_per_example_equals_retrieval(
    pool: Pool, encoder: FakeEncoder
) -> None:
    assert pool.profiles is not None
    doubled = [  # a repeated example is not a second point
        dataclasses.replace(p, embeddings_NS=p.embeddings_NS.repeat(2, 1)) for p in pool.profiles
    ]
    expected = Retrieval().mixture(pool, QUERIES, NO_PROBE)
    for examples in (pool, pool.with_profiles(doubled)):
        weights_Q1, indices_Q1 = Ariadne(centroids=99).mixture(examples, QUERIES, NO_PROBE)
        assert torch.equal(indices_Q1, expected[1])
        assert torch.equal(weights_Q1, expected[0])


def test_ariadne_with_one_centroid_chooses_the_nearest_mean(
    pool: Pool, encoder: FakeEncoder
) -> None:
    _, indices_Q1 = Ariadne(centroids=1).mixture(pool, QUERIES, NO_PROBE)
    means = [rows.mean(axis=0, keepdims=True) for rows in library_of(pool)]
    expected = [[retrieved(fake_embedding(text).double().numpy(), means)] for text in TEXTS]
    assert indices_Q1.tolist() == expected
    assert indices_Q1.tolist() != Retrieval().mixture(pool, QUERIES, NO_PROBE)[1].tolist()


def test_ariadne_finds_the_clusters_of_an_expert(llama: Base, encoder: FakeEncoder) -> None:
    """Check a query at one of two clusters of the first expert, whose mean is far from it."""
    experts = make_uneven_experts(llama, 2)
    at_S, off_S = fake_embedding(TEXTS[1]), fake_embedding("something else")
    generator = torch.Generator().manual_seed(0)

    def clustered(center_S: Tensor) -> Tensor:
        return center_S + 0.02 * torch.randn(20, len(center_S), generator=generator)

    between_S = at_S + off_S  # nearer to the query than the mean of the first expert's clusters
    examples = [torch.cat([clustered(at_S), clustered(-5 * off_S)]), clustered(between_S)]
    profiles = [
        dataclasses.replace(p, embeddings_NS=rows)
        for p, rows in zip(make_profiles(experts), examples, strict=True)
    ]
    pool = Pool.from_experts(experts).with_profiles(profiles)
    chosen = {
        centroids: int(Ariadne(centroids).mixture(pool, [QUERIES[1]], NO_PROBE)[1])
        for centroids in (1, 2)
    }
    assert chosen == {1: 1, 2: 0}


def test_ariadne_is_deterministic(llama: Base, encoder: FakeEncoder) -> None:
    """Check profiles that are loaded again, so that nothing is cached."""
    experts = make_uneven_experts(llama, 7)
    queries = [Query(f"question {i}") for i in range(40)]
    first, again = (
        Ariadne(centroids=3).mixture(pool_of(experts), queries, NO_PROBE)[1] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert len(set(first.flatten().tolist())) > 3


@dataclasses.dataclass(frozen=True)
class Spy(QueryRouter):
    """A router that sends every query to the first expert and records its inputs."""

    seen: list[tuple[str, Tensor]] = dataclasses.field(default_factory=list)

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        self.seen.append((probe.linear, probe.run()))
        return torch.ones(len(queries), 1), torch.zeros(len(queries), 1, dtype=torch.long)


def encode(base: Base) -> list[Question]:
    return [Question.encode(base, q.text, q.choices, query=q) for q in QUERIES if q.choices]


@torch.no_grad()
def last_input(base: Base, context: list[int]) -> Tensor:
    """Return the input [D] of the last block's query projection at the last context token."""
    heard: list[Tensor] = []
    linear = base.model.get_submodule(PROBED[base.model.config.model_type])
    assert isinstance(linear, nn.Linear)  # no expert is attached
    handle = linear.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    plain_logits(base, context, [])
    handle.remove()
    ((x_1LD,),) = [heard]
    assert x_1LD.shape[:2] == (1, len(context))
    return x_1LD[0, -1]


def test_the_probe_reads_the_bare_base_at_the_last_token(base: Base) -> None:
    spy, bare, questions = Spy(), load_base(base.name), encode(base)
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)), spy)
    assert len({len(question.context) for question in questions}) > 2
    routed.score(questions)
    routed.generate(queries_of(questions), 1)
    assert len(spy.seen) == 2
    for linear, x_QD in spy.seen:
        assert linear == PROBED[base.model.config.model_type]
        expected_QD = torch.stack([last_input(bare, q.context) for q in questions])
        torch.testing.assert_close(x_QD, expected_QD, rtol=1e-4, atol=1e-5)


def test_a_probe_needs_an_adapted_query_projection(base: Base) -> None:
    experts = [without(e, "q", "q_proj") for e in make_uneven_experts(base)]
    routed = RoutedModel(base, pool_of(experts), "logo")
    with pytest.raises(PhatgooseError, match=r"query projection, .*another router"):
        routed.score(encode(base))


def logo_weights(base: Base, experts: list[Expert], context: list[int], by: str) -> list[float]:
    """Return LoGo's weights, proportional to its scores; `e2` does not adapt the projection."""
    scores = []
    h_D = last_input(base, context).double()
    for fact in facts_of(experts, PROBED[base.model.config.model_type]):
        if fact is None:
            scores.append(0.0)
            continue
        o_O = fact.delta_OD @ h_D
        if by == "norm":
            scores.append(math.sqrt(sum(float(o) ** 2 for o in o_O)))
        else:
            p_O = [math.exp(float(o)) for o in o_O]
            p_O = [p / sum(p_O) for p in p_O]
            scores.append(1 / -sum(p * math.log(p) for p in p_O))
    return [score / sum(scores) for score in scores]


def mixture(
    facts: dict[str, list[Fact | None]], weights: list[float]
) -> Callable[[str, Tensor], Tensor]:
    """Return a function that adds a mixture of experts to each linear's output for a token."""
    return lambda linear, x_D: mixed(x_D, facts[linear], weights)


def weights_alone(
    base: Base, name: str, experts: list[Expert], question: Question, by: str
) -> list[float]:
    """Return each expert's weight for one question, computed without the router."""
    if name == "logo":
        return logo_weights(base, experts, question.context, by)
    (query,) = queries_of([question])
    query_S = fake_embedding(query.retrieval_text).double().numpy()
    library = library_of(pool_of(experts))
    if name == "retrieval":
        return [float(e == retrieved(query_S, library)) for e in range(len(experts))]
    warm = [math.exp(cosine(query_S, rows.mean(axis=0)) / 0.2) for rows in library]
    kept = sorted(range(len(warm)), key=lambda e: -warm[e])[:3]
    return [warm[e] / sum(warm[k] for k in kept) if e in kept else 0.0 for e in range(len(warm))]


@pytest.mark.parametrize(
    ("name", "options"),
    [("retrieval", {}), ("lorauter", {}), ("logo", {}), ("logo", {"by": "entropy"})],
)
def test_each_row_of_a_batch_has_its_own_mixture(
    base: Base, encoder: FakeEncoder, name: str, options: dict[str, Any]
) -> None:
    experts, bare, questions = make_uneven_experts(base), load_base(base.name), encode(base)
    routed = RoutedModel(base, pool_of(experts), make_router(name, **options))
    together = routed.score(questions)
    texts = routed.generate(queries_of(questions), 4)
    facts = {n: facts_of(experts, n) for n in base.linears}
    seen = set()
    for question, scores, text in zip(questions, together, texts, strict=True):
        weights = weights_alone(bare, name, experts, question, options.get("by", "norm"))
        seen.add(tuple(weights))
        plain = base_with(base, mixture(facts, weights))
        for choice, actual in zip(question.choices, scores, strict=True):
            expected = plain_score(plain, question.context, choice)
            assert actual.loglikelihood == pytest.approx(expected.loglikelihood, abs=3e-4)
            assert actual.eos_loglikelihood == pytest.approx(expected.eos_loglikelihood, abs=3e-4)
            assert actual.is_greedy == expected.is_greedy
        ids = plain_generate(plain, question.context, 4)
        assert text == base.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(seen) > 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_logo_keeps_the_strongest_experts(base: Base, top_k: int) -> None:
    experts, bare = make_uneven_experts(base, 6), load_base(base.name)
    questions = encode(base)
    logo = make_router("logo", top_k=top_k)
    assert isinstance(logo, QueryRouter)
    routed_pool = pool_of(experts)
    linear = PROBED[base.model.config.model_type]
    x_QD = torch.stack([last_input(bare, question.context) for question in questions])
    weights_QK, indices_QK = logo.mixture(routed_pool, [], Probe(linear, lambda: x_QD))
    for question, weights, indices in zip(questions, weights_QK, indices_QK, strict=True):
        scores = logo_weights(bare, experts, question.context, "norm")
        kept = sorted(range(6), key=lambda e: -scores[e])[:top_k]
        assert indices.tolist() == kept
        expected = [scores[e] / sum(scores[k] for k in kept) for e in kept]
        assert weights.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["retrieval", "logo"])
def test_a_question_scores_the_same_alone_and_in_any_batch(
    base: Base, encoder: FakeEncoder, name: str
) -> None:
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)), name)
    questions = encode(base)
    together = routed.score(questions)
    turned = routed.score(questions[::-1])[::-1]
    for question, scores, others in zip(questions, together, turned, strict=True):
        (alone,) = routed.score([question])
        for one, two, three in zip(scores, others, alone, strict=True):
            assert one.mean == pytest.approx(two.mean, abs=1e-4)
            assert one.mean == pytest.approx(three.mean, abs=1e-4)


def test_rows_that_end_early_do_not_change_the_mixtures_of_others(
    base: Base, encoder: FakeEncoder
) -> None:
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)), "retrieval")
    queries = queries_of(encode(base))
    whole = [routed.generate([query], 6)[0] for query in queries]
    assert routed.generate(queries, 6) == whole
    stop = next(text for text in whole if len(text) > 1)[:1]
    assert routed.generate(queries, 6, stops=[stop]) == [text.split(stop)[0] for text in whole]


def test_an_unannounced_forward_pass_is_refused(base: Base) -> None:
    RoutedModel(base, pool_of(make_uneven_experts(base)), "logo")
    with pytest.raises(PhatgooseError, match=r"routers of whole queries, .* model's"):
        plain_logits(base, [5, 9, 11], [12])


@pytest.mark.parametrize("router", ["retrieval", "lorauter", "ariadne", "logo", "glider"])
def test_a_question_without_a_query_is_an_error(
    llama: Base, encoder: FakeEncoder, router: str
) -> None:
    model = RoutedModel(llama, pool_of(make_uneven_experts(llama)), make_router(router))
    asked = Question.encode(llama, "Is the lake deep?", [" yes", " no"], query=Query("q", task="t"))
    assert len(model.score([asked])[0]) == 2
    with pytest.raises(PhatgooseError, match=f"router {router} decides by queries, and a question"):
        model.score([asked, dataclasses.replace(asked, query=None)])
    model.set_router("phatgoose")
    assert len(model.score([dataclasses.replace(asked, query=None)])[0]) == 2


def test_a_single_choice_is_not_part_of_the_query(llama: Base) -> None:
    context = "Is the lake deep?"
    assert Question.encode(llama, context, [" yes"]).query == Query(context)
    both = Question.encode(llama, context, [" yes", " no"]).query
    assert both == Query(context, (" yes", " no"))


@dataclasses.dataclass(frozen=True)
class Turns(QueryRouter):
    """A router that gives each query two experts of its own, the second with more weight."""

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        first_Q = torch.arange(len(queries)) % len(pool.experts)
        indices_Q2 = torch.stack([first_Q, (first_Q + 1) % len(pool.experts)], dim=1)
        return torch.tensor([[0.25, 0.75]]).expand(len(queries), 2), indices_Q2


def test_long_queries_are_answered_as_if_nothing_were_merged(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[int] = []

    def counting(x_TD: Tensor, *others: Any) -> Tensor:
        merged.append(len(x_TD))
        return merged_output(x_TD, *others)

    monkeypatch.setattr(routed_linear, "merged_output", counting)
    texts = [" ".join(f"{word} {n}" for n in range(40)) for word in ("goose", "duck", "swan")]
    questions = [Question.encode(base, text, ["yes", "no it is"]) for text in texts]
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)), Turns())
    scores = routed.score(questions)
    assert len(merged) >= len(base.linears) / 2  # all that read the question
    monkeypatch.setenv("PHATGOOSE_MIX", "loop")
    routed.set_router(Turns())
    merged.clear()
    apart = routed.score(questions)
    assert not merged
    for choices, expected in zip(scores, apart, strict=True):
        assert [s.loglikelihood for s in choices] == pytest.approx(
            [s.loglikelihood for s in expected], abs=1e-4
        )
    assert scores[0] != scores[1]
