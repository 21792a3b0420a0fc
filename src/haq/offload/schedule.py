"""Decisions while a model runs: what to bring to the GPU, now or before it is asked for."""

from collections.abc import Sequence

from haq.offload.costs import Costs

# Prompts choose nearly every expert, so there is nothing to predict.
MOST_TOKENS_TO_PREDICT = 8


def copies_that_pay(resident: Sequence[int], cold: Sequence[int], costs: Costs) -> int:
    """How many of the cold experts to bring to the GPU, those with the most tokens first.

    The layer takes as long as its slower lane. An expert that is brought costs a copy, which runs
    beside both lanes, and its products on the GPU; it takes the longest work off the CPU. All
    numbers of copies are compared.

    Args:
        resident: tokens of each chosen expert that is on the GPU.
        cold: tokens of each of the others, from the most to the fewest.
        costs: seconds.

    Examples:
        A token or two for each are computed on the CPU. With a thousand, copies pay.

        >>> costs = Costs(1e-4, 1e-6, 2e-3, 5e-4, 7e-3, 1e-4)
        >>> copies_that_pay([1], [1, 1], costs), copies_that_pay([900], [1000, 900, 2], costs)
        (0, 2)
    """
    # Before any sum is taken: a copy that is longer than all the work never pays.
    if not cold or costs.copy >= costs.cpu(cold):
        return 0
    seconds = [_seconds(resident, cold, count, costs) for count in range(len(cold) + 1)]
    return min(range(len(seconds)), key=seconds.__getitem__)


def _seconds(resident: Sequence[int], cold: Sequence[int], copies: int, costs: Costs) -> float:
    """The layer's time with the first ``copies`` of the cold experts on the GPU."""
    brought = cold[:copies]
    products = costs.gpu([*resident, *brought])
    # The last one can start when it has arrived.
    arrival = copies * costs.copy + costs.gpu(brought[-1:])
    return max(products, arrival, costs.cpu(cold[copies:]))


def prefetch_gain(probability: float, costs: Costs) -> float:
    """Seconds that an expert saves on average if it is on the GPU when its layer comes.

    Args:
        probability: that it is chosen.
        costs: seconds.

    Examples:
        >>> prefetch_gain(0.5, Costs(1e-3, 0.0, 4e-3, 0.0, 2e-3, 1e-3))
        0.002
    """
    return probability * (costs.cpu([1]) - costs.gpu([1]))


def arrives_in_time(queued: int, ahead: int, layer_seconds: float, costs: Costs) -> bool:
    """Whether a copy is done before its layer begins.

    Args:
        queued: copies that are on their way before it.
        ahead: how many layers away it is.
        layer_seconds: that a layer has taken so far, on average.
        costs: seconds.
    """
    return (queued + 1) * costs.copy <= ahead * layer_seconds
