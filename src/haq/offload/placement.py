"""Which experts live in the GPU's memory: decided from sizes, a budget, routing and costs.

A layer's time is the slower of two lanes, so it depends on how many of a token's experts are not
resident, and that number is random. Its distribution follows from how popular the experts are: a
token is taken to choose A distinct experts by independent draws that are conditioned on their
number (the conditional Bernoulli model), with odds fitted such that every expert is chosen as often
as it was seen to be. Nothing is moved here, and the same input always gives the same placement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from haq.offload.costs import Costs

if TYPE_CHECKING:
    from haq.offload.routing import RoutingStatistics

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# An expert's place: its layer, and its number there.
Cell = tuple[int, int]

POLICIES = ("latency", "path", "popularity", "uniform")

# How much of the order by "path" is its first stage. Measured on Mixtral-8x7B's popularity (base
# and instruct) with a quarter, a half and three quarters of the experts resident, as the spread of
# hit rates over layers relative to that of "popularity": 0.24 to 0.39 for a share of 0.3, 0.24 to
# 0.46 for 0.5, 0.39 to 0.60 for 0.7. The hit rate is 0.001 to 0.003 below it in all of them.
_PATH_SHARE = 0.5

# An expert that was always chosen, or never, would have odds without an end.
_SMALLEST = 1e-9

# Fitting stops here. It takes some twenty rounds with popularities as even as Mixtral's; where an
# expert is chosen by almost every token, three hundred leave an error of about 1e-4 in its share.
_TOLERANCE = 1e-9
_ROUNDS = 300

# Budgets are divided into at most this many units where layers differ in size.
_MOST_UNITS = 20_000

# Seconds become integers for the programme over layers, so that ties are exact.
_RESOLUTION = 2**44

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
    statistics: "RoutingStatistics",
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
    shares = _shares(statistics)
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
    resident: Sequence[Sequence[int]], statistics: "RoutingStatistics", costs: Costs
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
    curves = _curves(residents_first, statistics, costs)
    return float(np.take_along_axis(curves, mask.sum(1, keepdims=True), 1).sum())


# --- What came in ---------------------------------------------------------------------------------


def _check_layers(statistics: "RoutingStatistics") -> None:
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


def _shares(statistics: "RoutingStatistics") -> Floats:
    """The share of each layer's choices that falls on each expert: ``[L, E]``, rows sum to 1."""
    popularity = np.asarray(statistics.popularity, dtype=np.float64)
    shares: Floats = popularity / popularity.sum(1, keepdims=True)
    return shares


# --- How long a layer takes -----------------------------------------------------------------------


def _curves(order: Integers, statistics: "RoutingStatistics", costs: Costs) -> Floats:
    """Expected seconds of every layer with the first k experts of its order resident.

    Args:
        order: ``[L, E]``, the experts of each layer.
        statistics: of the routing.
        costs: of an expert on either side.

    Returns:
        ``[L, E + 1]``, for k from 0 to E.
    """
    chosen = statistics.experts_per_token
    shares = _shares(statistics)
    odds = _fitted_odds(shares.tobytes(), len(shares), chosen)
    ordered = np.take_along_axis(odds, order, 1)
    resident, cold = _sums_of_products(ordered, chosen), _sums_from_the_end(ordered, chosen)
    # [E + 1, L, A + 1], by the number of a token's experts that are not resident.
    weights = resident[..., ::-1] * cold
    seconds = [costs.layer([1] * (chosen - m), [1] * m) for m in range(chosen + 1)]
    curves: Floats = (weights @ np.array(seconds) / weights.sum(-1)).T
    return curves


@lru_cache(maxsize=8)
def _fitted_odds(shares: bytes, layers: int, chosen: int) -> Floats:
    """Odds with which the conditional model chooses every expert as often as it was seen to be.

    Args:
        shares: those of `_shares` as bytes, since they are what is remembered by.
        layers: L.
        chosen: A.

    Returns:
        ``[L, E]``, positive; those of a layer may be multiplied by any number.
    """
    target = np.frombuffer(shares).reshape(layers, -1) * chosen
    target = np.clip(target, _SMALLEST, 1 - _SMALLEST)
    odds = _centred(target / (1 - target), chosen)
    for _ in range(_ROUNDS):
        inclusion = _inclusion(odds, chosen)
        if np.abs(inclusion - target).max() < _TOLERANCE:
            break
        odds = _centred(odds * target / inclusion, chosen)
    return odds


