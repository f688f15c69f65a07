import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.shards import Kind, Limits, Request, Shard, cut

TOKENS = st.lists(st.integers(1, 60), max_size=40)
LIMITS = st.builds(Limits, chunk_tokens=st.integers(1, 80), shard_tokens=st.integers(1, 300))


def cut_tokens(tokens: list[int], limits: Limits, kind: Kind = "score") -> list[Shard]:
    requests = [Request(f"question {place}") for place in range(len(tokens))]
    return cut("task", kind, requests, tokens, limits)


@given(TOKENS, LIMITS)
def test_shards_partition_the_requests_in_order_of_length(
    tokens: list[int], limits: Limits
) -> None:
    shards = cut_tokens(tokens, limits)
    places = [place for shard in shards for place in shard.places]
    assert sorted(places) == list(range(len(tokens)))
    assert [tokens[place] for place in places] == sorted(tokens)
    for shard in shards:
        assert (shard.task, shard.kind) == ("task", "score")
        assert shard.tokens == sum(tokens[place] for place in shard.places)
        assert shard.requests == len(shard.places)


@given(TOKENS, LIMITS)
def test_chunks_and_shards_are_as_large_as_allowed(tokens: list[int], limits: Limits) -> None:
    shards = cut_tokens(tokens, limits)
    sizes = [[[tokens[place] for place in chunk] for chunk in shard.chunks] for shard in shards]
    for shard in sizes:
        assert sum(map(sum, shard)) <= limits.shard_tokens or len(shard) == 1
        for chunk in shard:
            assert chunk
            assert sum(chunk) <= limits.chunk_tokens or len(chunk) == 1
    for shard, following in itertools.pairwise(sizes):
        assert sum(map(sum, shard)) + sum(following[0]) > limits.shard_tokens
    for chunk, following_chunk in itertools.pairwise(chunk for shard in sizes for chunk in shard):
        assert sum(chunk) + following_chunk[0] > limits.chunk_tokens


@given(TOKENS, LIMITS)
def test_shards_depend_only_on_the_requests_and_the_limits(
    tokens: list[int], limits: Limits
) -> None:
    assert cut_tokens(tokens, limits) == cut_tokens(tokens, limits)


def test_a_key_changes_with_everything_that_changes_the_answer() -> None:
    requests = [Request("context", ("a", "b"), max_new_tokens=4, until=("\n",)), Request("other")]
    limits = Limits(100, 100)

    def key(
        asked: list[Request],
        task: str = "task",
        kind: Kind = "score",
        limits: Limits = limits,
        identity: str = "phatgoose",
    ) -> str:
        (shard, *_) = cut(task, kind, asked, [4] * len(asked), limits)
        return shard.key(identity)

    others = [
        key(requests, identity="phatgoose2"),
        key(requests, task="other"),
        key(requests, kind="generate"),
        key(requests[::-1]),
        key(requests[:1]),
        key(requests, limits=Limits(4, 100)),  # other batches
    ]
    for field, value in {
        "context": "context ",
        "choices": ("b", "a"),
        "max_new_tokens": 5,
        "until": (".",),
        "choices_shown": False,
    }.items():
        changed = replace(requests[0], **{field: value})  # type: ignore[arg-type]
        others.append(key([changed, requests[1]]))
    keys = [key(requests), *others]
    assert len(set(keys)) == len(keys)
    assert key(requests) == keys[0]
    # The border between two texts counts.
    assert key([Request("ab", ("c",))]) != key([Request("a", ("bc",))])
