"""What the tensors of a model are called in published checkpoints.

`transformers` renames weights while it loads them, and merges those of experts into 3-D parameters.
It can take all that back, for saving. Here it does so for numbers instead of weights: every row of
every parameter is given a number, and where the numbers come out tells which rows of which
parameter make up each published tensor. No family is known by name.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from haq.model.experts import is_fused_experts

# Elements of a tensor that is certainly a parameter.
_LARGE = 2**26


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a published checkpoint: some rows of a parameter, or all of it.

    Attributes:
        name: in the checkpoint.
        parameter: in the model.
        rows: int64, counted over the experts of a fused parameter ``[E, N, K]``; None is all.
    """

    name: str
    parameter: str
    rows: Tensor | None


def skeleton(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The float model with its buffers in memory and its parameters on the meta device."""
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        model: PreTrainedModel = kind(config)
    model.tie_weights()  # Where parameters are made anew, ties are lost.
    model.eval()
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device at once.

    `init_empty_weights` asks for a parameter's memory before it gives it back: all experts of a
    layer of DeepSeek-V3 are 30 GB, more than some machines promise. No buffer is that large.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and math.prod(_shape(args, kwargs)) >= _LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _shape(args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Of ``torch.empty(2, 3)``, ``torch.empty((2, 3))`` or ``torch.empty(size=(2, 3))``."""
    size = args or kwargs.get("size", ())
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names in the state that are second names of a parameter, with the first name of each."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True).items()
    names = {name: first.setdefault(id(tensor), name) for name, tensor in state}
    return {name: original for name, original in names.items() if name != original}


def published_pieces(model: PreTrainedModel) -> list[Piece]:
    """Every tensor of the checkpoint that ``model`` would be published as, in its order.

    Args:
        model: a float model, as `skeleton` makes it.

    Raises:
        ValueError: published tensors are more than rows of the model's parameters.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=8, hidden_size=4, intermediate_size=2,
        ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        ...     num_local_experts=2)
        >>> pieces = published_pieces(skeleton(MixtralForCausalLM, config))
        >>> [(p.name, p.rows.tolist()) for p in pieces if p.name.endswith("experts.1.w3.weight")]
        [('model.layers.0.block_sparse_moe.experts.1.w3.weight', [6, 7])]
    """
    tied, ignored = tied_names(model), set(model._keys_to_ignore_on_save or ())
    state = {n: t for n, t in model.state_dict().items() if n not in tied and n not in ignored}
    fused = {n for n, module in model.named_modules() if is_fused_experts(module)}
    pieces = []
    # One block's experts at a time: all of a large model's would be a gigabyte of numbers.
    for names in _together(state, fused):
        numbered = _numbered({name: state[name].shape for name in names}, fused)
        published = revert_weight_conversion(model, {n: t.clone() for n, t in numbered.items()})
        pieces += [_piece(name, numbers, numbered) for name, numbers in published.items()]
    order = {name: position for position, name in enumerate(state)}
    return sorted(pieces, key=lambda piece: order[piece.parameter])


def _together(state: dict[str, Tensor], fused: set[str]) -> Iterator[list[str]]:
    """Names whose tensors are converted in one go: those of one set of experts, and all others."""
    groups: dict[str, list[str]] = {}
    for name in state:
        owner = name.rpartition(".")[0]
        groups.setdefault(owner if owner in fused else "", []).append(name)
    yield from groups.values()


def _numbered(shapes: dict[str, torch.Size], fused: set[str]) -> dict[str, Tensor]:
    """A number for each row: ``[N]``, ``[N, 1, ...]``, and ``[E, N, 1]`` of fused experts."""
    numbered, start = {}, 0
    for name, shape in shapes.items():
        leading = 2 if len(shape) == 3 and name.rpartition(".")[0] in fused else min(len(shape), 1)
        rows = shape[:leading].numel()
        ones = [1] * (len(shape) - leading)
        numbered[name] = torch.arange(start, start + rows).view(*shape[:leading], *ones)
        start += rows
    return numbered


def _piece(name: str, numbers: Tensor, numbered: dict[str, Tensor]) -> Piece:
    flat = numbers.reshape(-1)
    for parameter, rows in numbered.items():
        rows = rows.reshape(-1)
        if len(flat) and rows[0] <= flat.min() and flat.max() <= rows[-1]:
            local = flat - rows[0]
            whole = torch.equal(flat, rows)
            return Piece(name, parameter, None if whole else local)
    raise ValueError(
        f"`{name}` of a published checkpoint is made of several parameters of the model: haq knows "
        "only tensors that are rows of one."
    )
