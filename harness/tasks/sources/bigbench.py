"""Read BIG-bench's JSON tasks from its source distribution and format them by its own rules.

A prompt without shots is

    task_prefix + example_input_prefix + input + [choice_prefix + choice]... + example_output_prefix

where BIG-bench shuffles the choices of each example with the same seed. The distribution and the
task files are Apache-2.0; the data sets inside keep their own licenses.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.tasks.files import open_archive
from harness.tasks.records import (
    Record,
    Split,
    check_record,
    identity_text,
    named,
    split_of,
)
from harness.tasks.sources.source import TaskRecords, no_tasks, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.cache import fetch_distribution
from phatgoose.errors import PhatgooseError, did_you_mean


@dataclass(frozen=True)
class Options:
    """Options for reading the members of a task. All are off by default.

    Attributes:
        no_append: never list the choices in the prompt.
        short_prefix: keep only the text after the last "Prompt:" of a long task prefix.
        first_line: keep only the first line of a long task prefix.
        kshot: number of training examples of the same member to put before each prompt, for
            members whose rule cannot be guessed without examples.
        choices: the answers to choose from, for members whose targets are among them.
        balance: keep the same number of examples for each target, the first ones by hash.
        cap: maximum number of examples to keep, the first ones by hash.
        skip_empty: skip examples whose target is empty. Without it they are an error.
    """

    no_append: bool = False
    short_prefix: bool = False
    first_line: bool = False
    kshot: int = 0
    choices: list[str] | None = None
    balance: bool = False
    cap: int = 0
    skip_empty: bool = False


expand = no_tasks
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
_FILE = "/task.json"


def fetch_archive() -> Path:
    """Return the cached source distribution, downloaded if needed. Checks its hash (seconds)."""
    return fetch_distribution("bigbench==1.0.0", "bigbench-1.0.0.tar.gz", SHA256, source=True)


def check(spec: TaskSpec) -> None:
    """Reject unknown options and invalid values."""
    options = options_of(Options, spec)
    for name, value in (("kshot", options.kshot), ("cap", options.cap)):
        if value < 0:
            raise PhatgooseError(
                f"task {spec.name}: load_opts.{name}={value}: it must be at least 0"
            )
    choices = options.choices
    if choices is not None and (
        not isinstance(choices, list)
        or not all(isinstance(choice, str) for choice in choices)
        or not 1 < len(set(choices)) == len(choices)
    ):
        raise PhatgooseError(
            f"task {spec.name}: load_opts.choices={choices!r}: give two or more different answers, "
            "such as ['Yes.', 'No.'] (in YAML, yes and no need quotes)"
        )


def identity(spec: TaskSpec) -> Any:
    """Return the hash of the archive."""
    return SHA256


def missing(spec: TaskSpec) -> str | None:
    """Return None: a missing archive is only noticed when it is downloaded."""


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks in one pass over the archive, downloading it if needed."""
    return read_archive(fetch_archive(), specs)


