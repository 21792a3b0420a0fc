"""One exact W8A8 product: which backend computes it, whether it can be trusted, and why.

    y[t, n] = (sum over k of q_x[t, k] * q_w[n, k]) * s_w[n] * s_x[t] + bias[n]

The integers are those of :mod:`haq.int8.grid`, their sum is exact in int32, the rest is float32 in
this order, and the result is cast to the input's dtype. Where a token also has a zero point z
(:mod:`haq.int8.tokens`), (128 - z) * s_w[n] * (sum over k of q_w[n, k]) is added before s_x. All
backends give the same bits, and so does a token alone and in a batch.

A fast kernel can be wrong without saying so: without VNNI, some add pairs of products in int16,
where they saturate. So no backend is believed. Each is compared with int64 arithmetic on extreme
integers before its first use in a process, and is passed over if a single one differs.

A weight has the layout of the backend that packed it, and exists once. The choice is therefore made
when it is packed, and one backend serves every number of tokens. Which of the exact ones is fastest
depends on the processor: it is measured when the first weight of a real model's size is packed.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from haq.int8 import cpu, cuda, reference, speed
from haq.int8.llvm.weight import LlvmWeight
from haq.int8.once import once
from haq.int8.reference import PackedWeight
from haq.int8.signs import SignedRowsWeight
from haq.int8.tokens import RoundedTokens, rounded_rows

MAX_IN_FEATURES = (2**31 - 1) // (128 * 128)
"""Longer sums could leave int32: 131 071."""


@dataclass(frozen=True)
class Backend:
    """A way to compute the product.

    Attributes:
        name: what ``HAQ_BACKEND`` and :func:`use_backend` call it.
        device_type: the kind of device it runs on; None for every kind.
        pack: weight int8 ``[N, K]`` and scale float32 ``[N, 1]`` to a packed weight.
    """

    name: str
    device_type: str | None
    pack: Callable[[Tensor, Tensor], PackedWeight]

    def runs_on(self, device_type: str) -> bool:
        return self.device_type in (None, device_type)


_LLVM = Backend("llvm", "cpu", LlvmWeight)

BACKENDS = (
    _LLVM,
    Backend("fbgemm", "cpu", cpu.FbgemmWeight),
    Backend("onednn", "cpu", cpu.OneDnnWeight),
    Backend("fbgemm_signs", "cpu", SignedRowsWeight),
    Backend("int_mm", "cpu", cpu.pack_for_int_mm),
    Backend("triton", "cuda", cuda.TritonWeight),
    Backend("int_mm", "cuda", cuda.PaddedWeight),
    Backend("reference", None, reference.pack),
)
"""In order of preference: the first exact one that runs on the weight's device packs it."""

_RIVALS = ("llvm", "fbgemm", "onednn")
"""Backends of the CPU whose order is measured: each is the faster one on some machine."""

# Weights with fewer elements are packed in the fixed order until a larger one came: a tiny model
# must not wait half a second to learn what it would not notice.
_WORTH_MEASURING = 2**20


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, row_sums: Tensor | None = None
) -> Tensor:
    """The W8A8 product of this module's formula: every token is given its scale as it arrives.

    Args:
        x: float ``[..., K]``.
        weight: packed ``[N, K]``.
        bias: float32 ``[N]``.
        row_sums: float32 ``[N]``, what `row_sums` gives, for tokens with a zero point; None for the
            symmetric grid.

    Returns:
        ``[..., N]``, dtype of ``x``. A token that holds NaN gives NaN, in its own row only.

    Examples:
        >>> weight = pack(torch.tensor([[127, 0], [1, 1]], dtype=torch.int8), torch.ones(2, 1))
        >>> linear(torch.tensor([[127.0, 2.4]]), weight)
        tensor([[16129.,   129.]])
    """
    if isinstance(weight, (cuda.TritonWeight, LlvmWeight)):
        return weight.linear(x, bias, row_sums)
    make = _symmetric if row_sums is None else _with_zero_points
    tokens = once(x, make, weight, make)
    count = len(tokens.scale)
    if count <= _ROWS_AT_ONCE:
        result = product(tokens, weight, row_sums)  # [T, N] float32
        if bias is not None:
            result.add_(bias)
        return result.to(x.dtype).view(*x.shape[:-1], result.shape[-1])
    return _long_linear(tokens, weight, bias, row_sums, x.dtype).view(*x.shape[:-1], -1)


