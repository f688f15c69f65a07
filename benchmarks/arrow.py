"""Compare the Arrow router with PEFT's own, over the same experts on SmolLM2-135M.

    python -m benchmarks.arrow [--experts 64] [--threads 2] [--rounds 3]

PEFT evaluates every expert for every token. Both sides get the exact leading singular vectors,
where PEFT iterates 15 times, so that they choose the same experts; their logits are compared first.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE, RANK, plain_base, random_pool
from benchmarks.timing import paired
from phatgoose.base import load_base
from phatgoose.card import Card, LoraFactors
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.ops.svd import thin_svd
from phatgoose.pool import Pool
from phatgoose.routers.arrow import Arrow

TOKENS, ROWS, TOP_K = 512, 4, 4
TARGET = 12.0


def write_adapters(pool: Pool, folder: Path) -> list[str]:
    """Write each expert of a pool as an adapter of PEFT, and return the folders."""
    folders = []
    for index, name in enumerate(pool.experts):
        linears = {
            linear: LoraFactors(factors.lora_A_ERD[index], factors.lora_B_EOR[index].contiguous())
            for linear, factors in pool.linears.items()
        }
        card = Card(
            name=name,
            task=name,
            base=BASE,
            base_fingerprint=pool.base_fingerprint,
            data_fingerprint="none",
            job=name,
            scale=1.0,
            recipe={},
            metrics={},
        )
        folders.append(str(folder / name))
        Expert(card, linears).to_peft(folders[-1])
    return folders


@torch.inference_mode()
def measure(threads: int = 2, rounds: int = 3, experts: int = 64) -> list[Figure]:
    """Return how many times as fast as PEFT's Arrow a pass of the routed model is."""
    torch.set_num_threads(threads)
    routed, theirs = load_base(BASE), plain_base()
    pool = random_pool(routed, experts)
    model = RoutedModel(routed, pool, Arrow(top_k=TOP_K, mix="outputs"))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        peft_model = create_arrow_model(
            theirs.model,
            write_adapters(pool, Path(folder)),
            ArrowConfig(top_k=TOP_K, router_temperature=1.0),
        ).eval()
    for name, module in peft_model.named_modules():
        if isinstance(module, ArrowLoraLinearLayer):
            linear = next(known for known in pool.linears if f"model.{known}." in name)
            factors = pool.linears[linear]
            _, v_ERD = thin_svd(factors.lora_A_ERD, factors.lora_B_EOR)
            module.register_buffer("prototypes", v_ERD[:, 0].contiguous(), persistent=False)
            module._protos_ready = True
    ids_BL = torch.randint(1000, 40000, (ROWS, TOKENS // ROWS))
    model.forward_context.announce("decoder", torch.ones_like(ids_BL, dtype=torch.bool))
    read = {"input_ids": ids_BL, "use_cache": False, "logits_to_keep": 1}
    ours, their_own = routed.model(**read).logits, peft_model(**read).logits
    difference = float((ours - their_own).abs().max() / their_own.abs().max())
    if difference > 1e-3:
        raise SystemExit(f"the two sides differ by {difference:.1e} of the largest logit")
    times = paired(
        {"ours": partial(routed.model, **read), "peft": partial(peft_model, **read)}, rounds
    )
    pairs = zip(times["ours"], times["peft"], strict=True)
    return [
        compare(
            f"passes/s, our Arrow / PEFT's, {experts} experts",
            [(1 / own, 1 / other) for own, other in pairs],
            better="higher",
            target=TARGET,
            note=f"{TOKENS} tokens, rank {RANK}, logits within {difference:.0e}",
        )
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
