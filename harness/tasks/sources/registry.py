"""Experts that the registry has already, taken by name: there are no examples."""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.tasks.sources.source import TaskRecords, no_tasks
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError

expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Refuse what belongs to other sources."""
    if spec.members or spec.adapter:
        raise PhatgooseError(
            f"task {spec.name}: an expert of the registry is taken as it is: leave out members "
            "and adapter, or choose another source"
        )


def identity(spec: TaskSpec) -> Any:
    """Nothing: there are no records."""


def missing(spec: TaskSpec) -> str | None:
    """Whether the registry has it is checked where the registry is known."""


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read nothing."""
    return iter(())
