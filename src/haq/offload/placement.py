"""Which experts live in the GPU's memory: decided from sizes, a budget, routing and costs.

Nothing is moved here, and the same input always gives the same placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from haq.offload.allocation import fastest
from haq.offload.costs import Costs
from haq.offload.odds import curves_of, shares_of
from haq.offload.paths import Booleans, Cell, path_order
from haq.offload.routing import RoutingStatistics

POLICIES = ("latency", "path", "popularity", "uniform")

# Lists of experts are cut here when printed.
_LONGEST_LIST = 48


@dataclass(frozen=True)
class Placement:
    """Where every expert lives, and what that is expected to bring.

    Attributes:
        policy: how it was chosen.
        resident: for each layer the experts in the GPU's memory, ascending.
        num_experts: E.
        hit_rates: for each layer the expected share of a token's experts that are resident.
        seconds: expected for one token in all layers' experts.
        layers: names of the experts modules.
    """

    policy: str
    resident: tuple[tuple[int, ...], ...]
    num_experts: int
    hit_rates: tuple[float, ...]
    seconds: float
    layers: tuple[str, ...]

    @property
    def num_resident(self) -> int:
        """Experts in the GPU's memory, over all layers."""
        return sum(map(len, self.resident))

    @property
    def hit_rate(self) -> float:
        """Mean of the layers' hit rates."""
        return float(np.mean(self.hit_rates))

    @property
    def spread(self) -> float:
        """Standard deviation of the layers' hit rates."""
        return float(np.std(self.hit_rates))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return {
            "policy": self.policy,
            "resident": [list(experts) for experts in self.resident],
            "num_experts": self.num_experts,
            "hit_rates": list(self.hit_rates),
            "seconds": self.seconds,
            "layers": list(self.layers),
        }

    def __str__(self) -> str:
        total = len(self.layers) * self.num_experts
        head = (
            f"{self.policy}: {self.num_resident} of {total} experts resident, expected hit rate "
            f"{self.hit_rate:.3f} (spread over layers {self.spread:.3f}), "
            f"{1e3 * self.seconds:.3g} ms per token"
        )
        width = max(len("layer"), *map(len, self.layers))
        lines = [f"{'layer'.ljust(width)}  number  hit rate  resident"]
        for name, experts, rate in zip(self.layers, self.resident, self.hit_rates, strict=True):
            listed = _ranges(experts)
            lines.append(f"{name.ljust(width)}  {len(experts):6}  {rate:8.3f}  {listed}".rstrip())
        return "\n".join([head, "", lines[0], "-" * max(map(len, lines)), *lines[1:]])


def place(
    policy: str,
    statistics: RoutingStatistics,
    costs: Costs,
    sizes: Sequence[int],
    budget: int,
) -> Placement:
    """Choose the experts that live in the GPU's memory.

    Args:
        policy: "latency" has the smallest expected seconds: each layer gets as many experts as make
            the sum over layers smallest, found exactly. "path" follows the paper's two stages: the
            most travelled ways from layer to layer, and what layers lack that these leave behind.
            "popularity" takes the most popular experts of all layers. "uniform" gives every layer
            the same number, the first ones one more where that does not come out even.
        statistics: of the routing.
        costs: of an expert on either side.
        sizes: bytes of one expert of each layer.
        budget: bytes for all residents together. Where a larger one lets "latency" only slow the
            model down (a GPU slower than the CPU), part of it stays unused.

    Returns:
        The placement. With a larger budget, all but "latency" only add experts.

    Raises:
        ValueError: the policy is unknown, there are no layers, a size is not positive or there is
            not one for each layer, or the budget is negative.

    Examples:
        >>> from haq.offload.routing import RoutingStatistics
        >>> counts = np.array([[60, 30, 10, 0], [25, 25, 25, 25]])
        >>> statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
        >>> costs = Costs(1e-3, 0.0, 4e-3, 0.0, 7e-3, 1e-4)
        >>> place("latency", statistics, costs, sizes=[100, 100], budget=300).resident
        ((0, 1), (0,))
    """
    if policy not in POLICIES:
        raise ValueError(
            f"`policy` must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}. "
            '"latency" is the one to start with.'
        )
    _check_layers(statistics)
    _check_memory(sizes, budget, len(statistics.layers))
    sizes, budget = [int(size) for size in sizes], int(budget)
    if policy == "latency":
        resident = _fastest(statistics, costs, sizes, budget)
    else:
        resident = _within(_order(policy, statistics), sizes, budget)
    shares = shares_of(statistics)
    rates = (row[list(experts)].sum() for row, experts in zip(shares, resident, strict=True))
    return Placement(
        policy=policy,
        resident=resident,
        num_experts=statistics.num_experts,
        hit_rates=tuple(map(float, rates)),
        seconds=expected_seconds(resident, statistics, costs),
        layers=tuple(statistics.layers),
    )


