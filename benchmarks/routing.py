"""Measure what routing adds to a whole model: prefill, decode, query routers, bfloat16.

    python -m benchmarks.routing [--threads 2] [--rounds 5] [--only prefill]

The base, loaded once more without experts, and the routed model run in turn in one process. Experts
and gates are random, so that routing is about uniform, except for `demo`: the pool that `make demo`
has trained, on text. A floor is the ratio of the operations (prefill) or of the bytes of weights
that have to be read (decode).
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE, RANK, random_pool
from benchmarks.timing import Times, paired
from phatgoose.architecture import find_linear, linear_sizes
from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel
from phatgoose.ops.mixing import VARIABLE
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.routers import Router, make_router
from phatgoose.routers.interface import Probe, QueryRouter

TOKENS, ROWS = 1024, 4
# Corners of what is usual: experts per token, and rank.
SHAPES = ((1, 8), (4, 8), (1, 32), (4, 32))
SHAPES_TARGET = 1.3  # times that of the first row of 166 experts
_REPOSITORY = Path(__file__).parents[1]
DEMO_PACKS = _REPOSITORY / "runs/demo/registry/packs"  # what `make demo` leaves
TEXT = _REPOSITORY / "docs"  # any text
PROMPT, STEPS = 64, 12  # of decode: positions in the cache, and tokens written per round
TARGETS = {32: 1.35, 166: 1.6}
TORCH_TARGETS = {32: 2.1, 166: 2.3}
DECODE_TARGETS = {1: 1.35, 4: 1.45, 8: 1.5}


class RandomMixture(QueryRouter):
    """Give every query `kept` random experts of equal weight."""

    def __init__(self, kept: int) -> None:
        self.kept = kept

    def mixture(self, pool: Pool, queries: Sequence[Query], probe: Probe) -> tuple[Tensor, Tensor]:
        """Draw the experts of each query."""
        scores_QE = torch.rand(len(queries), len(pool.experts))
        indices_QK = scores_QE.topk(self.kept, dim=1).indices
        return torch.full(indices_QK.shape, 1 / self.kept), indices_QK


@contextmanager
def way_of_mixing(way: str | None) -> Iterator[None]:
    """Within it, routers that are set mix in this way; without one, in the fastest."""
    before = os.environ.pop(VARIABLE, None)
    if way:
        os.environ[VARIABLE] = way
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before:
            os.environ[VARIABLE] = before


class Pair:
    """A base without experts, and the same base with a pool: random experts, or given ones."""

    def __init__(self, experts: int | Pool, dtype: str = "float32", rank: int = RANK) -> None:
        self.base = load_base(BASE, dtype=dtype)
        self.routed = load_base(BASE, dtype=dtype)
        # The same weights: where memory lies in the machine makes a difference of ten percent.
        for mine, theirs in zip(
            self.base.model.parameters(), self.routed.model.parameters(), strict=True
        ):
            mine.data = theirs.data
        self.pool = (
            experts if isinstance(experts, Pool) else random_pool(self.routed, experts, rank=rank)
        )
        self.model = RoutedModel(self.routed, self.pool)

    def set_router(self, router: Router | str, way: str | None = "kernel") -> None:
        """Route by `router` from now on, and mix in this way."""
        with way_of_mixing(way):
            self.model.set_router(router)

    def announce(self, rows: int, length: int) -> None:
        """Tell the routed linears what the next pass reads."""
        mask_BL = torch.ones(rows, length, dtype=torch.bool)
        self.model.forward_context.announce("decoder", mask_BL)

    def ways(self, base: Any, routed: Any, router: Router | str, ways: Sequence[str]) -> Any:
        """Return the arguments of `paired`: the base, and the routed model in several ways."""
        calls = {"base": base, **dict.fromkeys(ways, routed)}
        return calls, {way: partial(self.set_router, router, way) for way in ways}


def random_tokens(rows: int) -> Tensor:
    """Return 1,024 tokens in so many rows."""
    return torch.randint(1000, 40000, (rows, TOKENS // rows))


def prefill(
    pair: Pair,
    rounds: int,
    ways: Sequence[str] = ("kernel", "torch"),
    router: Router | str = "phatgoose",
    ids_BL: Tensor | None = None,
) -> Times:
    """Time one pass through 1,024 tokens, with logits at the last position of each row."""
    ids_BL = random_tokens(ROWS) if ids_BL is None else ids_BL
    pair.announce(*ids_BL.shape)

    def read(base: Base) -> None:
        base.model(input_ids=ids_BL, use_cache=False, logits_to_keep=1)

    calls = pair.ways(partial(read, pair.base), partial(read, pair.routed), router, ways)
    return paired(calls[0], rounds, calls[1])


def decode(pair: Pair, rows: int, rounds: int) -> Times:
    """Time greedy steps behind a cache, per step."""
    ids_BL = torch.randint(1000, 40000, (rows, PROMPT))
    pair.set_router("phatgoose")
    caches: dict[str, Any] = {}

    def read_prompt(name: str, base: Base) -> None:
        pair.announce(rows, PROMPT)
        output = base.model(input_ids=ids_BL, use_cache=True, logits_to_keep=1)
        caches[name] = output.past_key_values
        pair.announce(rows, 1)

    def write(name: str, base: Base) -> None:
        next_B1 = ids_BL[:, :1]
        for _ in range(STEPS):
            logits = base.model(
                input_ids=next_B1, past_key_values=caches[name], use_cache=True
            ).logits
            next_B1 = logits[:, -1:].argmax(dim=-1)

    bases = {"base": pair.base, "kernel": pair.routed}
    return paired(
        {name: partial(write, name, base) for name, base in bases.items()},
        rounds,
        {name: partial(read_prompt, name, base) for name, base in bases.items()},
    )


def by_query(pair: Pair, rows: int, kept: int, rounds: int) -> Times:
    """Time one pass through 1,024 tokens of so many queries, each with its own mixture."""
    ids_BL = random_tokens(rows)
    pair.announce(*ids_BL.shape)
    router = RandomMixture(kept)
    mixture = router.mixture(pair.pool, [Query("")] * rows, Probe("", lambda: ids_BL))
    pair.model.forward_context.mixture = mixture

    def read(base: Base) -> None:
        base.model(input_ids=ids_BL, use_cache=False, logits_to_keep=1)

    pair.set_router(router, way=None)
    return paired({"base": partial(read, pair.base), "routed": partial(read, pair.routed)}, rounds)


def floor_of_mixtures(pair: Pair, tokens: int, kept: int) -> float:
    """Return the least ratio of multiplications where so many tokens share a mixture."""
    base = routed = 0.0
    for name in pair.pool.linears:
        inputs, outputs = linear_sizes(find_linear(pair.base.model, name))
        base += tokens * inputs * outputs
        routed += kept * RANK * min(tokens * (inputs + outputs), inputs * outputs)
    return 1 + routed / base


def floor_of(
    pair: Pair, *, per_token: float, top_k: int, rank: int = RANK, others: int = 0
) -> float:
    """Return the least ratio of multiplications with weights, or of weights read.

    Args:
        pair: the model.
        per_token: how many of a linear's experts score a token: all, or none.
        top_k: how many of them it goes to.
        rank: of the experts.
        others: weights besides those of adapted linears.
    """
    base, routed = float(others), 0.0
    for name in pair.pool.linears:
        inputs, outputs = linear_sizes(find_linear(pair.base.model, name))
        base += inputs * outputs
        routed += per_token * inputs + top_k * rank * (inputs + outputs)
    return 1 + routed / base


def figure(name: str, times: Times, way: str, target: float | None, floor: float | None) -> Figure:
    """Return one comparison with the base."""
    note = f"seconds; {torch.get_num_threads()} threads"
    rounds = zip(times[way], times["base"], strict=True)
    return compare(name, rounds, target=target, floor=floor, note=note)


def headline(rounds: int, experts: int) -> list[Figure]:
    """Measure a pass through 1,024 tokens, with the kernel and with PyTorch's operators."""
    pair = Pair(experts)
    times = prefill(pair, rounds)
    floor = floor_of(pair, per_token=experts, top_k=2)
    return [
        figure(f"prefill, {experts} experts, {way}", times, way, targets[experts], floor)
        for way, targets in (("kernel", TARGETS), ("torch", TORCH_TARGETS))
    ]


