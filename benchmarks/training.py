"""Measure training: optimizer steps per second over those of PEFT, on batches of the demo's tasks.

    OMP_NUM_THREADS=1 python -m benchmarks.training [--threads 1] [--rounds 4]

PEFT runs from its published package over the same base, with the same rank on the same linears, in
the loop that its documentation shows: padded batches, and a loss over the logits of all positions.
A second loop gives PEFT what this project does about logits, which it computes only where there is
a target. All loops take turns on the same batches in one process. A figure is the median of the
ratios of such pairs. The floor is the ratio of operations: of the frozen linears in the forward
pass and for the gradients of their inputs, of LoRA, and of the vocabulary projection. Where frozen
linears use oneDNN (see `phatgoose.ops.frozen_linear`) a ratio may be beyond it, because PEFT's use
MKL: compare with PHATGOOSE_LINEAR=torch.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE
from harness.config.load import load_config
from harness.tasks import prepare_all, prepare_here
from harness.training.examples import job_examples
from phatgoose.architecture import linear_sizes
from phatgoose.base import Base, load_base, locate_base
from phatgoose.inference.scoring import logits_at
from phatgoose.ops.frozen_linear import library
from phatgoose.question import Question
from phatgoose.rows import pad_rows
from phatgoose.training.engine import PlainEngine, TargetLoss
from phatgoose.training.gated_lora import attach_lora
from phatgoose.training.recipe import Recipe
from phatgoose.training.trainer import Hooks, TrainingJob

Step = Callable[[list[Question]], float]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    print_table(measure(threads=arguments.threads, rounds=arguments.rounds))


def measure(*, threads: int = 1, rounds: int = 4) -> list[Figure]:
    """Measure steps of both stages against both loops of PEFT."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        recipe, base, batches = _batches()
        steps = {
            "lora": _our_steps(load_base(BASE), recipe, gates=False),
            "gates": _our_steps(load_base(BASE), recipe, gates=True),
            **_peft_steps(base, recipe, batches[0]),
        }
        seconds = _in_turn(steps, batches, rounds)
    finally:
        torch.set_num_threads(before)
    floors = _floors(base, recipe, batches)

    def figure(name: str, ours: str, other: str, target: float | None, floor: str) -> Figure:
        pairs = zip(seconds[ours], seconds[other], strict=True)
        return compare(
            f"training, {name}",
            [(1 / own, 1 / theirs) for own, theirs in pairs],
            better="higher",
            target=target,
            floor=floors[floor],
            note=f"steps/s, {threads} thread(s), frozen linears by {library()}",
        )

    return [
        figure("LoRA steps / PEFT, all logits", "lora", "peft", 1.5, "peft"),
        figure("LoRA steps / PEFT, logits at targets", "lora", "peft at targets", 1.15, "targets"),
        figure("gate steps / our LoRA steps", "gates", "lora", None, "gates"),
    ]


def _batches() -> tuple[Recipe, Base, list[list[Question]]]:
    """Return the demo's recipe, the base, and one batch of each task of the demo."""
    config = load_config(["pool=demo", "run.dir=/"])
    base, batches = load_base(BASE), []
    for data in prepare_all(tuple(config.pool_tasks()), prepare_here):
        train, evaluation = job_examples(base, [data], config.train, config.train.steps)
        job = TrainingJob(base, {}, train, evaluation[:1], config.train, Hooks())
        batch = [job.encode(job.train[index]) for index in next(job.order(0))]
        batches.append(sorted(batch, key=lambda question: question.length))
    return config.train, base, batches


