"""Kill processes of a run at points of its progress that a seed determines."""

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from tests.chaos.nodes import EVALUATOR, REGISTRY, SCORER, TRAINER, Actor, Nodes, kill
from tests.chaos.watch import Watch, working

KINDS = ("trainer", "evaluator", "scorer", "registry", "node", "driver")
# The kinds of the kills beyond one of each kind. A driver takes longest to recover.
_WEIGHTS = {"trainer": 5, "evaluator": 5, "scorer": 3, "registry": 2, "node": 2, "driver": 1}
_CLASSES = {
    "trainer": TRAINER,
    "evaluator": EVALUATOR,
    "scorer": SCORER,
    "registry": REGISTRY,
}
_PHASES = {
    "train": ("trainer", "registry", "node", "driver"),
    "evaluate": ("evaluator", "registry", "node", "driver", "scorer"),
}
# The kills of a phase are spread over this share of its work. The last one needs the rest.
_FROM, _TO = 0.03, 0.75
_DELAY_SECONDS = 1.5
_NEW_NODE_SECONDS = 3.0


@dataclass(frozen=True)
class Planned:
    """A planned kill: its kind, the share of the phase's work at which it is due, and a delay."""

    phase: str
    kind: str
    share: float
    delay: float


@dataclass
class Kill:
    """A completed kill. Times are in seconds since the start of the run.

    Attributes:
        seed, number: the seed of the run, and the number of the kill in it.
        seconds: the time of the kill.
        phase, kind: as planned.
        victim: the processes or the node that were killed.
        doing: what the victim was doing.
        experts, answers: how much was done by then.
        recovery: the time until the lost work was resumed; None if that was no longer needed.
        by: the event that showed the recovery.
        next_result: the time until the next expert was published or shard answered.
    """

    seed: int
    number: int
    seconds: float
    phase: str
    kind: str
    victim: str
    doing: str
    experts: int
    answers: int
    recovery: float | None = None
    by: str | None = None
    next_result: float | None = None

    def row(self) -> dict[str, Any]:
        """Return the kill as a row of a parquet file."""
        return asdict(self)


@dataclass(frozen=True)
class _Hit:
    """A dead victim, what it was doing, and the event that shows the recovery."""

    victim: str
    doing: str
    look: Callable[[], str | None]


