"""The experts of a layer with int8 weights and int8 inputs, in the place of transformers' own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haq.int8.tokens import RoundedTokens, round_tokens
from haq.nn.handles import register, registered
from haq.nn.linear import Int8Linear

Activation = Callable[[Tensor], Tensor]

# Rows that go through both products together, unless one expert has more.
_ROWS_AT_ONCE = 32

# Rows of one expert that go through both products together: what is between the products has the
# size of a few tokens' inner values and not of a whole prompt's.
_MOST_ROWS = 1024


class Int8Experts(nn.Module):
    """All experts of a mixture-of-experts layer, each two `Int8Linear`, behind one forward.

    It takes what transformers' fused experts take and gives what they give. Every token is
    quantized once, whatever number of experts reads it; tokens are gathered by expert, and only
    weights of experts that were chosen are touched. Between the two products everything is float32.
    A token's experts are added in the order in which the router names them, and its result does not
    depend on the tokens around it, but for the last bit of a sigmoid: torch computes the end of a
    tensor, or of a thread's share of it, by other code.

    Like `Int8Linear` it does not train, moves and pickles as any module, and is one opaque operator
    to the compiler.

    Args:
        up: the first matrix of each expert, ``[2 I, D]`` with gate and up rows in the order that
            ``activation`` expects, or ``[I, D]``; symmetric.
        down: the second matrix of each expert, ``[D, I]``; all of them asymmetric, or none.
        activation: from float32 ``[T, 2 I]`` (or ``[T, I]``) to ``[T, I]``; pickles if the module
            is to.

    Attributes:
        num_experts: E.

    Raises:
        ValueError: there are no experts, or the shapes of their matrices do not fit together.

    Examples:
        >>> up = [Int8Linear.from_float(torch.eye(2)), Int8Linear.from_float(torch.ones(2, 2))]
        >>> down = [Int8Linear.from_float(torch.eye(2)) for _ in range(2)]
        >>> experts = Int8Experts(up, down, torch.relu)
        >>> tokens, chosen = torch.tensor([[127.0, -1.0]]), torch.tensor([[1, 0]])
        >>> experts(tokens, chosen, torch.tensor([[0.5, 0.25]]))
        tensor([[94.7500, 63.0000]])
    """

    def __init__(
        self, up: Sequence[Int8Linear], down: Sequence[Int8Linear], activation: Activation
    ) -> None:
        super().__init__()
        _check(up, down)
        self.up = nn.ModuleList(up)
        self.down = nn.ModuleList(down)
        self.activation = activation
        self._handle = register(self)

    @property
    def num_experts(self) -> int:
        return len(self.up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float ``[T, D]``.
            top_k_index: int64 ``[T, A]``, the experts of each token; ``num_experts`` stands for
                none.
            top_k_weights: float ``[T, A]``.

        Returns:
            ``[T, D]``, dtype of ``hidden_states``, detached.

        Raises:
            ValueError: shapes do not fit, or an index is not in [0, num_experts].
        """
        hidden_states, top_k_weights = hidden_states.detach(), top_k_weights.detach()
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.haq.int8_experts(
                hidden_states, top_k_index, top_k_weights, self._handle
            )
            return compiled
        return self._compute(hidden_states, top_k_index, top_k_weights)

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        order, counts = by_expert(top_k_index, self.num_experts)
        chosen = [(self.expert(e), count) for e, count in enumerate(counts) if count]
        experts, rows = [pair for pair, _ in chosen], [count for _, count in chosen]
        tokens = order // top_k_index.shape[1]
        outputs = expert_rows(experts, rows, self.activation, hidden_states, tokens)
        return weighted_sum(outputs, order, top_k_weights).to(hidden_states.dtype)

    def expert(self, index: int) -> tuple[Int8Linear, Int8Linear]:
        """The two matrices of an expert."""
        return _layer(self.up, index), _layer(self.down, index)

    def _check_shapes(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        expected = _layer(self.up, 0).in_features
        matrices = hidden_states.dim() == index.dim() == 2 and weights.shape == index.shape
        if not matrices or hidden_states.shape != (len(index), expected):
            raise ValueError(
                f"`hidden_states` must have shape [T, {expected}], `top_k_index` and "
                f"`top_k_weights` [T, A], got {list(hidden_states.shape)}, {list(index.shape)} and "
                f"{list(weights.shape)}."
            )

    def extra_repr(self) -> str:
        up, down = _layer(self.up, 0), _layer(self.down, 0)
        return (
            f"num_experts={self.num_experts}, hidden={up.in_features}, inner={down.in_features}, "
            f"backend={up.backend}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)  # A copy is not the original to the compiler.


def by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Positions in ``index``, flat, sorted by expert ``[S]``, and how many each expert has.

    Args:
        index: int64 ``[T, A]``; E stands for none.
        num_experts: E.

    Raises:
        ValueError: an index is not in [0, E].

    Examples:
        >>> by_expert(torch.tensor([[1, 0], [3, 1]]), 3)
        (tensor([1, 0, 3]), [1, 2, 0])
    """
    flat, allowed = index.reshape(-1), f"integers in [0, {num_experts}]"
    try:
        counts = flat.bincount(minlength=num_experts + 1).tolist()
    except RuntimeError as error:  # It refuses what is negative, which costs no further look.
        raise ValueError(f"`top_k_index` must be {allowed}, got {flat.min().item()}.") from error
    if len(counts) > num_experts + 1:
        raise ValueError(f"`top_k_index` must be {allowed}, got {len(counts) - 1}.")
    none = counts.pop()
    order = flat.argsort(stable=True)
    return order[: len(order) - none], counts


def weighted_sum(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Outputs of experts, in whatever order they come, added as the router names them.

    Args:
        rows: float ``[S, D]``; used up.
        order: where each belongs, int64 ``[S]``: a position in ``weights``, flat, at most once.
        weights: float ``[T, A]``. A position that has no row adds nothing.

    Returns:
        ``[T, D]`` in the dtype of ``rows``.
    """
    rows.mul_(weights.reshape(-1)[order, None])
    chosen = rows.new_zeros(weights.numel(), rows.shape[1])
    chosen[order] = rows
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
    _grouped([(layer, count) for layer, _, count in experts], tokens, up)
    middle = activation(up).contiguous()  # [S, I]
    rounded = round_tokens(middle, second.asymmetric)
    _grouped([(layer, count) for _, layer, count in experts], rounded, out)


def _grouped(layers: Sequence[tuple[Int8Linear, int]], tokens: RoundedTokens, out: Tensor) -> None:
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


def _layer(layers: nn.ModuleList, index: int) -> Int8Linear:
    layer = layers[index]
    assert isinstance(layer, Int8Linear)
    return layer


def _check(up: Sequence[Int8Linear], down: Sequence[Int8Linear]) -> None:
    pairs = zip(up, down, strict=False)
    shapes = {(u.out_features, u.in_features, d.out_features, d.in_features) for u, d in pairs}
    if len(up) != len(down) or len(shapes) != 1:
        raise ValueError(
            f"`up` and `down` must be one layer for each expert, all of the same shape, got "
            f"{len(up)} and {len(down)} with shapes {sorted(shapes)}."
        )
    if any(layer.asymmetric for layer in up) or len({layer.asymmetric for layer in down}) > 1:
        raise ValueError(
            "`up` must be symmetric layers, and `down` all asymmetric or none, got "
            f"{[layer.asymmetric for layer in up]} and {[layer.asymmetric for layer in down]}."
        )
    ((up_rows, channels, rows, inner),) = shapes
    if rows != channels or up_rows not in (inner, 2 * inner):
        raise ValueError(
            f"`up` must be [2 I, D] or [I, D] for `down` of shape [D, I], got [{up_rows}, "
            f"{channels}] and [{rows}, {inner}]."
        )


@torch.library.custom_op("haq::int8_experts", mutates_args=())
def _int8_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> Tensor:
    experts = registered(handle)
    assert isinstance(experts, Int8Experts)
    return experts._compute(hidden_states, top_k_index, top_k_weights)


@_int8_experts.register_fake
def _(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)  # Rows, however the input is stored.
