"""Measure generation with stop strings against transformers' own `generate` of the base.

    python -m benchmarks.generation [--threads 2] [--rounds 3] [--limit 26]

Both sides start from 16 prompts of a task of the demo's suite as texts, and end each at a line
break. transformers gets `stop_strings`, as its documentation shows. The experts are random and so
weak that all sides write the same texts, which is checked. Each round runs all sides, one after the
other.
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE, plain_base, random_pool
from harness.tasks import prepare_all, task_specs
from harness.tasks.lm_eval_tasks import evaluation_table
from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel

MEMBER = "linguistic_mappings/pronoun_replacement_json"
BATCH, EXPERTS, STOP = 16, 8, "\n"


def measure(threads: int = 2, rounds: int = 3, limit: int = 26) -> list[Figure]:
    """Return the figures of 8 experts, and of the base alone.

    Args:
        threads: of each side.
        rounds: the median is over so many.
        limit: the most tokens of a text.
    """
    torch.set_num_threads(threads)
    prompts = _prompts()
    base, theirs = load_base(BASE), plain_base()
    model = RoutedModel(base, random_pool(base, EXPERTS, scale=1e-4))

    def ours() -> list[str]:
        return model.generate(prompts, limit, stops=[STOP])

    sides: dict[str, Callable[[], list[str]]] = {
        "transformers": lambda: _with_transformers(theirs, prompts, limit),
        "base": ours,
        "phatgoose": ours,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        texts = {}
        for side, write in sides.items():
            if side != "transformers":
                model.set_router(side)
            started = time.perf_counter()
            texts[side] = write()
            if number > 0:  # the first round is for what is made once
                seconds[side].append(time.perf_counter() - started)
        if not texts["transformers"] == texts["base"] == texts["phatgoose"]:
            raise SystemExit("the texts differ")
    written = [len(base.tokenizer(text)["input_ids"]) for text in texts["base"]]
    note = f"{BATCH} texts of {min(written)} to {max(written)} tokens, {threads} threads"
    baseline = seconds["transformers"]

    def figure(side: str, target: float | None) -> Figure:
        name = f"generation, {side} / transformers"
        pairs = zip(seconds[side], baseline, strict=True)
        return compare(name, pairs, target=target, note=note)

    return [figure("phatgoose", 1.5), figure("base", None)]


def _prompts() -> list[str]:
    group = {"name": "demo", "split": "all", "limit": BATCH}
    (task,) = prepare_all(task_specs({**group, "tasks": {"pronouns": {"members": [MEMBER]}}}))
    prompts: list[str] = evaluation_table(task)["input"].to_pylist()
    return [prompt.rstrip(" ") for prompt in prompts]


def _with_transformers(base: Base, prompts: list[str], limit: int) -> list[str]:
    """Generate as a user of transformers does."""
    tokenizer = base.tokenizer
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        ids_BL = base.model.generate(  # type: ignore[operator]  # a mixin hides its type
            **inputs,
            max_new_tokens=limit,
            do_sample=False,
            stop_strings=[STOP],
            tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id,
        )
    written = ids_BL[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text.split(STOP)[0] for text in texts]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=26, help="tokens of a text")
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
