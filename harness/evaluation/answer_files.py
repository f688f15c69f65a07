"""The answers of a run, in parquet files whose every row has a checksum.

    answers/shards/<key>.parquet             one shard under one router, as an actor wrote it
    answers/failed/<key>.parquet             the same, if some of its requests failed
    answers/tasks/<suite>/<router>.parquet   a row per complete task

An actor writes a file per shard, so nothing that is answered is lost. When a router is scored, the
shards of each task are joined into one row, so a router then has one file per suite.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from harness import run_folder
from harness.evaluation.answers import Answer
from harness.storage import Folder
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.inference.scoring import Score

_SHARDS, _FAILED, _TASKS = (
    f"{run_folder.ANSWERS_FOLDER}/{part}" for part in ("shards", "failed", "tasks")
)


class DamagedAnswer(PhatgooseError):
    """A stored answer that is missing, or was altered or truncated."""


class AnswerFiles:
    """The answers in a run folder. Files are written atomically."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def shards(self) -> set[str]:
        """Return the keys of all answered shards; not of those in which requests failed."""
        return self._keys(_SHARDS)

    def write(self, key: str, task: str, answer: Answer) -> None:
        """Store the answer to a shard of a task."""
        name = _file(_FAILED if answer.failed else _SHARDS, key)
        run_folder.write_table(self._folder, name, run_folder.ANSWERS, [_row(key, task, answer)])

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the answers to shards; they may be deleted already."""
        for key in keys:
            self._folder.delete(_file(_SHARDS, key), missing_ok=True)

    def read(self, key: str) -> Answer:
        """Return the answer to a shard.

        Raises:
            DamagedAnswer: the file is missing, was altered or was truncated.
        """
        name = _file(_SHARDS, key)
        if not self._folder.exists(name) and self._folder.exists(_file(_FAILED, key)):
            name = _file(_FAILED, key)
        answers = self._read(name, [key])
        if key not in answers:
            raise DamagedAnswer(f"{self._folder}/{name} is damaged")
        return answers[key]

    def tasks(self, suite: str, router: str) -> set[str]:
        """Return the keys of a router's complete tasks."""
        try:
            table = self._table(_compact(suite, router), ["key"])
        except DamagedAnswer:
            return set()
        return {*table["key"].to_pylist()}

    def read_tasks(self, suite: str, router: str, keys: Collection[str]) -> dict[str, Answer]:
        """Return the intact answers of a router's tasks, by key; others are left out."""
        try:
            return self._read(_compact(suite, router), keys)
        except DamagedAnswer:
            return {}

    def compact(
        self,
        suite: str,
        router: str,
        tasks: Mapping[str, tuple[str, Answer]],
        shards: Collection[str],
    ) -> None:
        """Store a router's complete tasks in one file, and delete the files of their shards.

        What the file has of other tasks stays.

        Args:
            suite: the name of the suite.
            router: the name of the router.
            tasks: the key and the answer, by the task's name.
            shards: the keys of the shards that these are made of.
        """
        name = _compact(suite, router)
        rows = [_row(key, task, answer) for task, (key, answer) in tasks.items()]
        with contextlib.suppress(DamagedAnswer):
            rows += [row for row in self._table(name).to_pylist() if row["task"] not in tasks]
        run_folder.write_table(self._folder, name, run_folder.ANSWERS, rows)
        self.delete(shards)
        for key in self._keys(_FAILED) & {*shards}:
            self._folder.delete(_file(_FAILED, key), missing_ok=True)

    def _keys(self, part: str) -> set[str]:
        names = self._folder.names(f"{part}/")
        return {PurePosixPath(name).stem for name in names if name.endswith(".parquet")}

    def _read(self, name: str, keys: Collection[str]) -> dict[str, Answer]:
        found = {}
        for row in self._table(name).to_pylist():
            if row["key"] in keys and row["sha256"] == _checksum(row):
                found[row["key"]] = _answer(row)
        return found

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        if not self._folder.exists(name):
            raise DamagedAnswer(f"{self._folder}/{name} is missing")
        try:
            return run_folder.read_table(self._folder, name, run_folder.ANSWERS, columns)
        except run_folder.DamagedTable as error:
            raise DamagedAnswer(f"{self._folder}/{name} is damaged ({reason_of(error)})") from error


def task_key(keys: Collection[str]) -> str:
    """Return the key of a task's answer, given those of its shards in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]


def _file(part: str, key: str) -> str:
    return f"{part}/{key}.parquet"


def _compact(suite: str, router: str) -> str:
    return run_folder.router_file(_TASKS, suite, router)


def _row(key: str, task: str, answer: Answer) -> dict[str, Any]:
    linears = list(answer.routing)
    weights = [answer.routing[linear].numpy() for linear in linears]
    row = {
        "key": key,
        "task": task,
        "scores": [[asdict(score) for score in scores] for scores in answer.scores],
        "texts": [text.encode("utf-8", "surrogatepass") for text in answer.texts],
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "cut": answer.cut,
        "failed": [{"place": place, "reason": why} for place, why in answer.failed.items()],
        "linears": linears,
        "routed": [answer.routed[linear] for linear in linears],
        "routing": np.stack(weights).tobytes() if weights else b"",
    }
    return {**row, "sha256": _checksum(row)}


def _checksum(row: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(row["routing"])
    text = {name: row[name] for name in row if name not in ("routing", "texts", "sha256")}
    digest.update(json.dumps(text, sort_keys=True).encode())
    for text in row["texts"]:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _answer(row: Mapping[str, Any]) -> Answer:
    linears = row["linears"]
    weights = np.frombuffer(row["routing"], dtype=np.float64).copy()
    weights_LE = weights.reshape(len(linears), -1) if linears else weights.reshape(0, 0)
    return Answer(
        scores=[[Score(**score) for score in scores] for scores in row["scores"]],
        texts=[text.decode("utf-8", "surrogatepass") for text in row["texts"]],
        tokens=row["tokens"],
        seconds=row["seconds"],
        routing=dict(zip(linears, torch.from_numpy(weights_LE), strict=True)),
        routed=dict(zip(linears, row["routed"], strict=True)),
        cut=row["cut"],
        failed={entry["place"]: entry["reason"] for entry in row["failed"]},
    )
