"""The sources of examples: one module per source, each with the functions of `Source`."""

from harness.tasks.sources import (
    bbh,
    bigbench,
    flan,
    jsonl,
    lm_eval,
    natural_instructions,
    p3,
    peft,
    registry,
)
from harness.tasks.sources.source import Source, TaskRecords

SOURCES: dict[str, Source] = {
    "bigbench": bigbench,
    "bbh": bbh,
    "p3": p3,
    "flan": flan,
    "natural_instructions": natural_instructions,
    "jsonl": jsonl,
    "lm_eval": lm_eval,
    "peft": peft,
    "registry": registry,
}

# Keys of a pool or suite that `expand` turns into tasks.
GROUP_KEYS: dict[str, tuple[str, ...]] = {
    "jsonl": ("files",),
    "lm_eval": ("lm_eval", "include_path", "num_fewshot", "overlay"),
    "natural_instructions": ("by", "language"),
    "peft": ("adapters",),
}

# Sources whose data sets have their own split.
SPLIT_ALREADY = ("flan", "p3")

__all__ = ["GROUP_KEYS", "SOURCES", "SPLIT_ALREADY", "Source", "TaskRecords"]
