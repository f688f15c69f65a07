"""Check, before anything is trained, that the base can answer the suites' requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.evaluation.encoding import encode
from harness.evaluation.requests import SuiteRequests
from harness.tasks import TaskData
from harness.tasks.generation_options import generation_options
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.sources.lm_eval import load_task
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.tokenization import encode_pairs, max_length, prompt_room


def check_suite(base: Base, suite: Mapping[str, Any], tasks: Sequence[TaskData]) -> None:
    """Refuse a suite with a task that the base cannot answer.

    Args:
        base: the base; its weights are not needed.
        suite: the suite's YAML file as a dictionary.
        tasks: the data of its tasks.

    Raises:
        PhatgooseError: a generation option is not supported, a task generates more tokens than the
            base has positions, or an answer has no token or more than the base reads.
    """
    for data in tasks:
        try:
            _check_generation(base, data)
            _check_answers(base, data)
        except PhatgooseError as error:
            raise PhatgooseError(f"suite {suite['name']}, task {data.name}: {error}") from error


def check_lengths(base: Base, requests: SuiteRequests) -> None:
    """Refuse prompts that would be cut, for `suite.too_long=refuse`.

    Raises:
        PhatgooseError: there are such prompts. The message counts them by task.
    """
    counts: dict[str, int] = {}
    for name, task in requests.tasks.items():
        for asked in task.asked(name).values():
            for one in encode(base, [each.request for each in asked], ""):
                limit = one.request.max_new_tokens
                is_cut = bool(limit) and len(one.prompt) > prompt_room(base, limit)
                if is_cut or (one.question is not None and one.question.is_cut(base)):
                    counts[name] = counts.get(name, 0) + 1
    if counts:
        listed = ", ".join(f"{count} of {task}" for task, count in counts.items())
        raise PhatgooseError(
            f"suite.too_long=refuse: base {base.name} reads {max_length(base)} tokens, and prompts "
            f"are longer ({listed}). Leave these tasks out, or set suite.too_long=cut."
        )


def _check_generation(base: Base, data: TaskData) -> None:
    """Check a task's generation options, and that they leave room for a prompt."""
    if data.kind != "generation":
        return
    limit = data.spec.max_new_tokens
    if data.spec.source == "lm_eval":
        task = load_task(data.spec)
        if task.OUTPUT_TYPE != "generate_until":
            return
        limit = generation_options(data.name, task.config.generation_kwargs).max_new_tokens
    prompt_room(base, limit)


def _check_answers(base: Base, data: TaskData) -> None:
    """Check that each answer to score has a token, and that the base reads all its tokens."""
    rows = evaluation_table(data).to_pylist()
    answers = {a: row for row in rows for a in row["choices"] or row["targets"][:1]}
    names = [f"document {row['document']}" for row in answers.values()]
    encoded = encode_pairs(base, [("", answer) for answer in answers], names=names)
    room = max_length(base)
    for (answer, row), (_, ids) in zip(answers.items(), encoded, strict=True):
        if len(ids) - 1 > room:
            raise PhatgooseError(
                f"document {row['document']}: the answer {answer[:40]!r}... has {len(ids) - 1} "
                f"tokens, and base {base.name} reads {room}. Leave the task out."
            )
