"""The actor that answers evaluation requests, with one base, one pool at a time, and any router."""

import time
from dataclasses import dataclass
from typing import Any

import ray

from harness.evaluation.answer_files import AnswerFiles
from harness.evaluation.answering import answer_shard, split_chunks
from harness.evaluation.conditions import Conditions
from harness.evaluation.encoding import EncodedShard
from harness.registry import Registry
from harness.registry.packs import Members, open_pool, open_single
from harness.scheduling.actor import Actor, Refused, log_to_run_folder
from harness.scheduling.load_base import load_base_on_actor
from harness.scheduling.settings import BaseConfig
from harness.source_code import digest, router_code
from harness.storage import Folder
from phatgoose.card import dtype_name
from phatgoose.errors import OutOfMemory, PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.profile import Profile
from phatgoose.routers import Router


@dataclass(frozen=True)
class EvalSettings:
    """The settings of all evaluation actors of a run.

    Attributes:
        base: the base to load.
        conditions: the conditions to answer under.
        registry: the registry that stores the experts.
        run_dir: the run folder, for the answers and the log.
        code: the driver's `code_version`.
    """

    base: BaseConfig
    conditions: Conditions
    registry: str
    run_dir: str
    code: str


@dataclass(frozen=True)
class Asked:
    """What all calls for one router share.

    Attributes:
        router: the router.
        members: the experts to attach.
        code: the driver's digest of the router's source code; None to accept any.
    """

    router: Router
    members: Members
    code: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What the driver hears of an answer: the number of tokens, and the seconds it took."""

    tokens: int
    seconds: float


class EvalActor(Actor):
    """An actor that answers shards. The base stays loaded; each call names its pool.

    Args:
        settings: the settings of the run's evaluation actors.
        registry_actor: the registry actor, for nodes that cannot read the registry's files.
    """

    def __init__(self, settings: EvalSettings, registry_actor: Any) -> None:
        log_to_run_folder(settings.run_dir, "evaluate")
        super().__init__(settings.code)
        conditions = settings.conditions
        self._registry_actor = registry_actor
        self._registry = Registry(settings.registry, conditions.base)
        self._files = AnswerFiles(Folder(settings.run_dir))
        self._base = load_base_on_actor(
            settings.base, conditions.base, mps=conditions.device == "mps"
        )
        conditions.check(dtype_name(self._base.model.dtype), self._base.device.type)
        self._model: RoutedModel | None = None
        self._attached: tuple[Any, ...] | None = None  # the identity of the attached pool

    def answer(self, asked: Asked, shard: EncodedShard, key: str, halvings: int = 0) -> Receipt:
        """Answer a shard under a router, and store the answer.

        Args:
            asked: the router and its experts.
            shard: the requests.
            key: what the answer is stored as.
            halvings: how often to cut the chunks into halves before, because memory ran out.
        """
        if asked.code is not None and digest(router_code(asked.router)) != asked.code:
            raise Refused(
                f"router={asked.router.name()}: its code on this node differs from the driver's. "
                "Install the same files on every node. If a file was edited during the run, run "
                "the same command again."
            )
        self._attach(asked.members)
        model = self._routed
        started = time.monotonic()
        try:
            if asked.router != model.router:
                model.set_router(asked.router)
            answer = answer_shard(self._base, model, split_chunks(shard, halvings), self._beat)
        except OutOfMemory:
            raise
        except PhatgooseError as error:  # not of a disk or a network
            raise Refused(str(error)) from error
        answer.seconds = time.monotonic() - started
        self._files.write(key, shard.task, answer)
        self._beat()
        return Receipt(answer.tokens, answer.seconds)

    @property
    def _routed(self) -> RoutedModel:
        assert self._model is not None
        return self._model

    def _attach(self, members: Members) -> None:
        """Attach this pool to the base, unless it is attached already."""
        if members.identity == self._attached:
            return
        if self._model is not None:
            self._model.detach()  # a detached model refuses to answer
        self._model = self._attached = None
        self._model = RoutedModel(self._base, self._open(members))
        self._attached = members.identity

    def _open(self, members: Members) -> Pool:
        """Map a pool from its pack; load a single expert that no pack of this machine has."""
        experts, profiles = members.experts, members.profiles
        if len(experts) == 1:
            ((name, content),) = experts.items()
            single = open_single(self._registry, name, content, self._beat)
            pool = single or Pool.from_experts([self._fetch(content)])
        else:
            pool = open_pool(self._registry, experts, self._fetch, self._beat)
        if profiles is None:
            return pool
        found = [self._profile(experts[name], profiles[name]) for name in pool.experts]
        return pool.with_profiles(found)

    def _fetch(self, content_hash: str) -> Expert:
        """Read an expert; ask the registry actor if this node cannot read the registry's files."""
        if self._registry.has(content_hash):
            return self._registry.load(content_hash)
        expert: Expert = ray.get(self._registry_actor.load.remote(content_hash))
        self._beat()
        return expert

    def _profile(self, content_hash: str, profile_id: str) -> Profile:
        """Return a profile, mapped if this node can read the registry's files."""
        if self._registry.has_profile(content_hash, profile_id):
            return self._registry.profile(content_hash, profile_id)
        profile: Profile = ray.get(self._registry_actor.profile.remote(content_hash, profile_id))
        return profile
