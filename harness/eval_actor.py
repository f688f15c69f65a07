"""The actor that answers evaluation requests: one base and pool, any router."""

import time
from collections.abc import Mapping
from typing import Any

import ray

from harness.cluster import log_to_run_folder
from harness.config import MULTITASK, BaseConfig, Multitask
from harness.journal import Answer, Chunk, Request
from harness.pack import open_pool
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


class EvalActor:
    """Answers chunks with a base and a pool that stay loaded.

    Args:
        base: which base to load.
        fingerprint: what it must be.
        registry: where the experts are kept.
        keeper: the registry's actor, for nodes that do not see its files.
        experts: content hash by name: the pool.
        profiles: the experts' profile ids by name; None if no router needs profiles.
        multitask: content hash of the multitask expert, if a router needs it.
        run_dir: where to write the log.
    """

    def __init__(
        self,
        base: BaseConfig,
        fingerprint: str,
        registry: str,
        keeper: Any,
        experts: Mapping[str, str],
        profiles: Mapping[str, str] | None,
        multitask: str | None,
        run_dir: str,
    ) -> None:
        log_to_run_folder(run_dir, "evaluate")

        def fetch(content_hash: str) -> Expert:
            expert: Expert = ray.get(keeper.load.remote(content_hash))
            return expert

        loaded = load_base_on_actor(base, fingerprint)
        kept = Registry(registry, fingerprint)
        pool = open_pool(kept, experts, fetch)
        if profiles is not None:
            pool = pool.with_profiles(
                [_profile(kept, keeper, experts[name], profiles[name]) for name in pool.experts]
            )
        self._pools = {"": pool}
        if multitask is not None:
            self._pools[MULTITASK] = Pool.from_experts([fetch(multitask)])
        self._attached, self._model = "", RoutedModel(loaded, pool)

    def answer(self, router: Router, chunk: Chunk, description: str = "") -> Answer:
        """Answer one chunk, routed by `router`, which may look at the task's description."""
        self._attach(MULTITASK if isinstance(router, Multitask) else "")
        if router != self._model.router:
            self._model.set_router(router)
        started = time.monotonic()
        ask = self._score if chunk.kind == "score" else self._generate
        answer = ask(chunk, description)
        answer.seconds = time.monotonic() - started
        return answer

    def _attach(self, pool: str) -> None:
        """Let the base have this pool: the multitask expert is no member of the other one."""
        if pool != self._attached:
            self._model.detach()  # from here on it refuses to answer
            self._model = RoutedModel(self._model.base, self._pools[pool])
            self._attached = pool

    def _score(self, chunk: Chunk, description: str) -> Answer:
        base = self._model.base
        questions = [
            Question.encode(base, r.context, r.choices, query=_query(r, description))
            for r in chunk.requests
        ]
        with self._model.recording(RoutingLog()) as log:
            scores = self._model.score(questions)
        return Answer(
            scores=scores,
            tokens=sum(question.length for question in questions),
            routing=log.weights,
            routed=log.tokens,
        )

    def _generate(self, chunk: Chunk, description: str) -> Answer:
        base, requests = self._model.base, chunk.requests
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
        with self._model.recording(RoutingLog()) as log:
            if together and getattr(base.model.config, "sliding_window", None) is None:
                written, first = self._model.answer(questions, limit, stops=stops)
                scores = [[score] for score in first]
            else:
                scores = self._model.score(questions) if questions else []
                with self._model.recording(None):
                    written = self._model.generate(queries, limit, stops=stops)
        read = sum(map(len, contexts)) + sum(len(q.choices[0]) for q in questions)
        return Answer(
            scores=scores,
            texts=[_cut_text(r, text) for r, text in zip(requests, written, strict=True)],
            tokens=read + sum(request.max_new_tokens for request in requests),
            routing=log.weights,
            routed=log.tokens,
        )


def _profile(registry: Registry, keeper: Any, content_hash: str, profile_id: str) -> Profile:
    """A profile, mapped where this node sees the registry's files."""
    if registry.has_profile(content_hash, profile_id):
        return registry.profile(content_hash, profile_id)
    profile: Profile = ray.get(keeper.profile.remote(content_hash, profile_id))
    return profile


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
