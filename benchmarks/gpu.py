"""Measure routing on a GPU: the frozen linear alone, torch's way, and the Triton kernels.

    python -m benchmarks.gpu OUTPUT_FOLDER [--toy]

Shapes are those of T5-XL and of a 7B model, in bfloat16, with rank 16 and two experts a token. Each
case is a sequence of linears with their own weights, gates and factors, so many that they exceed
the GPU's cache, as the linears of a model do. Times are per linear. All sides alternate in one
process, and a ratio is the median over rounds. In prefill Python runs ahead of the GPU. In decode
it cannot keep up, so there the sides are also compared as CUDA graphs; torch's way waits for the
device and cannot be one.

A floor adds to the frozen linear's measured time what the additional operations or bytes take at
this card's own speed: that of a large product in bfloat16, and of a copy. The operations of scores
count three times, which float32 accuracy costs on tensor cores. With `--toy` everything runs at
tiny sizes on any machine, to show that it runs: the times mean nothing.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figures import Figure, compare, print_table
from phatgoose.ops import mix, standardise, top_k_softmax, triton_kernels
from phatgoose.ops.routing import gate_scorer

TOP_K, RANK = 2, 16
DECODED = 64  # up to so many tokens are decoding
TARGETS = {"prefill": 1.25, "decode": 1.3}


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        shapes: inputs and outputs of a linear, with a name.
        experts: sizes of the pool.
        tokens: of one call.
        square: side of the matrices of the large product.
        copied: bytes of the copy.
        cache: bytes that a case's weights should exceed.
        memory: bytes that a case's factors may take.
        rounds: the medians are over so many.
    """

    shapes: tuple[tuple[str, int, int], ...]
    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    square: int
    copied: int
    cache: int
    memory: int
    rounds: int


REAL = Sizes(
    shapes=(
        ("T5-XL attention", 2048, 2048),
        ("T5-XL feed-forward", 2048, 5120),
        ("T5-XL feed-forward", 5120, 2048),
        ("7B attention", 4096, 4096),
        ("7B feed-forward", 4096, 11008),
        ("7B feed-forward", 11008, 4096),
    ),
    experts=(166, 36, 1000),
    tokens=(8192, 1, 8, 64),
    square=8192,
    copied=2**31,
    cache=200 * 2**20,
    memory=6 * 2**30,
    rounds=15,
)
TOY = Sizes((("toy", 32, 48),), (3, 5), (70, 1, 8), 64, 2**16, 2**13, 2**16, 2)


@dataclass(frozen=True)
class Layer:
    """A frozen linear with its experts, prepared for both ways."""

    weight_OD: Tensor
    gates_ED: Tensor
    lora_A_EDR: Tensor
    lora_B_ERO: Tensor
    torch_way: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Linears of one shape and pool, what they read, and what the floor is computed from."""

    name: str
    x_TD: Tensor
    layers: Sequence[Layer]
    rounds: int
    speeds: tuple[float, float]


def measure(sizes: Sizes, device: str, seconds: float = 180) -> list[Figure]:
    """Return a figure for each number of experts, shape, number of tokens and way.

    Args:
        sizes: what to measure.
        device: where.
        seconds: start no further case after so many, and say which are left out.
    """
    started = time.monotonic()
    speeds = _ceilings(sizes, device)
    figures = [
        Figure("ceiling: bf16 product, TFLOP/s", speeds[0] / 1e12, 0, math.nan, None, None, "-"),
        Figure("ceiling: copy, GB/s", speeds[1] / 1e9, 0, math.nan, None, None, "-"),
    ]
    for experts, (name, inputs, outputs) in itertools.product(sizes.experts, sizes.shapes):
        if time.monotonic() - started > seconds:
            print(f"left out, for time: {name}, {experts} experts", file=sys.stderr)
            continue
        layers = _layers(inputs, outputs, experts, sizes, device)
        for tokens in sizes.tokens:
            label = f"{name} {inputs} x {outputs}, {experts} experts, {tokens} tokens"
            x_TD = torch.randn(tokens, inputs, device=device).bfloat16()
            figures += _measure_case(Case(label, x_TD, layers, sizes.rounds, speeds))
            print(f"{label}: {figures[-1].ratio:.2f}", file=sys.stderr, flush=True)
        del layers
    return figures


def _layers(inputs: int, outputs: int, experts: int, sizes: Sizes, device: str) -> list[Layer]:
    """Return linears that exceed the cache together, as far as their factors fit in memory."""
    factors = 2 * 2 * experts * RANK * (inputs + outputs)  # two layouts
    count = min(-(-sizes.cache // (2 * inputs * outputs)), sizes.memory // factors)
    return [_layer(inputs, outputs, experts, device) for _ in range(max(count, 1))]


def _layer(inputs: int, outputs: int, experts: int, device: str) -> Layer:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    gates_ED = random(experts, inputs)
    lora_A_EDR = (random(experts, inputs, RANK) / inputs**0.5).bfloat16()
    lora_B_ERO = (random(experts, RANK, outputs) / RANK**0.5).bfloat16()
    lora_A_ERD = lora_A_EDR.transpose(1, 2).contiguous()
    lora_B_EOR = lora_B_ERO.transpose(1, 2).contiguous()
    score = gate_scorer(gates_ED)

    def torch_way(x_TD: Tensor) -> Tensor:
        weights_TK, indices_TK = top_k_softmax(score(x_TD), TOP_K)
        return mix(x_TD, lora_A_ERD, lora_B_EOR, indices_TK, weights_TK)

    return Layer(
        weight_OD=(random(outputs, inputs) / inputs**0.5).bfloat16(),
        gates_ED=standardise(gates_ED) / math.sqrt(inputs),
        lora_A_EDR=lora_A_EDR,
        lora_B_ERO=lora_B_ERO,
        torch_way=torch_way,
    )


def triton_way(x_TD: Tensor, layer: Layer) -> Tensor:
    """Return the routed linear's output by the Triton kernels."""
    y_TO = F.linear(x_TD, layer.weight_OD)
    factors = layer.lora_A_EDR, layer.lora_B_ERO
    if len(x_TD) <= DECODED:
        triton_kernels.decode_(y_TO, x_TD, layer.gates_ED, *factors, TOP_K, True)
    else:
        scores_TE = triton_kernels.scores(x_TD, layer.gates_ED)
        inverse_T = triton_kernels.inverse_std(x_TD)
        weights_TK, indices_TK = triton_kernels.select(scores_TE, TOP_K, inverse_T)
        triton_kernels.mix_(y_TO, x_TD, *factors, indices_TK, weights_TK)
    return y_TO


