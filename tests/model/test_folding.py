"""Scales folded into a block: exactly, reversibly, and how a change of the block is noticed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.model.experts import unfuse
from haq.model.folding import Producer, fold, keep_parameters, same_function
from tests.model.toys import EXPERTS, HIDDEN, INNER, Fused, Mixture, Normed, OnePlusNorm, Residual

# --- Into linears and norms -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("norm", "offset"),
    [(nn.LayerNorm(HIDDEN), 0.0), (nn.RMSNorm(HIDDEN), 0.0), (OnePlusNorm(HIDDEN), 1.0)],
    ids=["layer norm", "rms norm", "one plus norm"],
)
def test_folding_into_a_16_bit_norm_is_as_exact_as_into_a_32_bit_one(
    norm: nn.Module, offset: float, dtype: torch.dtype
) -> None:
    block = Normed(norm)
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 1.5).sub_(offset)
    # A weight of zero, and for LayerNorm a bias beside it that must be rescaled all the same.
    norm.weight.data[3] = -offset
    norm.weight.data.copy_(norm.weight.to(dtype))
    hidden = torch.randn(1, 50, HIDDEN)
    with torch.no_grad():
        expected = block(hidden)
    scale = torch.linspace(0.3, 7.0, HIDDEN)

    producer = Producer("norm", torch.arange(HIDDEN), offset)
    applied = fold(block, producer, ("fc",), scale, dtype).applied

    # Stored in 16 bits, the weight is the one that was folded.
    assert torch.equal(norm.weight, norm.weight.to(dtype).float())
    # The scale is the one asked for, to the precision of the stored weight: an ulp of w is several
    # of a small 1 + w.
    torch.testing.assert_close(applied, scale, rtol=10 * torch.finfo(dtype).eps, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-5)


def test_folding_divides_rows_and_multiplies_columns() -> None:
    block = Residual()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    scale = torch.arange(1.0, INNER + 1)
    fold(block, Producer("fc1", torch.arange(INNER)), ("fc2",), scale, torch.float32)
    after = block.state_dict()
    torch.testing.assert_close(after["fc1.weight"], before["fc1.weight"] / scale[:, None])
    torch.testing.assert_close(after["fc1.bias"], before["fc1.bias"] / scale)
    torch.testing.assert_close(after["fc2.weight"], before["fc2.weight"] * scale)
    for untouched in ("fc2.bias", "norm.weight", "norm.bias"):
        assert torch.equal(after[untouched], before[untouched])


def test_rows_that_nothing_reads_keep_their_numbers() -> None:
    block = Fused(lambda x: (x[..., :INNER], x[..., INNER:]))
    gate = block.gate_up.weight[:INNER].clone()
    producer = Producer("gate_up", torch.arange(INNER, 2 * INNER))
    fold(block, producer, ("down",), torch.full((INNER,), 2.0), torch.float32)
    assert torch.equal(block.gate_up.weight[:INNER], gate)


def test_kept_parameters_come_back() -> None:
    block = Residual()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    restore = keep_parameters(block.norm, block.fc1)
    for parameter in block.parameters():
        parameter.data.add_(1.0)
    restore()
    after = block.state_dict()
    for key in ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias"):
        assert torch.equal(after[key], before[key])
    torch.testing.assert_close(after["fc2.weight"], before["fc2.weight"] + 1)


# --- Into mixtures of experts ---------------------------------------------------------------------

POWERS_OF_TWO = 2.0 ** (torch.arange(HIDDEN) % 5 - 2)


NORM = Producer("norm", torch.arange(HIDDEN))
READERS = ("shared", "experts", "router")
FORMS = {"fused": lambda experts: experts, "unfused": unfuse}


def parameters_of(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def changed(block: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, p in block.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_folding_reaches_every_expert_and_the_router(form: Callable) -> None:
    block, hidden = Mixture(form), torch.randn(2, 30, HIDDEN)
    before = parameters_of(block)
    with torch.no_grad():
        expected = block(hidden)
        fold(block, NORM, READERS, POWERS_OF_TWO, torch.float32)
        # Factors that round nothing in what is multiplied; sums and the product with it do.
        torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-4)
    first = {n for n in before if n.startswith("experts.") and "down" not in n}
    assert len(first) == (1 if form is FORMS["fused"] else EXPERTS)
    # The second matrices of the experts, and what has other channels, are not among them.
    assert changed(block, before) == {
        *first,
        "norm.weight",
        "norm.bias",
        "router.weight",
        "shared.weight",
    }
    for name in (*first, "router.weight", "shared.weight"):
        assert torch.equal(block.get_parameter(name), before[name] * POWERS_OF_TWO)


# --- And back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["w", "1 + w"])
def test_a_fold_into_a_norm_is_taken_back_to_the_bit(offset: float, dtype: torch.dtype) -> None:
    block = Normed(OnePlusNorm(HIDDEN) if offset else nn.LayerNorm(HIDDEN))
    nn.init.normal_(block.norm.weight)
    before = parameters_of(block)
    producer = Producer("norm", torch.arange(HIDDEN), offset)
    # Thirds: what is multiplied by them does not come back by division.
    folded = fold(block, producer, ("fc",), torch.arange(1.0, HIDDEN + 1) / 3, dtype)
    assert changed(block, before) >= {"norm.weight", "fc.weight"}
    folded.undo()
    assert changed(block, before) == set()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_fold_into_a_linear_is_taken_back_to_the_bit(kind: type[nn.Module]) -> None:
    block = Residual()
    if kind is Conv1D:
        block.fc1, block.fc2 = Conv1D(INNER, HIDDEN), Conv1D(HIDDEN, INNER)
        nn.init.normal_(block.fc1.bias)
    before = parameters_of(block)
    folded = fold(
        block,
        Producer("fc1", torch.arange(INNER)),
        ("fc2",),
        torch.arange(1.0, INNER + 1) / 3,
        torch.float32,
    )
    assert changed(block, before) == {"fc1.weight", "fc1.bias", "fc2.weight"}
    folded.undo()
    assert changed(block, before) == set()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_fold_by_powers_of_two_into_experts_is_taken_back_to_the_bit(form: Callable) -> None:
    block = Mixture(form)
    before = parameters_of(block)
    folded = fold(block, NORM, READERS, POWERS_OF_TWO, torch.float32)
    assert len(changed(block, before)) > 4
    folded.undo()
    assert changed(block, before) == set()


def test_a_fold_by_any_scale_is_taken_back_to_the_bit_but_for_experts() -> None:
    block = Mixture(unfuse)
    before = parameters_of(block)
    folded = fold(block, NORM, READERS, torch.arange(1.0, HIDDEN + 1) / 3, torch.bfloat16)
    folded.undo()
    # Multiplied and divided by the same number: one ulp at most.
    assert {name.partition(".")[0] for name in changed(block, before)} <= {"experts"}
    torch.testing.assert_close(parameters_of(block), before, rtol=2e-7, atol=0)


def test_what_powers_of_two_did_is_taken_back_without_a_copy() -> None:
    block = Residual()
    scale = 2.0 ** (torch.arange(INNER) % 5 - 2)
    folded = fold(block, Producer("fc1", torch.arange(INNER)), ("fc2",), scale, torch.float32)
    for layer in (block.fc1, block.fc2):
        layer.weight.data.fill_(3.0)
    folded.undo()
    assert torch.equal(block.fc1.weight, (3 * scale[:, None]).expand_as(block.fc1.weight))
    assert torch.equal(block.fc2.weight, (3 / scale).expand_as(block.fc2.weight))


def test_what_is_taken_back_is_no_copy_of_the_experts() -> None:
    """It would be as large as the layer."""
    block = Mixture(unfuse)
    folded = fold(block, NORM, READERS, POWERS_OF_TWO, torch.float32)
    matrix = block.experts.expert(1).up.weight
    matrix.data.fill_(3.0)
    folded.undo()
    assert torch.equal(matrix, (3 / POWERS_OF_TWO).expand_as(matrix))


# --- Whether a block still does the same ----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "same"),
    [(0.0, True), (1e-4, True), (1e-2, False), (float("nan"), False)],
    ids=["none", "rounding", "one percent", "nan"],
)
def test_an_error_is_measured_against_what_the_block_adds(error: float, same: bool) -> None:
    """A residual stream a hundred times larger would hide it."""
    hidden, added = 100 * torch.randn(1, 5, HIDDEN), torch.randn(1, 5, HIDDEN)
    assert same_function(hidden, hidden + added, hidden + added * (1 + error)) is same


def test_the_rounding_of_a_large_residual_stream_is_no_error() -> None:
    hidden, added = 1e6 * torch.randn(1, 50, HIDDEN), torch.randn(1, 50, HIDDEN)
    rounding = 0.06 * torch.randn(1, 50, HIDDEN)  # An ulp of a million is 0.0625.
    assert same_function(hidden, hidden + added, hidden + added + rounding)


def outputs(*, wrong: int, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """What enters a block, what came out before and after; ``wrong`` tokens are others."""
    hidden, added = torch.randn(2, tokens // 2, HIDDEN), torch.randn(2, tokens // 2, HIDDEN)
    output = hidden + added * (1 + 1e-4)
    output.view(tokens, HIDDEN)[:wrong] += 1.0
    return hidden, hidden + added, output


@pytest.mark.parametrize(
    ("wrong", "share", "same"),
    [
        (0, 1.0, True),
        (1, 1.0, False),
        (0, 0.99, True),
        (2, 0.99, True),
        (3, 0.99, False),
        (200, 0.99, False),
        (100, 0.5, True),
        (101, 0.5, False),
    ],
)
def test_the_share_of_tokens_that_must_be_the_same(wrong: int, share: float, same: bool) -> None:
    """By itself for each of 200 tokens, however far off the others are."""
    assert same_function(*outputs(wrong=wrong), share) is same


def test_all_tokens_together_are_measured_as_one() -> None:
    """Where the block adds next to nothing to one of them, rounding is large beside it."""
    hidden, added = torch.randn(1, 50, HIDDEN), torch.randn(1, 50, HIDDEN)
    added[0, 7] = 0.0
    output = hidden + added
    output[0, 7] *= 1 + 1e-4
    assert same_function(hidden, hidden + added, output)
    # Each by itself, and without exception: 49 of 50 are.
    assert not same_function(hidden, hidden + added, output, 0.99)


def test_a_small_error_in_every_token_is_no_exception_of_a_few() -> None:
    hidden, added = torch.randn(1, 200, HIDDEN), torch.randn(1, 200, HIDDEN)
    assert not same_function(hidden, hidden + added, hidden + 1.01 * added, 0.99)


def test_a_token_to_which_nothing_is_added_is_compared_by_its_size() -> None:
    hidden = torch.randn(1, 200, HIDDEN)
    assert same_function(hidden, hidden, hidden * (1 + 1e-7), 0.99)
    assert not same_function(hidden, hidden, hidden * (1 + 1e-4), 0.99)


def test_nan_in_more_than_the_share_is_not_the_same() -> None:
    hidden, reference, output = outputs(wrong=0)
    output[0, :3, 0] = torch.nan
    assert not same_function(hidden, reference, output, 0.99)
