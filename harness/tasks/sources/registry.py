"""Experts that are already in the registry, taken by name. There are no examples."""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.tasks.sources.source import TaskRecords, no_tasks
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError

expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Reject fields that belong to other sources."""
    if spec.members or spec.adapter:
        raise PhatgooseError(
            f"task {spec.name}: an expert of the registry is used as it is. Remove members and "
            "adapter, or choose another source."
        )


def identity(spec: TaskSpec) -> Any:
    """Return None: there are no records."""


def missing(spec: TaskSpec) -> str | None:
    """Return None: the registry is checked where it is known."""


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read nothing."""
    return iter(())
