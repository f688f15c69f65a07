"""The actor that answers evaluation requests: one base and pool, any router."""

import time
from collections.abc import Mapping
from typing import Any

import ray

from harness.cluster import log_to_run_folder
from harness.config import BaseConfig
from harness.journal import Answer, Chunk, Request
from harness.pack import open_pool
from harness.registry import Registry
from harness.train_actor import load_base_on_actor
from phatgoose.encoding import encode_context
from phatgoose.expert import Expert
from phatgoose.model import RoutedModel, RoutingLog
from phatgoose.routers import Router
from phatgoose.scoring import Question, generate, score


class EvalActor:
    """Answers chunks with a base and a pool that stay loaded.

    Args:
        base: which base to load.
        fingerprint: what it must be.
        registry: where the experts are kept.
        keeper: the registry's actor, for nodes that do not see its files.
        experts: content hash by name: the pool.
        run_dir: where to write the log.
    """

    def __init__(
        self,
        base: BaseConfig,
        fingerprint: str,
        registry: str,
        keeper: Any,
        experts: Mapping[str, str],
        run_dir: str,
    ) -> None:
        log_to_run_folder(run_dir, "evaluate")

        def fetch(content_hash: str) -> Expert:
            expert: Expert = ray.get(keeper.load.remote(content_hash))
            return expert

        loaded = load_base_on_actor(base, fingerprint)
        pool = open_pool(Registry(registry, fingerprint), experts, fetch)
        self._model = RoutedModel(loaded, pool)

    def answer(self, router: Router, chunk: Chunk) -> Answer:
        """Answer one chunk, routed by `router`."""
        if router != self._model.router:
            self._model.set_router(router)
        started = time.monotonic()
        answer = self._score(chunk) if chunk.kind == "score" else self._generate(chunk)
        answer.seconds = time.monotonic() - started
        return answer

    def _score(self, chunk: Chunk) -> Answer:
        base, log = self._model.base, RoutingLog()
        questions = [Question.encode(base, r.context, r.choices) for r in chunk.requests]
        self._model.record(log)
        try:
            scores = score(base, questions, log)
        finally:
            self._model.record(None)
        return Answer(
            scores=scores,
            tokens=sum(question.length for question in questions),
            routing=log.weights,
            routed=log.tokens,
        )

    def _generate(self, chunk: Chunk) -> Answer:
        base, requests = self._model.base, chunk.requests
        contexts = [encode_context(base, request.context) for request in requests]
        written = generate(base, contexts, max(r.max_new_tokens for r in requests))
        texts = [_cut_text(r, text) for r, text in zip(requests, written, strict=True)]
        tokens = sum(map(len, contexts)) + len(contexts) * max(r.max_new_tokens for r in requests)
        return Answer(texts=texts, tokens=tokens)


def _cut_text(request: Request, text: str) -> str:
    """What was generated, up to the first stop string, without the space moved from the prompt."""
    if request.context.endswith(" "):
        text = text.removeprefix(" ")
    for stop in request.until:
        text = text.split(stop)[0]
    return text