def _centred(odds: Floats, chosen: int) -> Floats:
    """Odds with 1 as the geometric mean of each layer's A largest, so that no product overflows."""
    largest = np.sort(odds, axis=1)[:, -chosen:]
    scaled: Floats = odds / np.exp(np.log(largest).mean(1, keepdims=True))
    return scaled


def _inclusion(odds: Floats, chosen: int) -> Floats:
    """How often the conditional model chooses every expert: ``[L, E]``."""
    before, after = _sums_of_products(odds, chosen), _sums_from_the_end(odds, chosen)
    # The other A - 1 experts: some from before this one, the rest from after it.
    others = np.einsum("elj,elj->le", before[:-1, :, :-1], after[1:, :, -2::-1])
    inclusion: Floats = odds * others / before[-1, :, -1:]
    return inclusion


def _sums_of_products(odds: Floats, chosen: int) -> Floats:
    """Elementary symmetric polynomials of the first k odds: ``[E + 1, L, A + 1]``.

    At ``[k, l, j]`` is the sum of the products of all j of the first k odds of layer l.
    """
    layers, experts = odds.shape
    sums = np.zeros((experts + 1, layers, chosen + 1))
    sums[0, :, 0] = 1
    for k in range(experts):
        sums[k + 1] = sums[k]
        sums[k + 1, :, 1:] += odds[:, k, None] * sums[k, :, :-1]
    return sums


def _sums_from_the_end(odds: Floats, chosen: int) -> Floats:
    """As `_sums_of_products`, of all odds but the first k."""
    return _sums_of_products(odds[:, ::-1], chosen)[::-1]


# --- Orders: with a larger budget, more of the same -----------------------------------------------


def _order(policy: str, statistics: "RoutingStatistics") -> list[Cell]:
    """All experts of all layers, the first to be resident first."""
    if policy == "path":
        return _path_order(statistics)
    shares = _shares(statistics)
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


def _path_order(statistics: "RoutingStatistics") -> list[Cell]:
    """Both stages as one order, a fixed share of the places to each, wherever it is cut."""
    cover = _PathCover(_shares(statistics), np.asarray(statistics.transitions)[0])
    order: list[Cell] = []
    travelled = 0
    for number in range(1, len(statistics.layers) * statistics.num_experts + 1):
        cell = cover.most_travelled() if travelled < _PATH_SHARE * number else None
        travelled += cell is not None
        cell = cell or cover.supplement()
        cover.add(cell)
        order.append(cell)
    return order