def shapes(rounds: int, experts: int = 166) -> list[Figure]:
    """Measure the same for other numbers of experts per token, and other ranks."""
    found = []
    for rank in sorted({rank for _, rank in SHAPES}):
        pair = Pair(experts, rank=rank)
        for top_k in (top_k for top_k, its_rank in SHAPES if its_rank == rank):
            times = prefill(pair, rounds, ("kernel",), make_router("phatgoose", top_k=top_k))
            floor = floor_of(pair, per_token=experts, top_k=top_k, rank=rank)
            name = f"prefill, {experts} experts, top_k {top_k}, rank {rank}"
            target = SHAPES_TARGET * TARGETS[experts]
            found.append(figure(name, times, "kernel", target, floor))
    return found


def demo(rounds: int) -> list[Figure]:
    """Measure the same with the trained pool of the demo, on text, if it is there."""
    packs = sorted(DEMO_PACKS.glob("*/"), key=lambda folder: folder.stat().st_mtime)
    if not packs:
        print(f"not measured: the demo's pool, as there is no {DEMO_PACKS}. Run `make demo`.")
        return []
    pair = Pair(Pool.open(packs[-1]))
    text = "\n".join(page.read_text() for page in sorted(TEXT.glob("*.md")))
    ids_BL = torch.tensor(pair.base.tokenizer(text).input_ids[:TOKENS]).view(ROWS, -1)
    times = prefill(pair, rounds, ids_BL=ids_BL)
    experts = len(pair.pool.experts)
    floor = floor_of(pair, per_token=experts, top_k=2)
    return [
        figure(f"prefill, the demo's {experts} experts, {way}", times, way, target, floor)
        for way, target in (("kernel", TARGETS[32]), ("torch", TORCH_TARGETS[32]))
    ]


