"""How long a layer is expected to take with some of its experts resident.

Its time is the slower of two lanes, so it depends on how many of a token's experts are not
resident, and that number is random. Its distribution follows from how popular the experts are: a
token is taken to choose A distinct experts by independent draws that are conditioned on their
number (the conditional Bernoulli model), with odds fitted such that every expert is chosen as often
as it was seen to be.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from haq.offload.costs import Costs
from haq.offload.routing import RoutingStatistics

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# An expert that was always chosen, or never, would have odds without an end.
_SMALLEST = 1e-9

# Fitting stops here. It takes some twenty rounds with popularities as even as Mixtral's; where an
# expert is chosen by almost every token, three hundred leave an error of about 1e-4 in its share.
_TOLERANCE = 1e-9
_ROUNDS = 300


def shares_of(statistics: RoutingStatistics) -> Floats:
    """The share of each layer's choices that falls on each expert: ``[L, E]``, rows sum to 1."""
    popularity = np.asarray(statistics.popularity, dtype=np.float64)
    shares: Floats = popularity / popularity.sum(1, keepdims=True)
    return shares


def curves_of(order: Integers, statistics: RoutingStatistics, costs: Costs) -> Floats:
    """Expected seconds of every layer with the first k experts of its order resident.

    Args:
        order: ``[L, E]``, the experts of each layer.
        statistics: of the routing.
        costs: of an expert on either side.

    Returns:
        ``[L, E + 1]``, for k from 0 to E.
    """
    chosen = statistics.experts_per_token
    shares = shares_of(statistics)
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
        shares: those of `shares_of` as bytes, since they are what is remembered by.
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