# Tokens whose products are rescaled and cast while they are in the cache.
_ROWS_AT_ONCE = 128


def _symmetric(x: Tensor) -> RoundedTokens:
    return rounded_rows(x.reshape(-1, x.shape[-1]).contiguous())


def _with_zero_points(x: Tensor) -> RoundedTokens:
    return rounded_rows(x.reshape(-1, x.shape[-1]).contiguous(), asymmetric=True)


def _long_linear(
    tokens: RoundedTokens,
    weight: PackedWeight,
    bias: Tensor | None,
    row_sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`linear` for many tokens, some at a time: ``[T, N]``."""
    out = None
    for start in range(0, len(tokens.scale), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        result = product(tokens[here], weight, row_sums)
        if bias is not None:
            result.add_(bias)
        if out is None:
            out = result.new_empty(len(tokens.scale), result.shape[1], dtype=dtype)
        out[here] = result
    assert out is not None
    return out


def product(
    tokens: RoundedTokens, weight: PackedWeight, row_sums: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """The product of tokens that are rounded already: float32 ``[T, N]``, in ``out`` if given."""
    sums = weight.product(tokens.integers)
    if tokens.shift is not None:
        assert row_sums is not None
        sums.addcmul_(tokens.shift, row_sums)
    return torch.mul(sums, tokens.scale, out=sums if out is None else out)


def pack(weight: Tensor, scale: Tensor) -> PackedWeight:
    """Lay out a weight for the best backend of its device, or for the one that was asked for.

    Args:
        weight: int8 ``[N, K]``, contiguous. -128 is computed with correctly, though the grid does
            not use it: checkpoints of other tools contain it.
        scale: float32 ``[N, 1]``, on the same device.

    Returns:
        The packed weight. It may share memory with ``weight`` and ``scale``.

    Raises:
        ValueError: a backend of an unknown name was asked for.
        RuntimeError: the backend that was asked for does not run on this device or is not exact.
    """
    if weight.is_meta:  # Nothing to compute with yet: the shape waits for its numbers.
        return reference.pack(weight, scale)
    measure = weight.device.type == "cpu" and weight.numel() >= _WORTH_MEASURING
    return _choose(weight.device.type, measure).pack(weight, scale)


def compiles() -> bool:
    """Whether kernels that LLVM compiles run on this CPU, and none but them was asked for.

    They are also what norms and attention are computed with, whichever product is the fastest.

    Examples:
        >>> with use_backend("reference"):
        ...     compiles()
        False
    """
    return _asked_for() in (None, _LLVM.name) and _verdict(_LLVM, "cpu").exact


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Pack weights for one backend inside a ``with`` block, in this thread; for tests and reports.

    The environment variable ``HAQ_BACKEND`` does the same for a whole process. Weights that are
    packed already keep their layout.

    Args:
        name: of a backend, see :func:`backends`.

    Raises:
        ValueError: the name is unknown.

    Examples:
        >>> with use_backend("reference"):
        ...     pack(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1)).backend
        'reference'
    """
    token = _asked_here.set(_known(name, "`name`"))
    try:
        yield
    finally:
        _asked_here.reset(token)


_asked_here: ContextVar[str | None] = ContextVar("asked_here", default=None)


def _asked_for() -> str | None:
    here = _asked_here.get()
    if here is not None:
        return here
    name = os.environ.get("HAQ_BACKEND")
    return _known(name, "The environment variable HAQ_BACKEND") if name else None


def _known(name: str, source: str) -> str:
    names = list(dict.fromkeys(backend.name for backend in BACKENDS))
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(names)}; got {name!r}.")
    return name


def _choose(device_type: str, measure: bool = False) -> Backend:
    """The backend that was asked for, else the first exact one."""
    asked = _asked_for()
    if measure and asked is None:
        _measure_rivals()
    reasons = []
    for backend in _in_order():
        if backend.runs_on(device_type) and asked in (None, backend.name):
            verdict = _verdict(backend, device_type)
            if verdict.exact:
                return backend
            reasons.append(verdict.reason)
    if asked is None:
        raise RuntimeError(f"No int8 product is exact on {device_type!r} devices: {reasons}.")
    reason = reasons[0] if reasons else f"it does not run on {device_type!r} devices"
    raise RuntimeError(f"The int8 backend {asked!r} was asked for and cannot be used: {reason}.")


# How much of LLVM's time counts beside that of others. Where it multiplies, kernels do what is
# around the products, too: a layer takes a token in two calls. And another one may seem to be
# faster only because something else was at work while they were timed.
_SHARE_OF_LLVM = 0.8

