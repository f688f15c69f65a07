"""Attach a pool and a router to a base; score, generate, and read what was routed where.

Shape suffixes: D input features, E experts, K experts kept, Q queries.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from phatgoose.architecture import find_linear, linear_sizes, replace_module
from phatgoose.base import Base, last_query_projection
from phatgoose.errors import PhatgooseError
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.inference.generation import answer, generate
from phatgoose.inference.routed_linear import RoutedLinear, RoutingLog
from phatgoose.inference.scoring import Score, score, score_parts
from phatgoose.ops import RoutedExperts, packed
from phatgoose.pool import Pool, PoolLinear
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import Merge, QueryRouter, Router, TokenRouter, Wrapper, make_router
from phatgoose.routers.interface import Probe
from phatgoose.rows import pad_rows
from phatgoose.tokenization import cut_context, encode_context, prompt_room, spaces_moved

LogOrNone = TypeVar("LogOrNone", bound=RoutingLog | None)


class RoutedModel:
    """A base with a pool attached; its router can be changed at any time.

    Without a router, and with `base`, its output is that of the base.

    Args:
        base: the base; its linears are wrapped in place, and `detach` restores them.
        pool: the experts to route among.
        router: the first router, or its name.

    Attributes:
        pool: the pool on the base's device; factors in the base's dtype, gates in float32.
        router: the router.
        forward_context: what the rows and positions of the current pass are.

    Raises:
        PhatgooseError: the pool was made with another base, or does not fit its linears.
    """

    def __init__(self, base: Base, pool: Pool, router: Router | str = "base") -> None:
        if pool.base_fingerprint != base.fingerprint:
            raise PhatgooseError(
                f"the pool was made with the base {pool.base_fingerprint[:12]}, and {base.name} is "
                f"{base.fingerprint[:12]}: load the base that the pool was trained on"
            )
        self.base = base
        self._given, self.pool = pool, _fit(base, pool)
        self.forward_context = ForwardContext()
        record = base.architecture
        self._linears = {
            name: RoutedLinear(
                find_linear(base.model, name), name, record.side_of(name), self.forward_context
            )
            for name in self.pool.linears
        }
        for name, linear in self._linears.items():
            replace_module(base.model, name, linear)
        self._attached = True
        try:
            self.set_router(router)
        except BaseException:
            self.detach()
            raise

    @torch.no_grad()
    def set_router(self, router: Router | str) -> None:
        """Route by `router`, or the router of that name, from now on.

        Raises:
            PhatgooseError: there is no router of that name, an option is invalid, or the pool
                lacks what the router needs. The previous router then stays.
        """
        router = make_router(router) if isinstance(router, str) else router
        router.check_options()
        router.check(self.pool)
        acting: Router = router
        wrappers = []
        while isinstance(acting, Wrapper):
            wrappers.append(acting)
            acting = acting.inner
        # Merges, and what routers score by, are made of unrounded factors.
        pool = self._given
        for wrapper in wrappers:
            pool = wrapper.change(pool)
        install = [self._prepare(acting, pool, name) for name in self._linears]
        for call in install:  # now that nothing can go wrong any more
            call()
        self.router, self._acting, self._acting_pool = router, acting, pool

    def _prepare(self, router: Router, pool: Pool, name: str) -> Callable[[], None]:
        """Return the call that installs a router on one linear."""
        linear, device = self._linears[name], self.base.device
        if isinstance(router, QueryRouter):
            factors = self._mixed(pool, name)
            experts = RoutedExperts(factors.lora_A_ERD, factors.lora_B_EOR)
            return lambda: linear.set_experts(experts)
        if isinstance(router, TokenRouter | Merge):
            own = replace(pool, linears={name: _moved(pool.linears[name], device)})
            if isinstance(router, Merge):
                static = linear.as_static(router.merge(own, name))
                return lambda: linear.set_static(static)
            factors = self._mixed(pool, name)
            experts = RoutedExperts(
                factors.lora_A_ERD,
                factors.lora_B_EOR,
                router.rule(own, name),
                mixes_factors=router.mix == "factors",
            )
            return lambda: linear.set_experts(experts)
        return linear.clear

    def _mixed(self, pool: Pool, name: str) -> PoolLinear:
        """Return the factors of one linear as they are mixed, on the base's device."""
        if pool is self._given:
            return self.pool.linears[name]
        return _rounded(_moved(pool.linears[name], self.base.device), self._linears[name].weight)

    def score(self, questions: Sequence[Question]) -> list[list[Score]]:
        """Score every choice of every question in one batch; see `inference.scoring.score`."""
        return score_parts(self.base, questions, self._score)

    def _score(self, questions: Sequence[Question]) -> list[list[Score]]:
        with self._decided([q.query for q in questions], [q.context for q in questions]):
            return score(self.base, questions, self.forward_context)

    def generate(
        self, prompts: Sequence[Query | str], max_new_tokens: int, *, stops: Sequence[str] = ()
    ) -> list[str]:
        """Generate greedy continuations of a batch of prompts; see `inference.generation.generate`.

        A prompt that is too long loses its beginning. Spaces at its end are not written again.
        """
        queries = [Query(p) if isinstance(p, str) else p for p in prompts]
        room = prompt_room(self.base, max_new_tokens)
        contexts = [
            cut_context(self.base, encode_context(self.base, query.text), room) for query in queries
        ]
        spaces = [spaces_moved(query.text) for query in queries]
        with self._decided(queries, contexts):
            return generate(
                self.base,
                contexts,
                max_new_tokens,
                stops=stops,
                spaces=spaces,
                forward=self.forward_context,
            )

    def answer(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        *,
        stops: Sequence[str] = (),
        spaces: Sequence[int] = (),
    ) -> tuple[list[str], list[Score]]:
        """Generate and score in one pass; see `phatgoose.inference.generation.answer`."""
        with self._decided([q.query for q in questions], [q.context for q in questions]):
            return answer(
                self.base,
                questions,
                max_new_tokens,
                stops=stops,
                spaces=spaces,
                forward=self.forward_context,
            )

    def record(self, log: RoutingLog | None) -> None:
        """Count what is routed into `log` from now on; stop counting if it is None."""
        for linear in self._linears.values():
            linear.log = log

    @contextmanager
    def recording(self, log: LogOrNone) -> Iterator[LogOrNone]:
        """Count what is routed into `log` within the `with` block; nothing if it is None."""
        before = next(iter(self._linears.values())).log
        self.record(log)
        try:
            yield log
        finally:
            self.record(before)

    @contextmanager
    def listening(
        self, hear: Callable[[str, Tensor], None], linears: Sequence[str] | None = None
    ) -> Iterator[None]:
        """Call `hear` with the name and the input of each adapted linear that runs in the block.

        Only those named in `linears`, if it is given.
        """

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, RoutedLinear)
            hear(module.name, args[0])

        chosen = self._linears if linears is None else linears
        handles = [self._linears[name].register_forward_pre_hook(hook) for name in chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def detach(self) -> None:
        """Put the frozen linears back, so that the base is as it was; this model ends with it."""
        self._attached = False
        for name, linear in self._linears.items():
            replace_module(self.base.model, name, linear.base)

    @contextmanager
    def _decided(
        self, asked: Sequence[Query | None], contexts: Sequence[list[int]]
    ) -> Iterator[None]:
        """Let a router that looks at whole queries decide about those of the next batch."""
        if not self._attached:
            raise PhatgooseError("this model was detached from its base: make a new RoutedModel")
        acting, pool = self._acting, self._acting_pool
        queries = [query for query in asked if query is not None]
        looks = isinstance(acting, QueryRouter) or (
            isinstance(acting, TokenRouter) and acting.is_biased
        )
        if looks and len(queries) < len(asked):
            raise PhatgooseError(
                f"router {acting.name()} decides by queries, and a question has none: make it with "
                "Question.encode, or give Question(query=Query(text))"
            )
        device = next(iter(self.pool.linears.values())).lora_A_ERD.device
        try:
            with torch.inference_mode():
                if isinstance(acting, QueryRouter):
                    probe = Probe(self._probe_linear(), lambda: self._probe(contexts))
                    weights_QK, indices_QK = acting.mixture(pool, queries, probe)
                    # Not in the base's dtype: weights are float32 until the sum over experts.
                    self.forward_context.mixture = weights_QK.to(device), indices_QK.to(device)
                elif isinstance(acting, TokenRouter) and acting.is_biased:
                    self.forward_context.bias_QE = acting.bias(pool, queries).to(device)
            yield
        finally:
            self.forward_context.clear()

    def _probe_linear(self) -> str:
        return last_query_projection(self.base, self.pool.linears) or ""

    def _probe(self, contexts: Sequence[list[int]]) -> Tensor:
        """Return the value of `Probe.run`: x_QD of the query projection, under the bare base."""
        name, base = self._probe_linear(), self.base
        if not name:
            raise PhatgooseError(
                "this router reads the input of a query projection, and the pool adapts none: use "
                "another router"
            )
        ids_BL, mask_BL = (
            t.to(base.device) for t in pad_rows(contexts, base.tokenizer.pad_token_id)
        )
        heard: dict[str, Tensor] = {}
        whole = base.model.get_encoder() if base.is_encoder_decoder else base.model.base_model
        self.forward_context.bare = True
        try:
            with self.listening(heard.__setitem__, [name]):
                whole(input_ids=ids_BL, attention_mask=mask_BL)
        finally:
            self.forward_context.bare = False
        last_B = mask_BL.sum(dim=1) - 1
        return heard[name][torch.arange(len(contexts), device=base.device), last_B]


def _moved(factors: PoolLinear, device: torch.device) -> PoolLinear:
    """Return the same factors and gates on another device."""
    gate_ED, absent_E = factors.gate_ED, factors.absent_E
    return PoolLinear(
        lora_A_ERD=factors.lora_A_ERD.to(device),
        lora_B_EOR=factors.lora_B_EOR.to(device),
        gate_ED=None if gate_ED is None else gate_ED.to(device),
        absent_E=None if absent_E is None else absent_E.to(device),
    )


def _rounded(factors: PoolLinear, weight: Tensor) -> PoolLinear:
    """Return factors in the dtype of a base's weight, for mixing, and gates in float32."""
    dtype, gate_ED = weight.dtype, factors.gate_ED
    lora_A_ERD, lora_B_EOR = packed(factors.lora_A_ERD.to(dtype), factors.lora_B_EOR.to(dtype))
    return replace(
        factors,
        lora_A_ERD=lora_A_ERD,
        lora_B_EOR=lora_B_EOR,
        gate_ED=None if gate_ED is None else gate_ED.float(),
    )


def _fit(base: Base, pool: Pool) -> Pool:
    """Return the pool on the base's device, rounded for mixing, after checking that it fits."""
    linears = {}
    for name, factors in pool.linears.items():
        linear = find_linear(base.model, name)
        expected = linear_sizes(linear)
        found = (factors.lora_A_ERD.shape[2], factors.lora_B_EOR.shape[1])
        if expected != found:
            raise PhatgooseError(f"the pool maps {found} on {name}, the base {expected}")
        linears[name] = _rounded(_moved(factors, linear.weight.device), linear.weight)
    if not linears:
        raise PhatgooseError("the pool adapts no linear")
    return Pool(pool.base_fingerprint, pool.experts, linears, pool.profiles)
