"""What a second moment has seen."""

import copy

from torch import Tensor

from haq.quantization.hessian import SecondMoment


def mean_of(moment: SecondMoment) -> Tensor:
    """Its mean, float32 ``[K, K]``, both halves of it; the moment stays as it is."""
    left = copy.deepcopy(moment).take_mean().tril()
    return left + left.tril(-1).T
