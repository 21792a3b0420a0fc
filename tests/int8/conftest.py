"""Backends to test, and the product they are compared with: numpy, int64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import matmul

Pack = Callable[[Tensor, Tensor], matmul.PackedWeight]


@pytest.fixture(params=["llvm", "fbgemm", "onednn", "fbgemm_signs", "int_mm", "reference"])
def pack(request: pytest.FixtureRequest) -> Pack:
    """Pack for each CPU backend in turn, where this machine has it."""
    status = {status.name: status for status in matmul.backends() if status.device == "cpu"}
    if not status[request.param].exact:
        pytest.skip(status[request.param].reason)

    def pack_for_backend(weight: Tensor, scale: Tensor) -> matmul.PackedWeight:
        with matmul.use_backend(request.param):
            packed = matmul.pack(weight, scale)
        assert packed.backend == request.param
        return packed

    return pack_for_backend


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def random_weight(generator: torch.Generator) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Int8 ``[N, K]`` over the whole range, -128 included, and float32 scales ``[N, 1]``."""

    def make(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        shape = (rows, columns)
        weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        return weight, torch.rand(rows, 1, generator=generator) + 0.01

    return make


@pytest.fixture(scope="session")
def numpy_linear() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The formula of ``haq.int8.matmul``, step by step: integers in int64, the rest in float32."""

    def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens = x.detach().float().numpy()  # exact: float32 holds every bfloat16 and float16
        largest = np.abs(tokens).max(axis=-1, keepdims=True)
        token_scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
        integers = np.rint(tokens / token_scale).astype(np.int64)
        sums = integers @ weight.numpy().astype(np.int64).T
        result = sums.astype(np.float32) * scale.numpy().T * token_scale
        if bias is not None:
            result = result + bias.numpy()
        return torch.from_numpy(result).to(x.dtype)

    return linear
