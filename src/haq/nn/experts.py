"""The experts of a layer with int8 weights and int8 inputs, in the place of transformers' own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haq.int8.tokens import RoundedTokens, round_tokens
from haq.nn.handles import register, registered
from haq.nn.linear import Int8Linear

Activation = Callable[[Tensor], Tensor]

# Rows that go through both products together, unless one expert has more.
_ROWS_AT_ONCE = 32


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
        order, counts = self._by_expert(top_k_index)
        slots = top_k_index.shape[1]
        rows = order // slots  # [S]: the token of each chosen expert, sorted by expert
        tokens = round_tokens(hidden_states.contiguous())
        down = tokens.integers.new_empty(len(rows), hidden_states.shape[1])  # [S, D]
        start = 0
        for span in _spans(counts):
            here = slice(start, start + sum(span.values()))
            self._run(span, tokens[rows[here]], down[here])
            start = here.stop
        down.mul_(top_k_weights.reshape(-1)[order, None])

        # Back in the order of tokens; where no expert was chosen stays zero.
        chosen = down.new_zeros(top_k_index.numel(), down.shape[1])
        chosen[order] = down
        chosen = chosen.view(*top_k_index.shape, down.shape[1])  # [T, A, D]
        total = chosen[:, 0]
        for slot in range(1, slots):
            total = total + chosen[:, slot]
        return total.to(hidden_states.dtype)

    def _check_shapes(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        expected = _layer(self.up, 0).in_features
        matrices = hidden_states.dim() == index.dim() == 2 and weights.shape == index.shape
        if not matrices or hidden_states.shape != (len(index), expected):
            raise ValueError(
                f"`hidden_states` must have shape [T, {expected}], `top_k_index` and "
                f"`top_k_weights` [T, A], got {list(hidden_states.shape)}, {list(index.shape)} and "
                f"{list(weights.shape)}."
            )

    def _run(self, span: Mapping[int, int], tokens: RoundedTokens, out: Tensor) -> None:
        """Some experts on their tokens: from ``[S, D]`` to ``out`` ``[S, D]``."""
        up = tokens.integers.new_empty(len(out), _layer(self.up, 0).out_features)  # [S, 2 I]
        _grouped(self.up, span, tokens, up)
        middle = self.activation(up).contiguous()  # [S, I]
        _grouped(self.down, span, round_tokens(middle, _layer(self.down, 0).asymmetric), out)

    def _by_expert(self, index: Tensor) -> tuple[Tensor, list[int]]:
        """Positions in ``index``, flat, sorted by expert ``[S]``, and how many each expert has."""
        flat, allowed = index.reshape(-1), f"integers in [0, {self.num_experts}]"
        try:
            counts = flat.bincount(minlength=self.num_experts + 1).tolist()
        except RuntimeError as error:  # It refuses what is negative, which costs no further look.
            raise ValueError(
                f"`top_k_index` must be {allowed}, got {flat.min().item()}."
            ) from error
        if len(counts) > self.num_experts + 1:
            raise ValueError(f"`top_k_index` must be {allowed}, got {len(counts) - 1}.")
        none = counts.pop()
        order = flat.argsort(stable=True)
        return order[: len(order) - none], counts

    def extra_repr(self) -> str:
        up, down = _layer(self.up, 0), _layer(self.down, 0)
        return (
            f"num_experts={self.num_experts}, hidden={up.in_features}, inner={down.in_features}, "
            f"backend={up.backend}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)  # A copy is not the original to the compiler.


def _spans(counts: Sequence[int]) -> Iterator[dict[int, int]]:
    """Experts and how many rows each has, as many at a time as is fast.

    With a few tokens that is all of them: every operation between the products costs more than what
    it computes. With many it is a few: what is between the products then stays in the cache.
    """
    span: dict[int, int] = {}
    for expert, count in enumerate(counts):
        if span and sum(span.values()) + count > _ROWS_AT_ONCE:
            yield span
            span = {}
        if count:
            span[expert] = count
    if span:
        yield span


def _grouped(
    layers: nn.ModuleList, span: Mapping[int, int], tokens: RoundedTokens, out: Tensor
) -> None:
    """Each expert's product with its rows.

    Args:
        layers: one `Int8Linear` ``[N, K]`` for each expert.
        span: which experts have how many rows.
        tokens: ``[S, K]``, sorted by expert.
        out: float32 ``[S, N]``, written to.
    """
    start = 0
    for expert, count in span.items():
        layer, here = _layer(layers, expert), slice(start, start + count)
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