class _PathCover:
    """What the two stages know while experts are placed one by one.

    Args:
        shares: ``[L, E]``, rows sum to 1.
        joint: int64 ``[L, E, E]``, tokens that chose i in layer l and j in the next one; where all
            are zero, the two choices are taken to be independent.
    """

    def __init__(self, shares: Floats, joint: Integers) -> None:
        self._shares = shares
        self._experts = shares.shape[1]
        self._placed = np.zeros(shares.shape, dtype=bool)
        self._covered = np.zeros(len(shares))
        self._ranked = np.argsort(-shares, axis=1, kind="stable")
        edges = [_edge_shares(shares, joint, layer) for layer in range(len(shares) - 1)]
        # The edges of each layer to the next, the most travelled first, and how many are behind us.
        self._edges = [np.argsort(-edge, kind="stable") for edge in edges]
        self._flows = [edge[order] for edge, order in zip(edges, self._edges, strict=True)]
        self._done = [0] * len(edges)
        # The first edge of each layer that still lacks an end: its flow, and both its ends.
        self._head_flow = np.zeros(len(edges))
        self._head_ends = np.zeros((len(edges), 2), dtype=np.int64)
        self._other_end: Cell | None = None
        for layer in range(len(edges)):
            self._advance(layer)

    def add(self, cell: Cell) -> None:
        """Place an expert."""
        layer = cell[0]
        self._placed[cell] = True
        self._covered[layer] += self._shares[cell]
        for source in (layer - 1, layer):
            if 0 <= source < len(self._edges):
                self._advance(source)

    def most_travelled(self) -> Cell | None:
        """Stage one: what the most travelled edge lacks, both ends one after the other.

        A layer that is covered better than the mean is left out. Otherwise the edges of the few
        layers with uneven routing would take all places, and the spread over layers would be larger
        than that of "popularity" (1.5 times on Mixtral-8x7B, with a share of 0.7).
        """
        other, self._other_end = self._other_end, None
        if other is not None and not self._placed[other]:
            return other
        lacks = self._lacking()
        ahead = self._covered > self._covered.mean() + 1e-12
        refused = (lacks[:, 0] & ahead[:-1]) | (lacks[:, 1] & ahead[1:])
        flow = np.where(refused, -1.0, self._head_flow)
        if not len(flow) or flow.max() < 0:
            return None
        layer = int(flow.argmax())
        ends = [(layer + i, int(self._head_ends[layer, i])) for i in (0, 1) if lacks[layer, i]]
        self._other_end = ends[-1]
        return ends[0]

    def supplement(self) -> Cell:
        """Stage two: the most popular expert that the layer with the lowest hit rate lacks.

        The layer with the fewest residents gives the same hit rate, and on Mixtral-8x7B a larger
        spread over layers.
        """
        layer = int(np.where(self._placed.all(1), np.inf, self._covered).argmin())
        ranked = self._ranked[layer]
        return layer, int(ranked[~self._placed[layer, ranked]][0])

    def _lacking(self) -> Booleans:
        """Which ends of the first edges are not placed: ``[L - 1, 2]``."""
        layers = np.arange(len(self._edges))[:, None] + np.array([0, 1])
        lacking: Booleans = ~self._placed[layers, self._head_ends]
        return lacking

    def _advance(self, layer: int) -> None:
        """Leave the edges behind whose ends are both placed."""
        edges = self._edges[layer]
        while self._done[layer] < len(edges):
            some = edges[self._done[layer] : self._done[layer] + 256]
            source, target = some // self._experts, some % self._experts
            lacking = ~(self._placed[layer, source] & self._placed[layer + 1, target])
            if lacking.any():
                first = int(lacking.argmax())
                self._done[layer] += first
                self._head_flow[layer] = self._flows[layer][self._done[layer]]
                self._head_ends[layer] = source[first], target[first]
                return
            self._done[layer] += len(some)
        self._head_flow[layer] = -1


def _edge_shares(shares: Floats, joint: Integers, layer: int) -> Floats:
    """How much goes from each expert of a layer to each of the next: ``[E * E]``, sums to 1."""
    seen = joint[layer].sum()
    edges = joint[layer] / seen if seen else np.outer(shares[layer], shares[layer + 1])
    flat: Floats = edges.ravel()
    return flat


# --- Latency --------------------------------------------------------------------------------------


def _fastest(
    statistics: "RoutingStatistics", costs: Costs, sizes: Sequence[int], budget: int
) -> tuple[tuple[int, ...], ...]:
    """The residents with the smallest expected seconds."""
    orders, which, curves = _best_orders(statistics, costs)
    weights, capacity, exact = _units(sizes, statistics.num_experts, budget)
    numbers = _allocate(curves, weights, capacity)
    fastest = tuple(
        tuple(sorted(map(int, orders[which[layer, number], layer, :number])))
        for layer, number in enumerate(numbers)
    )
    if exact:
        return fastest
    # Coarse units may leave out what another policy still finds room for.
    others = [_within(_order(policy, statistics), sizes, budget) for policy in POLICIES[1:]]
    return min([fastest, *others], key=lambda r: expected_seconds(r, statistics, costs))


def _best_orders(
    statistics: "RoutingStatistics", costs: Costs
) -> tuple[Integers, Integers, Floats]:
    """For each layer and number of residents k, which k are best.

    The most popular ones, but for costs with which hits are not always welcome. There the sets of
    "path" compete; those of the other policies are the most popular of a layer anyway.

    Returns:
        Two orders ``[2, L, E]``; which of them has the better first k, ``[L, E + 1]``; and the
        seconds with those, ``[L, E + 1]``.
    """
    popular = np.argsort(-_shares(statistics), axis=1, kind="stable")
    of_layer: list[list[int]] = [[] for _ in statistics.layers]
    for layer, expert in _path_order(statistics):
        of_layer[layer].append(expert)
    orders = np.stack([popular, np.array(of_layer)])
    by_popularity, by_path = (_curves(order, statistics, costs) for order in orders)
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
