"""What experts compute, one product after the other: the way of every backend."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from haq.int8.llvm.weight import LlvmWeight, Rows, products
from haq.int8.tokens import RoundedTokens, round_tokens
from haq.nn.linear import Int8Linear

Activation = Callable[[Tensor], Tensor]

# Rows that go through both products together, unless one expert has more.
_ROWS_AT_ONCE = 32

# Rows of one expert that go through both products together: what is between the products has the
# size of a few tokens' inner values and not of a whole prompt's.
_MOST_ROWS = 1024


def by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Positions in ``index``, flat, sorted by expert ``[S]``, and how many each expert has.

    Args:
        index: int64 ``[T, A]``; E stands for none.
        num_experts: E.

    Raises:
        ValueError: an index is not in [0, E].

    Examples:
        >>> import torch
        >>> by_expert(torch.tensor([[1, 0], [3, 1]]), 3)
        (tensor([1, 0, 3]), [1, 2, 0])
    """
    if index.numel() <= _FEW:
        return _few_by_expert(index, num_experts)
    flat = index.reshape(-1)
    try:
        counts = flat.bincount(minlength=num_experts + 1).tolist()
    except RuntimeError as error:  # It refuses what is negative, which costs no further look.
        raise _unknown_expert(int(flat.min()), num_experts) from error
    if len(counts) > num_experts + 1:
        raise _unknown_expert(len(counts) - 1, num_experts)
    none = counts.pop()
    order = flat.argsort(stable=True)
    return order[: len(order) - none], counts


# So many choices are sorted faster by Python than by torch.
_FEW = 64


def _few_by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    chosen = index.reshape(-1).tolist()
    counts = [0] * (num_experts + 1)
    for expert in chosen:
        if not 0 <= expert <= num_experts:
            raise _unknown_expert(expert, num_experts)
        counts[expert] += 1
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    none = counts.pop()
    order = order[: len(order) - none]
    return torch.tensor(order, dtype=torch.int64, device=index.device), counts


def _unknown_expert(expert: int, num_experts: int) -> ValueError:
    return ValueError(f"`top_k_index` must be integers in [0, {num_experts}], got {expert}.")