def decoding(rounds: int, experts: int = 166) -> list[Figure]:
    """Measure greedy steps in batches of several sizes."""
    pair, found = Pair(experts), []
    vocabulary = pair.base.model.get_output_embeddings().weight.numel()
    for rows, target in DECODE_TARGETS.items():
        # Of a larger batch, it depends on how many tokens share an expert.
        floor = floor_of(pair, per_token=experts, top_k=2, others=vocabulary) if rows == 1 else None
        name = f"decode, {experts} experts, batch {rows}"
        found.append(figure(name, decode(pair, rows, rounds), "kernel", target, floor))
    return found


def mixtures(rounds: int, experts: int = 166, kept: int = 20) -> list[Figure]:
    """Measure query routers."""
    pair, found = Pair(experts), []
    for rows in (1, 4):
        floor = floor_of_mixtures(pair, TOKENS // rows, kept)
        name = f"prefill, a mixture of {kept} for each of {rows} queries"
        found.append(figure(name, by_query(pair, rows, kept, rounds), "routed", 1.5, floor))
    return found


def half(rounds: int, experts: int = 166) -> list[Figure]:
    """Measure a pass through 1,024 tokens in bfloat16."""
    pair = Pair(experts, "bfloat16")
    times = prefill(pair, rounds, ("kernel",))
    floor = floor_of(pair, per_token=experts, top_k=2)
    return [figure(f"prefill, {experts} experts, bfloat16", times, "kernel", 1.6, floor)]


PARTS: dict[str, Callable[[int], list[Figure]]] = {
    "prefill": lambda rounds: headline(rounds, 32) + headline(rounds, 166),
    "shapes": shapes,
    "demo": demo,
    "decode": decoding,
    "query": mixtures,
    "bfloat16": half,
}


@torch.inference_mode()
def measure(threads: int = 2, rounds: int = 5, only: str | None = None) -> list[Figure]:
    """Measure all of it, or what is named `only`."""
    torch.set_num_threads(threads)
    return [found for name, part in PARTS.items() if only in (None, name) for found in part(rounds)]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