def expected_seconds(
    resident: Sequence[Sequence[int]], statistics: RoutingStatistics, costs: Costs
) -> float:
    """What one token is expected to take in the experts of all layers.

    Args:
        resident: for each layer the experts in the GPU's memory.
        statistics: of the routing.
        costs: of an expert on either side.

    Returns:
        Seconds.

    Raises:
        ValueError: ``resident`` does not fit the statistics.

    Examples:
        >>> from haq.offload.routing import RoutingStatistics
        >>> counts = np.array([[60, 30, 10, 0]])
        >>> statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
        >>> costs = Costs(1e-3, 0.0, 4e-3, 0.0, 7e-3, 1e-4)
        >>> round(expected_seconds([[0]], statistics, costs), 6)  # 0.6 * 1 ms + 0.4 * 4.1 ms
        0.00224
    """
    _check_layers(statistics)
    mask = _mask(resident, len(statistics.layers), statistics.num_experts)
    residents_first = np.argsort(~mask, axis=1, kind="stable")
    curves = curves_of(residents_first, statistics, costs)
    return float(np.take_along_axis(curves, mask.sum(1, keepdims=True), 1).sum())


def _fastest(
    statistics: RoutingStatistics, costs: Costs, sizes: Sequence[int], budget: int
) -> tuple[tuple[int, ...], ...]:
    """The residents with the smallest expected seconds."""
    resident, exact = fastest(statistics, costs, sizes, budget)
    if exact:
        return resident
    # Coarse units may leave out what another policy still finds room for.
    others = [_within(_order(policy, statistics), sizes, budget) for policy in POLICIES[1:]]
    return min([resident, *others], key=lambda r: expected_seconds(r, statistics, costs))


def _order(policy: str, statistics: RoutingStatistics) -> list[Cell]:
    """All experts of all layers, the first to be resident first: more of them with more room."""
    if policy == "path":
        return path_order(statistics)
    shares = shares_of(statistics)
    ranked = np.argsort(-shares, axis=1, kind="stable")
    if policy == "uniform":
        return [(layer, int(expert)) for column in ranked.T for layer, expert in enumerate(column)]
    flat = np.argsort(-shares, axis=None, kind="stable")
    return [(int(cell) // shares.shape[1], int(cell) % shares.shape[1]) for cell in flat]


def _within(
    order: Sequence[Cell], sizes: Sequence[int], budget: int
) -> tuple[tuple[int, ...], ...]:
    """The residents of every layer: the first of an order, up to one that does not fit."""
    resident: list[list[int]] = [[] for _ in sizes]
    for layer, expert in order:
        budget -= sizes[layer]
        if budget < 0:
            break
        resident[layer].append(expert)
    return tuple(tuple(sorted(experts)) for experts in resident)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours together: "0-3, 7"; the end of a long list is left out."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    if len(text) <= _LONGEST_LIST:
        return text
    return f"{text[:_LONGEST_LIST].rsplit(',', 1)[0]}, ..."


# --- What came in ---------------------------------------------------------------------------------


def _check_layers(statistics: RoutingStatistics) -> None:
    if not len(statistics.layers):
        raise ValueError(
            "`statistics` must be of at least one layer with experts, got none. Only a mixture of "
            "experts can be placed."
        )


def _check_memory(sizes: Sequence[int], budget: int, layers: int) -> None:
    if len(sizes) != layers:
        raise ValueError(
            f"`sizes` must hold one number of bytes for each of {layers} layers, got {len(sizes)}. "
            "Pass the size of one expert of every layer."
        )
    for layer, size in enumerate(sizes):
        if not isinstance(size, Integral) or size <= 0:
            raise ValueError(
                f"`sizes` must be positive whole numbers of bytes, got {size!r} for layer {layer}. "
                "Pass the size of one expert of every layer."
            )
    if not isinstance(budget, Integral) or budget < 0:
        raise ValueError(
            f"`budget` must be a whole number of bytes that is not negative, got {budget!r}. With "
            "0 no expert is resident."
        )


def _mask(resident: Sequence[Sequence[int]], layers: int, num_experts: int) -> Booleans:
    """Which experts are resident: bool ``[L, E]``."""
    if len(resident) != layers:
        raise ValueError(
            f"`resident` must hold the experts of {layers} layers, got {len(resident)}. Pass an "
            "empty list for a layer without any."
        )
    mask = np.zeros((layers, num_experts), dtype=bool)
    for layer, experts in enumerate(resident):
        for expert in experts:
            if not 0 <= expert < num_experts or mask[layer, expert]:
                raise ValueError(
                    f"`resident` must hold different experts from 0 to {num_experts - 1} in each "
                    f"layer, got {list(experts)} for layer {layer}. Pass each number once."
                )
            mask[layer, expert] = True
    return mask
