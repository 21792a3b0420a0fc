"""Other ways to make a transformers model int8, each as its own documentation says. For `peers.py`.

Each takes a bfloat16 model that it may change, and gives the int8 one. Imports are inside: a peer
that is not there is not to stop the others.
"""

import copy
import warnings
from collections.abc import Callable

import shapes
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.experts import is_fused_experts
from haq.nn import Int8Experts

Convert = Callable[[PreTrainedModel], PreTrainedModel]


def bf16(model: PreTrainedModel) -> PreTrainedModel:
    return model


def haq(model: PreTrainedModel) -> PreTrainedModel:
    return shapes.int8_copy(model)


def haq_with_head(model: PreTrainedModel) -> PreTrainedModel:
    return shapes.with_int8_head(shapes.int8_copy(model))


def torchao(model: PreTrainedModel) -> PreTrainedModel:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compiled(model: PreTrainedModel) -> PreTrainedModel:
    compiled: PreTrainedModel = torch.compile(torchao(model), dynamic=False)
    return compiled


def torchao_experts(model: PreTrainedModel) -> PreTrainedModel:
    """By names, which reaches fused experts; they run with the eager implementation only."""
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig()
    names = [
        name
        for name, parameter in model.named_parameters()
        if name.endswith(("_proj.weight", "lm_head.weight")) or "experts." in name
    ]
    quantize_(model, FqnToConfig(dict.fromkeys(names, config)), filter_fn=None)
    model.set_experts_implementation("eager")
    return model


def quanto(model: PreTrainedModel) -> PreTrainedModel:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(shapes.prompt(shapes.PROMPT))
    freeze(model)
    return model


def bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """LLM.int8 with its usual threshold; the head stays as it is, as transformers leaves it."""
    import bitsandbytes as bnb

    for name, linear in _linears(model.model).items():
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6
        )
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
        model.model.set_submodule(name, layer.to("cpu"))
    return model


def torch_ao(model: PreTrainedModel) -> PreTrainedModel:
    """Dynamic quantization; it has no bfloat16, so everything else becomes float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(model).float()
        return torch.ao.quantization.quantize_dynamic(
            model, {nn.Linear}, dtype=torch.qint8, inplace=True
        )


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


PEERS: dict[str, Convert] = {
    "bf16": bf16,
    "haq": haq,
    "haq, head too": haq_with_head,
    "torchao": torchao,
    "torchao, compiled": torchao_compiled,
    "torchao, experts by name": torchao_experts,
    "optimum-quanto": quanto,
    "bitsandbytes": bitsandbytes,
    "torch.ao": torch_ao,
}


def head_is_int8(model: PreTrainedModel) -> bool:
    """Whether the head is int8, in whatever form."""
    return not _is_plain(model.lm_head)


def experts_are_int8(model: PreTrainedModel) -> bool | None:
    """Whether the experts of a mixture are int8; None without experts."""
    experts = [m for m in model.modules() if is_fused_experts(m) or isinstance(m, Int8Experts)]
    if not experts:
        return None
    return not any(_is_plain(module) for module in experts)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's matrices are float tensors of torch itself."""
    parameters = [p for p in module.parameters() if p.dim() > 1]
    return any(type(p.data) is Tensor and p.is_floating_point() for p in parameters)
