"""What routing costs: one adapted linear, routed among E experts, over the frozen linear alone.

    python benchmarks/mix.py [--threads 1]

Prints, for each shape, the frozen linear's time, the floor that the operations set, and the ratio
(frozen + routed) / frozen of PHATGOOSE's routing with each way of mixing, all in one process:
medians of 21 rounds that take the ways in turn. `loop` and `grouped` are what `phatgoose.ops.mix`
chooses between; `dense` evaluates every expert for every token, as PEFT's Arrow router does.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.ops import mix, mix_reference, standardise
from phatgoose.ops.route import route_standardised

MIX = sys.modules[mix.__module__]
ROUNDS = 21
RANK, TOP_K = 16, 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print("in x out     E    T   frozen us  floor   loop  grouped  chosen  dense")
    for width, out in ((576, 576), (576, 1536), (2048, 2048)):
        for experts in (8, 166):
            for tokens in (1, 8, 64, 512):
                print(_line(width, out, experts, tokens), flush=True)


@torch.inference_mode()
def _line(width: int, out: int, experts: int, tokens: int) -> str:
    x_TD, weight_OD = torch.randn(tokens, width), torch.randn(out, width)
    lora_A_ERD = torch.randn(experts, RANK, width)
    lora_B_EOR = torch.randn(experts, out, RANK)
    gates_ED = standardise(torch.randn(experts, width))

    def routed(how: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            weights_TK, indices_TK = route_standardised(x_TD, gates_ED, TOP_K)
            added = how(x_TD, lora_A_ERD, lora_B_EOR, indices_TK, weights_TK)
            return F.linear(x_TD, weight_OD) + added

        return call

    chosen = MIX._use_grouped
    # Name, what decides between the two products, and what to call.
    ways = [
        ("frozen", chosen, lambda: F.linear(x_TD, weight_OD)),
        ("loop", lambda *_: False, routed(mix)),
        ("grouped", lambda *_: True, routed(mix)),
        ("chosen", chosen, routed(mix)),
    ]
    if tokens * experts <= 20_000:  # beyond that, dense takes gigabytes
        ways.append(("dense", chosen, routed(mix_reference)))
    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(ROUNDS + 1):
        for name, decides, way in ways:
            MIX._use_grouped = decides
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    MIX._use_grouped = chosen
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    scoring, mixing = 2 * experts * width, 2 * TOP_K * RANK * (width + out)
    floor = 1 + (scoring + mixing) / (2 * width * out)
    ratio = {name: f"{value / median['frozen']:.2f}" for name, value in median.items()}
    return (
        f"{width} x {out}  {experts:4} {tokens:4}  {median['frozen'] * 1e6:9.0f}  {floor:5.2f}  "
        f"{ratio['loop']:>5}  {ratio['grouped']:>7}  {ratio['chosen']:>6}  "
        f"{ratio.get('dense', '-'):>5}"
    )


if __name__ == "__main__":
    main()
