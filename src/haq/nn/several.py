"""Decoder layers one after the other, for one new token, in one call.

The end of a layer and the beginning of the next one are one chain. Python comes in between only
where experts were chosen: it is told which ones, and where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from haq.nn.layer import LayerStep
from haq.nn.parts import Mixture
from haq.nn.store import Store


class SeveralSteps:
    """The chains of several layers.

    Args:
        layers: each of them once, with a block that is known, and for tokens of the same kind.
    """

    def __init__(self, layers: Sequence[LayerStep]) -> None:
        from haq.int8.llvm.chain import Chain

        self.layers = tuple(layers)
        steps, chains = [], []
        for layer in layers:
            steps += [*layer.before, *layer.after]
            if isinstance(layer.parts.block, Mixture):
                chains.append(Chain(steps))
                steps = [*layer.of_experts]
        self._first, *self._of_experts = [*chains, Chain(steps)]

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, stores: Sequence[Store]) -> list[Tensor]:
        """What each layer gives, given what the one before does.

        Keys and values are written to where the stores say, and the stores are not told.

        Args:
            x: as for `LayerStep.run`, and the next two.
            cos: likewise.
            sin: likewise.
            stores: of the layers.

        Returns:
            ``[1, 1, K]`` each, of the first layers. There are less than all if kernels do not know
            an expert that was chosen, and none if a layer cannot be run now, or a store does not
            know what will be attended to.
        """
        held = []  # It lives until the kernels have read it.
        try:
            for layer in self.layers:
                tensors = layer.take()
                if tensors is None:
                    return []
                held.append(tensors)
            return self._run(x, cos, sin, stores)
        finally:
            for layer, _ in zip(self.layers, held, strict=False):
                layer.give_back()

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, stores: Sequence[Store]) -> list[Tensor]:
        results: list[Tensor] = []
        address, rotation = x.data_ptr(), (cos.data_ptr(), sin.data_ptr())
        for layer, store in zip(self.layers, stores, strict=True):
            spot, attended = layer.place(store, x), store.ahead()
            if attended is None:
                return []
            results.append(torch.empty_like(x))
            out = results[-1].data_ptr()
            layer.tell_before(address, *rotation, spot)
            layer.tell_after(address, attended, out)
            address = out
        self._first.run()
        mixtures = (at for at, layer in enumerate(self.layers) if layer.of_experts)
        for at, chain in zip(mixtures, self._of_experts, strict=True):
            held = self.layers[at].tell_experts()
            if held is None:
                return results[:at]
            chain.run()
            del held
        return results
