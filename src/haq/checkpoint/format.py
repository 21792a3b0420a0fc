"""What a checkpoint holds: names, shapes and dtypes of its tensors, and what `config.json` says.

The form is "int-quantized" of compressed-tensors, which vLLM serves: an int8 ``weight`` ``[N, K]``
and a float32 ``weight_scale`` ``[N, 1]`` for each linear, under the names that published
checkpoints of the architecture have, every expert by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.experts import is_fused_experts, routers
from haq.model.linears import is_linear
from haq.model.published import Piece
from haq.nn import Int8Experts, Int8Linear

HAQ_FILE = "haq.json"
FORMAT_VERSION = 1

_WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
_ACTIVATIONS = _WEIGHTS | {"strategy": "token", "dynamic": True, "observer": None}
# What must be as it is for the int8 products here: the rest says how scales were found.
_BINDING = ("num_bits", "type", "symmetric", "strategy", "dynamic")


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor on disk.

    Attributes:
        name: on disk.
        key: in the state of the int8 model.
        rows: of the value under ``key``, int64, its leading dimensions flattened; None is all.
        shape: on disk.
        int8: whether it is int8; else it is a float.
    """

    name: str
    key: str
    rows: Tensor | None
    shape: tuple[int, ...]
    int8: bool = False

    def take(self, value: Tensor) -> Tensor:
        """The tensor to write, of the value in the model."""
        if self.rows is None:
            return value.contiguous()
        return _flat(value, self.shape)[self.rows].reshape(self.shape)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Write a tensor that was read into the value of the model."""
        if self.rows is None:
            value.copy_(tensor)
        else:
            _flat(value, self.shape)[self.rows] = tensor.to(value.dtype)


def _flat(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``value`` with as many dimensions as ``shape`` has, the first ones in one."""
    return value.view(-1, *value.shape[value.dim() - len(shape) + 1 :])


def stored_tensors(model: nn.Module, pieces: Sequence[Piece]) -> list[Stored]:
    """Every tensor of the checkpoint of ``model``, in its order.

    Args:
        model: with int8 modules, on any device.
        pieces: `published_pieces` of the same model in float.
    """
    state = {n: t.shape for n, t in _float_state(model)}
    return [stored for piece in pieces for stored in _stored(model, piece, state)]


def _float_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; int8 weights are neither, and reading one would unpack it."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _stored(model: nn.Module, piece: Piece, state: dict[str, torch.Size]) -> Iterator[Stored]:
    owner, _, leaf = piece.parameter.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, Int8Experts):
        yield from _of_experts(module, owner, leaf, piece)
    elif isinstance(module, Int8Linear) and leaf == "weight":
        yield from _of_linear(module, owner, piece.name.removesuffix(".weight"), piece.rows)
    else:
        shape = state[piece.parameter]
        rows = piece.rows
        if rows is not None:  # Rows of a fused parameter [E, N, K] are matrices [n, K].
            shape = torch.Size((len(rows), *shape[max(len(shape) - 1, 1) :]))
        yield Stored(piece.name, piece.parameter, rows, tuple(shape))


def _of_linear(
    module: Int8Linear, key: str, name: str, rows: Tensor | None = None
) -> Iterator[Stored]:
    number = module.out_features if rows is None else len(rows)
    yield Stored(f"{name}.weight", f"{key}.weight", rows, (number, module.in_features), True)
    yield Stored(f"{name}.weight_scale", f"{key}.weight_scale", rows, (number, 1))


def _of_experts(module: Int8Experts, owner: str, leaf: str, piece: Piece) -> Iterator[Stored]:
    matrix = leaf.removesuffix("_bias")
    which = "down" if matrix == "down_proj" else "up"
    layers = list(module.get_submodule(which).children())
    number = _linear(layers[0]).out_features
    if _in_one_expert(piece, number):
        assert piece.rows is not None
        expert, rows = int(piece.rows[0]) // number, piece.rows % number
        whole = torch.equal(rows, torch.arange(number))
        name, key = piece.name.removesuffix(".weight"), f"{owner}.{which}.{expert}"
        yield from _of_linear(_linear(layers[expert]), key, name, None if whole else rows)
        return
    # Published in one, which the form has no place for: an expert by itself, as in the report.
    for expert, layer in enumerate(layers):
        name, key = f"{owner}.{expert}.{matrix}", f"{owner}.{which}.{expert}"
        if leaf == matrix:
            yield from _of_linear(_linear(layer), key, name)
        else:
            yield Stored(f"{name}.bias", f"{key}.bias", None, (number,))


