"""How many experts each layer gets, such that all layers together are expected to be fastest."""

import math
from collections.abc import Sequence

import numpy as np

from haq.offload.costs import Costs
from haq.offload.odds import Floats, Integers, curves_of, shares_of
from haq.offload.paths import path_order
from haq.offload.routing import RoutingStatistics

# Budgets are divided into at most this many units where layers differ in size.
_MOST_UNITS = 20_000

# Seconds become integers for the programme over layers, so that ties are exact.
_RESOLUTION = 2**44


def fastest(
    statistics: RoutingStatistics, costs: Costs, sizes: Sequence[int], budget: int
) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """The residents with the smallest expected seconds.

    Args:
        statistics: of the routing.
        costs: of an expert on either side.
        sizes: bytes of one expert of each layer.
        budget: bytes for all residents together.

    Returns:
        For each layer its residents, ascending; and whether nothing was rounded. If something was,
        another placement may find room for more.
    """
    orders, which, curves = _best_orders(statistics, costs)
    weights, capacity, exact = _units(sizes, statistics.num_experts, budget)
    numbers = _allocate(curves, weights, capacity)
    resident = tuple(
        tuple(sorted(map(int, orders[which[layer, number], layer, :number])))
        for layer, number in enumerate(numbers)
    )
    return resident, exact


def _best_orders(statistics: RoutingStatistics, costs: Costs) -> tuple[Integers, Integers, Floats]:
    """For each layer and number of residents k, which k are best.

    The most popular ones, but for costs with which hits are not always welcome. There the sets of
    "path" compete; those of the other policies are the most popular of a layer anyway.

    Returns:
        Two orders ``[2, L, E]``; which of them has the better first k, ``[L, E + 1]``; and the
        seconds with those, ``[L, E + 1]``.
    """
    popular = np.argsort(-shares_of(statistics), axis=1, kind="stable")
    of_layer: list[list[int]] = [[] for _ in statistics.layers]
    for layer, expert in path_order(statistics):
        of_layer[layer].append(expert)
    orders = np.stack([popular, np.array(of_layer)])
    by_popularity, by_path = (curves_of(order, statistics, costs) for order in orders)
    better = by_path < by_popularity * (1 - 1e-12)
    return orders, better.astype(np.int64), np.where(better, by_path, by_popularity)


def _units(sizes: Sequence[int], experts: int, budget: int) -> tuple[Integers, int, bool]:
    """Bytes as small whole numbers.

    Returns:
        What k experts of a layer weigh, ``[L, E + 1]``; how much there is room for; and whether
        nothing was rounded. Weights are rounded up, so that the budget is never passed.
    """
    total, unit = sum(sizes) * experts, math.gcd(*sizes)
    most = max(_MOST_UNITS, len(sizes) * experts)
    exact = total // unit <= most
    if not exact:
        # Of the total and not of the budget: with a larger budget, what fitted must fit again.
        unit = -(-total // most)
    weights = np.array([[-(-k * size // unit) for k in range(experts + 1)] for size in sizes])
    capacity = int(weights[:, -1].sum()) if budget >= total else budget // unit
    return weights, capacity, exact


def _allocate(curves: Floats, weights: Integers, capacity: int) -> list[int]:
    """How many experts each layer gets, for the smallest sum of seconds: dynamic programming.

    Among equals more residents win, and then those of the lower layer.

    Args:
        curves: ``[L, E + 1]``, seconds with k residents.
        weights: ``[L, E + 1]``, what k residents take, ascending.
        capacity: what there is.
    """
    layers, options = curves.shape
    resolution = _RESOLUTION / curves.max(1).sum()
    # One number to compare: seconds first, residents second.
    values = np.rint(curves * resolution).astype(np.int64) * (layers * options)
    values -= np.arange(options)
    best = np.zeros(capacity + 1, dtype=np.int64)  # of the layers so far, by what they may take
    numbers = np.zeros((layers, capacity + 1), dtype=np.int32)
    for layer in reversed(range(layers)):
        before, best = best, best + values[layer, 0]
        for number in range(1, options):
            weight = int(weights[layer, number])
            if weight > capacity:
                break
            candidate = before[: capacity + 1 - weight] + values[layer, number]
            better = candidate <= best[weight:]
            np.copyto(best[weight:], candidate, where=better)
            np.copyto(numbers[layer, weight:], number, where=better)
    chosen = []
    for layer in range(layers):
        chosen.append(int(numbers[layer, capacity]))
        capacity -= int(weights[layer, chosen[-1]])
    return chosen
