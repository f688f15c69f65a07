"""The actor that answers evaluation requests: one base and pool, any router."""

import time
from collections.abc import Mapping
from typing import Any

import ray
from torch import Tensor

from harness.actor import Actor
from harness.cluster import log_to_run_folder
from harness.config import BaseConfig
from harness.journal import Answer, Chunk, Request
from harness.pack import Members, open_pool
from harness.registry import Registry
from harness.train_actor import load_base_on_actor
from phatgoose.encoding import encode_context
from phatgoose.expert import Expert
from phatgoose.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.profile import Profile
from phatgoose.query import Query
from phatgoose.routed_linear import RoutingLog
from phatgoose.routers import Router
from phatgoose.scoring import Question


class EvalActor(Actor):
    """Answers chunks with a base that stays loaded, and with the pool of each call.

    Args:
        base: which base to load.
        fingerprint: what it must be.
        registry: where the experts are kept.
        keeper: the registry's actor, for nodes that do not see its files.
        run_dir: where to write the log.
        code: the driver's `code_version`.
    """

    def __init__(
        self,
        base: BaseConfig,
        fingerprint: str,
        registry: str,
        keeper: Any,
        run_dir: str,
        code: str,
    ) -> None:
        log_to_run_folder(run_dir, "evaluate")
        super().__init__(code)
        self._keeper = keeper
        self._registry = Registry(registry, fingerprint)
        self._base = load_base_on_actor(base, fingerprint)
        self._model: RoutedModel | None = None
        self._attached: tuple[Any, ...] | None = None  # the identity of the pool

    def answer(self, router: Router, chunk: Chunk, description: str, members: Members) -> Answer:
        """Answer one chunk with these experts, routed by `router`.

        The router may look at the task's description.
        """
        self._attach(members)
        model = self._routed
        if router != model.router:
            model.set_router(router)
        started = time.monotonic()
        ask = self._score if chunk.kind == "score" else self._generate
        answer = ask(chunk, description)
        answer.seconds = time.monotonic() - started
        self._done += 1
        return answer

    @property
    def _routed(self) -> RoutedModel:
        assert self._model is not None
        return self._model

    def _attach(self, members: Members) -> None:
        """Let the base have this pool, if it has another one."""
        if members.identity == self._attached:
            return
        if self._model is not None:
            self._model.detach()  # from here on it refuses to answer
        self._model = self._attached = None
        self._model = RoutedModel(self._base, self._open(members))
        self._attached = members.identity

    def _open(self, members: Members) -> Pool:
        """A pool: mapped from its pack; a single expert, which some routers need, by itself."""
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
        expert: Expert = ray.get(self._keeper.load.remote(content_hash))
        self._beat()
        return expert

    def _beat(self) -> None:
        """A sign of life: a pool of many experts takes its time."""
        self._done += 1

    def _profile(self, content_hash: str, profile_id: str) -> Profile:
        """A profile, mapped where this node sees the registry's files."""
        if self._registry.has_profile(content_hash, profile_id):
            return self._registry.profile(content_hash, profile_id)
        profile: Profile = ray.get(self._keeper.profile.remote(content_hash, profile_id))
        return profile

    def _score(self, chunk: Chunk, description: str) -> Answer:
        base, model = self._base, self._routed
        questions = [
            Question.encode(base, r.context, r.choices, query=_query(r, description))
            for r in chunk.requests
        ]
        with model.recording(RoutingLog()) as log:
            scores = model.score(questions)
        return Answer(
            scores=scores,
            tokens=sum(question.length for question in questions),
            routing=_on_cpu(log.weights),
            routed=log.tokens,
        )

    def _generate(self, chunk: Chunk, description: str) -> Answer:
        base, model, requests = self._base, self._routed, chunk.requests
        limit = max(request.max_new_tokens for request in requests)
        stops = sorted({stop for request in requests for stop in request.until})
        queries = [_query(request, description) for request in requests]
        contexts = [encode_context(base, request.context) for request in requests]
        questions = [
            Question.encode(base, request.context, request.choices, query=query)
            for request, query in zip(requests, queries, strict=True)
            if request.choices
        ]
        # With white space at its end, a prompt is one before what is written and another before
        # the answer, to which that space belongs.
        together = [question.context for question in questions] == contexts
        with model.recording(RoutingLog()) as log:
            if together and getattr(base.model.config, "sliding_window", None) is None:
                written, first = model.answer(questions, limit, stops=stops)
                scores = [[score] for score in first]
            else:
                scores = model.score(questions) if questions else []
                with model.recording(None):
                    written = model.generate(queries, limit, stops=stops)
        read = sum(map(len, contexts)) + sum(len(q.choices[0]) for q in questions)
        return Answer(
            scores=scores,
            texts=[_cut_text(r, text) for r, text in zip(requests, written, strict=True)],
            tokens=read + sum(request.max_new_tokens for request in requests),
            routing=_on_cpu(log.weights),
            routed=log.tokens,
        )


def _on_cpu(routing: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors for a driver whose machine need not have a GPU."""
    return {linear: weights_E.cpu() for linear, weights_E in routing.items()}


def _query(request: Request, description: str) -> Query:
    """What routers may know of a request: not the right answer that is scored, if that is all."""
    return Query(request.context, request.choices if request.choices_shown else (), description)


def _cut_text(request: Request, text: str) -> str:
    """What was generated, up to the first stop string, without the space moved from the prompt."""
    if request.context.endswith(" "):
        text = text.removeprefix(" ")
    for stop in request.until:
        text = text.split(stop)[0]
    return text