def _in_one_expert(piece: Piece, number: int) -> bool:
    """Whether a piece of a fused parameter is rows of a single expert with ``number`` rows."""
    return piece.rows is not None and len((piece.rows // number).unique()) == 1


def _linear(module: nn.Module) -> Int8Linear:
    assert isinstance(module, Int8Linear)
    return module


def float_modules(model: nn.Module, pieces: Sequence[Piece], prefix: str = "") -> list[str]:
    """Names on disk of the modules that multiply in float: linears and routers.

    Args:
        model: with int8 modules.
        pieces: `published_pieces` of the same model in float, or those of a part of it.
        prefix: of the names of that part.
    """
    linears = {n for n, m in model.named_modules() if is_linear(m)}
    named, stored = linears | set(routers(model)), {piece.parameter for piece in pieces}
    published = {p.parameter: p.name.removesuffix(".weight") for p in pieces}
    names = {published[f"{n}.weight"] for n in named if f"{n}.weight" in stored}
    # transformers looks for its own names: the head of GPT-NeoX is published as `embed_out`.
    names |= {n for n in linears if f"{n}.weight" in stored}
    fused = {n for n, m in model.named_modules() if is_fused_experts(m)}
    excluded = [p for p in pieces if p.parameter.rpartition(".")[0] in fused]
    names |= {p.name.removesuffix(".weight") for p in excluded}
    # A tied head has no tensor of its own.
    head = {n for n in linears if _is_tied_head(model, n)} if not prefix else set()
    return sorted(names | head)


def _is_tied_head(model: nn.Module, name: str) -> bool:
    """Whether a linear's weight is that of the input embeddings."""
    weight = model.get_parameter(f"{name}.weight")
    return isinstance(model, PreTrainedModel) and weight is model.get_input_embeddings().weight


def int8_heads(model: PreTrainedModel, pieces: Sequence[Piece]) -> list[str]:
    """Names of an int8 head, on disk and in the model; none if it is float.

    Args:
        model: with int8 modules.
        pieces: `published_pieces` of the same model in float.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, Int8Linear):
        return []
    own = {name for name, module in model.named_modules() if module is head}
    stored = {p.name.removesuffix(".weight") for p in pieces if p.parameter[:-7] in own}
    return sorted(own | stored)


def quantization_entry(ignore: Sequence[str], heads: Sequence[str] = ()) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``: W8A8, per channel and per token, symmetric.

    Args:
        ignore: names on disk of the modules that stay float.
        heads: names of an int8 head. It needs to be named: to who serves a model a head is no
            "Linear" as others are, and is float unless it is a target by itself.
    """
    group = {
        "targets": ["Linear", *heads],
        "format": "int-quantized",
        "weights": _WEIGHTS,
        "input_activations": _ACTIVATIONS,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": group},
    }


def check_entry(entry: object, file: object) -> None:
    """Refuse a ``quantization_config`` of another method.

    Args:
        entry: of ``config.json``, None if it has none.
        file: where it is from, for the message.

    Raises:
        ValueError: it is not W8A8 int8 in the form that haq reads.
    """
    expected = (
        '`quantization_config` of compressed-tensors with the format "int-quantized", int8 weights '
        "per channel and int8 inputs per token, both symmetric"
    )
    if entry is None:
        raise ValueError(
            f"`{file}` must have a {expected}; it has none: this is a float model. Load it with "
            "`transformers` and call `haq.quantize_model`."
        )
    for key, got in _differences(entry):
        raise ValueError(
            f"`{file}` must have a {expected}, got {key} = {got!r}. Load it with the tool that "
            "made it, or quantize the float model with haq."
        )


def _differences(entry: object) -> Iterator[tuple[str, object]]:
    if not isinstance(entry, dict):
        yield "quantization_config", entry
        return
    if entry.get("quant_method") != "compressed-tensors":
        yield "quant_method", entry.get("quant_method")
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield "config_groups", groups
        return
    for name, group in groups.items():
        for part, expected in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
            scheme = group.get(part) if isinstance(group, dict) else None
            if not isinstance(scheme, dict):
                yield f"{part} of {name}", scheme
                continue
            for key in _BINDING:
                if scheme.get(key) != expected[key]:
                    yield f"{part}.{key} of {name}", scheme.get(key)
        if isinstance(group, dict) and group.get("output_activations") is not None:
            yield f"output_activations of {name}", group["output_activations"]
        if isinstance(group, dict) and group.get("format", "int-quantized") not in (
            None,
            "int-quantized",
        ):
            yield f"format of {name}", group["format"]
    if entry.get("format") not in (None, "int-quantized"):
        yield "format", entry.get("format")
