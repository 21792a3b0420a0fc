"""What the routers of a model choose: every layer of experts is watched while batches run.

The routers differ from family to family; what the experts are given does not. So it is the experts
that are watched, float or int8, on one side or on two.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from haq.model.blocks import token_rows
from haq.model.experts import ExpertList, is_experts, is_offloaded
from haq.model.linears import weight_of
from haq.model.modes import evaluating
from haq.nn import Int8Experts


@dataclass(frozen=True)
class Routing:
    """What the router of one layer chose for the tokens of one batch, padding left out.

    Attributes:
        index: the experts of each token, int64 ``[T, A]``; the number of experts stands for none.
        weights: the router's, float64 ``[T, A]``.
    """

    index: NDArray[np.int64]
    weights: NDArray[np.float64]


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold all experts of a layer, by name, in the order of the layers.

    Float experts, int8 experts, and whatever stands in their place and says so with a class
    attribute ``is_offloaded_experts = True``; what is inside of it is not looked at.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and _holds_experts(module):
            found[name] = module
    if not found:
        raise ValueError(
            "`model` must be a mixture of experts of a family that haq knows, got "
            f"{type(model).__name__} without a layer of experts. Without experts there is no "
            "routing, and nothing to offload."
        )
    return found


def _holds_experts(module: nn.Module) -> bool:
    return is_offloaded(module) or isinstance(module, Int8Experts) or is_experts(module)


def number_of_experts(layers: Mapping[str, nn.Module]) -> int:
    """E, which is the same in every layer.

    Args:
        layers: from `experts_modules`.

    Raises:
        ValueError: the layers differ.
    """
    return _the_same("experts", {name: _size(module) for name, module in layers.items()})


def _size(experts: nn.Module) -> int:
    if isinstance(experts, ExpertList):
        return len(experts)
    number = getattr(experts, "num_experts", None)
    return number if isinstance(number, int) else len(experts.get_parameter("down_proj"))


def _the_same(what: str, numbers: Mapping[str, int]) -> int:
    """The one number that all layers have."""
    first, expected = next(iter(numbers.items()))
    for name, number in numbers.items():
        if number != expected:
            raise ValueError(
                f"`model` must have as many {what} in every layer, got {expected} in `{first}` "
                f"and {number} in `{name}`. Routing is known only of models whose layers agree."
            )
    return expected


def routings(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    progress: bool = False,
) -> Iterator[list[Routing]]:
    """Run the model on each batch, and tell what every layer chose.

    No logits are computed where the model has a body without them. The model is as before after
    each batch, errors or not: no hook is left, and each module is in the mode it was in.

    Args:
        model: a mixture of experts of `transformers`, float or int8.
        batches: int64 token ids ``[B, T]``, or mappings with ``input_ids`` and, if there is
            padding, ``attention_mask``.
        progress: show a bar with the batches done and the time left.

    Yields:
        One `Routing` for each layer of `experts_modules`, with the same tokens in the same order.

    Raises:
        TypeError: the model is not of `transformers`, or a batch is none.
        ValueError: there is no batch, a batch is empty or does not fit the model, the model has no
            experts, or its layers have or choose different numbers of them.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a `transformers` model, got {type(model).__name__}. Pass the "
            "`...ForCausalLM` model itself, without a pipeline or a wrapper."
        )
    layers = experts_modules(model)
    number_of_experts(layers)
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"`batches` must be an iterable of batches, got {type(batches).__name__}. Put a single "
            "batch in a list."
        )
    number = 0
    # None: shown on a terminal or in a notebook, not in a file.
    disable = None if progress else True
    bar = logging.tqdm(batches, desc="Routing", unit="batch", disable=disable)
    for number, batch in enumerate(bar, start=1):
        yield _routing_of(model, layers, _checked(f"`batches[{number - 1}]`", batch, model))
    if not number:
        raise ValueError(
            "`batches` is empty: pass at least one batch of token ids of shape [batch, sequence]."
        )


def _routing_of(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batch: dict[str, Tensor]
) -> list[Routing]:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    seen: dict[str, list[Routing]] = {name: [] for name in layers}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name].append(_routing(name, *_given(name, module, args, kwargs), keep))

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        with evaluating(model):
            # The body, without the head; of a model without a prefix that is the model itself.
            model.base_model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in seen.items():
        if len(calls) != 1:
            raise ValueError(
                f"`model` must call every layer of experts once for each batch, but called "
                f"`{name}` {len(calls)} times. Which tokens were whose is not known then."
            )
    chosen = [calls[0] for calls in seen.values()]
    slots = {name: one.index.shape[1] for name, one in zip(seen, chosen, strict=True)}
    _the_same("experts per token", slots)
    return chosen


def _given(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The second and the third argument, whatever the family calls them: ``[..., A]`` both."""
    given = [*args, *kwargs.values()]
    if kwargs:
        with suppress(TypeError):  # names that the family does not have
            given = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    index, weights = given[1:3] if len(given) >= 3 else (None, None)
    if (
        not isinstance(index, Tensor)
        or not isinstance(weights, Tensor)
        or index.is_floating_point()
        or not weights.is_floating_point()
        or index.shape != weights.shape
    ):
        got = [list(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in given]
        raise ValueError(
            f"`{name}` must be called with hidden states, the indices of the experts [T, A] and "
            f"their weights [T, A], got {got}. Routing of this family cannot be watched."
        )
    return index, weights


def _routing(name: str, index: Tensor, weights: Tensor, keep: Tensor) -> Routing:
    tokens = index.numel() // index.shape[-1]
    if tokens != keep.numel():
        raise ValueError(
            f"`{name}` must be called with all {keep.numel()} tokens of a batch, got {tokens}. "
            "Which tokens they are is not known."
        )
    # Copies: what the experts do with their arguments must not show here.
    chosen = token_rows(index.detach(), keep.to(index.device))
    given = token_rows(weights.detach(), keep.to(weights.device))
    return Routing(
        chosen.to("cpu", torch.int64, copy=True).numpy(),
        given.to("cpu", torch.float64, copy=True).numpy(),
    )


def _checked(where: str, batch: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch as a mapping on the model's device."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(ids, Tensor):
        got = (
            f"a mapping with {list(given)}" if isinstance(given, Mapping) else type(given).__name__
        )
        raise TypeError(
            f"{where} must be an int64 tensor of token ids, or a mapping that has one as "
            f"'input_ids', got {got}. Use the tokenizer's `return_tensors='pt'`."
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"{where} must hold int64 token ids, got {ids.dtype}. Use `.long()`.")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"{where} must have shape [batch, sequence] and hold tokens, got {list(ids.shape)}. "
            "Use `ids[None]` for one sequence."
        )
    vocabulary = len(weight_of(model.get_input_embeddings()))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{where} must hold ids in [0, {vocabulary - 1}], the model's vocabulary, got "
            f"{low if low < 0 else high}. Use the model's own tokenizer."
        )
    checked = {"input_ids": ids.to(model.device)}
    mask = given.get("attention_mask")
    if mask is not None:
        _check_mask(where, mask, ids)
        checked["attention_mask"] = mask.to(model.device)
    return checked


def _check_mask(where: str, mask: Any, ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"'attention_mask' of {where} must be a tensor, got {type(mask).__name__}. Leave it "
            "out if there is no padding."
        )
    if mask.shape != ids.shape or not bool(mask.any()):
        raise ValueError(
            f"'attention_mask' of {where} must have the shape of 'input_ids', {list(ids.shape)}, "
            f"and keep a token, got shape {list(mask.shape)} with {int(mask.sum())} tokens kept. "
            "Leave out batches of padding."
        )
