"""The actor that answers evaluation requests, with one base, one pool at a time, and any router."""

import time
from typing import Any

import ray

from harness.evaluation.answering import answer_chunk
from harness.evaluation.chunks import Answer, Chunk
from harness.evaluation.conditions import Conditions
from harness.registry import Registry
from harness.registry.packs import Members, open_pool
from harness.scheduling.actor import Actor, log_to_run_folder
from harness.scheduling.load_base import load_base_on_actor
from harness.scheduling.settings import BaseConfig
from harness.source_code import digest, router_code
from phatgoose.card import dtype_name
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.profile import Profile
from phatgoose.routers import Router


class EvalActor(Actor):
    """An actor that answers chunks. The base stays loaded; each call names its pool.

    Args:
        base: the base to load.
        conditions: the conditions to answer under.
        registry: the registry that stores the experts.
        registry_actor: the registry actor, for nodes that cannot read the registry's files.
        run_dir: the run folder, for the log.
        code: the driver's `code_version`.
    """

    def __init__(
        self,
        base: BaseConfig,
        conditions: Conditions,
        registry: str,
        registry_actor: Any,
        run_dir: str,
        code: str,
    ) -> None:
        log_to_run_folder(run_dir, "evaluate")
        super().__init__(code)
        self._registry_actor = registry_actor
        self._registry = Registry(registry, conditions.base)
        self._base = load_base_on_actor(base, conditions.base, mps=conditions.device == "mps")
        conditions.check(dtype_name(self._base.model.dtype), self._base.device.type)
        self._model: RoutedModel | None = None
        self._attached: tuple[Any, ...] | None = None  # the identity of the attached pool

    def answer(
        self,
        router: Router,
        chunk: Chunk,
        description: str,
        members: Members,
        code: str | None = None,
    ) -> Answer:
        """Answer one chunk with these experts, routed by `router`.

        The router may use the task's description. `code` is the driver's digest of the router's
        source code.
        """
        if code is not None and digest(router_code(router)) != code:
            raise PhatgooseError(
                f"router={router.name()}: its code on this node differs from the driver's. Install "
                "the same files on every node. If a file was edited during the run, run the same "
                "command again."
            )
        self._attach(members)
        model = self._routed
        if router != model.router:
            model.set_router(router)
        started = time.monotonic()
        answer = answer_chunk(self._base, model, chunk, description)
        answer.seconds = time.monotonic() - started
        self._done += 1
        return answer

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
        """Map a pool from its pack; load a single expert without a pack."""
        experts, profiles = members.experts, members.profiles
        if len(experts) == 1:
            pool = Pool.from_experts([self._fetch(content) for content in experts.values()])
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
