import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.ops.svd import output_projection, thin_svd

sizes = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 4),
        "rank": st.integers(1, 9),
        "inputs": st.integers(1, 12),
        "outputs": st.integers(1, 12),
        "seed": st.integers(0, 10**6),
    }
)


def make_factors(
    *, experts: int, rank: int, inputs: int, outputs: int, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora_A_ERD = torch.randn(experts, rank, inputs, generator=generator)
    return lora_A_ERD, torch.randn(experts, outputs, rank, generator=generator)


def assert_is_the_svd_of(s_R: Tensor, v_RD: Tensor, delta_OD: Tensor) -> None:
    """Compare with torch's SVD of the dense product in float64, up to the sign of directions."""
    _, expected_S, expected_SD = torch.linalg.svd(delta_OD, full_matrices=False)
    kept = min(len(s_R), len(expected_S))
    largest = float(expected_S[0])
    torch.testing.assert_close(
        s_R.double()[:kept], expected_S[:kept], rtol=1e-4, atol=1e-5 * largest
    )
    assert float(s_R[kept:].abs().sum()) < 1e-5 * largest
    # All directions together, scaled by their strength: independent of signs and equal values.
    gram_DD = v_RD.double().T @ torch.diag(s_R.double() ** 2) @ v_RD.double()
    torch.testing.assert_close(gram_DD, delta_OD.T @ delta_OD, rtol=1e-4, atol=1e-5 * largest**2)
    torch.testing.assert_close(
        v_RD @ v_RD.T, torch.eye(len(v_RD), dtype=v_RD.dtype), rtol=0, atol=1e-5
    )
    if len(expected_S) < 2 or expected_S[1] < 0.99 * largest:
        cosine = float(v_RD[0].double() @ expected_SD[0])
        assert abs(abs(cosine) - 1) < 1e-4


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes)
def test_thin_svd_matches_the_svd_of_the_product(sizes: dict[str, int]) -> None:
    lora_A_ERD, lora_B_EOR = make_factors(**sizes)
    s_ER, v_ERD = thin_svd(lora_A_ERD, lora_B_EOR)
    least = min(sizes["rank"], sizes["inputs"], sizes["outputs"])
    assert s_ER.shape == (sizes["experts"], least)
    assert v_ERD.shape == (sizes["experts"], least, sizes["inputs"])
    assert (s_ER.diff(dim=1) <= 0).all()
    products = lora_B_EOR.double() @ lora_A_ERD.double()
    for s_R, v_RD, delta_OD in zip(s_ER, v_ERD, products, strict=True):
        assert_is_the_svd_of(s_R, v_RD, delta_OD)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes)
def test_the_projection_preserves_the_norms_of_the_products(sizes: dict[str, int]) -> None:
    lora_A_ERD, lora_B_EOR = make_factors(**sizes)
    m_ERD = output_projection(lora_A_ERD, lora_B_EOR)
    x_TD = torch.randn(5, sizes["inputs"], generator=torch.Generator().manual_seed(1)).double()
    products = lora_B_EOR.double() @ lora_A_ERD.double()
    for m_RD, delta_OD in zip(m_ERD, products, strict=True):
        norm_T, expected_T = (x_TD @ m_RD.double().T).norm(dim=1), (x_TD @ delta_OD.T).norm(dim=1)
        torch.testing.assert_close(norm_T, expected_T, rtol=1e-4, atol=1e-5)


def test_zero_rows_that_pad_a_rank_have_zero_singular_values() -> None:
    lora_A_ERD, lora_B_EOR = make_factors(experts=3, rank=6, inputs=20, outputs=16, seed=0)
    lora_A_ERD[0, 2:], lora_B_EOR[0, :, 2:] = 0, 0  # a rank of 2
    lora_A_ERD[1], lora_B_EOR[1] = 0, 0  # absent
    s_ER, v_ERD = thin_svd(lora_A_ERD, lora_B_EOR)
    assert s_ER.isfinite().all()
    assert v_ERD.isfinite().all()
    assert float(s_ER[0, 2:].max()) < 1e-6 * float(s_ER[0, 0])
    assert not s_ER[1].any()
    assert_is_the_svd_of(s_ER[0], v_ERD[0], lora_B_EOR[0].double() @ lora_A_ERD[0].double())
    assert not output_projection(lora_A_ERD, lora_B_EOR)[1].any()


def test_the_svd_of_an_expert_does_not_depend_on_the_others() -> None:
    lora_A_ERD, lora_B_EOR = make_factors(experts=4, rank=3, inputs=10, outputs=8, seed=0)
    together, alone = thin_svd(lora_A_ERD, lora_B_EOR), thin_svd(lora_A_ERD[2:3], lora_B_EOR[2:3])
    torch.testing.assert_close(together[0][2], alone[0][0])
    torch.testing.assert_close(together[1][2].abs(), alone[1][0].abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    lora_A_ERD, lora_B_EOR = (
        t.to(dtype) for t in make_factors(experts=2, rank=4, inputs=24, outputs=20, seed=0)
    )
    s_ER, v_ERD = thin_svd(lora_A_ERD, lora_B_EOR)
    assert s_ER.dtype == v_ERD.dtype == torch.float32
    assert output_projection(lora_A_ERD, lora_B_EOR).dtype == torch.float32
    products = lora_B_EOR.double() @ lora_A_ERD.double()
    for s_R, v_RD, delta_OD in zip(s_ER, v_ERD, products, strict=True):
        assert_is_the_svd_of(s_R, v_RD, delta_OD)
