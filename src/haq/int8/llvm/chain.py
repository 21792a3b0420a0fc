"""Kernels one after the other, on the same threads, in one call.

What a token goes through in a layer is a dozen kernels of a few microseconds each, beside products
that read the weights. From Python each of them costs more than it takes.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from haq.int8.llvm import compiler, threads
from haq.int8.llvm.words import I64, POINTER, VOID, Code, number

# Of each step: its function, what that is told, and where its counter of pieces is, or 0.
_STEP = 3


class Step:
    """A kernel and what it is told.

    Args:
        kernel: the function.
        names: of the places.
        told: what is there.

    Examples:
        >>> from haq.int8.llvm.between import sum_step
        >>> a, out = torch.ones(2), torch.zeros(2)
        >>> step = sum_step(torch.float32, a.data_ptr(), a.data_ptr(), out.data_ptr(), 2)
        >>> Chain([step, step]).run()
        >>> out
        tensor([2., 2.])
    """

    def __init__(self, kernel: compiler.Kernel, names: Sequence[str], told: Sequence[int]) -> None:
        self.kernel, self._names = kernel, {name: at for at, name in enumerate(names)}
        self.places = array("q", told)

    def tell(self, first: str, *told: int) -> None:
        """Change what is at some places, one after the other, from the first one on."""
        at = self._names[first]
        self.places[at : at + len(told)] = array("q", told)

    def address_of(self, name: str) -> int:
        """Of a place; 0 if there is none of this name."""
        at = self._names.get(name)
        return 0 if at is None else self.places.buffer_info()[0] + at * self.places.itemsize


class Chain:
    """Steps, each of which begins when all threads are done with the one before.

    It is used again and again, by one thread of Python at a time.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps  # Their places are where the table says.
        self._table = array("q", [len(steps)])
        for step in steps:
            places = step.places.buffer_info()[0]
            self._table.extend([step.kernel.address, places, step.address_of("counter")])
        self._kernel = compiler.kernel_of(_module, ())

    def run(self) -> None:
        self._kernel(self._table, torch.get_num_threads())


def _module() -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    (table,) = code.parameters
    first, _ = threads.number_and_count(code)
    kind = ir.FunctionType(VOID, [POINTER])
    steps = code.mul(code.read(table, number(0), I64), number(_STEP))
    with code.loop(number(0), steps, _STEP) as index:
        function, places, counter = (
            code.read(table, code.add(index, number(1 + place)), I64) for place in range(_STEP)
        )
        code.call(code.inttoptr(function, kind.as_pointer()), [code.inttoptr(places, POINTER)])
        threads.wait_for_all(code)
        # Nobody looks at this step's counter any more; the next call begins at 0 again.
        counts = code.icmp_signed("!=", counter, number(0))
        with code.if_then(code.and_(counts, code.icmp_signed("==", first, number(0)))):
            code.store(number(0), code.inttoptr(counter, POINTER))
    code.ret_void()
    return module
