"""What counts as a linear layer, and that its weight is seen as [N, K] without a copy."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.model.linears import bias_view, is_linear, linears, weight_view
from haq.nn.kept import use_fast_linears


class Adapter(nn.Linear):
    """Adds to what a linear computes, as LoRA does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.sum()


class Renamed(nn.Linear):
    """A subclass that computes the same."""


def test_both_kinds_of_linear_multiply_by_the_view() -> None:
    x = torch.randn(3, 5)
    linear, conv = nn.Linear(5, 7), Conv1D(nf=7, nx=5)
    nn.init.normal_(conv.bias)
    for module in (linear, conv):
        assert weight_view(module).shape == (7, 5)
        expected = x @ weight_view(module).T + bias_view(module)
        torch.testing.assert_close(module(x), expected)


def test_writing_to_a_view_writes_to_the_module() -> None:
    for module in (nn.Linear(5, 7), Conv1D(nf=7, nx=5)):
        weight_view(module)[6].zero_()
        bias_view(module)[6] = 3.0
        assert module(torch.randn(5))[6] == 3.0


def test_no_bias_is_none() -> None:
    assert bias_view(nn.Linear(2, 2, bias=False)) is None
    assert bias_view(nn.RMSNorm(2)) is None


def test_only_what_computes_a_plain_product_is_linear() -> None:
    block = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "conv": Conv1D(nf=2, nx=2),
            "renamed": Renamed(2, 2),
            "adapter": Adapter(2, 2),
            "norm": nn.LayerNorm(2),
            "bilinear": nn.Bilinear(2, 2, 2),
            "inside": nn.ModuleDict({"linear": nn.Linear(2, 2)}),
        }
    )
    assert list(linears(block)) == ["linear", "conv", "renamed", "inside.linear"]


def test_integer_weights_are_not_linear() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert not is_linear(module)


def test_a_linear_that_a_kernel_computes_is_one() -> None:
    module = nn.Sequential(nn.Linear(5, 7, dtype=torch.bfloat16), Adapter(5, 7).bfloat16())
    assert use_fast_linears(module) == 1
    assert list(linears(module)) == ["0"]