def read_archive(archive: Path, specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks in one pass over an archive, each as soon as all its members are found.

    Args:
        archive: the source distribution, a .tar.gz file.
        specs: the tasks; a member is a task of BIG-bench, such as `operators` or
            `arithmetic/1_digit_addition`, or a pattern such as `mult_data_wrangling/*_dates_1`.

    Raises:
        PhatgooseError: the archive is damaged, or has no such task (similar names are suggested).
    """
    waiting = dict(enumerate(specs))
    seen: list[str] = []
    kept: dict[int, dict[str, Any]] = {number: {} for number in waiting}
    with open_archive(archive) as tar:
        for info in tar:
            if not (info.name.startswith(_ROOT) and info.name.endswith(_FILE)):
                continue
            member = info.name[len(_ROOT) : -len(_FILE)]
            seen.append(member)
            takers = [n for n, s in waiting.items() if _is_among(member, s.members)]
            file = tar.extractfile(info) if takers else None
            if file is None:
                continue
            source = file.read()
            for number in takers:
                spec, found = waiting[number], kept[number]
                found[member] = parse_member(member, source, options_of(Options, spec))
                if found.keys() == set(spec.members):  # no pattern may match more
                    del waiting[number]
                    yield _task(spec, kept.pop(number))
            if not waiting:
                return
    for number, spec in waiting.items():
        _check_all_found(spec, seen)
        yield _task(spec, kept.pop(number))


def _is_among(member: str, members: Sequence[str]) -> bool:
    return member in members or any("*" in m and fnmatch.fnmatchcase(member, m) for m in members)


def _check_all_found(spec: TaskSpec, names: Sequence[str]) -> None:
    for member in spec.members:
        if any(_is_among(name, [member]) for name in names):
            continue
        hint = did_you_mean(member, names) or "see the task list of BIG-bench"
        raise PhatgooseError(f"task {spec.name}: BIG-bench has no task {member}: {hint}")


def _task(spec: TaskSpec, definitions: Mapping[str, dict[str, Any]]) -> TaskRecords:
    # Keep BIG-bench's canary, so that the text can be filtered from training corpora.
    canary = "\n".join(sorted({str(d.get("canary", "")) for d in definitions.values()}))
    about = [str(d["description"]) for d in definitions.values() if d.get("description")]
    return TaskRecords(
        spec,
        make_records(spec, definitions),
        description="; ".join(dict.fromkeys(about)),
        origin={"release": "BIG-bench 1.0.0", "canary": canary},
    )


def parse_member(member: str, source: bytes, options: Options) -> dict[str, Any]:
    """Parse the `task.json` of a member and apply the options that concern its prompts.

    Raises:
        PhatgooseError: it is not JSON, has no examples of its own, or an option does not apply.
    """
    try:
        definition: dict[str, Any] = json.loads(source)
    except ValueError as error:
        raise PhatgooseError(f"BIG-bench task {member} is not JSON ({error})") from error
    if not definition.get("examples"):
        raise PhatgooseError(
            f"BIG-bench task {member} has no examples of its own. Name its subtasks ({member}/...)."
        )
    prefix = definition.get("task_prefix", "")
    if options.short_prefix:
        _, found, last = prefix.rpartition("Prompt:")
        if not found:
            raise PhatgooseError(
                f'the prefix of BIG-bench task {member} has no "Prompt:". Remove short_prefix.'
            )
        definition["task_prefix"] = last.strip()
    if options.first_line:
        definition["task_prefix"] = prefix.strip().partition("\n")[0]
    if options.no_append:
        definition["append_choices_to_input"] = False
    return definition


def make_records(
    spec: TaskSpec, definitions: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Split, Record]]:
    """Turn one or several BIG-bench tasks into the records of one task.

    Args:
        spec: the task.
        definitions: the results of `parse_member` by member.

    Raises:
        PhatgooseError: an example is invalid; the message gives its member and number.
    """
    options = options_of(Options, spec)
    places = [
        (member, number)
        for member in _in_order(spec, definitions)
        for number, example in enumerate(definitions[member]["examples"])
        if not (options.skip_empty and "target" in example and not any(_targets(example)))
    ]
    if options.balance or options.cap:
        places = _some(spec, places, definitions, options)
    for member, number in places:
        definition = definitions[member]
        example = definition["examples"][number]
        record = _record(spec, definition, number, options)
        check_record(record, f"task {spec.name}: BIG-bench task {member}, example {number + 1}")
        # Split by the bare input, so that the same question with different choices is never in
        # both splits. Some tasks have empty inputs; prompt and answers identify those examples.
        yield split_of(spec.name, example["input"].strip() or identity_text(record)), record


def _in_order(spec: TaskSpec, definitions: Mapping[str, Any]) -> list[str]:
    """Return the members in the task's order; the matches of one pattern are sorted by name."""
    found = (m for pattern in spec.members for m in sorted(definitions) if _is_among(m, [pattern]))
    return list(dict.fromkeys(found))


def _some(
    spec: TaskSpec,
    places: list[tuple[str, int]],
    definitions: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> list[tuple[str, int]]:
    """Return the examples that `balance` and `cap` keep, the first ones by hash."""

    def example(place: tuple[str, int]) -> Mapping[str, Any]:
        return definitions[place[0]]["examples"][place[1]]

    first: dict[str, tuple[str, int]] = {}
    for member, number in places:
        record = _record(spec, definitions[member], number, options)
        first.setdefault(record.document, (member, number))
    chosen = [first[document] for document in sorted(first)]
    if options.balance:
        labels = [
            json.dumps(example(p).get("target", example(p).get("target_scores"))) for p in chosen
        ]
        least, taken = min(Counter(labels).values()), Counter[str]()
        balanced = []
        for place, label in zip(chosen, labels, strict=True):
            taken[label] += 1
            if taken[label] <= least:
                balanced.append(place)
        chosen = balanced
    return chosen[: options.cap or None]


def prompt_of(definition: Mapping[str, Any], example: Mapping[str, Any], shots: str = "") -> str:
    """Return the prompt of one example by BIG-bench's rules.

    Args:
        definition: the parsed `task.json`.
        example: one of its examples: `input`, and `target` or `target_scores`.
        shots: other examples with their answers, inserted after the task's prefix.
    """
    text = example["input"]
    # Not parsed as a boolean: six tasks have the string "false", and BIG-bench appends choices.
    if "target_scores" in example and definition.get("append_choices_to_input", True):
        choices = sorted(example["target_scores"])
        prefix = definition.get("choice_prefix", "\n  choice: ")
        text += "".join(prefix + choices[i] for i in _order(len(choices)))
    text = definition.get("example_input_prefix", "\nQ: ") + text
    text += definition.get("example_output_prefix", "\nA: ")
    return str(definition.get("task_prefix", "")) + shots + text


def _record(spec: TaskSpec, definition: Mapping[str, Any], number: int, options: Options) -> Record:
    example = definition["examples"][number]
    prompt = prompt_of(definition, example, _shots(spec.name, definition, number, options.kshot))
    choices: list[str] = []
    grades: list[float] = []
    correct: list[int] = []
    if "target_scores" in example:
        choices = list(example["target_scores"])
        grades = [float(score) for score in example["target_scores"].values()]
        # No choice is correct unless a score exceeds the others (or 0, for a single choice).
        if max(grades) > (min(grades) if len(grades) > 1 else 0):
            correct = [i for i, grade in enumerate(grades) if grade == max(grades)]
        targets = [choices[i] for i in correct]
    else:
        targets = _targets(example)
        if options.choices:
            choices, grades = options.choices, [float(c in targets) for c in options.choices]
            correct = [i for i, choice in enumerate(choices) if choice in targets]
    if spec.style == "paper":
        prompt = prompt.strip() + "\nAnswer: "  # the space belongs to the answer
        targets = sorted(targets, key=len, reverse=True)
    record = Record(spec.name, "", prompt, targets, choices, correct, grades, example["input"])
    return named(record)


def _targets(example: Mapping[str, Any]) -> list[str]:
    target = example["target"]
    return [text.strip() for text in (target if isinstance(target, list) else [target])]


def _answer(example: Mapping[str, Any]) -> str:
    """Return the answer of a shot: as in BIG-bench, the target if there is one."""
    if "target" in example:
        return _targets(example)[0]
    scores: Mapping[str, float] = example["target_scores"]
    return max(scores, key=scores.__getitem__)


def _shots(task: str, definition: Mapping[str, Any], number: int, count: int) -> str:
    """Return the first other training examples with answers, joined as in BIG-bench."""
    if not count:
        return ""
    separator = definition.get("few_shot_example_separator", "\n")
    bare = {**definition, "task_prefix": ""}
    shots = []
    for place, example in enumerate(definition["examples"]):
        if place != number and split_of(task, example["input"]) == "train":
            shots.append(prompt_of(bare, example) + _answer(example) + separator)
        if len(shots) == count:
            break
    return "".join(shots)


@lru_cache
def _order(count: int) -> list[int]:
    """Return BIG-bench's order of this many choices, as indices into the sorted choices."""
    order: list[int] = np.random.RandomState(42).permutation(count).tolist()
    return order
