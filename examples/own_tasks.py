"""Train experts on your own tasks, route among them, and see which experts each token used.

    python examples/own_tasks.py                                 # the three small tasks in data/
    python examples/own_tasks.py a.jsonl b.jsonl c.jsonl --base /models/my-llama --steps 100

Each file is one task, and each line is one example: {"input": "What is 2 + 2?", "target": "4"}.
Every fifth example is held out of training. Neither Ray nor Hydra is needed. With the default base,
whose weights come from the package index, a task takes about half a minute on one core.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from phatgoose import (
    Base,
    Card,
    Example,
    Expert,
    PhatgooseError,
    Pool,
    Recipe,
    RoutedModel,
    RoutingLog,
    Stage,
    load_base,
    train_expert,
)
from phatgoose.card import validate_name
from phatgoose.inference.token_view import to_html, to_terminal, token_routes
from phatgoose.training.train import CurveRow, Hooks

DATA = Path(__file__).parent / "data"
SHOWN = 3


@dataclass(frozen=True)
class Task:
    """The examples of one file."""

    name: str
    fingerprint: str
    train: list[Example]
    held_out: list[Example]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the tasks, train an expert for each, route among them, and show the routes."""
    options = parse(arguments)
    tasks = [read_task(file) for file in options.files]
    if len({task.name for task in tasks}) < len(tasks):
        raise PhatgooseError(
            "two files have the same name, and names identify experts. Rename one."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        scale=1.0,
        init_std=0.04,
        lora=Stage(steps=options.steps, lr=1.5e-3),
        gates=Stage(steps=max(1, options.steps // 3), lr=1e-2),
        batch_size=8,
        evaluation_examples=16,
        validate_every=0,
        dtype="float32",
    )
    base = load_base(options.base)
    linear = options.linear or base.linears[len(base.linears) // 3]
    if linear not in base.linears:  # checked before the training
        raise PhatgooseError(
            f"--linear={linear}: no such linear. Use one such as {base.linears[0]}."
        )
    experts = []
    for task in tasks:
        expert = train(base, task, recipe)
        expert.save(options.out / f"{task.name}.arrow")
        experts.append(expert)

    model = RoutedModel(base, Pool.from_experts(experts), "phatgoose")
    for task in tasks:
        compare(model, task)

    # One text made of all tasks: every token is routed to its own experts.
    text = "\n".join(e.input + e.target for e in (task.held_out[0] for task in tasks))
    routes = token_routes(model, text, linear)
    print(f"\nExperts of each token at {linear}:\n\n{to_terminal(routes, model.pool.experts)}")
    page = options.out / "routes.html"
    page.write_text(to_html(routes, model.pool.experts, f"Experts at {linear}"), encoding="utf-8")
    print(f"\nSaved the routes as a page, {page}, and the experts as {options.out}/*.arrow")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train experts on your own tasks, and route among them."
    )
    default = [DATA / "capitals.jsonl", DATA / "count.jsonl", DATA / "opposites.jsonl"]
    parser.add_argument(
        "files", nargs="*", type=Path, default=default, help="JSON Lines files, one task each"
    )
    parser.add_argument("--base", default="smollm2-135m", help="a name, a directory or a hub id")
    parser.add_argument(
        "--steps", type=int, default=24, help="LoRA steps; gates train for a third of them"
    )
    parser.add_argument(
        "--linear", help="linear whose routes are shown (default: one after a third)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/own_tasks"), help="output folder")
    return parser.parse_args(arguments)


def read_task(file: Path) -> Task:
    """Read one file, and hold out every fifth example of a shuffled order."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PhatgooseError(f"cannot read {file}: {error.strerror}") from error
    examples = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # The target follows the input directly, so the input must end with a space.
            examples.append(Example(row["input"].rstrip() + " ", row["target"].strip()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PhatgooseError(
                f'{file}, line {number}: invalid. Write {{"input": "text", "target": "text"}}.'
            ) from error
    if len(examples) < 10:
        raise PhatgooseError(f"{file}: only {len(examples)} examples. Give at least 10.")
    random.Random(0).shuffle(examples)
    fingerprint = hashlib.sha256(content).hexdigest()
    held_out = examples[::5]
    return Task(
        name=validate_name(file.stem),
        fingerprint=fingerprint,
        train=[example for example in examples if example not in held_out],
        held_out=held_out,
    )


def train(base: Base, task: Task, recipe: Recipe) -> Expert:
    """Train one expert and its gates, and print the progress."""

    def report(progress: CurveRow) -> None:
        done = progress.step + 1
        if progress.split == "train" and (done == 1 or done % 8 == 0):
            rate = done / progress.seconds
            print(
                f"{task.name}: {progress.stage} step {done}, loss {progress.loss:.2f}, "
                f"{rate:.2f} steps/s, {progress.tokens / progress.seconds:.0f} tokens/s",
                flush=True,
            )

    card = Card(
        name=task.name,
        task=task.name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        data_fingerprint=task.fingerprint,
        job="examples/own_tasks.py",
        scale=recipe.scale,
        recipe=asdict(recipe),
        metrics={},
    )
    return train_expert(base, card, task.train, task.held_out, recipe, Hooks(report=report))


def compare(model: RoutedModel, task: Task) -> None:
    """Print the answers of the base and the routed model, and the experts' shares."""
    model.set_router("base")
    base_answers = answer(model, task)
    model.set_router("phatgoose")
    with model.recording(RoutingLog()) as log:
        routed_answers = answer(model, task)
    targets = [example.target for example in task.held_out]

    print(f"\n{task.name}, {len(targets)} held-out examples")
    answers = zip(task.held_out[:SHOWN], base_answers, routed_answers, strict=False)
    for example, before, after in answers:
        print(f"  {example.input!r}")
        print(f"    base {before!r}, routed {after!r}, correct {example.target!r}")
    print(
        f"  correct: base {right(base_answers, targets)}, routed {right(routed_answers, targets)}"
    )
    weights_E = torch.stack(list(log.weights.values())).sum(dim=0) / sum(log.tokens.values())
    shares = zip(model.pool.experts, weights_E.tolist(), strict=True)
    print("  experts, over all linears: " + ", ".join(f"{name} {x:.0%}" for name, x in shares))


def answer(model: RoutedModel, task: Task) -> list[str]:
    """Return the first line of the model's answer to each held-out input."""
    prompts = [example.input for example in task.held_out]
    return [text.strip() for text in model.generate(prompts, 16, stops=["\n"])]


def right(answers: list[str], targets: list[str]) -> str:
    """Return how many answers equal the target exactly."""
    correct = sum(a == t for a, t in zip(answers, targets, strict=True))
    return f"{correct} of {len(targets)} ({correct / len(targets):.0%})"


if __name__ == "__main__":
    try:
        main()
    except PhatgooseError as error:
        sys.exit(f"error: {error}")