def _in_turn(
    steps: dict[str, Step], batches: list[list[Question]], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each step, after a first round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for batch in batches:
            losses = {}
            for name, step in steps.items():
                started = time.perf_counter()
                losses[name] = step(batch)
                if number:
                    seconds[name].append(time.perf_counter() - started)
            if not number and batch is batches[0]:  # nothing was trained yet
                assert abs(losses["lora"] - losses["peft"]) < 1e-4, losses
    return seconds


def _our_steps(base: Base, recipe: Recipe, *, gates: bool) -> Step:
    layers = attach_lora(
        base.model,
        base.linears,
        rank=recipe.rank,
        scale=recipe.scale,
        init_std=recipe.init_std,
        seed=recipe.seed,
    )
    parameters = [p for layer in layers.values() for p in (layer.lora_A_RD, layer.lora_B_OR)]
    stage = recipe.lora
    if gates:
        assert recipe.gates is not None
        stage = recipe.gates
        for layer in layers.values():
            layer.add_gate()
        parameters = [layer.gate_D for layer in layers.values() if layer.gate_D is not None]
    engine = PlainEngine(TargetLoss(base, recipe.dtype), parameters, stage, recipe)

    def step(batch: list[Question]) -> float:
        loss = engine.loss(batch)
        engine.backward(loss / _targets(batch))
        engine.step()
        return float(loss.detach()) / _targets(batch)

    return step


def _peft_steps(base: Base, recipe: Recipe, example: list[Question]) -> dict[str, Step]:
    """Return the loops of PEFT, which train one model: over all logits, and at targets only."""
    plain = AutoModelForCausalLM.from_pretrained(locate_base(BASE), dtype=torch.float32)
    options = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=round(recipe.scale * recipe.rank),
        target_modules=list(base.linears),
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(plain, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lora.lr)
    inner = dataclasses.replace(base, model=model.get_base_model())

    def over_all_logits(batch: list[Question]) -> Tensor:
        rows, mask_BL = _rows(base, batch)
        labels = rows.masked_fill(mask_BL == 0, -100)
        for row, question in enumerate(batch):
            labels[row, : len(question.context)] = -100
        loss: Tensor = model(input_ids=rows, attention_mask=mask_BL, labels=labels).loss
        return loss

    def at_targets(batch: list[Question]) -> Tensor:
        rows, mask_BL = _rows(base, batch)
        places = [
            (row, len(question.context) - 1 + index)
            for row, question in enumerate(batch)
            for index in range(len(question.choices[0]))
        ]
        rows_N, columns_N = torch.tensor(places).T
        with logits_at(inner, rows_N, columns_N):
            logits_NV = model(input_ids=rows, attention_mask=mask_BL, use_cache=False).logits[0]
        targets = [token for question in batch for token in question.choices[0]]
        return F.cross_entropy(logits_NV, torch.tensor(targets))

    def step(loss_of: Callable[[list[Question]], Tensor], batch: list[Question]) -> float:
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    with torch.no_grad():
        assert abs(over_all_logits(example) - at_targets(example)) < 1e-4
    return {
        "peft": functools.partial(step, over_all_logits),
        "peft at targets": functools.partial(step, at_targets),
    }


def _rows(base: Base, batch: list[Question]) -> tuple[Tensor, Tensor]:
    # The last token of a target is in the labels only.
    whole = [[*question.context, *question.choices[0]] for question in batch]
    return pad_rows(whole, base.tokenizer.pad_token_id)


def _targets(batch: list[Question]) -> int:
    return sum(len(question.choices[0]) for question in batch)


def _floors(base: Base, recipe: Recipe, batches: list[list[Question]]) -> dict[str, float]:
    """Return the ratios of operations, summed over the batches."""
    sizes = [linear_sizes(base.model.get_submodule(name)) for name in base.linears]
    frozen = sum(2 * 2 * inputs * outputs for inputs, outputs in sizes)  # per token
    lora = sum(2 * recipe.rank * (inputs + outputs) for inputs, outputs in sizes)
    head = base.model.get_output_embeddings()
    logits = 2 * 2 * head.weight.numel()
    tokens = sum(question.length - 1 for batch in batches for question in batch)
    padded = sum(len(batch) * max(q.length for q in batch) for batch in batches)
    targets = sum(map(_targets, batches))
    # Each of LoRA's two products has a gradient for both of its factors; a gate needs one of them.
    ours = tokens * (frozen + 3 * lora) + targets * logits
    return {
        "peft": padded * (frozen + 3 * lora + logits) / ours,
        "targets": (padded * (frozen + 3 * lora) + targets * logits) / ours,
        "gates": ours / (tokens * (frozen + 2 * lora) + targets * logits),
    }


if __name__ == "__main__":
    main()
