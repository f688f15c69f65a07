"""Measure the cost of routing: a linear routed among E experts, relative to the frozen linear.

    python -m benchmarks.mix [--threads 1] [--device cuda]

For each shape it prints the time of the frozen linear, the lower bound given by the number of
operations, and the ratio (frozen + routed) / frozen of PHATGOOSE's routing for each way of mixing.
All ways run in one process; the numbers are medians of 21 rounds that alternate between the ways.
`phatgoose.ops.mix` chooses between `loop`, `grouped` and `dense`. `dense` evaluates every expert,
as PEFT's Arrow router does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops import mix, top_k_softmax
from phatgoose.ops.routing import gate_scorer

MIX: Any = sys.modules[mix.__module__]
ROUNDS = 21
RANK = 16


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    print("   in x out     E   K    T   frozen us  floor   loop  grouped  dense  chosen")
    for width, out in ((576, 576), (576, 1536), (2048, 2048)):
        for experts, top_k in ((8, 2), (8, 8), (36, 2), (166, 2)):
            for tokens in (1, 8, 64, 512):
                print(_line(width, out, experts, top_k, tokens), flush=True)


@torch.inference_mode()
def _line(width: int, out: int, experts: int, top_k: int, tokens: int) -> str:
    x_TD, weight_OD = torch.randn(tokens, width), torch.randn(out, width)
    lora_A_ERD = torch.randn(experts, RANK, width)
    lora_B_EOR = torch.randn(experts, out, RANK)
    score = gate_scorer(torch.randn(experts, width))

    def routed() -> Tensor:
        weights_TK, indices_TK = top_k_softmax(score(x_TD), top_k)
        added = mix(x_TD, lora_A_ERD, lora_B_EOR, indices_TK, weights_TK)
        return F.linear(x_TD, weight_OD) + added

    chosen = MIX._way
    ways: dict[str, tuple[Callable[..., str], Callable[[], Tensor]]] = {
        "frozen": (chosen, lambda: F.linear(x_TD, weight_OD)),
        "loop": (lambda *_: "loop", routed),
        "grouped": (lambda *_: "grouped", routed),
        "dense": (lambda *_: "dense", routed),
        "chosen": (chosen, routed),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, (decides, way) in ways.items():
            MIX._way = decides
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    MIX._way = chosen
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    scoring, mixing = 2 * experts * width, 2 * top_k * RANK * (width + out)
    floor = 1 + (scoring + mixing) / (2 * width * out)
    ratio = {name: f"{value / median['frozen']:.2f}" for name, value in median.items()}
    return (
        f"{width:5} x {out:4}  {experts:4} {top_k:3} {tokens:4}  {median['frozen'] * 1e6:9.0f}  "
        f"{floor:5.2f}  {ratio['loop']:>5}  {ratio['grouped']:>7}  {ratio['dense']:>5}  "
        f"{ratio['chosen']:>6}"
    )


if __name__ == "__main__":
    main()
