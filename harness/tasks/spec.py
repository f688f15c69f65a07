"""A task of a pool or a suite, as its YAML file describes it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phatgoose.errors import PhatgooseError, did_you_mean

# bigbench: as BIG-bench prompts. paper: as PHATGOOSE's authors prompted BIG-bench, which is the
# same prompt, then "\nAnswer:", and the longest of the accepted answers as the target.
STYLES = ("bigbench", "paper")
METRICS = ("exact_match", "rouge_l")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a pool or a suite.

    Attributes:
        name: the task's name; letters, digits, `_`, `.` and `-`.
        members: what it is made of, in the words of its source: tasks of BIG-bench, data sets,
            files.
        source: where its examples come from, one of `harness.tasks.sources.SOURCES`.
        adapter: a folder with a LoRA adapter saved by PEFT, which becomes the task's expert. With
            members its gates are trained on them; without it has no gates, and no profile.
        description: what the task is about, for the routers that read it; the source's own, or
            made of the task's name and some inputs, if it is empty.
        style: how prompts of BIG-bench are written, see `STYLES`.
        load_opts: how the members are read; each source says which there are.
        folder: where local copies of data sets of the hub are, each as `<owner>/<name>`, or
            whatever else a source reads from a folder; looked into before the hub.
        split: what to evaluate on: the `evaluation` split, or `all`, for a task that no expert of
            the pool was trained on.
        limit: how many documents to evaluate on at most; none means all of them.
        max_new_tokens: how many tokens to generate at most.
        metric: how what was generated is scored, one of `METRICS`.
    """

    name: str
    members: tuple[str, ...] = ()
    source: str = "bigbench"
    adapter: str | None = None
    description: str = ""
    style: str = "bigbench"
    load_opts: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    split: Literal["evaluation", "all"] = "evaluation"
    limit: int | None = None
    max_new_tokens: int = 16
    metric: str = "exact_match"

    def __post_init__(self) -> None:
        """Raise PhatgooseError for a value that cannot be meant."""
        where = f"task {self.name}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise PhatgooseError(
                f"{self.name!r} cannot be a task's name: use letters, digits, _, . and -"
            )
        if not isinstance(self.members, tuple):
            raise PhatgooseError(f"{where}: members must be a list, not {self.members!r}")
        if not isinstance(self.load_opts, Mapping):
            raise PhatgooseError(f"{where}: load_opts must be options by name")
        one_of(self.style, STYLES, f"{where}: style")
        one_of(self.metric, METRICS, f"{where}: metric")
        one_of(self.split, ("evaluation", "all"), f"{where}: split")
        for key, value in (("limit", self.limit), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and (type(value) is not int or value < 1):
                raise PhatgooseError(f"{where}: {key} must be a positive number, not {value!r}")

    @property
    def has_data(self) -> bool:
        """Whether there are examples, and not only an expert."""
        return bool(self.members)


def one_of(value: object, allowed: Iterable[str], where: str) -> None:
    """Raise PhatgooseError, with a near name, for a value that is none of these."""
    allowed = list(allowed)
    if value not in allowed:
        hint = did_you_mean(str(value), allowed) or f"it is one of {', '.join(allowed)}"
        raise PhatgooseError(f"{where}: there is no {value!r}; {hint}")
