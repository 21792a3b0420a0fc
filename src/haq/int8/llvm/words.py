"""The few words of LLVM's language that the kernels are written in."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()

# Of the cache, in bytes.
_LINE = 64

# What is asked for so far ahead is not to push out of the first level what is worked with.
_FAR = 4096

# Values and types of LLVM: llvmlite does not tell one from the other to a type checker.
Value = Any
Type = Any


class Code(ir.IRBuilder):  # type: ignore[misc]
    """A function that is being written, from its first line on.

    Args:
        module: what it becomes a part of.
        name: its own.
        parameters: the types of what it takes; it gives nothing back.
        internal: whether only functions of the same module call it.
    """

    def __init__(
        self, module: ir.Module, name: str, parameters: Sequence[Type], internal: bool = True
    ) -> None:
        function = ir.Function(module, ir.FunctionType(VOID, parameters), name)
        if internal:
            function.linkage = "internal"
            function.attributes.add("noinline")
        super().__init__(function.append_basic_block())
        self.entry = self.block

    @property
    def parameters(self) -> Sequence[Value]:
        parameters: Sequence[Value] = self.function.args
        return parameters

    def variable(self, kind: Type, value: Value) -> Value:
        """A variable's address; LLVM makes a register of it."""
        with self.goto_entry_block():
            address = self.alloca(kind)
        self.store(value, address)
        return address

    def room(self, size: int) -> Value:
        """The address of so many bytes, at the beginning of a line of the cache."""
        with self.goto_entry_block():
            address = self.alloca(I8, size=size)
        address.align = _LINE
        address.type = POINTER  # To whatever is stored there.
        return address

    def value(self, address: Value, kind: Type) -> Value:
        return self.load(address, typ=kind)

    def address(self, base: Value, index: Value, kind: Type) -> Value:
        return self.gep(base, [index], source_etype=kind)

    def read(self, base: Value, index: Value, kind: Type, lanes: int = 1) -> Value:
        """One element, or as many as a vector has, from the ``index``-th on."""
        return self.load(
            self.address(base, index, kind), typ=vector(kind, lanes), align=bytes_of(kind)
        )

    def write(self, value: Value, base: Value, index: Value, kind: Type) -> None:
        """An element or a vector of them, from the ``index``-th on."""
        self.store(value, self.address(base, index, kind), align=bytes_of(kind))

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int | Value = 1) -> Iterator[Value]:
        """What is written inside happens for ``start``, ``start + step``, ... below ``stop``."""
        index = self.variable(I64, start)
        with self.repeat(lambda: self.icmp_signed("<", self.value(index, I64), stop)):
            yield self.value(index, I64)
            step = number(step) if isinstance(step, int) else step
            self.store(self.add(self.value(index, I64), step), index)

    @contextlib.contextmanager
    def repeat(self, condition: Any) -> Iterator[None]:
        """What is written inside happens as long as what ``condition`` writes is true."""
        head, body, end = (self.function.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        self.cbranch(condition(), body, end)
        self.position_at_end(body)
        yield
        self.branch(head)
        self.position_at_end(end)

    def intrinsic(self, name: str, result: Type, *arguments: Value) -> Value:
        """A function of LLVM's own, by its whole name."""
        known = self.module.globals.get(name)
        if known is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            known = ir.Function(self.module, kind, name)
        return self.call(known, arguments)

    def smaller(self, a: Value, b: Value) -> Value:
        return self.select(self.icmp_signed("<", a, b), a, b)


def quotient_up(code: Code, a: Value, b: Value) -> Value:
    """``a / b``, rounded up; both are positive."""
    return code.sdiv(code.add(a, code.sub(b, number(1))), b)


def larger(code: Code, a: Value, b: Value) -> Value:
    """Of integers without a sign."""
    return code.select(code.icmp_unsigned(">", a, b), a, b)


def rounded(code: Code, value: Value) -> Value:
    """To the nearest integers, ties to even; still float32."""
    return code.intrinsic(f"llvm.roundeven.{suffix(value.type)}", value.type, value)


def reduced(code: Code, how: str, value: Value) -> Value:
    """Of a vector, by the name that LLVM has for it: ``umax``, ``fmin``."""
    if lanes_of(value.type) == 1:
        return value
    name = f"llvm.vector.reduce.{how}.{suffix(value.type)}"
    return code.intrinsic(name, value.type.element, value)


def spread(code: Code, value: Value, lanes: int) -> Value:
    """A vector of one number."""
    if lanes == 1:
        return value
    kind = vector(value.type, lanes)
    first = code.insert_element(constant(kind, 0), value, number(0, I32))
    return code.shuffle_vector(first, first, number(0, vector(I32, lanes)))


def parts(code: Code, length: Value, lanes: int) -> list[tuple[int, Value, Value]]:
    """Most of a row in registers, the rest one by one: lanes, from where, to where."""
    whole = code.and_(length, number(-lanes))
    return [(lanes, number(0), whole), (1, whole, length)]


def total(code: Code, value: Value) -> Value:
    """The sum of a vector of float32."""
    if lanes_of(value.type) == 1:
        return value
    name = f"llvm.vector.reduce.fadd.{suffix(value.type)}"
    # Negative zero changes no sum.
    function = code.intrinsic(name, FLOAT, constant(FLOAT, -0.0), value)
    function.fastmath.add("reassoc")  # In any order, in parallel.
    return function


def side_by_side(code: Code, values: Sequence[Value]) -> Value:
    """A vector of numbers, each of its own."""
    if len(values) == 1:
        return values[0]
    result = constant(vector(values[0].type, len(values)), 0)
    for index, value in enumerate(values):
        result = code.insert_element(result, value, number(index, I32))
    return result


def sums_of_four(code: Code, *vectors: Value) -> Value:
    """The sums of four vectors of integers, side by side."""
    a, b, c, d = vectors
    # What moves stays within 128 bits at first, which one instruction does.
    ab, cd = (code.add(*_woven(code, *pair, 1)) for pair in ((a, b), (c, d)))
    result = code.add(*_woven(code, ab, cd, 2))
    while lanes_of(result.type) > len(vectors):
        half = lanes_of(result.type) // 2
        halves = [range(half), range(half, 2 * half)]
        result = code.add(
            *(code.shuffle_vector(result, result, constants(I32, part)) for part in halves)
        )
    return result


def _woven(code: Code, a: Value, b: Value, size: int) -> Iterator[Value]:
    """Elements of ``a`` and ``b`` in turn, ``size`` of each: of first halves, then of second ones.

    Halves are those of each four elements.
    """
    lanes = lanes_of(a.type)
    for half in (0, 2):
        order = [
            of + four + half + part + element
            for four in range(0, lanes, 4)
            for part in range(0, 2, size)
            for of in (0, lanes)
            for element in range(size)
        ]
        yield code.shuffle_vector(a, b, constants(I32, order))


def multiply_add(code: Code, a: Value, b: Value, c: Value) -> Value:
    """``a * b + c`` of float32, rounded once."""
    return code.intrinsic(f"llvm.fma.{suffix(a.type)}", a.type, a, b, c)


def prefetch(code: Code, address: Value, length: int, distance: int) -> None:
    """Ask for as many bytes as are read from an address on, but so many bytes ahead of them."""
    for line in range(0, length if distance else 0, _LINE):
        place = code.address(address, number(distance + line), I8)
        ask_for(code, place, far=distance >= _FAR)


def ask_for(code: Code, address: Value, far: bool = False) -> None:
    """Ask for a line of the cache, which is there later; if that is far, in the second level."""
    hints = [number(hint, I32) for hint in (0, 2 if far else 3, 1)]  # To be read, often, data.
    code.intrinsic("llvm.prefetch.p0", VOID, address, *hints)


def number(value: int, kind: Type = I64) -> Value:
    """An integer, or a vector of it."""
    return constant(kind, value)


def constant(kind: Type, value: float) -> Value:
    """A number, or a vector of it."""
    if isinstance(value, float):  # LLVM refuses numbers that float32 does not hold.
        value = ctypes.c_float(value).value
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


def constants(kind: Type, values: Sequence[int]) -> Value:
    """A vector of numbers."""
    return ir.Constant(vector(kind, len(values)), list(values))


def vector(kind: Type, lanes: int) -> Type:
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def lanes_of(kind: Type) -> int:
    return kind.count if isinstance(kind, ir.VectorType) else 1


def bytes_of(kind: Type) -> int:
    return 4 if isinstance(kind, ir.FloatType) else 2 if kind is HALF else kind.width // 8


def suffix(kind: Type) -> str:
    """What the names of intrinsics end with."""
    lanes, element = lanes_of(kind), kind.element if isinstance(kind, ir.VectorType) else kind
    name = "f32" if isinstance(element, ir.FloatType) else f"i{element.width}"
    return name if lanes == 1 else f"v{lanes}{name}"
