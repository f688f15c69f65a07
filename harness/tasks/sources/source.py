"""The interface of a source of examples: a module of this package with these functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

from harness.tasks.records import Record, Split
from harness.tasks.spec import TaskSpec, one_of
from phatgoose.errors import PhatgooseError

T = TypeVar("T")


@dataclass(frozen=True)
class TaskRecords:
    """The examples of a task as a source reads them.

    Attributes:
        spec: the task.
        records: its examples, one at a time; only the first one with each document id is kept.
        description: what the task is about, if the source says so.
        origin: further facts to store with the data, such as a revision or a canary.
    """

    spec: TaskSpec
    records: Iterator[tuple[Split, Record]]
    description: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """A source of examples."""

    def check(self, spec: TaskSpec) -> None:
        """Raise PhatgooseError for invalid members or options, without reading data."""

    def expand(self, group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the tasks that a pool or suite implies: fields of TaskSpec by task name.

        An example is one task per file of the folder that `group` names. Often there are none.
        """

    def identity(self, spec: TaskSpec) -> Any:
        """Return what determines the records besides name, style and options, as JSON data.

        Examples are the hash of an archive and the revision of a data set. Raises PhatgooseError if
        it cannot be determined.
        """

    def missing(self, spec: TaskSpec) -> str | None:
        """Return what is unavailable and where it was searched, or None. Must be fast."""

    def read(self, specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
        """Read tasks in any order. The caller consumes a task's records before the next task.

        Raises PhatgooseError for the first invalid example, naming its place in the source.
        """


def options_of(kind: type[T], spec: TaskSpec) -> T:
    """Return a task's `load_opts` as the source's dataclass of options.

    Raises:
        PhatgooseError: an option is unknown, or its type differs from that of its default.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in spec.load_opts.items():
        one_of(name, known, f"task {spec.name}: load_opts")
        default = known[name].default
        if default is not None and type(value) is not type(default):
            raise PhatgooseError(
                f"task {spec.name}: load_opts.{name}={value!r}: its type must match {default!r}"
            )
    return kind(**spec.load_opts)


def no_tasks(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return no tasks: the `expand` of sources whose tasks are always named one by one."""
    return {}
