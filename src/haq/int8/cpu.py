"""The int8 products that torch has for the CPU: fbgemm, oneDNN and ``torch._int_mm``.

x86 multiplies *unsigned* by signed bytes (``vpdpbusd``), so both fast libraries want activations in
[0, 255]. They get q + 128 and take the surplus, 128 times the sum of the weight's row, off again in
int32: nothing is lost, and the symmetric grid stays what the rest of the library sees.

Both offer more than is asked of them. fbgemm's operator would also divide by a scale and round, but
it rounds ``x * (1 / scale) + 128`` in float32, which sends values near a tie to the other integer
(3 in 100 000 of them for bfloat16 inputs). So it is given integers, which rounding cannot change.
oneDNN's would take signed activations, but without AMX by a reference kernel, 300 times slower.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from haq.int8.reference import PlainWeight

_ZERO_POINT = 128


class FbgemmWeight:
    """A weight in fbgemm's layout: the fastest product for few tokens, and good for many.

    It serves every number of tokens. With two threads of a Zen 4 it takes 0.7 of oneDNN's time for
    1 token, 1.0 to 1.15 of it for 16 to 64, and 1.1 to 1.2 for 256. Laying the weight out again for
    oneDNN when many tokens come would cost far more than that: 640 ms for a weight of
    [14336, 4096], whose product with 256 tokens takes 49 ms here and 40 ms there.
    """

    backend = "fbgemm"

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: int = _ZERO_POINT) -> None:
        quantized = _quantized_tensor(weight, scale)
        self._zero_point = zero_point  # Added to the integers, so that they are unsigned.
        with _fbgemm_engine():
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        # The operator "quantizes" its float32 input, multiplies, and returns float32.
        self._linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def product(self, rounded: Tensor) -> Tensor:
        product: Tensor = self._linear(rounded.float(), 1.0, self._zero_point, self._packed)
        return product

    def unpack(self) -> Tensor:
        quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
        integers: Tensor = quantized.int_repr()
        return integers


# Numbers of rows that a oneDNN product is made for: all up to 8, then quarters of an octave, and
# eighths where more rows mean more time.
_EXACT_ROWS = 8
_FEW_ROWS = 128


class OneDnnWeight:
    """A weight in oneDNN's layout.

    oneDNN compiles a kernel for every number of rows that comes, and keeps the last 1024 of them:
    300 KB each for a weight of [7168, 1024], so that prompts of many lengths cost more memory than
    the weight. Rows are therefore filled up to one of a few numbers.
    """

    backend = "onednn"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale = scale.flatten()
        self._zeros = torch.zeros(len(weight), dtype=torch.int32, device="cpu")
        self._linear = torch.ops.onednn.qlinear_pointwise.default

    def product(self, rounded: Tensor) -> Tensor:
        tokens = len(rounded)
        rows = _filled_up(tokens)
        if rows == tokens:
            integers = rounded.to(torch.int8)
        else:  # What is in the rows below changes nothing in these.
            integers = rounded.new_empty(rows, rounded.shape[1], dtype=torch.int8)
            integers[:tokens] = rounded
        product: Tensor = self._linear(
            integers.bitwise_xor(-_ZERO_POINT).view(torch.uint8),  # q + 128
            1.0,  # scale and zero point of the input
            _ZERO_POINT,
            self._packed,
            self._scale,  # scale and zero point of the weight
            self._zeros,
            None,  # bias
            1.0,  # scale and zero point of the output
            0,
            torch.float32,
            "none",  # what to do after the product
            [],
            "",
        )
        return product[:tokens]

    def unpack(self) -> Tensor:
        transposed: Tensor = self._packed.to_dense()  # [K, N] int8
        return transposed.t().contiguous()


def _filled_up(rows: int) -> int:
    """The number of rows that a product is made for.

    Examples:
        >>> [_filled_up(rows) for rows in (1, 16, 17, 33, 128, 129, 512, 513)]
        [1, 16, 20, 40, 128, 144, 512, 576]
    """
    if rows <= _EXACT_ROWS:
        return rows
    step = (1 << (rows - 1).bit_length() - 1) // (4 if rows <= _FEW_ROWS else 8)
    return -(-rows // step) * step


def pack_for_int_mm(weight: Tensor, scale: Tensor) -> PlainWeight:
    """Weight int8 ``[N, K]`` and scale float32 ``[N, 1]``, multiplied by ``torch._int_mm``."""
    return PlainWeight("int_mm", weight, scale, _int_mm)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    # Where a side is 1 its stride means nothing, yet this operator believes it, and leaves the
    # result unwritten if it looks impossible (pytorch issue 195066). So it is shown fresh strides.
    columns = a.shape[1]
    a = a.as_strided(a.shape, (columns, 1))
    b = b.view(1, -1) if columns == 1 else b.as_strided(b.shape, (columns, 1)).t()  # [K, N]
    return torch._int_mm(a, b)


def _quantized_tensor(weight: Tensor, scale: Tensor) -> Tensor:
    """The quantized tensor type that fbgemm packs from; nothing else in the library uses it."""
    zero_points = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    return torch._make_per_channel_quantized_tensor(
        weight, scale.flatten().double(), zero_points, axis=0
    )


_ENGINE_LOCK = threading.Lock()


@contextlib.contextmanager
def _fbgemm_engine() -> Iterator[None]:
    """Make torch pack for fbgemm, whatever engine the process has chosen for its own models.

    The engine is one global of the process, left alone where it is right already, as it is by
    default on x86.
    """
    with _ENGINE_LOCK:
        chosen = torch.backends.quantized.engine
        if chosen in ("x86", "fbgemm"):
            yield
            return
        torch.backends.quantized.engine = "fbgemm"
        try:
            yield
        finally:
            torch.backends.quantized.engine = chosen


def _spend_deprecation_warning() -> None:
    """Let torch say, once and to nobody, that its quantized tensors are deprecated.

    torch warns at the first quantized tensor of a process. A user of this library can do nothing
    about it; when torch removes them, fbgemm fails its proof and the next backend takes over. Done
    at import, because ``catch_warnings`` changes the filters of all threads while it is active.
    """
    with warnings.catch_warnings(), contextlib.suppress(AttributeError, RuntimeError):
        warnings.simplefilter("ignore")
        with torch.device("cpu"):
            _quantized_tensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1))


_spend_deprecation_warning()
