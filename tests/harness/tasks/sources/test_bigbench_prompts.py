"""Compare prompts of ten BIG-bench tasks with ones written by hand, and read the real archive.

The tests of the archive are skipped if it is not in the user's cache. The prefixes are the tasks'
own; task prefixes are shortened, and examples are invented.
"""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness.conf
from harness.tasks import TaskSpec, folder_of, task_specs, write_all
from harness.tasks.records import Record
from harness.tasks.sources.bigbench import SHA256, make_records, read_archive
from harness.tasks.store import read_records, read_task
from phatgoose.cache import cache_dir, check_sha256

# The user's cache, looked up on import because tests have a separate one.
ARCHIVE = cache_dir() / "downloads" / "bigbench-1.0.0.tar.gz"
YES_NO = {"Yes": 1, "No": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "arithmetic": (
        {},
        {"input": "What is 1 plus 2?", "target_scores": {"3": 1, "4": 0}},
        "\nQ: What is 1 plus 2?\n  choice: 4\n  choice: 3\nA: ",
        "Q: What is 1 plus 2?\n  choice: 4\n  choice: 3\nA:\nAnswer: ",
    ),
    "operators": (
        {
            "task_prefix": "Compute.",
            "example_input_prefix": "\n",
            "example_output_prefix": " = ",
        },
        {"input": "op i = i + 1. op 2", "target": "3"},
        "Compute.\nop i = i + 1. op 2 = ",
        "Compute.\nop i = i + 1. op 2 =\nAnswer: ",
    ),
    "plural": (
        {
            "example_input_prefix": "This is a ",
            "example_output_prefix": ". Now there is another one. There are two ",
        },
        {"input": "goose", "target": "geese"},
        "This is a goose. Now there is another one. There are two ",
        "This is a goose. Now there is another one. There are two\nAnswer: ",
    ),
    "cause_and_effect": (
        {
            "task_prefix": "Which makes more sense?",
            "example_input_prefix": "\nexample:",
            "example_output_prefix": "\nanswer: ",
        },
        {
            "input": "",
            "target_scores": {"It rained, so I am wet.": 1, "I am wet, so it rained.": 0},
        },
        "Which makes more sense?\nexample:\n  choice: It rained, so I am wet."
        "\n  choice: I am wet, so it rained.\nanswer: ",
        "Which makes more sense?\nexample:\n  choice: It rained, so I am wet."
        "\n  choice: I am wet, so it rained.\nanswer:\nAnswer: ",
    ),
    "logic_grid_puzzle": (
        {"append_choices_to_input": "false"},
        {"input": "Which house?", "target_scores": {"1": 0, "2": 1, "3": 0}},
        "\nQ: Which house?\n  choice: 1\n  choice: 2\n  choice: 3\nA: ",
        "Q: Which house?\n  choice: 1\n  choice: 2\n  choice: 3\nA:\nAnswer: ",
    ),
    "logical_deduction": (
        {
            "task_prefix": "Three objects: ",
            "example_input_prefix": "",
            "example_output_prefix": " ",
            "choice_prefix": "",
            "append_choices_to_input": False,
        },
        {
            "input": "The owl is left of the jay.",
            "target_scores": {"The owl is first.": 1, "No.": 0},
        },
        "Three objects: The owl is left of the jay. ",
        "Three objects: The owl is left of the jay.\nAnswer: ",
    ),
    "multiemo": (
        {"task_prefix": "Is it good?", "choice_prefix": ""},
        {"input": "I slept well.", "target_scores": {"positive": 1, "negative": 0}},
        "Is it good?\nQ: I slept well.positivenegative\nA: ",
        "Is it good?\nQ: I slept well.positivenegative\nA:\nAnswer: ",
    ),
    "strategyqa": (
        {"append_choices_to_input": False},
        {"input": "Can geese swim?", "target": "Yes. They do.", "target_scores": YES_NO},
        "\nQ: Can geese swim?\nA: ",
        "Q: Can geese swim?\nA:\nAnswer: ",
    ),
    "vitaminc": (
        {
            "task_prefix": "Judge.",
            "example_input_prefix": "\nPassage: ",
            "example_output_prefix": "\nTrue, False, or Neither? ",
            "append_choices_to_input": False,
        },
        {"input": "Ice is cold. Claim: ice is warm.", "target_scores": {"False": 1, "True": 0}},
        "Judge.\nPassage: Ice is cold. Claim: ice is warm.\nTrue, False, or Neither? ",
        "Judge.\nPassage: Ice is cold. Claim: ice is warm.\nTrue, False, or Neither?\nAnswer: ",
    ),
    "word_sorting": (
        {
            "task_prefix": "Sort the words:",
            "example_input_prefix": "\nList: ",
            "example_output_prefix": "\nSorted: ",
        },
        {"input": "owl jay", "target": "jay owl"},
        "Sort the words:\nList: owl jay\nSorted: ",
        "Sort the words:\nList: owl jay\nSorted:\nAnswer: ",
    ),
}


def record(definition: dict[str, Any], example: dict[str, Any], style: str) -> Record:
    spec = TaskSpec("t", ("m",), style=style)
    ((_, made),) = make_records(spec, {"m": {**definition, "examples": [example]}})
    return made


@pytest.mark.parametrize("name", CASES)
def test_both_prompt_styles_match_prompts_written_by_hand(name: str) -> None:
    definition, example, bigbench, paper = CASES[name]
    assert record(definition, example, "bigbench").input == bigbench
    assert record(definition, example, "paper").input == paper


@pytest.fixture(scope="module")
def archive() -> Path:
    """Return the real archive, if it has been downloaded on this machine."""
    if not ARCHIVE.exists():
        pytest.skip("BIG-bench's archive (358 MB) is not in the cache of this user")
    check_sha256(ARCHIVE, SHA256)
    return ARCHIVE


@pytest.mark.slow(seconds=20)
def test_all_core_groups_are_read_from_the_archive(archive: Path, cache: Path) -> None:
    """Check the numbers of examples against earlier counts, less the duplicates."""
    conf = Path(harness.conf.__path__[0]) / "pool" / "bigbench.yaml"
    specs = task_specs(yaml.safe_load(conf.read_text()))
    counts = json.loads((Path(__file__).parent / "bigbench_counts.json").read_text())
    write_all(read_archive(archive, specs))
    found = {spec.name: sum(read_task(folder_of(spec)).counts.values()) for spec in specs}
    assert found.keys() == counts.keys()
    fewer = {name: counts[name] - n for name, n in found.items() if n != counts[name]}
    assert all(difference > 0 for difference in fewer.values())
    assert len(fewer) == 14
    # One task repeats a prompt with its answer 16 times. In others at most 1 % are duplicates.
    assert fewer.pop("gem_e2e_nlg") == 16
    assert all(difference <= 0.01 * counts[name] for name, difference in fewer.items())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB
    anachronisms = next(spec for spec in specs if spec.name == "anachronisms")
    shown = read_records(folder_of(anachronisms) / "train", limit=1)[0]
    assert shown.text in shown.input
    assert shown.choices
