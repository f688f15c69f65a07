"""One mixture per query, merged into the frozen weight."""

import pytest
import torch
from torch import Tensor, nn

from phatgoose.ops import RoutedExperts, mix_reference
from phatgoose.ops.compiled import find_kernel
from phatgoose.ops.mixtures import merged_output, merging_pays


def queries(*counts: int) -> Tensor:
    """Return each token's query, for so many tokens of each."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@pytest.mark.parametrize("bias", [False, True])
def test_merged_output_is_that_of_each_token_with_its_query_s_mixture(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=bias).double()
    x_TD = torch.randn(9, 12).double()
    lora_A_ERD, lora_B_EOR = torch.randn(5, 4, 12).double(), torch.randn(5, 7, 4).double()
    weights_QK = torch.rand(4, 3).double()
    indices_QK = torch.tensor([[0, 1, 2], [4, 3, 0], [2, 4, 1], [1, 0, 3]])
    query_T = queries(5, 0, 3, 1)  # a pass need not hold tokens of all queries
    with torch.no_grad():
        y_TO = merged_output(
            x_TD, linear, RoutedExperts(lora_A_ERD, lora_B_EOR), weights_QK, indices_QK, query_T
        )
        expected_TO = linear(x_TD) + mix_reference(
            x_TD, lora_A_ERD, lora_B_EOR, indices_QK[query_T], weights_QK[query_T]
        )
    torch.testing.assert_close(y_TO, expected_TO)


class Doubled(nn.Linear):
    """A linear that computes something else than a product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_merging_pays_for_long_queries_of_a_float32_base() -> None:
    linear = nn.Linear(96, 96)  # merging costs as much as 48 tokens, and 64 columns more
    assert merging_pays(linear, 64, queries(96))
    assert not merging_pays(linear, 64, queries(95))
    assert merging_pays(linear, 640, queries(53))
    assert merging_pays(linear, 64, queries(200, 20))  # it is the sum of tokens that counts
    assert not merging_pays(linear, 64, queries(95, 96))
    assert not merging_pays(linear, 64, queries(0))
    assert not merging_pays(linear.bfloat16(), 64, queries(960))
    with torch.enable_grad():
        assert not merging_pays(linear.float(), 64, queries(960))
    with torch.autocast("cpu", torch.bfloat16):
        assert not merging_pays(linear, 64, queries(960))
    assert not merging_pays(Doubled(96, 96), 64, queries(960))
    assert merging_pays(linear, 64, queries(960))
    linear.register_forward_hook(lambda *_: None)
    assert not merging_pays(linear, 64, queries(960))


@pytest.mark.parametrize("way", ["kernel", "torch", "dense", "grouped", "loop"])
def test_nothing_is_merged_if_another_way_was_asked_for(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = torch.randn(3, 4, 8), torch.randn(3, 8, 4)
    assert RoutedExperts(*factors).may_merge
    monkeypatch.setenv("PHATGOOSE_MIX", way)
    if way != "kernel" or not isinstance(find_kernel(), str):
        assert not RoutedExperts(*factors).may_merge
