"""Pools of LoRA adapters saved by PEFT: one expert each, from folders or the hub.

Adapters have no examples. To train an expert's gates, name members from another source in its task.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.tasks.sources.source import TaskRecords
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError


def expand(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one task per adapter in `adapters`, a list of folders or hub ids or a dict by name.

    A hub id may pin a revision: `owner/name@revision`.
    """
    adapters = group.get("adapters")
    if not adapters:
        if group.get("tasks"):
            return {}
        raise PhatgooseError(
            f"{group['name']}: no adapters are given. Name some: adapters=[/data/a,owner/name]."
        )
    if not isinstance(adapters, Mapping):
        named = {_name(str(adapter)): str(adapter) for adapter in adapters}
        if len(named) < len(adapters):
            raise PhatgooseError(
                f"{group['name']}: two adapters have the same name. Give names: "
                "adapters={name: folder}."
            )
        adapters = named
    return {name: {"adapter": str(where)} for name, where in adapters.items()}


def check(spec: TaskSpec) -> None:
    """Reject members: this source has no examples."""
    raise PhatgooseError(
        f"task {spec.name}: this source reads no members. Set the source that does, such as "
        "source: jsonl."
    )


def identity(spec: TaskSpec) -> Any:
    """Return None: there are no records."""


def missing(spec: TaskSpec) -> str | None:
    """Return None: adapters are found by `harness.tasks.adapters`."""


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read nothing."""
    return iter(())


def _name(adapter: str) -> str:
    name = Path(adapter.partition("@")[0]).name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".-") or "adapter"
