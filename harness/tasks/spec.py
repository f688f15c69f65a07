"""The specification of a task of a pool or suite, as its YAML file describes it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phatgoose.errors import PhatgooseError, check_known

# bigbench: BIG-bench's own prompts. paper: the prompts of PHATGOOSE's authors, i.e. the same prompt
# followed by "\nAnswer:", with the longest accepted answer as the target.
STYLES = ("bigbench", "paper")
METRICS = ("exact_match", "rouge_l")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a pool or a suite.

    Attributes:
        name: the task's name; letters, digits, `_`, `.` and `-`.
        members: what the task is made of, as its source names it: BIG-bench tasks, data sets,
            files.
        source: where the examples come from, one of `harness.tasks.sources.SOURCES`.
        adapter: a LoRA adapter saved by PEFT, a folder or hub id, used as the task's expert. With
            members, its gates are trained on them. Without members, it has no gates and no
            profile.
        description: what the task is about, for the routers that read it. If empty, it is the
            source's own, or made from the task's name and some inputs.
        style: how BIG-bench prompts are written, see `STYLES`.
        load_opts: how the members are read; each source defines its own options.
        folder: local copies of data sets of the hub, each as `<owner>/<name>`, or whatever else a
            source reads from a folder. It is searched before the hub.
        split: the documents to evaluate on: the `evaluation` split, or `all` for a task that no
            expert of the pool was trained on.
        limit: maximum number of documents to evaluate on; None means all.
        max_new_tokens: maximum number of tokens to generate.
        metric: how generated text is scored, one of `METRICS`.
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
        """Raise PhatgooseError for an invalid value."""
        where = f"task {self.name}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise PhatgooseError(
                f"{self.name!r} is not a valid task name. Use letters, digits, _, . and -."
            )
        if not isinstance(self.members, tuple):
            raise PhatgooseError(f"{where}: members must be a list, not {self.members!r}")
        if not isinstance(self.load_opts, Mapping):
            raise PhatgooseError(f"{where}: load_opts must be a mapping of options")
        one_of(self.style, STYLES, f"{where}: style")
        one_of(self.metric, METRICS, f"{where}: metric")
        one_of(self.split, ("evaluation", "all"), f"{where}: split")
        for key, value in (("limit", self.limit), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and (type(value) is not int or value < 1):
                raise PhatgooseError(f"{where}: {key} must be a positive number, not {value!r}")

    @property
    def has_data(self) -> bool:
        """True if the task has examples, not only an expert."""
        return bool(self.members)


def one_of(value: object, allowed: Iterable[str], where: str) -> None:
    """Raise PhatgooseError, with similar names, unless a value is one of these."""
    check_known(value, allowed, f"{where}: there is no {value!r}")
