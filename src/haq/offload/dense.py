"""Everything but the experts: on the GPU, or brought there layer by layer if it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.blocks import find_blocks
from haq.offload.module import OffloadedExperts


class DenseSide:
    """Moves a model whose experts are `OffloadedExperts`, and brings it back as it was.

    Args:
        model: the model.
        device: the GPU. Nothing moves if that is the CPU, unless layers are streamed.
        streamed: leave decoder blocks on the CPU; accelerate's hooks bring the weights of each of
            their layers when it is called, and forget them.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, streamed: bool) -> None:
        self._model, self._device, self._streamed = model, device, streamed
        self._kept: list[tuple[nn.Module, dict[str, nn.Parameter | None], dict[str, Tensor | None]]]
        self._kept = []

    def to_gpu(self) -> None:
        """After the experts were replaced."""
        if not self._streamed:
            self._move(self._model, self._device)
            return
        name, blocks = find_blocks(self._model)
        with _without(self._model, name):
            self._move(self._model, self._device)
        for module in blocks.modules():
            self._kept.append((module, dict(module._parameters), dict(module._buffers)))
        for block in blocks:
            # Of its own: `state_dict` would ask the experts, which are in two places.
            tensors = dict(block.named_parameters()) | dict(block.named_buffers())
            state = {key: tensor.detach() for key, tensor in tensors.items()}
            cpu_offload(block, self._device, offload_buffers=True, state_dict=state)

    def to_cpu(self) -> None:
        """Back: the same parameters with the same numbers."""
        if self._streamed:
            remove_hook_from_submodules(find_blocks(self._model)[1])
            for module, parameters, buffers in self._kept:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            self._kept = []
        self._move(self._model, torch.device("cpu"))

    def _move(self, model: PreTrainedModel, device: torch.device) -> None:
        if self._device.type == "cpu":
            return
        stands = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
        for stand in stands:
            stand.moving = True
        try:
            model.to(device)  # type: ignore[arg-type]
        finally:
            for stand in stands:
                stand.moving = False


@contextmanager
def _without(model: nn.Module, name: str) -> Iterator[None]:
    """The model without one of its modules, for a while."""
    module = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        model.set_submodule(name, module)
