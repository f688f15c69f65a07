"""Check, without a second device, that all computations stay on the device of the base.

Torch's device `meta` replaces a GPU: its tensors have shapes and no numbers. As with a GPU, an
operation must not mix its tensors with CPU tensors.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phatgoose.base import Base
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.scoring import score
from phatgoose.ops import mix, mix_factors
from phatgoose.pool import Pool, PoolLinear
from phatgoose.question import Question
from phatgoose.routers import ROUTERS, Merge, TokenRouter, Wrapper, make_router
from phatgoose.training.gated_lora import attach_expert, attach_lora, detach_lora
from tests.support.pools import make_pool
from tests.support.tiny import make_experts

META = torch.device("meta")
NAMES = [n for n, r in ROUTERS.items() if issubclass(r, TokenRouter | Merge | Wrapper)]


def moved(linear: PoolLinear) -> PoolLinear:
    values: dict[str, Any] = {f.name: getattr(linear, f.name) for f in dataclasses.fields(linear)}
    there: dict[str, Any] = {n: None if v is None else v.to(META) for n, v in values.items()}
    return PoolLinear(**there)


def on_meta(pool: Pool) -> Pool:
    return dataclasses.replace(pool, linears={n: moved(f) for n, f in pool.linears.items()})


def router_of(name: str, **options: Any) -> Any:
    given = {"genknowsub": {"general": "e0"}, "single": {"expert": "e1"}}.get(name, {})
    return make_router(name, **{**given, **options})


class OneDevice(TorchDispatchMode):
    """A mode that refuses what a GPU refuses; copies and scalars may come from elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        devices = {tensor.device for tensor in tensors if tensor.dim()}
        if len(devices) > 1 and "copy" not in func.__name__:
            raise RuntimeError(f"{func} is given tensors of {sorted(map(str, devices))}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with OneDevice():
        yield


def test_the_fake_gpu_refuses_cpu_tensors() -> None:
    for operation in (torch.add, torch.mul, torch.mm):
        assert operation(torch.ones(2, 2, device=META), torch.ones(2, 2).to(META)).device == META
        with pytest.raises(RuntimeError, match=r"cpu.*meta"):
            operation(torch.ones(2, 2, device=META), torch.ones(2, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("absent", [True, False])
def test_routers_stay_on_the_device_of_the_pool(base: Base, name: str, absent: bool) -> None:
    """Check linears that all experts adapt, and linears that one of them does not."""
    pool = on_meta(make_pool(base, 5))
    linears = [n for n, f in pool.linears.items() if (f.absent_E is not None) == absent]
    assert linears
    router = router_of(name)
    if isinstance(router, Wrapper):
        pool, router = router.change(pool), router.inner
    for linear in linears:
        factors = pool.linears[linear]
        assert factors.lora_A_ERD.device == factors.lora_B_EOR.device == META
        if isinstance(router, Merge):
            assert {matrix.device for matrix in router.merge(pool, linear)} == {META}
            continue
        x_TD = torch.zeros(3, factors.lora_A_ERD.shape[2], device=META)
        bias_TE = torch.zeros(3, 5, device=META) if router.is_biased else None
        weights_TK, indices_TK = router.rule(pool, linear)(x_TD, bias_TE)
        assert weights_TK.device == indices_TK.device == META
        assert weights_TK.shape == indices_TK.shape == (3, min(router.top_k, 5))


@pytest.mark.parametrize("mixer", [mix, mix_factors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_stays_on_the_device_of_the_inputs(mixer: Any, dtype: torch.dtype) -> None:
    """Check dense mixing; the other ways read the number of tokens per expert."""
    x_TD = torch.zeros(3, 16, device=META, dtype=dtype)
    factors = x_TD.new_zeros(4, 2, 16), x_TD.new_zeros(4, 8, 2)
    indices_TK = torch.zeros(3, 2, device=META, dtype=torch.long)
    y_TO = mixer(x_TD, *factors, indices_TK, torch.zeros(3, 2, device=META))
    assert (y_TO.device, y_TO.dtype, y_TO.shape) == (META, dtype, (3, 8))


def questions_of(base: Base) -> list[Question]:
    texts = [("Is the lake deep?", [" yes", " no"]), ("the grey goose flies over", [" the lake"])]
    return [Question.encode(base, context, choices) for context, choices in texts]


@pytest.mark.parametrize("router", [None, "phatgoose", "merged"])
def test_scoring_moves_its_inputs_to_the_device_of_the_base(
    llama: Base, router: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def keep(logits_PV: Tensor, _: Any, __: Any, asked: list[Any]) -> list[list[Any]]:
        seen.append(logits_PV)
        return [[] for _ in asked]

    monkeypatch.setattr("phatgoose.inference.scoring.to_scores", keep)
    questions, pool = questions_of(llama), make_pool(llama, 5)
    nn.Module.to(llama.model, META)
    if router is None:
        score(llama, questions)
    else:
        RoutedModel(llama, pool, router).score(questions)
    (logits_PV,) = seen
    assert logits_PV.device == META
    assert logits_PV.shape[1] == llama.model.config.vocab_size


def test_trained_parameters_are_on_the_device_of_the_base(base: Base) -> None:
    expert = make_experts(base, 1)[0]
    nn.Module.to(base.model, META)
    layers = attach_lora(base.model, base.linears, rank=2, scale=1.0, init_std=0.1, seed=0)
    for name, layer in layers.items():
        layer.add_gate()
        assert layer.gate_D is not None
        assert {layer.lora_A_RD.device, layer.lora_B_OR.device, layer.gate_D.device} == {META}
        y = layer(torch.zeros(2, layer.lora_A_RD.shape[1], device=META))
        assert (y.device, y.shape) == (META, (2, layer.base.out_features))
        assert base.model.get_submodule(name) is layer
    detach_lora(base.model, layers)
    for layer in attach_expert(base.model, expert).values():
        assert layer.lora_A_RD.device == layer.lora_B_OR.device == META