_measured_seconds: dict[str, float] = {}
_measuring_lock = threading.Lock()


def _measure_rivals() -> None:
    """Time the rivals, once per process, if there is a choice between them."""
    with _measuring_lock:
        rivals = [b for b in BACKENDS if b.name in _RIVALS and _verdict(b, "cpu").exact]
        if not _measured_seconds and len(rivals) > 1:
            packs = {b.name: b.pack for b in rivals}
            _measured_seconds.update(speed.seconds_per_layer(packs, linear))


def _in_order() -> list[Backend]:
    """All backends, the measured ones by their seconds; the fixed order where nothing is known."""
    return sorted(BACKENDS, key=lambda b: (b.name not in _RIVALS, _cost(b.name)))


def _cost(name: str) -> float:
    share = _SHARE_OF_LLVM if name == _LLVM.name else 1.0
    return share * _measured_seconds.get(name, 0.0)


@dataclass(frozen=True)
class Verdict:
    """What a backend's proof found on one kind of device; ``reason`` says why it is not used."""

    available: bool
    exact: bool
    reason: str


_proof_lock = threading.Lock()
_verdicts: dict[tuple[str, str], Verdict] = {}


def _verdict(backend: Backend, device_type: str) -> Verdict:
    """The verdict on ``backend``, proved at the first call of the process."""
    key = (backend.name, device_type)
    known = _verdicts.get(key)
    if known is not None:  # As it is in every call of a norm.
        return known
    with _proof_lock:
        if key not in _verdicts:
            _verdicts[key] = _prove(backend, torch.device(device_type))
        return _verdicts[key]


def _prove(backend: Backend, device: torch.device) -> Verdict:
    try:
        difference = reference.difference(backend.pack, device)
    # No such operator, none for this device, or what it needs is not installed.
    except (AttributeError, ImportError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        return Verdict(available=False, exact=False, reason=f"not available here: {first_line}")
    return Verdict(available=True, exact=not difference, reason=difference)


@dataclass(frozen=True)
class BackendStatus:
    """What is known about one backend on one kind of device.

    Attributes:
        name: what ``HAQ_BACKEND`` calls it.
        device: the kind of device.
        available: whether this torch, on this machine, has it.
        exact: whether it proved exact.
        tokens: the numbers of tokens it serves: "all" or "none".
        reason: why it serves none; empty if it serves all.
    """

    name: str
    device: str
    available: bool
    exact: bool
    tokens: str
    reason: str


class BackendTable(tuple[BackendStatus, ...]):
    """The status of every backend; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("backend", "device", "available", "exact", "tokens", "why not")
        lines = [head, *(tuple(map(_cell, astuple(status))) for status in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    __repr__ = __str__


def backends() -> BackendTable:
    """Which products this machine has, which of them are exact, which one is used and why.

    The first call of a process measures them, unless a weight of at least a million elements was
    packed before; that takes about a second.

    Examples:
        >>> next(status.exact for status in backends() if status.name == "reference")
        True
    """
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return BackendTable(status for device_type in device_types for status in _statuses(device_type))


def _statuses(device_type: str) -> Iterator[BackendStatus]:
    try:
        chosen = _choose(device_type, measure=device_type == "cpu")
        why_another = f"{chosen.name} " + ("was asked for" if _asked_for() else "comes first")
    except RuntimeError:  # What was asked for cannot be used: that is what the table is to tell.
        chosen = None
        why_another = f"{_asked_for()} was asked for"
    for backend in BACKENDS:
        if backend.runs_on(device_type):
            verdict = _verdict(backend, device_type)
            used = backend is chosen
            yield BackendStatus(
                name=backend.name,
                device=device_type,
                available=verdict.available,
                exact=verdict.exact,
                tokens="all" if used else "none",
                reason=verdict.reason or ("" if used else _slower(backend) or why_another),
            )


def _slower(backend: Backend) -> str:
    """How long a backend takes beside the one that was chosen, if that was measured and decided."""
    if _asked_for() or backend.device_type != "cpu" or backend.name not in _measured_seconds:
        return ""
    best = min(_measured_seconds, key=_cost)
    times = _measured_seconds[backend.name] / _measured_seconds[best]
    made_up = "" if times >= 1 else ", which makes up for it around the products"
    return f"measured: takes {times:.2f} times as long as {best}{made_up}"


def _cell(value: str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value
