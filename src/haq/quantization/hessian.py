"""Second moments of a layer's input, and the root of them that rounding needs.

The squared error that replacing weights W by Q makes in a layer's output, summed over tokens, is

    sum_t |W x_t - Q x_t|^2 = tr((W - Q) H (W - Q)^T),    H = sum_t x_t x_t^T

so H ``[K, K]`` is all that rounding has to know about the data. It is the Hessian of that error in
each row of Q (up to the factor 2, which changes no decision): Optimal Brain Surgeon (Hassibi and
Stork, 1993); for language models GPTQ (arXiv 2210.17323, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haq.processes import Processes
from haq.quantization.outer import add_left_of_diagonal

# Damping that had to grow this far makes H close to a multiple of the identity, for which
# compensation does nothing: rounding to nearest is then the honest name.
_LARGEST_DAMPING = 1.0

# Least diagonal entry, as a fraction of the largest, tried one after the other when damping alone
# leaves H numerically indefinite: a channel millions of times larger than the mean is what does it.
_DIAGONAL_FLOORS = (1e-6, 1e-5, 1e-4, 1e-3)


class SecondMoment:
    """Accumulates H over batches: float32 ``[K, K]``, the mean over the tokens seen.

    Examples:
        >>> moment = SecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moment.take_mean()
        tensor([[5., 1.],
                [1., 2.]])
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(channels, channels, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor, scale: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: float ``[T, K]``; with a scale integers in [-256, 256], which is faster on some
                processors.
            scale: float32 ``[T, 1]``, what each token is multiplied by.
        """
        add_left_of_diagonal(self._sum, inputs.float(), scale)
        self.tokens += inputs.shape[0]

    def sum_over(self, processes: Processes) -> None:
        """Add what the other processes saw."""
        processes.sum_(self._sum)
        self.tokens = sum(processes.counts(self.tokens, self._sum.device))

    def take_mean(self) -> Tensor:
        """H over the number of tokens, all zero if there were none.

        What is right of the diagonal is not said. It is in the memory of the sum, which is gone:
        the second call has nothing to give.

        Returns:
            Float32 ``[K, K]``, for `triangular_root`.

        Raises:
            RuntimeError: it was taken before.
        """
        if self._sum.numel() == 0:
            raise RuntimeError("The second moment was taken already.")
        mean = self._sum.div_(max(self.tokens, 1))
        self._sum = torch.empty(0)
        return mean


@dataclass(frozen=True)
class Root:
    """The upper triangular R ``[K, K]`` with ``H + damping = R R^T``, and what it took.

    Attributes:
        upper: R, in the dtype of H.
        damping: fraction of H's mean diagonal that was added to its diagonal.
        floor: fraction of H's largest diagonal entry that the diagonal was raised to; 0 if not.
    """

    upper: Tensor
    damping: float
    floor: float


def triangular_root(hessian: Tensor, damping: float, *, use_up: bool = False) -> Root | None:
    """Factor the damped Hessian; add damping until it works.

    Damping grows tenfold up to the mean diagonal, then small diagonal entries are raised. A channel
    that is zero in every token has an empty row and column: it is given a diagonal of 1, which
    separates it from the others, so it neither receives nor causes compensation.

    Args:
        hessian: ``[K, K]`` float32 or float64, symmetric, finite; unchanged. What is right of the
            diagonal is not read.
        damping: fraction of the mean diagonal to start with, positive.
        use_up: give the memory of ``hessian`` back as soon as it is factored.

    Returns:
        The root, or None if nothing made the matrix positive definite.

    Examples:
        >>> triangular_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), damping=1e-9).upper
        tensor([[2., 0.],
                [0., 1.]])
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    attempts = [(level, 0.0) for level in _damping_levels(damping)]
    attempts += [(_LARGEST_DAMPING, floor) for floor in _DIAGONAL_FLOORS]
    for level, floor in attempts:
        raised = diagonal.clamp(min=floor * diagonal.max()) + level * mean
        lower = _root(hessian, torch.where(dead, 1.0, raised))
        if lower is not None:
            if use_up:
                hessian.untyped_storage().resize_(0)
            return Root(lower.T, level, floor)
    return None


def _damping_levels(first: float) -> list[float]:
    levels = [first]
    while levels[-1] < _LARGEST_DAMPING:
        levels.append(min(levels[-1] * 10, _LARGEST_DAMPING))
    return levels


# ``M = R R^T`` with R upper triangular is a Cholesky factorization from the last row up. It is made
# in the memory of a copy of M, where R^T takes the place of what is left of the diagonal, some rows
# at a time. So there are two matrices at most: for an expert of Mixtral each takes 822 MB. LAPACK
# alone would want M turned around, and would clear the other half slowly.
_ROWS_OF_ROOT = 512


def _root(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """R^T of ``matrix`` with another diagonal, or None if that is not positive definite."""
    lower = matrix.clone()
    lower.diagonal().copy_(diagonal)
    for stop in range(len(lower), 0, -_ROWS_OF_ROOT):
        here, behind = slice(max(stop - _ROWS_OF_ROOT, 0), stop), slice(stop, None)
        before = slice(here.start)
        if stop < len(lower):
            lower[here, :stop] -= lower[behind, here].T @ lower[behind, :stop]
            lower[here, behind] = 0
        triangle = _root_of_few(lower[here, here])
        if triangle is None:
            return None
        lower[here, here] = triangle
        rest = torch.linalg.solve_triangular(triangle.T, lower[here, before], upper=True)
        lower[here, before] = rest
    return lower


def _root_of_few(matrix: Tensor) -> Tensor | None:
    # With J, which reverses the order, it is the usual one: ``J M J = L L^T``, ``R = J L J``.
    usual, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).mT)
    # What is NaN or infinite anywhere has come to a diagonal by the time that is factored.
    finite = bool(usual.diagonal().isfinite().all())
    return usual.mT.flip(0, 1) if finite and not failed else None