def _measure_case(case: Case) -> list[Figure]:
    x_TD, layers = case.x_TD, case.layers
    _compare(x_TD, layers[0])

    def frozen() -> None:
        for layer in layers:
            F.linear(x_TD, layer.weight_OD)

    def by_torch() -> None:
        for layer in layers:
            F.linear(x_TD, layer.weight_OD).add_(layer.torch_way(x_TD))

    def by_triton() -> None:
        for layer in layers:
            triton_way(x_TD, layer)

    prefills = len(x_TD) > DECODED
    target = TARGETS["prefill"] if prefills else None
    figures = _figures(case, frozen, {"torch": (by_torch, None), "triton": (by_triton, target)})
    if prefills:
        return figures
    graphs = {"triton, CUDA graph": (_captured(by_triton), TARGETS["decode"])}
    return [*figures, *_figures(case, _captured(frozen), graphs)]


def _compare(x_TD: Tensor, layer: Layer) -> None:
    """Raise RuntimeError if the ways differ by more than a few roundings."""
    expected_TO = F.linear(x_TD, layer.weight_OD).float() + layer.torch_way(x_TD).float()
    error = (triton_way(x_TD, layer).float() - expected_TO).abs().max()
    if not error <= 0.03 * expected_TO.abs().max():
        raise RuntimeError(f"the ways differ by {error:.3g} in {expected_TO.abs().max():.3g}")


def _figures(
    case: Case,
    frozen: Callable[[], None],
    ways: Mapping[str, tuple[Callable[[], None], float | None]],
) -> list[Figure]:
    """Time the sides in alternating rounds, after two that are not counted."""
    sides = {"frozen": frozen} | {name: way for name, (way, _) in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(case.rounds + 2):
        for name, side in sides.items():
            times[name].append(_seconds(side, case.x_TD.device) / len(case.layers))
    times = {name: values[2:] for name, values in times.items()}
    base = statistics.median(times["frozen"])
    return [
        compare(
            f"{case.name}: {name}",
            zip(times[name], times["frozen"], strict=True),
            target=target,
            floor=1 + _additional(len(case.x_TD), case.layers[0], case.speeds) / base,
            note=f"seconds per linear, {len(case.layers)} linears",
        )
        for name, (_, target) in ways.items()
    ]


def _additional(tokens: int, layer: Layer, speeds: tuple[float, float]) -> float:
    """Return the seconds that routing's operations or bytes take at the card's own speed."""
    (outputs, inputs), experts = layer.weight_OD.shape, len(layer.gates_ED)
    pairs = tokens * TOP_K
    operations = 3 * 2 * tokens * experts * inputs + 2 * pairs * RANK * (inputs + outputs)
    # The gates, the factors that are chosen if all choices differ, x once, y read and written.
    moved = 4 * experts * inputs + 2 * min(experts, pairs) * RANK * (inputs + outputs)
    moved += 2 * tokens * (inputs + 2 * outputs)
    return max(operations / speeds[0], moved / speeds[1])


def _ceilings(sizes: Sizes, device: str) -> tuple[float, float]:
    """Return operations per second of a large bfloat16 product, and bytes per second of a copy."""
    a_NN, b_NN = (
        torch.randn(sizes.square, sizes.square, device=device).bfloat16() for _ in range(2)
    )
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest(function: Callable[[], object]) -> float:
        return min(_seconds(function, a_NN.device) for _ in range(10))

    product = fastest(lambda: a_NN @ b_NN)
    copy = fastest(lambda: target.copy_(source))
    return 2 * sizes.square**3 / product, 2 * sizes.copied / copy


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a step as a CUDA graph; as it is where there is no GPU."""
    if not torch.cuda.is_available():
        return step
    # Warming up on another stream is what torch asks for; compilation is over after it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def main() -> None:
    """Measure, print the table and write it as parquet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any machine")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.toy:
        parser.error("there is no GPU: only --toy runs without one")
    torch.manual_seed(0)
    figures = measure(TOY if arguments.toy else REAL, device)
    print_table(figures)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(figure) for figure in figures]
    pq.write_table(pa.Table.from_pylist(rows), arguments.output / "gpu.parquet")


if __name__ == "__main__":
    main()
