"""What a source of examples is: a module of this package with these functions."""

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
        records: its examples, one at a time; of those with the same document the first counts.
        description: what the task is about, as far as the source says.
        origin: what else is to be kept with the data, such as a revision or a canary.
    """

    spec: TaskSpec
    records: Iterator[tuple[Split, Record]]
    description: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Where examples come from."""

    def check(self, spec: TaskSpec) -> None:
        """Raise PhatgooseError for members or options that cannot be meant; reads no data."""

    def expand(self, group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The tasks that a pool or suite has without naming them: fields of TaskSpec by name.

        For instance one task per file of the folder that `group` names; often there are none.
        """

    def identity(self, spec: TaskSpec) -> Any:
        """What determines the records besides name, style and options, as JSON has it.

        Such as the hash of an archive, or the revision of a data set. Raises PhatgooseError if
        that cannot be known.
        """

    def missing(self, spec: TaskSpec) -> str | None:
        """What cannot be reached, and where it was looked for; None if all can be. Fast."""

    def read(self, specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
        """Read tasks, in any order; the records of one are read before the next is asked for.

        Raises PhatgooseError for the first faulty example, naming its place in the source.
        """


def options_of(kind: type[T], spec: TaskSpec) -> T:
    """A task's `load_opts` as a source's dataclass of options.

    Raises:
        PhatgooseError: an unknown option, or a value of another type than its default.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in spec.load_opts.items():
        one_of(name, known, f"task {spec.name}: load_opts")
        default = known[name].default
        if default is not None and type(value) is not type(default):
            raise PhatgooseError(
                f"task {spec.name}: load_opts.{name} is {value!r}, and must be like {default!r}"
            )
    return kind(**spec.load_opts)


def no_tasks(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`expand` of a source whose tasks are always named one by one."""
    return {}