def plan(seed: int, kills: int) -> list[Planned]:
    """Plan kills: at least one of each kind, and half of all kills in each phase."""
    draw = random.Random(seed)
    planned = []
    for phase, number in (("train", (kills + 1) // 2), ("evaluate", kills // 2)):
        kinds = list(_PHASES[phase])
        if number < len(kinds):  # with few kills, the first of a phase has a kind of its own
            others = kinds[1:] if phase == "train" else kinds[:0:-1]
            chosen = [kinds[0], *others[: number - 1]]
        else:
            weights = [_WEIGHTS[kind] for kind in kinds]
            chosen = kinds + draw.choices(kinds, weights, k=number - len(kinds))
        draw.shuffle(chosen)
        slot = (_TO - _FROM) / number
        for place, kind in enumerate(chosen):
            share = _FROM + slot * (place + draw.random())
            planned.append(Planned(phase, kind, share, draw.uniform(0, _DELAY_SECONDS)))
    return planned


class Killer:
    """Carry out the planned kills of one run, one after the other.

    Args:
        planned: the kills, in order.
        seed: the seed of the plan; also chooses among several victims.
        nodes, watch: the cluster and the observer of the run.
        experts, answers: how many the complete run has.
    """

    def __init__(
        self,
        planned: list[Planned],
        seed: int,
        nodes: Nodes,
        watch: Watch,
        experts: int,
        answers: int,
    ) -> None:
        self._planned, self._seed, self._nodes, self._watch = list(planned), seed, nodes, watch
        self._totals = {"train": experts, "evaluate": answers}
        self._draw = random.Random(f"{seed} victims")
        self._due: float | None = None
        self._new_node: float | None = None
        self._recovered: dict[int, Callable[[], str | None]] = {}
        self.kills: list[Kill] = []
        watch.look_out = self._look_for_recovery

    @property
    def is_done(self) -> bool:
        """Return whether all kills are done and all nodes are replaced."""
        return not self._planned and self._new_node is None

    def step(self, driver: subprocess.Popen[bytes]) -> None:
        """Kill what is due and replace nodes; call it repeatedly in the main thread."""
        now = time.monotonic()
        if self._new_node is not None and now >= self._new_node:
            self._new_node = None
            self._nodes.add()
        if not self._planned:
            return
        if self._planned[0].kind == "trainer" and self._done("train") == self._totals["train"]:
            # All experts are done, so it is too late. Kill something of the other phase.
            self._planned[0] = replace(self._planned[0], phase="evaluate", kind="evaluator")
        if not self._is_due(self._planned[0]):
            return
        if self._due is None:
            self._due = now + self._planned[0].delay
        if now >= self._due and self._kill(self._planned[0], driver):
            self._planned.pop(0)
            self._due = None

    def _is_due(self, planned: Planned) -> bool:
        return self._done(planned.phase) >= planned.share * self._totals[planned.phase]

    def _done(self, phase: str) -> int:
        return len(self._watch.records) if phase == "train" else self._watch.answers

    def _kill(self, planned: Planned, driver: subprocess.Popen[bytes]) -> bool:
        """Carry out one kill; return False if no victim is at work."""
        watch = self._watch
        seconds, experts, answers = watch.seconds, len(watch.records), watch.answers
        actors = self._nodes.actors()
        work = [actor for actor in working(actors) if actor.kind != REGISTRY]
        if not work:
            hit = None
        elif planned.kind == "driver":
            hit = self._kill_driver(driver)
        elif planned.kind == "node":
            hit = self._kill_node(work)
        else:
            hit = self._kill_actor(planned.kind, actors)
        if hit is None:
            return False
        number = len(self.kills) + 1
        what = (seconds, planned.phase, planned.kind, hit.victim, hit.doing, experts, answers)
        self._recovered[number] = hit.look
        self.kills.append(Kill(self._seed, number, *what))
        return True

    def _kill_driver(self, driver: subprocess.Popen[bytes]) -> _Hit | None:
        stage = self._watch.status
        if stage.get("driver", {}).get("process") != driver.pid:
            return None
        doing = f"{stage['stage']}: {stage['done']} of {stage['total']} {stage['unit']}s"
        if not kill(psutil.Process(driver.pid)):
            return None
        return _Hit(f"process {driver.pid}", doing, self._driver_back(driver.pid))

    def _kill_node(self, work: list[Actor]) -> _Hit | None:
        nodes = [n for n in self._nodes.workers if any(a.node == n.node_id for a in work)]
        if not nodes or self._new_node is not None:
            return None
        node = self._draw.choice(nodes)
        doing = ", ".join(self._doing(actor) for actor in work if actor.node == node.node_id)
        before = {n.node_id for n in self._nodes.workers}
        count = self._nodes.kill_node(node)
        if not count:  # it was dead already, but not killed here
            raise RuntimeError(f"the node {node.node_id} died without being killed")
        self._new_node = time.monotonic() + self._draw.uniform(0, _NEW_NODE_SECONDS)
        victim = f"node {node.node_id[:6]}, {count} processes"
        return _Hit(victim, doing, self._node_back(before))

    def _kill_actor(self, kind: str, actors: list[Actor]) -> _Hit | None:
        name = _CLASSES[kind]
        victims = working(actors, name)
        if kind == "registry":  # usually it is between two calls
            victims = [a for a in actors if a.kind == REGISTRY and a.method != "__init__"]
        if not victims:
            return None
        victim = self._draw.choice(victims)
        said = self._watch.trains(victim.process.pid)
        if kind == "trainer" and said is None:  # between two experts
            return None
        doing = self._doing(victim)
        if not kill(victim.process):
            return None
        known = {actor.process.pid for actor in actors}
        look = self._actor_back(kind, name, known, said.expert if said else "")
        return _Hit(f"process {victim.process.pid}", doing, look)

    def _doing(self, actor: Actor) -> str:
        said = self._watch.trains(actor.process.pid)
        if actor.kind == TRAINER and said:
            return f"training {said.expert} for {self._watch.seconds - said.seconds:.1f} s"
        return f"{actor.kind}.{actor.method}" if actor.method else f"{actor.kind}, idle"

    def _driver_back(self, old: int) -> Callable[[], str | None]:
        def look() -> str | None:
            new = self._watch.status.get("driver", {}).get("process")
            others = [a for a in working(self._watch.actors) if a.kind != REGISTRY]
            return "new driver's actors are working" if new not in (None, old) and others else None

        return look

    def _node_back(self, before: set[str]) -> Callable[[], str | None]:
        def look() -> str | None:
            there = [a for a in working(self._watch.actors) if a.node not in before]
            there = [a for a in there if a.kind != REGISTRY]
            return "an actor works on the new node" if there else None

        return look

    def _actor_back(
        self, kind: str, name: str, known: set[int], expert: str
    ) -> Callable[[], str | None]:
        begun = self._watch.seconds

        def look() -> str | None:
            if kind == "trainer":
                again = [x for x in self._watch.lines if x.seconds > begun and x.expert == expert]
                return f"{expert} is being trained again" if again else None
            new = [a for a in self._watch.actors if a.kind == name and a.process.pid not in known]
            if kind == "registry":
                back = [a for a in new if a.method != "__init__"]
                return "a new process serves" if back else None
            return "a new process is at work" if any(a.works for a in new) else None

        return look

    def _look_for_recovery(self) -> None:
        now = self._watch.seconds
        for kill_ in list(self.kills):
            if kill_.next_result is None and self._watch.progress > kill_.seconds:
                kill_.next_result = round(now - kill_.seconds, 2)
            look = self._recovered.get(kill_.number)
            if look and kill_.recovery is None and (seen := look()):
                kill_.recovery, kill_.by = round(now - kill_.seconds, 2), seen


def has_every_kind(kills: list[Kill]) -> bool:
    """Return whether there was at least one kill of each kind."""
    return {kill_.kind for kill_ in kills} == set(KINDS)
