"""BIG-bench's JSON tasks, read from its source distribution and formatted by its own rules.

A prompt without shots is

    task_prefix + example_input_prefix + input + [choice_prefix + choice]... + example_output_prefix

where the choices stand in an order that BIG-bench draws anew, with the same seed, for each example.
Distribution and task files are Apache-2.0; the data sets inside keep their own licences.
"""

import difflib
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.tasks.records import Record, Split, distinct, document_id, split_of
from phatgoose.cache import fetch_distribution
from phatgoose.errors import PhatgooseError

# bigbench: as BIG-bench prompts. paper: as PHATGOOSE's authors prompted BIG-bench, which is the
# same prompt, then "\nAnswer:", and the longest of the accepted answers as the target.
STYLES = ("bigbench", "paper")

# no_append: never list the choices in the prompt.
# short_prefix: keep only what follows the last "Prompt:" of a long task prefix.
LOAD_OPTS = ("no_append", "short_prefix")

SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks/"
_FILE = "/task.json"


def fetch_archive() -> Path:
    """The source distribution in the cache, fetched if need be; its hash is checked (seconds)."""
    return fetch_distribution("bigbench==1.0.0", "bigbench-1.0.0.tar.gz", SHA256, source=True)


def read_members(archive: Path, members: Iterable[str]) -> dict[str, bytes]:
    """Read the `task.json` of several tasks in one pass over the archive.

    Args:
        archive: the source distribution, a .tar.gz file.
        members: tasks, such as `operators` or `arithmetic/1_digit_addition`.

    Raises:
        PhatgooseError: the archive is damaged, or has no such task (near names are given).
    """
    wanted = set(members)
    found: dict[str, bytes] = {}
    names: list[str] = []
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for info in tar:
                if not (info.name.startswith(_ROOT) and info.name.endswith(_FILE)):
                    continue
                name = info.name[len(_ROOT) : -len(_FILE)]
                names.append(name)
                file = tar.extractfile(info) if name in wanted else None
                if file is not None:
                    found[name] = file.read()
                if len(found) == len(wanted):
                    return found
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise PhatgooseError(
            f"{archive} is damaged ({error}): delete it and start again to fetch it anew"
        ) from error
    missing = sorted(wanted - set(found))
    if missing:
        near = difflib.get_close_matches(missing[0], names, n=3)
        near = near or [name for name in names if missing[0] in name][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "see the task list of BIG-bench"
        raise PhatgooseError(f"BIG-bench has no task {', '.join(missing)}: {hint}")
    return found


def parse_member(member: str, source: bytes, load_opts: Mapping[str, bool]) -> dict[str, Any]:
    """Parse the `task.json` of a member and apply `LOAD_OPTS` to it.

    Raises:
        PhatgooseError: it is not JSON, has no examples of its own, or an option does not fit it.
    """
    try:
        definition: dict[str, Any] = json.loads(source)
    except ValueError as error:
        raise PhatgooseError(f"BIG-bench task {member} is not JSON ({error})") from error
    if not definition.get("examples"):
        raise PhatgooseError(
            f"BIG-bench task {member} has no examples of its own: name its subtasks ({member}/...)"
        )
    if load_opts.get("short_prefix"):
        _, found, last = definition.get("task_prefix", "").rpartition("Prompt:")
        if not found:
            raise PhatgooseError(
                f'the prefix of BIG-bench task {member} has no "Prompt:": leave out short_prefix'
            )
        definition["task_prefix"] = last.strip()
    if load_opts.get("no_append"):
        definition["append_choices_to_input"] = False
    return definition


def make_records(
    task: str, definitions: Iterable[Mapping[str, Any]], style: str
) -> dict[Split, list[Record]]:
    """Turn one or several BIG-bench tasks into the records of one task, by split.

    Args:
        task: the name of the resulting task.
        definitions: what `parse_member` returned for each of its members.
        style: one of `STYLES`.
    """
    splits: dict[Split, list[Record]] = {"train": [], "evaluation": []}
    for definition in definitions:
        for example in definition["examples"]:
            record = _record(task, definition, example, style)
            # Split by the bare input: the same question never stands on both sides, however its
            # choices differ. Some tasks have an empty one; there the prompt tells them apart.
            splits[split_of(task, example["input"].strip() or record.input)].append(record)
    return {split: distinct(records) for split, records in splits.items()}


def prompt_of(definition: Mapping[str, Any], example: Mapping[str, Any]) -> str:
    """The prompt of one example, without shots, by BIG-bench's rules.

    Args:
        definition: the `task.json`.
        example: one of its examples: `input`, and `target` or `target_scores`.
    """
    text = example["input"]
    # Taken as it is: six tasks say "false", a string, and BIG-bench appends their choices.
    if "target_scores" in example and definition.get("append_choices_to_input", True):
        choices = sorted(example["target_scores"])
        prefix = definition.get("choice_prefix", "\n  choice: ")
        text += "".join(prefix + choices[i] for i in _order(len(choices)))
    before = definition.get("task_prefix", "") + definition.get("example_input_prefix", "\nQ: ")
    return before + text + definition.get("example_output_prefix", "\nA: ")


def _record(
    task: str, definition: Mapping[str, Any], example: Mapping[str, Any], style: str
) -> Record:
    prompt = prompt_of(definition, example)
    choices: list[str] = []
    correct: list[int] = []
    if "target_scores" in example:
        choices = list(example["target_scores"])
        scores = list(example["target_scores"].values())
        # Where no score is above the others (or above 0, for a lone one), no choice is right.
        if max(scores) > (min(scores) if len(scores) > 1 else 0):
            correct = [i for i, score in enumerate(scores) if score == max(scores)]
        targets = [choices[i] for i in correct]
    else:
        target = example["target"]
        targets = [t.strip() for t in (target if isinstance(target, list) else [target])]
    if style == "paper":
        prompt = prompt.strip() + "\nAnswer: "  # the space goes to the answer
        targets = sorted(targets, key=len, reverse=True)
    return Record(task, document_id(task, prompt), prompt, targets, choices, correct)


@lru_cache
def _order(count: int) -> list[int]:
    """The order in which BIG-bench lists this many choices, as indices into the sorted choices."""
    order: list[int] = np.random.RandomState(42).permutation(count).tolist()
    return order
