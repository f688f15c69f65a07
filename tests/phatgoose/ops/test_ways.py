"""Which way of routing and mixing is taken, and what is said about it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops import RoutedExperts, compiled, mixing, routed
from tests.support.routed_cases import Case, check, needs_kernel, operands_of

CANNOT = "no kernel computes in torch.float16 on cpu"


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let a test change what decides about the kernel, and forget what was decided."""
    routed._say.cache_clear()
    compiled.find_kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    compiled.find_kernel.cache_clear()


@pytest.mark.parametrize("way", ["dense", "grouped", "loop"])
@pytest.mark.parametrize("mixes_factors", [False, True])
def test_the_environment_chooses_one_of_torchs_ways(
    way: str, mixes_factors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()

    def spy(name: str) -> mixing.Product:
        product = mixing._PRODUCTS[name]

        def call(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
            used.add(name)
            return product(x_ND, weight_EOD, counts_E)

        return call

    monkeypatch.setattr(mixing, "_PRODUCTS", {name: spy(name) for name in mixing._PRODUCTS})
    check(Case(tokens=20, experts=12, mixes_factors=mixes_factors), way)
    assert used == ({way} if way != "dense" else set())


def test_an_unknown_way_is_refused(forget: pytest.MonkeyPatch) -> None:
    forget.setenv("PHATGOOSE_MIX", "fast")
    with pytest.raises(PhatgooseError, match=r"PHATGOOSE_MIX=fast: it must be one of kernel, "):
        check_default()


def check_default() -> RoutedExperts:
    on = operands_of(Case())
    return RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)


@pytest.mark.parametrize("wanted", [None, "kernel"])
def test_without_a_kernel_torch_computes_and_it_is_said_once(
    wanted: str | None, forget: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget.setattr(compiled, "_MODULES", {})
    forget.setattr(compiled, "_ANY", "phatgoose_cpu_of_nobody")
    if wanted:
        forget.setenv("PHATGOOSE_MIX", wanted)
        with pytest.raises(
            PhatgooseError, match=r"MIX=kernel: no kernel for the CPU, as .*compiler"
        ):
            check_default()
        return
    forget.delenv("PHATGOOSE_MIX", raising=False)
    with caplog.at_level(logging.WARNING, logger="phatgoose"):
        assert check_default()._kernel is None
        assert check_default()._kernel is None
    assert [record.message for record in caplog.records] == [
        "routing takes longer: no kernel for the CPU, as it was not compiled when phatgoose was "
        "installed. Install phatgoose again where a C++ compiler is."
    ]
    assert routed.way_on("cpu") == "torch"


def test_a_kernel_that_was_asked_for_and_cannot_compute_is_an_error(
    forget: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on = operands_of(Case())
    halves = on.lora_A_ERD.half(), on.lora_B_EOR.half()
    forget.delenv("PHATGOOSE_MIX", raising=False)
    with caplog.at_level(logging.INFO, logger="phatgoose"):
        assert RoutedExperts(*halves, on.rule)._kernel is None
    assert [record.message for record in caplog.records] == [
        f"routing takes longer: {CANNOT}. Set PHATGOOSE_MIX=torch, or choose another dtype."
    ]
    assert routed.way_on("cpu", torch.float16) == "torch"
    forget.setenv("PHATGOOSE_MIX", "kernel")
    with pytest.raises(PhatgooseError, match=f"MIX=kernel: {CANNOT}"):
        RoutedExperts(*halves, on.rule)


def test_a_kind_of_device_without_a_kernel_is_no_warning(
    forget: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget.delenv("PHATGOOSE_MIX", raising=False)
    with caplog.at_level(logging.INFO, logger="phatgoose"):
        assert routed.way_on("mps") == "torch"
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    forget.setenv("PHATGOOSE_MIX", "kernel")
    with pytest.raises(PhatgooseError, match="MIX=kernel: there is no kernel for mps"):
        routed.way_on("mps")


def test_the_kernels_for_cuda_say_what_they_cannot_compute() -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
    from phatgoose.ops import triton_experts

    on = operands_of(Case(experts=12))
    factors = on.lora_A_ERD, on.lora_B_EOR
    assert triton_experts.unsupported(*factors, on.rule) is None
    assert triton_experts.unsupported(*factors, replace(on.rule, top_k=8)) is None
    more = triton_experts.unsupported(*factors, replace(on.rule, top_k=9))
    assert more == "it keeps at most 8 experts per token, and the router keeps 9"
    mixed = triton_experts.unsupported(factors[0].double(), factors[1], on.rule)
    assert mixed == "its factors are torch.float64 and torch.float32"


@needs_kernel
def test_a_kernel_from_other_source_is_not_used(forget: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "cpu_kernels.cpp"
    other.write_text("// changed since")
    forget.setattr(compiled, "_SOURCES", [other])
    reason = compiled.find_kernel()
    assert isinstance(reason, str)
    assert reason.endswith("was compiled from another version of cpu_kernels.cpp")


@needs_kernel
def test_a_library_that_is_not_the_kernel_is_not_used(
    forget: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "phatgoose_cpu_broken.py").write_text("")
    forget.syspath_prepend(tmp_path)
    forget.setattr(compiled, "_MODULES", {})
    forget.setattr(compiled, "_ANY", "phatgoose_cpu_broken")
    reason = compiled.find_kernel()
    assert isinstance(reason, str)
    assert "cannot be loaded" in reason


@needs_kernel
def test_every_instruction_set_computes_the_formula(forget: pytest.MonkeyPatch) -> None:
    """Check those that this processor understands; the largest is checked elsewhere."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = order.index(torch.backends.cpu.get_cpu_capability())
    builds = set()
    for capability in order[: here + 1]:
        forget.setattr(torch.backends.cpu, "get_cpu_capability", lambda now=capability: now)
        compiled.find_kernel.cache_clear()
        kernel = compiled.find_kernel()
        assert not isinstance(kernel, str)
        builds.add(kernel.build)
        for rank, experts, tokens in [(16, 166, 9), (8, 20, 200), (37, 5, 33), (4, 1, 1)]:
            check(Case(tokens, experts, rank=rank, inputs=67, outputs=131), "kernel", threads=2)
    assert len(builds) == here + 1
