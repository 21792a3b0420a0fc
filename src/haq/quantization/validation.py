"""Whether a model and a calibration set can be worked with, decided before anything is touched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.config import QuantizationConfig
from haq.model.blocks import find_blocks
from haq.model.experts import check_in_one_place, dense_layers, fused_experts, unknown_weights
from haq.model.heads import find_head
from haq.model.linears import weight_of
from haq.nn import Int8Linear


@dataclass(frozen=True)
class Structure:
    """What of a model becomes int8.

    Attributes:
        name: of the list of blocks in the model.
        blocks: the list.
        excluded: names of modules and weights that stay float.
        head: name of the output head, if that becomes int8; None if it stays, or there is none.
    """

    name: str
    blocks: nn.ModuleList
    excluded: frozenset[str]
    head: str | None


def excluded_modules(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Names of all modules that a pattern matches, and of everything inside them.

    Weights that belong to no layer (a Mamba's ``A_log``) can be matched by their own name.

    Args:
        model: any module.
        patterns: shell-style patterns over full names.

    Examples:
        >>> model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1)), "b": nn.Linear(1, 1)})
        >>> sorted(excluded_modules(model, ["a"]))
        ['a', 'a.0']
    """
    names = _names(model)
    matched = {n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)}
    return frozenset(n for n in names if any(n == m or n.startswith(f"{m}.") for m in matched))


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name] + list(unknown_weights(model))


def checked_config(config: QuantizationConfig | None) -> QuantizationConfig:
    """The configuration, the default one for None.

    Raises:
        TypeError: it is something else.
    """
    if config is None:
        return QuantizationConfig()
    if not isinstance(config, QuantizationConfig):
        raise TypeError(
            f"`config` must be a QuantizationConfig, got {type(config).__name__}. Write "
            "`haq.QuantizationConfig(...)`; `QuantizationConfig.from_dict` reads a dictionary."
        )
    return config


