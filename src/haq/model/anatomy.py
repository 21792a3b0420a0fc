"""What a decoder layer seems to be, by the names that most families have for its parts."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from haq.model.attention import NAME
from haq.nn import Int8Linear
from haq.nn.parts import Gated, Parts

_ATTENTION = "self_attn"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_GATED = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "act_fn"


def may_be_layer(module: nn.Module) -> bool:
    """Whether a module has the parts of a decoder layer, by their names, and nothing else.

    Those are an attention with four projections and perhaps norms of queries and keys, two norms,
    and one more module.

    Examples:
        >>> may_be_layer(nn.Linear(2, 2))
        False
    """
    attention = module._modules.get(_ATTENTION)
    if attention is None:
        return False
    names, inside = module._modules.keys(), attention._modules.keys()
    own = (module._parameters, module._buffers, attention._parameters, attention._buffers)
    return (
        names >= {*_NORMS}
        and len(names) == len(_NORMS) + 2
        and inside in ({*_PROJECTIONS}, {*_PROJECTIONS, *_HEAD_NORMS})
        and not any(len(held) for held in own)
    )


def attention_of(layer: nn.Module) -> Any:
    """The attention of a layer."""
    return layer._modules[_ATTENTION]


def block_of(layer: nn.Module) -> nn.Module:
    """What follows the second norm of a layer."""
    (name,) = layer._modules.keys() - {_ATTENTION, *_NORMS}
    module = layer._modules[name]
    assert module is not None
    return module


def modules_of(layer: nn.Module) -> list[nn.Module | None]:
    """All modules that kernels stand in for, as they are now: the block's parts are the last."""
    attention, block = attention_of(layer), block_of(layer)
    found = [attention, *(layer._modules[name] for name in _NORMS)]
    found += [attention._modules.get(name) for name in (*_PROJECTIONS, *_HEAD_NORMS)]
    return [*found, block, *(block._modules.get(name) for name in (*_GATED, _ACTIVATION))]


def parts_of(layer: nn.Module) -> Parts | None:
    """What kernels would need to know of a layer; None if its parts are not what they seem."""
    attention = attention_of(layer)
    query, key, value, output = (attention._modules[name] for name in _PROJECTIONS)
    linears = (query, key, value, output)
    size, scale = (getattr(attention, name, None) for name in ("head_dim", "scaling"))
    first, second = (layer._modules[name] for name in _NORMS)
    if not isinstance(size, int) or not isinstance(scale, float):
        return None
    if not all(isinstance(linear, Int8Linear) for linear in linears) or not first or not second:
        return None
    names = _HEAD_NORMS if _HEAD_NORMS[0] in attention._modules else ()
    head_norms = tuple(attention._modules[name] for name in names)
    gated = _gated(block_of(layer))
    return Parts((first, second), query, key, value, output, head_norms, gated, size, scale)


def is_untouched(layer: nn.Module, parts: Parts) -> bool:
    """Whether nobody looks at, or replaced, what the modules of a layer would do by themselves."""
    attention = attention_of(layer)
    if attention.config._attn_implementation != NAME or torch_module._has_any_global_hook():
        return False
    modules = modules_of(layer)
    if parts.gated is None:  # The block is called as it is.
        modules = modules[: -len(_GATED) - 2]
    return not any(_is_watched(module) for module in modules if module is not None)


def _gated(module: nn.Module) -> Gated | None:
    """The parts of a gated block of int8 layers; None if it is another module."""
    if module._modules.keys() != {*_GATED, _ACTIVATION} or module._parameters:
        return None
    gate, up, down = (module._modules[name] for name in _GATED)
    activation, sample = module._modules[_ACTIVATION], torch.linspace(-20, 20, 401)
    assert activation is not None
    if not (
        isinstance(gate, Int8Linear)
        and isinstance(up, Int8Linear)
        and isinstance(down, Int8Linear)
        and torch.allclose(activation(sample), F.silu(sample), rtol=1e-5, atol=1e-6)
    ):
        return None
    return Gated(gate, up, down)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
