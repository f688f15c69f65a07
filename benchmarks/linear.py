"""Measure one routed linear against the frozen linear alone, for each way of mixing.

    python -m benchmarks.linear [--threads 1] [--dtype bfloat16]

For each shape it prints the time of the frozen linear, the floor that the operations set, and the
ratio of a linear that is routed by PHATGOOSE: the kernel, PyTorch's three ways, and the way that
PyTorch would choose. Several linears with their own experts take turns, so that no cache holds
what a model would have to read from memory. On a GPU see benchmarks/gpu.py.
"""

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from benchmarks.figures import Figure, compare
from benchmarks.routing import way_of_mixing
from benchmarks.timing import Times, paired
from phatgoose.ops import RoutedExperts, TokenRule
from phatgoose.ops.frozen_linear import product
from phatgoose.ops.mixing import WAYS
from phatgoose.ops.routing import gate_scorer

RANK = 16
SHAPES = ((576, 576), (576, 1536), (2048, 2048))
POOLS = ((8, 2), (8, 8), (36, 2), (166, 2))
MOST_BYTES = 3e8  # of all experts of a case


class Case:
    """Linears of one shape, each with its experts."""

    def __init__(
        self, shape: tuple[int, int], experts: int, top_k: int, tokens: int, dtype: torch.dtype
    ) -> None:
        inputs, outputs = shape
        size = experts * RANK * (inputs + outputs) * dtype.itemsize
        self._linears = range(max(1, min(12, int(MOST_BYTES / size))))
        self._x_TD = torch.randn(tokens, inputs).to(dtype)
        self._weights = [torch.randn(outputs, inputs).to(dtype) for _ in self._linears]
        self._factors = [
            (
                (torch.randn(experts, inputs, RANK) / inputs**0.5).to(dtype).transpose(1, 2),
                torch.randn(experts, RANK, outputs).to(dtype).transpose(1, 2),
            )
            for _ in self._linears
        ]
        self._rules = [
            TokenRule(gate_scorer(torch.randn(experts, inputs)), top_k) for _ in self._linears
        ]
        operations = 2 * experts * inputs + 2 * top_k * RANK * (inputs + outputs)
        self.floor = 1 + operations / (2 * inputs * outputs)

    def _run(self, routed: list[RoutedExperts] | None) -> None:
        for index, weight_OD in enumerate(self._weights):
            y_TO: Tensor = product(self._x_TD, weight_OD)
            if routed:
                routed[index].route_and_add(y_TO, self._x_TD)

    def times(self, ways: tuple[str, ...], rounds: int) -> Times:
        """Return the seconds of all linears, frozen and in each way."""
        experts: dict[str, list[RoutedExperts]] = {}
        calls = {"frozen": partial(self._run, None)}
        for way in ways:
            with way_of_mixing(way):
                experts[way] = [
                    RoutedExperts(*factors, rule)
                    for factors, rule in zip(self._factors, self._rules, strict=True)
                ]
            calls[way] = partial(self._in_way, way, experts[way])
        times = paired(calls, rounds)
        return {name: [t / len(self._linears) for t in found] for name, found in times.items()}

    def _in_way(self, way: str, experts: list[RoutedExperts]) -> None:
        with way_of_mixing(way):
            self._run(experts)


@torch.inference_mode()
def measure(threads: int = 2, rounds: int = 5) -> list[Figure]:
    """Return the figure of a large pool on a large linear, on one thread."""
    torch.set_num_threads(1)
    case = Case((2048, 2048), 1000, 2, 1024, torch.float32)
    times = case.times(("kernel",), rounds)
    torch.set_num_threads(threads)
    return [
        compare(
            "one linear of 2048 x 2048, 1,000 experts",
            zip(times["kernel"], times["frozen"], strict=True),
            target=2.1,
            floor=case.floor,
            note="seconds; 1,024 tokens, one thread",
        )
    ]


@torch.inference_mode()
def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("   in x out     E   K    T   frozen us  floor" + "".join(f"{way:>9}" for way in WAYS))
    for shape in SHAPES:
        for experts, top_k in POOLS:
            for tokens in (1, 8, 64, 512):
                case = Case(shape, experts, top_k, tokens, getattr(torch, arguments.dtype))
                times = case.times(WAYS, arguments.rounds)
                ratios = [
                    compare(way, zip(times[way], times["frozen"], strict=True)).ratio
                    for way in WAYS
                ]
                print(
                    f"{shape[0]:5} x {shape[1]:4}  {experts:4} {top_k:3} {tokens:4}  "
                    f"{statistics.median(times['frozen']) * 1e6:9.0f}  {case.floor:5.2f}"
                    + "".join(f"{ratio:9.2f}" for ratio in ratios),
                    flush=True,
                )


if __name__ == "__main__":
    main()