def checked_model(model: PreTrainedModel, config: QuantizationConfig) -> Structure:
    """The model's blocks and head, and the names of the modules to leave in float.

    Raises:
        TypeError: ``model`` is not a `transformers` model.
        ValueError: it is no decoder of text, is on the meta device or spread over devices, has
            non-finite weights, no blocks, weights haq does not know, nothing to quantize, or a
            pattern matches nothing.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a `transformers` model, got {type(model).__name__}. Pass the "
            "`...ForCausalLM` model itself, without a pipeline, an adapter or a compiled wrapper."
        )
    _check_placement(model)
    structure = checked_structure(model, config)
    check_weights_finite(model)
    return structure


def checked_structure(model: PreTrainedModel, config: QuantizationConfig) -> Structure:
    """What `checked_model` says, of a model whose weights may be on the meta device."""
    _check_kind(model)
    check_in_one_place(model)
    excluded = _checked_exclusions(model, config)
    name, blocks = find_blocks(model)
    _check_weights_known(blocks, name, excluded)
    head = find_head(model)
    if head is not None and (head in excluded or head.startswith(f"{name}.")):
        head = None
    structure = Structure(name, blocks, excluded, head)
    _check_something_to_do(model, structure, config)
    return structure


def checked_batches(
    calibration: Iterable[Tensor | Mapping[str, Tensor]], model: PreTrainedModel
) -> list[dict[str, Tensor]]:
    """Calibration batches as mappings on the model's device, every one of them checked.

    Raises:
        TypeError: a batch is neither a tensor nor a mapping with "input_ids", or not int64.
        ValueError: there is no batch or no token, a shape is wrong, an id is not in the vocabulary,
            or a sequence is longer than the model's positions.
    """
    check_iterable(calibration)
    batches = [_checked_batch(i, batch, model) for i, batch in enumerate(calibration)]
    if not batches:
        raise ValueError(
            "`calibration` is empty: pass at least one batch of token ids of shape [batch, "
            "sequence]. `haq.calibration_batches(tokenizer, source)` makes them from text."
        )
    return batches


def check_iterable(calibration: object) -> None:
    """Refuse a single batch, and what holds none.

    Raises:
        TypeError: it is no iterable of batches.
    """
    single = isinstance(calibration, Tensor | Mapping | str)
    if single or not isinstance(calibration, Iterable):
        raise TypeError(
            "`calibration` must be an iterable of batches, got "
            f"{'a single ' if single else ''}{type(calibration).__name__}. Put batches in a list, "
            "or make them from text with `haq.calibration_batches(tokenizer, source)`."
        )


def _checked_batch(
    index: int, batch: Tensor | Mapping[str, Tensor], model: PreTrainedModel
) -> dict[str, Tensor]:
    where = f"`calibration[{index}]`"
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise TypeError(
            f"{where} must be an int64 tensor of token ids, or a mapping that has one as "
            f"'input_ids', got {_describe(batch)}."
        )
    ids = batch["input_ids"]
    if ids.dtype != torch.int64:
        raise TypeError(f"{where} must hold int64 token ids, got {ids.dtype}. Use `.long()`.")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"{where} must have shape [batch, sequence] and hold tokens, got {list(ids.shape)}."
        )
    _check_ids(where, ids, model)
    mask = batch.get("attention_mask")
    checked = {"input_ids": ids.to(model.device)}
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"'attention_mask' of {where} must be a tensor, got {_describe(mask)}.")
        if mask.shape != ids.shape or not bool(mask.any()):
            raise ValueError(
                f"'attention_mask' of {where} must have the shape of 'input_ids', "
                f"{list(ids.shape)}, and keep a token, got shape {list(mask.shape)} with "
                f"{int(mask.sum())} tokens kept."
            )
        checked["attention_mask"] = mask.to(model.device)
    return checked


def _check_ids(where: str, ids: Tensor, model: PreTrainedModel) -> None:
    vocabulary = len(weight_of(model.get_input_embeddings()))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{where} must hold ids in [0, {vocabulary - 1}], the model's vocabulary, got "
            f"{low if low < 0 else high}. Was it made with another model's tokenizer?"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] > positions:
        raise ValueError(
            f"{where} must be no longer than the model's {positions} positions, got sequences of "
            f"{ids.shape[1]} tokens. Pass `sequence_length={positions}` or less to "
            "`haq.calibration_batches`."
        )


def _check_kind(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ValueError(
            "`model` must be a causal language model, one list of blocks that reads token ids, "
            f"got {type(model).__name__}."
        )


def _check_placement(model: PreTrainedModel) -> None:
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"`model` must have float weights, got one quantized with {model.quantization_method}. "
            "Load the original model."
        )
    on_meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(
            f"`model` must have its weights in memory, but `{on_meta}` is on the meta device. Load "
            "it without offloading (`device_map=None`)."
        )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"`model` must be on one device, got {', '.join(sorted(devices))}. Load it on one; "
            "haq.quantize_checkpoint takes what is too large for one."
        )


def _checked_exclusions(model: PreTrainedModel, config: QuantizationConfig) -> frozenset[str]:
    names = _names(model)
    modules = [name for name, _ in model.named_modules()]
    for pattern in config.exclude:
        # Models without a head are fine with the default pattern.
        if pattern in QuantizationConfig.exclude:
            continue
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`exclude` pattern {pattern!r} matches no module of {type(model).__name__}. "
                f"Module names look like {modules[-1]!r}; `*` matches any part, dots included."
            )
    excluded = excluded_modules(model, config.exclude)
    head = find_head(model)
    if head is not None and set(config.exclude) & set(QuantizationConfig.exclude):
        excluded |= {head}  # It is meant, whatever this model calls it.
    return excluded


def _check_weights_known(blocks: nn.ModuleList, name: str, excluded: frozenset[str]) -> None:
    for i, block in enumerate(blocks):
        for weight, shape in unknown_weights(block).items():
            full = f"{name}.{i}.{weight}"
            if full not in excluded and full.rpartition(".")[0] not in excluded:
                raise ValueError(
                    f"`{full}` has shape {list(shape)} and belongs to no linear layer and to no "
                    "experts that haq knows: it cannot quantize it and does not leave weights in "
                    f'float silently. Add "{full}", or the module it is in, to `exclude` to keep '
                    "it float."
                )


def _check_something_to_do(
    model: PreTrainedModel, structure: Structure, config: QuantizationConfig
) -> None:
    found = [
        f"{structure.name}.{i}.{n}"
        for i, block in enumerate(structure.blocks)
        for n in (*dense_layers(block), *fused_experts(block))
    ]
    converted = any(isinstance(module, Int8Linear) for module in model.modules())
    if converted or structure.head is not None:
        return
    if all(full in structure.excluded for full in found):
        raise ValueError(
            f"Nothing to quantize: {type(model).__name__} has {len(found)} layers in its "
            f"blocks, all of them excluded by `exclude={config.exclude}`."
        )


def check_weights_finite(model: nn.Module, prefix: str = "") -> None:
    """Refuse NaN and infinity in a parameter that is in memory.

    Args:
        model: a model, or a part of one.
        prefix: of its parameters' names.
    """
    for name, parameter in model.named_parameters(prefix):
        if parameter.is_meta:
            continue
        low, high = parameter.aminmax() if parameter.numel() else (parameter, parameter)
        # NaN propagates through both ends.
        if parameter.numel() and not bool((low.isfinite() & high.isfinite()).all()):
            bad = int((~parameter.isfinite()).sum())
            raise ValueError(
                f"`model` must have finite weights, but `{name}` has NaN or infinity in {bad} of "
                f"{parameter.numel()} elements. The checkpoint is damaged or was saved in a dtype "
                "that overflowed."
            )


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with keys {list(value)}"
    return type(value).__name__
