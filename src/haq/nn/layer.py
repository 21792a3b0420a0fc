"""A decoder layer for one new token, in two calls: up to its keys and values, and what follows.

A layer of `transformers` is dozens of operations. Beside weights that are read at the memory's
speed each of them takes microseconds that add up (docs/performance.md): Python, a look at each
tensor, threads that wait to be woken. Here they are two chains of kernels whose memory is there
already. Between them the cache, whatever kind it is, is given the keys and values. The experts that
a token chose are a third one.
"""

import threading
from array import array
from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haq.int8.llvm import weight
from haq.nn.chosen import ChosenExperts
from haq.nn.linear import Int8Linear
from haq.nn.norms import formula
from haq.nn.parts import Gated, Held, Mixture, Parts, tensors_of_norm
from haq.nn.rows import group_of
from haq.nn.store import Attended, Spot, Store

if TYPE_CHECKING:  # It needs llvmlite.
    from haq.int8.llvm.chain import Step


# Where what a kernel writes begins: at a line of the cache.
_LINE = 64

# Of keys that there is room for at first; it doubles when they are more.
_KEYS = 1024


class LayerStep:
    """The two chains of a layer, and their memory.

    Args:
        parts: of the layer, for which `haq.nn.parts.fits`.
        dtype: of its input.
        turned: to how much of each head rotary embeddings are applied, R.

    Attributes:
        is_current: false once it was found that tensors are not where they were.
        before: the steps of the first chain.
        after: those of the second one.
        of_experts: those of the third one, of a mixture.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype, turned: int) -> None:
        self.parts, self.dtype, self.turned = parts, dtype, turned
        self.heads, self.groups, self.width = parts.heads, parts.groups, parts.width
        self.channels = parts.query.in_features
        self.is_current = True
        self._lock = threading.Lock()
        self._held = Held(parts)
        tensors = self._held.tensors()
        self._kinds = list(map(type, tensors))
        self._present = [tensor is not None for tensor in tensors]
        self._addresses = self._addresses_of(tensors)
        self._memory: list[Tensor] = []
        self._scores = torch.empty(self.heads * _KEYS, dtype=torch.float32)
        self._build()

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, store: Store) -> list[Tensor] | None:
        """The layer's output; or, for an unknown block, what it is to be added to, and its input.

        Args:
            x: ``[1, 1, K]``, contiguous, as the next two.
            cos: of a token's rotation, with R numbers.
            sin: likewise.
            store: of the layer.

        Returns:
            Tensors ``[1, 1, K]``; None, and nothing was done, if another thread is in here, or if
            a tensor is not where it was: it may have been loaded, moved or shared.
        """
        held = self.take()  # They live until the kernels have read them.
        if held is None:
            return None
        try:
            return self._run(x, cos, sin, store)
        finally:
            self.give_back()

    def take(self) -> list[Tensor | None] | None:
        """Let nobody else run it until `give_back`.

        Returns:
            What the kernels read, which is to be held until they have; None as for `run`.
        """
        if not self._lock.acquire(blocking=False):
            return None
        held = self._held.tensors()
        self.is_current = (
            list(map(type, held)) == self._kinds
            and self._addresses_of(held) == self._addresses
            and self.parts.is_as_before()
        )
        if self.is_current:
            return held
        self._lock.release()
        return None

    def give_back(self) -> None:
        self._lock.release()

    def place(self, store: Store, x: Tensor) -> Spot:
        """Where a store takes a token's key and value, in the dtype of a tensor."""
        return store.place((self.groups, self.parts.size), (self.groups, self.width), x)

    def tell_before(self, x: int, cos: int, sin: int, spot: Spot) -> None:
        """The first chain: addresses of a token and its rotation, and where keys go."""
        self._first_norm.tell("tokens", x)
        self._rotation.tell("cos", cos, sin)
        self._rotation.tell("turned_key", *spot)

    def tell_after(self, x: int, attended: Attended, result: int) -> None:
        """The second one: the address of the token again, and of the layer's output."""
        size = self.heads * attended.tokens_before
        if size > len(self._scores):
            self._scores = self._scores.new_empty(2 * size)
        self._attention.tell("scores", self._scores.data_ptr())
        self._attention.tell("key", attended.key, attended.value)
        self._attention.tell("tokens_before", attended.tokens_before)
        self._attention.tell("key_group", *attended[3:5])
        self._attention.tell("value_group", *attended[5:])
        self._first_sum.tell("a", x)
        self._last_sum.tell("out", result)

    def tell_experts(self) -> list[Any] | None:
        """The third one, of a mixture: what the router chose.

        Returns:
            What is to be held until it was run; None if kernels do not know one of the experts.
        """
        assert isinstance(self.parts.block, Mixture)
        return self._experts.tell([self.parts.block.experts.expert(i) for i in self._index])

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, store: Store) -> list[Tensor]:
        address, block = x.data_ptr(), self.parts.block
        self.tell_before(address, cos.data_ptr(), sin.data_ptr(), self.place(store, x))
        self._chains[0].run()
        result = torch.empty_like(x)
        self.tell_after(address, store.keep(x), result.data_ptr())
        results = [result]
        if block is None:
            results.append(torch.empty_like(x))
            self._second_norm.tell("tokens", result.data_ptr())
            self._second_norm.tell("out", results[1].data_ptr())
        self._chains[1].run()
        if isinstance(block, Mixture):
            self._add_experts(block, result)
        return results

    def _add_experts(self, mixture: Mixture, result: Tensor) -> None:
        """What the router chose, to the sum that is there."""
        held = self.tell_experts()
        if held is not None:
            self._chains[2].run()
            return
        index = torch.tensor([self._index.tolist()])
        added = mixture.experts(self._experts.tokens[:1], index, self._gates)
        torch.add(self._total, added, out=result)

    def _build(self) -> None:
        from haq.int8.llvm import attention, between
        from haq.int8.llvm.chain import Chain

        parts, dtype, size = self.parts, self.dtype, self.parts.size
        self._room = self._take(max(weight.room([group_of(layer)]) for layer in parts.linears))
        self._total = torch.empty(1, 1, self.channels, dtype=dtype)
        total = self._total.data_ptr()
        normed, query, key, value, turned, attended, product = (
            self._take(count * width)
            for count, width in (
                (self.channels, 2),
                (self.heads * size, 2),
                (self.groups * size, 2),
                (self.groups * self.width, 2),
                (self.heads * size, 4),
                (self.heads * self.width, 2),
                (self.channels, 2),
            )
        )
        self._first_norm = self._norm(parts.norms[0], 0, normed)
        shape = self.heads, self.groups, size, self.width, self.turned
        self._rotation = between.rotation_step(dtype, parts.scale, query, key, value, turned, shape)
        self.before = [
            self._first_norm,
            self._product(parts.query, normed, query),
            self._product(parts.key, normed, key),
            self._product(parts.value, normed, value),
            *self._norms_of_heads(query, key),
            self._rotation,
        ]
        self._attention = attention.step(
            dtype, turned, attended, self.heads, self.groups, size, self.width
        )
        self._first_sum = self._last_sum = between.sum_step(dtype, 0, product, total, self.channels)
        self._second_norm = self._norm(parts.norms[1], total, normed)
        self.after = [
            self._attention,
            self._product(parts.output, attended, product),
            self._first_sum,
            self._second_norm,
        ]
        self.of_experts: list[Step] = []
        if parts.block is not None:
            self._last_sum = between.sum_step(dtype, total, product, 0, self.channels)
        if isinstance(parts.block, Gated):
            self.after += [*self._gated(parts.block, normed, product), self._last_sum]
        elif isinstance(parts.block, Mixture):
            self.after += self._router(parts.block, normed, product)
            self.of_experts = [*self._experts.steps, self._last_sum]
        self._chains = [Chain(steps) for steps in (self.before, self.after, self.of_experts)]

    def _norms_of_heads(self, query: int, key: int) -> Iterator["Step"]:
        """In place: a kernel reads all of a head before it writes."""
        for norm, place, heads in zip(
            self.parts.head_norms, (query, key), (self.heads, self.groups), strict=False
        ):
            width = len(norm.get_parameter("weight"))
            yield self._norm(norm, place, place, heads * self.parts.size // width)

    def _gated(self, gated: Gated, tokens: int, out: int) -> Iterator["Step"]:
        from haq.int8.llvm.between import gate_step

        inner = gated.gate.out_features
        first, second, product = (self._take(2 * inner) for _ in range(3))
        yield self._product(gated.gate, tokens, first)
        yield self._product(gated.up, tokens, second)
        yield gate_step(self.dtype, first, second, product, 1, inner, inner)
        yield self._product(gated.down, product, out)

    def _router(self, mixture: Mixture, token: int, out: int) -> list["Step"]:
        """The choice of experts; and what computes them, when Python has seen which ones."""
        from haq.int8.llvm import router

        number, slots, channels = mixture.experts.num_experts, mixture.slots, self.channels
        self._experts = ChosenExperts(mixture.experts.expert(0), slots, self.dtype)
        self._index = array("q", [0] * slots)
        self._gates = torch.empty(1, slots)
        logits, gates = self._take(4 * number), self._gates.data_ptr()
        self._experts.steps[-1].tell("b", gates, out)
        weight = mixture.router.get_parameter("weight").data_ptr()
        places = logits, token, gates, self._index.buffer_info()[0]
        return [
            router.logits_step(self.dtype, token, weight, logits, number, channels),
            router.choice_step(
                self.dtype,
                mixture.normed,
                mixture.rounded,
                *places,
                self._experts.tokens.data_ptr(),
                (number, slots, channels),
            ),
        ]

    def _norm(self, module: nn.Module, tokens: int, out: int, count: int = 1) -> "Step":
        from haq.int8.llvm import norms

        norm, (scale, bias) = formula(module), tensors_of_norm(module)
        assert norm is not None
        assert scale is not None
        return norms.step(tokens, count, norm, scale, bias, out)

    def _product(self, layer: Int8Linear, tokens: int, out: int) -> "Step":
        dtypes = self.dtype, self.dtype
        return weight.step([group_of(layer)], dtypes, tokens, self._room, out)

    def _addresses_of(self, tensors: list[Any]) -> list[int]:
        return list(map(Tensor.data_ptr, compress(tensors, self._present)))

    def _take(self, size: int) -> int:
        """The address of so many bytes, which stay until this object goes."""
        self._memory.append(torch.empty(size + _LINE, dtype=torch.uint8))
        return -(-self._memory[-1].data_ptr() // _LINE) * _LINE
