"""How well the experts of a layer can be foretold, from the layers before or from what went by."""

import numpy as np

from haq.offload.odds import Floats, Integers
from haq.offload.replay import check_trace
from haq.offload.routing import RoutingStatistics

# Comparing every expert's last use with all others takes [T, A, E] at a time.
_CHUNK = 1024


def prediction_recall(
    statistics: RoutingStatistics, trace: Integers, capacity: int, ahead: int = 1
) -> dict[str, float]:
    """How many of a layer's experts were among those that were predicted.

    Args:
        statistics: of the routing, best of other text than the trace.
        trace: int64 ``[T, L, A]``, the tokens of one text in their order; E stands for none.
        capacity: how many experts of each layer a prediction may name.
        ahead: from how many layers before "transitions" predicts. The layers that have none before
            them are left out everywhere.

    Returns:
        The recall of three predictions: "transitions", the most likely ones after what the layer
        before chose (`RoutingStatistics.predict`); "popularity", always the most popular; "lru",
        those of the layer that were used last.

    Raises:
        ValueError: the trace does not fit the statistics, ``capacity`` is not in [1, E], or there
            is no layer so far ahead.

    Examples:
        >>> from haq.offload.routing import RoutingStatistics
        >>> statistics = RoutingStatistics(2, num_experts=4, experts_per_token=1)
        >>> trace = np.array([[[0], [3]], [[1], [2]], [[0], [3]], [[1], [2]]])
        >>> statistics.add(0, trace[:, 0], None)
        >>> statistics.add(1, trace[:, 1], None, before=[trace[:, 0]])
        >>> prediction_recall(statistics, trace, capacity=1)
        {'transitions': 1.0, 'popularity': 0.5, 'lru': 0.0}
    """
    layers, experts = len(statistics.layers), statistics.num_experts
    check_trace(trace, layers, experts)
    if not 1 <= capacity <= experts:
        raise ValueError(
            f"`capacity` must be from 1 to {experts}, the experts of a layer, got {capacity!r}. "
            "A quarter of them is a good start."
        )
    if not 1 <= ahead < min(layers, 4):
        raise ValueError(
            f"`ahead` must be from 1 to {min(layers - 1, 3)} for {layers} layers, got {ahead!r}. "
            "Statistics reach three layers."
        )
    found = dict.fromkeys(("transitions", "popularity", "lru"), 0)
    popularity = statistics.popularity
    for layer in range(ahead, layers):
        chosen = trace[:, layer]
        scores = _scores_of_tokens(statistics, layer - ahead, trace[:, layer - ahead], ahead)
        static = np.broadcast_to(popularity[layer], scores.shape)
        found["transitions"] += _found_in_best(scores, chosen, capacity)
        found["popularity"] += _found_in_best(static, chosen, capacity)
        found["lru"] += _found_in_recent(chosen, experts, capacity)
    total = max(int((trace[:, ahead:] < experts).sum()), 1)
    return {name: count / total for name, count in found.items()}


def _scores_of_tokens(
    statistics: RoutingStatistics, layer: int, chosen: Integers, ahead: int
) -> Floats:
    """`RoutingStatistics.scores` of every token's experts ``[T, A]``: ``[T, E]``."""
    experts = statistics.num_experts
    # Scores are sums over the chosen experts. The last row is that of none.
    rows = [statistics.scores(layer, [expert], ahead) for expert in range(experts)]
    table = np.stack([*rows, np.zeros(experts)])
    scores = np.zeros((len(chosen), experts))
    for slot in range(chosen.shape[1]):
        scores += table[chosen[:, slot]]
    scores[(chosen == experts).all(1)] = statistics.popularity[layer + ahead]
    return scores


def _found_in_best(scores: Floats, chosen: Integers, capacity: int) -> int:
    """Choices ``[T, A]`` among those with the best scores ``[T, E]``; E is never found."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :capacity]
    among = np.zeros((len(scores), scores.shape[1] + 1), dtype=bool)
    np.put_along_axis(among, best, True, axis=1)
    return int(np.take_along_axis(among, chosen, axis=1).sum())


def _found_in_recent(chosen: Integers, experts: int, capacity: int) -> int:
    """Choices ``[T, A]`` among those that were used last, of the tokens before."""
    tokens, slots = chosen.shape
    # When each expert was used last, up to and with each token: 0 for never; [1 + T, E + 1].
    last = np.zeros((tokens + 1, experts + 1), dtype=np.int64)
    times = np.arange(1, tokens * slots + 1).reshape(tokens, slots)
    np.put_along_axis(last[1:], chosen, times, axis=1)
    last[:, experts] = 0
    last = np.maximum.accumulate(last, axis=0)[:-1]
    found = 0
    for start in range(0, tokens, _CHUNK):
        before = last[start : start + _CHUNK]
        own = np.take_along_axis(before, chosen[start : start + _CHUNK], axis=1)
        later = (before[:, None, :] > own[:, :, None]).sum(-1)
        found += int(((own > 0) & (later < capacity)).sum())
    return found
