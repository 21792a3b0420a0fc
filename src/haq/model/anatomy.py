"""What a decoder layer seems to be, by the names that most families have for its parts."""

import importlib
import itertools
from collections import Counter
from itertools import repeat
from operator import contains, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from haq.model.attention import NAME
from haq.model.places import Places
from haq.nn import Int8Experts, Int8Linear
from haq.nn.parts import Gated, Mixture, Parts

# What hooks of `transformers` write to while a model is asked for more than its output.
_collecting = "transformers.utils.output_capturing"
try:
    _collector: Any = importlib.import_module(_collecting)._active_collector
except (ImportError, AttributeError):  # Another version, whose hooks are like any.
    _collector = None

_ATTENTION = "self_attn"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_GATED = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "act_fn"
_MIXTURE = ("gate", "experts")
_IN_BLOCK = (*_GATED, _ACTIVATION, *_MIXTURE)

# Of the dictionary of a module.
_PRE_HOOKS, _HOOKS = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks")

# Tokens that tell one router from another.
_SAMPLE_TOKENS = 5


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


def slots_of(layer: nn.Module) -> Places:
    """Where all modules are that kernels stand in for: the block and its parts are the last."""
    attention, block = attention_of(layer), block_of(layer)
    (name,) = (name for name, module in layer._modules.items() if module is block)
    places = [(layer, _ATTENTION), *((layer, norm) for norm in _NORMS)]
    places += [(attention, inside) for inside in (*_PROJECTIONS, *_HEAD_NORMS)]
    places += [(layer, name), *((block, inside) for inside in _IN_BLOCK)]
    return Places([(parent._modules, inside) for parent, inside in places])


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
    block = block_of(layer)
    known = _gated(block) or _mixture(block)
    return Parts((first, second), query, key, value, output, head_norms, known, size, scale)


def operations_of(parts: Parts) -> Counter[str]:
    """What such a layer does with a token by torch, beside its products, norms and attention.

    That is its rotation, the scale of the scores and a sum; then a gate, or a router, and a sum.
    """
    known = Counter(mul=5, neg=2, add=3)
    if isinstance(parts.block, Gated):
        known += Counter(mul=1, add=1, silu=1)
    elif isinstance(parts.block, Mixture):
        known += Counter(linear=1, softmax=1, topk=1, add=1)
        known += Counter(sum=1, div=1) if parts.block.normed else Counter()
    return known


def replaced_by(slots: Places, parts: Parts) -> list[nn.Module]:
    """The modules that are not called where kernels run."""
    modules = slots.values
    if parts.block is None:  # It is called as it is.
        modules = modules[: -len(_IN_BLOCK) - 1]
    return [module for module in modules if module is not None]


def are_untouched(modules: list[nn.Module]) -> bool:
    """Whether nobody looks at, or changed, what modules would do; the first is the attention."""
    if torch_module._has_any_global_hook():
        return False
    held = list(map(vars, modules))
    if any(map(_PRE_HOOKS, held)) or any(map(contains, held, repeat("forward"))):
        return False
    hooks = (hook for some in map(_HOOKS, held) if some for hook in some.values())
    config: Any = modules[0].config
    return all(map(_sleeps, hooks)) and bool(config._attn_implementation == NAME)


def _sleeps(hook: Any) -> bool:
    """Whether a hook does nothing now.

    A model that was asked for all hidden states once has hooks of `transformers` from then on.
    """
    theirs = _collector is not None and getattr(hook, "__module__", "") == _collecting
    return theirs and not _collector.get()


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


def _mixture(module: nn.Module) -> Mixture | None:
    """The parts of a mixture of int8 experts; None if it is another module, or routes otherwise."""
    if module._modules.keys() != {*_MIXTURE} or module._parameters:
        return None
    router, experts = (module._modules[name] for name in _MIXTURE)
    if router is None or not isinstance(experts, Int8Experts):
        return None
    names = {name for name, tensor in router._parameters.items() if tensor is not None}
    if names != {"weight"} or len(router._buffers) or len(router._modules):
        return None
    weight = router.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SAMPLE_TOKENS, weight.shape[-1], generator=generator).to(weight)
    found = router(sample)
    if not isinstance(found, tuple) or not all(isinstance(part, Tensor) for part in found):
        return None
    for normed, rounded in itertools.product((False, True), repeat=2):
        if len(found) == 3 and _is_softmax(found, sample @ weight.T, normed, rounded):
            slots = found[2].shape[-1]
            return Mixture(router, experts, experts.activation, slots, normed, rounded)
    return None


def _is_softmax(found: tuple[Tensor, ...], logits: Tensor, normed: bool, rounded: bool) -> bool:
    """Whether a router gave logits, scores and experts by this formula."""
    _, scores, index = found
    if index.dim() != 2 or index.is_floating_point() or scores.shape != index.shape:
        return False
    expected, order = logits.float().softmax(-1).topk(index.shape[-1])
    if normed:
        expected = expected / expected.sum(-1, keepdim=True)
    expected = expected.to(logits.dtype) if rounded else expected
    same = scores.dtype == expected.dtype and torch.equal(index, order)
    return same and torch.allclose(scores.float(), expected.float(), rtol=1e-5, atol=0)
