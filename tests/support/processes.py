"""Processes that work at the same time, like several drivers or actors.

They are forked from a process that has imported the libraries and no module of this project, so
that slow libraries are imported once and not once per process.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "pyarrow.parquet", "pytest", "hypothesis"])


def start(target: Callable[..., None], *calls: tuple[Any, ...]) -> list[BaseProcess]:
    """Start one process per call, with the current environment of this process."""
    environment = dict(os.environ)
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=_call, args=(environment, target, call)) for call in calls
    ]
    for process in processes:
        process.start()
    return processes


def _call(environment: dict[str, str], target: Callable[..., None], call: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*call)
