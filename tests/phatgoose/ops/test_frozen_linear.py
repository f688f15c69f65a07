"""Check products by frozen weights against F.linear, in both libraries."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from phatgoose.ops import frozen_linear
from phatgoose.ops.frozen_linear import (
    FrozenLinear,
    library,
    product,
    use_fast_products,
    use_plain_products,
)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here"
)


@pytest.fixture(autouse=True)
def _chosen_again() -> Iterator[None]:
    """Choose the library anew, and for products of any size."""
    library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_linear, "_LARGE", 1)
        yield
    library.cache_clear()


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_LINEAR", "onednn")


def choose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str, capability: str = "AVX512"
) -> str:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(frozen_linear, "_CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return library()


def test_other_makers_with_avx512_get_onednn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PHATGOOSE_LINEAR", raising=False)
    assert choose(monkeypatch, tmp_path, "AuthenticAMD") == "onednn"


@pytest.mark.parametrize(
    ("maker", "capability"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2")]
)
def test_other_processors_keep_mkl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str, capability: str
) -> None:
    monkeypatch.delenv("PHATGOOSE_LINEAR", raising=False)
    assert choose(monkeypatch, tmp_path, maker, capability) == "torch"


def test_an_unknown_processor_keeps_mkl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PHATGOOSE_LINEAR", raising=False)
    monkeypatch.setattr(frozen_linear, "_CPU_INFO", tmp_path / "missing")
    assert library() == "torch"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHATGOOSE_LINEAR", "torch")
    assert choose(monkeypatch, tmp_path, "AuthenticAMD") == "torch"
    library.cache_clear()
    monkeypatch.setenv("PHATGOOSE_LINEAR", "mkl")
    with pytest.raises(PhatgooseError, match=r"PHATGOOSE_LINEAR=mkl: .*Give one of torch, onednn"):
        library()
    library.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setenv("PHATGOOSE_LINEAR", "onednn")
    with pytest.raises(PhatgooseError, match=r"library\. Give one of torch, or leave"):
        library()


@needs_onednn
@given(
    tokens=st.integers(0, 9),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_onednn_multiplies_like_float64(
    tokens: int, inputs: int, outputs: int, bias: bool, transposed: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHATGOOSE_LINEAR", "onednn")
        library.cache_clear()
        torch.manual_seed(seed)
        x_TD = torch.randn(tokens, inputs)
        weight_OD = torch.randn(outputs, inputs)
        if transposed:
            weight_OD = torch.randn(inputs, outputs).t()
        bias_O = torch.randn(outputs) if bias else None
        expected = F.linear(
            x_TD.double(), weight_OD.double(), None if bias_O is None else bias_O.double()
        )
        torch.testing.assert_close(
            product(x_TD, weight_OD, bias_O), expected.float(), rtol=1e-5, atol=1e-5
        )


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_a_plain_linear(onednn: None, bias: bool) -> None:
    plain = nn.Linear(12, 7, bias=bias).requires_grad_(False)
    x = torch.randn(2, 5, 12, requires_grad=True)
    grad = torch.randn(2, 5, 7)
    expected_y = plain(x)
    (expected,) = torch.autograd.grad(expected_y, x, grad)
    use_fast_products(plain)
    assert type(plain) is FrozenLinear
    y = plain(x)
    assert "_Product" in type(y.grad_fn).__name__
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found, expected)


@needs_onednn
def test_a_weight_that_is_trained_keeps_its_gradient(onednn: None) -> None:
    linear = nn.Linear(12, 7)
    use_fast_products(linear)
    linear(torch.randn(3, 12)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.any()


@needs_onednn
def test_other_dtypes_and_autocast_stay_with_pytorch(onednn: None) -> None:
    plain = nn.Linear(12, 7).requires_grad_(False)
    x = torch.randn(3, 12)
    use_fast_products(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16
    plain.to(torch.bfloat16)
    assert torch.equal(plain(x.bfloat16()), F.linear(x.bfloat16(), plain.weight, plain.bias))


@needs_onednn
def test_all_linears_of_a_base_use_it_and_can_be_plain_again(
    onednn: None, llama_folder: Path
) -> None:
    """Check that outputs stay the same, and kinds that are no plain linear as they are."""
    model = load_base(str(llama_folder)).model
    kinds = [type(module) for module in model.modules()]
    ids_BL = torch.arange(12).view(2, 6)
    fast = model(input_ids=ids_BL).logits
    assert kinds.count(FrozenLinear) == 2 * 7 + 1  # of both layers, and the vocabulary's
    use_plain_products(model)
    assert [nn.Linear if kind is FrozenLinear else kind for kind in kinds] == [
        type(module) for module in model.modules()
    ]
    torch.testing.assert_close(model(input_ids=ids_BL).logits, fast)


@needs_onednn
def test_small_products_stay_with_pytorch(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "_LARGE", 12 * 7)
    monkeypatch.setattr(frozen_linear, "_LONG", 40 * 11 * 7)
    for tokens, inputs, fast in ((3, 12, True), (3, 11, False), (40, 11, True), (39, 11, False)):
        linear = nn.Linear(inputs, 7).requires_grad_(False)
        use_fast_products(linear)
        y = linear(torch.randn(tokens, inputs, requires_grad=True))
        assert ("_Product" in type(y.grad_fn).__name__) == fast


def test_pytorch_alone_changes_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_LINEAR", "torch")
    linear = nn.Linear(3, 3)
    use_fast_products(linear)
    assert type(linear) is nn.Linear
