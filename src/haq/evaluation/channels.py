"""How large the channels of a layer's input get: where the outliers are, and whether they are gone.

Smoothing divides the input of a layer by a scale that it folds into what comes before, so that of a
quantized model is the smoothed one. The layers of experts are looked at, too: what a fused module
computes inside is computed here once more.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from haq.model.blocks import token_rows
from haq.model.experts import (
    Activation,
    check_in_one_place,
    fused_matrices,
    is_fused_experts,
    unfused_shapes,
)
from haq.model.linears import is_linear
from haq.model.modes import evaluating
from haq.nn import Int8Experts, Int8Linear
from haq.quantization.validation import checked_batches

# From the arguments of a module's call and the mask ``[B, T]`` to a layer's input ``[tokens, K]``.
Input = Callable[[tuple[Any, ...], Tensor], Tensor]


def channel_magnitudes(
    model: PreTrainedModel, calibration: Iterable[Tensor | Mapping[str, Tensor]], layer: str
) -> Tensor:
    """The largest magnitude of each channel of what one layer reads.

    Of a float model it shows the outliers; of the same model in int8, what smoothing left of them.
    `haq.plotting.plot_channels` draws both.

    Args:
        model: a causal language model of `transformers`, float or int8; left as it was.
        calibration: batches of token ids, as for `haq.quantize_model`. Padding is left out.
        layer: the name of a linear, a matrix of one expert as the report names it
            ("model.layers.0.mlp.experts.3.down_proj"), or the experts of a layer
            ("model.layers.0.mlp.experts") for what all of them read.

    Returns:
        float32 ``[K]``, on the CPU; NaN where one was seen.

    Raises:
        TypeError: a batch is none.
        ValueError: the model has no such layer, no token reached it, or a batch does not fit the
            model.
        RuntimeError: an `ExpertOffloader` is attached.

    Examples:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2,
        ...                    num_attention_heads=2, word_embed_proj_dim=16)
        >>> model, tokens = OPTForCausalLM(config), [torch.randint(2, 64, (1, 32))]
        >>> channel_magnitudes(model, tokens, "model.decoder.layers.1.fc1").shape
        torch.Size([16])
    """
    check_in_one_place(model)
    module, input_of = _find(model, layer)
    batches = checked_batches(calibration, model)
    # No logits are computed unless it is the head that is looked at.
    runs = model.base_model if module in set(model.base_model.modules()) else model
    largest: Tensor | None = None
    mask = Tensor()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal largest
        rows = input_of(args, mask)
        if len(rows):
            magnitude = rows.float().abs().amax(0)
            largest = magnitude if largest is None else torch.maximum(largest, magnitude)

    handle = module.register_forward_pre_hook(note)
    try:
        with evaluating(model):
            for batch in batches:
                kept = batch.get("attention_mask")
                mask = torch.ones_like(batch["input_ids"]) if kept is None else kept
                mask = mask.bool()
                runs(**batch, use_cache=False)
    finally:
        handle.remove()
    if largest is None:
        raise ValueError(
            f"No token of `calibration` reached `{layer}`. Pass more text, or another layer."
        )
    return largest.cpu()


def _find(model: PreTrainedModel, layer: str) -> tuple[nn.Module, Input]:
    """The module to watch, and how its call tells what the layer reads."""
    known: list[str] = []
    for module_name, module in model.named_modules():
        for name, input_of in _inputs(module_name, module):
            if name == layer:
                return module, input_of
            known.append(name)
    raise ValueError(_unknown(model, layer, known))


def _inputs(name: str, module: nn.Module) -> Iterator[tuple[str, Input]]:
    """What can be seen where a module is called, by the names of the layers that read it."""
    if is_linear(module) or isinstance(module, Int8Linear):
        yield name, _all_rows
    elif is_fused_experts(module) or isinstance(module, Int8Experts):
        yield name, _all_rows
        number, first = _experts(module)
        for expert in range(number):
            yield f"{name}.{expert}.{first}", partial(_rows_of, expert)
            yield f"{name}.{expert}.down_proj", partial(_middle_of, module, expert)


def _experts(module: nn.Module) -> tuple[int, str]:
    """How many there are, and what the report calls the first matrix of each."""
    if isinstance(module, Int8Experts):
        up, down = module.expert(0)
        number, rows, inner = module.num_experts, up.out_features, down.in_features
    else:
        number, (rows, _), (_, inner), _ = unfused_shapes(module)
    return number, "up_proj" if rows == inner else "gate_up_proj"


def _all_rows(args: tuple[Any, ...], mask: Tensor) -> Tensor:
    return token_rows(args[0], mask)


def _rows_of(expert: int, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """Of the tokens that chose the expert."""
    hidden, index = (token_rows(values, mask) for values in args[:2])
    return hidden[(index == expert).any(-1)]


def _middle_of(module: nn.Module, expert: int, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """What the expert computes between its two matrices."""
    rows = _rows_of(expert, args, mask)
    if isinstance(module, Int8Experts):
        up, _ = module.expert(expert)
        return module.activation(up(rows.float()))
    weights, biases, _, _ = fused_matrices(module)
    bias = None if biases is None else biases[expert]
    return Activation(module)(functional.linear(rows, weights[expert], bias))


def _unknown(model: PreTrainedModel, layer: str, known: list[str]) -> str:
    """Names with numbers left out: a large model has thousands of them."""
    forms = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in known)
    close = get_close_matches(layer, known, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    return (
        f"`layer` must be one of the {len(known)} layers of {type(model).__name__}, got {layer!r}."
        f"{meant} There are {', '.join(forms)}, with numbers for the stars."
    )