def weighted_sum(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Outputs of experts, in whatever order they come, added as the router names them.

    Args:
        rows: float ``[S, D]``; used up.
        order: where each belongs, int64 ``[S]``: a position in ``weights``, flat, at most once.
        weights: float ``[T, A]``. A position that has no row adds nothing.

    Returns:
        ``[T, D]`` in the dtype of ``rows``.
    """
    # Indexing with brackets, which can do more, takes several times as long.
    rows.mul_(weights.reshape(-1).index_select(0, order).unsqueeze(1))
    chosen = rows.new_zeros(weights.numel(), rows.shape[1]).index_copy_(0, order, rows)
    chosen = chosen.view(*weights.shape, rows.shape[1])  # [T, A, D]
    total = chosen[:, 0]
    for slot in range(1, weights.shape[1]):
        total = total + chosen[:, slot]
    return total


def expert_rows(
    experts: Sequence[tuple[Int8Linear, Int8Linear]],
    counts: Sequence[int],
    activation: Activation,
    hidden_states: Tensor,
    tokens: Tensor,
) -> Tensor:
    """What experts make of the tokens that chose them.

    Args:
        experts: the two matrices of each.
        counts: how many rows each has, none of them zero; together S.
        activation: from float32 ``[T, 2 I]`` (or ``[T, I]``) to ``[T, I]``.
        hidden_states: float ``[T, D]``.
        tokens: int64 ``[S]``, the token of each row, sorted by expert.

    Returns:
        float32 ``[S, D]``.
    """
    if experts and isinstance(experts[0][0]._packed, LlvmWeight):
        return _compiled_rows(experts, counts, activation, hidden_states, tokens)
    # Every token once, whatever number of experts reads it.
    rounded = round_tokens(hidden_states.contiguous())
    outputs = rounded.integers.new_empty(len(tokens), hidden_states.shape[1])
    start = 0
    for span in _spans(counts):
        here = slice(start, start + sum(count for _, count in span))
        part = [(*experts[index], count) for index, count in span]
        _run(part, activation, rounded[tokens[here]], outputs[here])
        start = here.stop
    return outputs


def _compiled_rows(
    experts: Sequence[tuple[Int8Linear, Int8Linear]],
    counts: Sequence[int],
    activation: Activation,
    hidden_states: Tensor,
    tokens: Tensor,
) -> Tensor:
    """`expert_rows` where a kernel takes the rows of several experts at once."""
    outputs, start = [], 0
    for span in _spans(counts):
        stop = start + sum(count for _, count in span)
        states = hidden_states.index_select(0, tokens[start:stop])
        part = [(experts[index], count) for index, count in span]
        outputs.append(_compiled_span(part, activation, states))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def one_token(
    experts: Sequence[tuple[Int8Linear, Int8Linear]],
    activation: Activation,
    hidden_states: Tensor,
    weights: Tensor,
) -> Tensor:
    """What `weighted_sum` makes of `expert_rows`, for one token and kernels that LLVM compiles.

    Nothing has to be gathered, sorted or brought back, which takes as long as the products of a
    small layer.

    Args:
        experts: the two matrices of each that the token chose, as the router names them.
        activation: as for `expert_rows`.
        hidden_states: float ``[1, D]``.
        weights: float ``[1, A]``.

    Returns:
        float32 ``[1, D]``.
    """
    states = hidden_states.expand(len(experts), -1)
    rows = _compiled_span([(pair, 1) for pair in experts], activation, states)
    rows.mul_(weights.reshape(-1, 1))
    total = rows[:1]
    for slot in range(1, len(experts)):
        total = total + rows[slot]
    return total


def _compiled_span(
    experts: Sequence[tuple[tuple[Int8Linear, Int8Linear], int]],
    activation: Activation,
    states: Tensor,
) -> Tensor:
    """Some experts, each on so many rows, in two calls: from ``[S, D]`` to float32 ``[S, D]``."""
    from haq.int8.llvm.between import gated

    up, down = ([group_of(pair[part], count) for pair, count in experts] for part in (0, 1))
    middle = products(up, states, torch.float32)
    if activation is gated:  # It is what is rounded, a row at a time.
        return products(down, middle, torch.float32, gated=True)
    return products(down, activation(middle), torch.float32)


def group_of(layer: Int8Linear, count: int = 1) -> Rows:
    """Some tokens of a layer that has kernels of LLVM."""
    assert isinstance(layer._packed, LlvmWeight)
    return Rows(layer._packed, count, layer.bias, layer._row_sums)


def _spans(counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Experts and how many rows each has, as many at a time as is fast.

    With a few tokens that is all of them: every operation between the products costs more than what
    it computes. With many it is a few: what is between the products then stays in the cache.
    """
    span: list[tuple[int, int]] = []
    rows = 0
    for expert, count in enumerate(counts):
        if span and rows + count > _ROWS_AT_ONCE:
            yield span
            span, rows = [], 0
        while count > _MOST_ROWS:
            yield [(expert, _MOST_ROWS)]
            count -= _MOST_ROWS
        span.append((expert, count))
        rows += count
    if span:
        yield span


def _run(
    experts: Sequence[tuple[Int8Linear, Int8Linear, int]],
    activation: Activation,
    tokens: RoundedTokens,
    out: Tensor,
) -> None:
    """Some experts, each on so many rows: from ``[S, D]`` to ``out`` ``[S, D]``."""
    first, second, _ = experts[0]
    up = tokens.integers.new_empty(len(out), first.out_features)  # [S, 2 I]
    _products([(layer, count) for layer, _, count in experts], tokens, up)
    middle = activation(up).contiguous()  # [S, I]
    rounded = round_tokens(middle, second.asymmetric)
    _products([(layer, count) for _, layer, count in experts], rounded, out)


def _products(layers: Sequence[tuple[Int8Linear, int]], tokens: RoundedTokens, out: Tensor) -> None:
    """Each layer's product with its rows.

    Args:
        layers: `Int8Linear` ``[N, K]``, and how many rows it has.
        tokens: ``[S, K]``, in the order of the layers.
        out: float32 ``[S, N]``, written to.
    """
    start = 0
    for layer, count in layers:
        here = slice(start, start + count)
        layer.product(tokens[here], out[here])
        if layer.bias is not None:
            out[here].add_(layer.bias)
        start += count
