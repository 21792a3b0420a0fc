"""`quantize_model`: one decoder block after the other, from float to int8."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from haq.config import QuantizationConfig
from haq.model.blocks import BlockBatch, BlockInputs, capture_block_inputs, run_block
from haq.model.experts import fused_experts, routers, unknown_weights
from haq.model.fast import use_fast_parts
from haq.model.heads import write_at_once
from haq.model.linears import linears
from haq.model.tail import Route, tail_batches
from haq.nn import Int8Linear
from haq.quantization.block import quantize_block
from haq.quantization.guard import guard, unguard
from haq.quantization.head import quantize_head
from haq.quantization.report import (
    QuantizationReport,
    attach_report,
    detach_report,
    find_report,
    place_of_report,
)
from haq.quantization.validation import (
    Structure,
    checked_batches,
    checked_config,
    checked_model,
)


# In inference mode the new parameters would be unusable outside of it.
@torch.inference_mode(False)
def quantize_model(
    model: PreTrainedModel,
    calibration: Iterable[Tensor | Mapping[str, Tensor]],
    config: QuantizationConfig | None = None,
    *,
    progress: bool = True,
) -> PreTrainedModel:
    """Turn the linear layers of every decoder block to int8, in place, and return the model.

    For each block in order, with the inputs that the int8 blocks before it really produce: group
    the linears that share an input, smooth each group with the scale that leaves the smallest error
    in what the block computes, accumulate the second moments of the quantized inputs, round every
    weight with error compensation, and replace the linears by `haq.Int8Linear`. In a mixture of
    experts every expert is treated like this on the tokens that choose it, and `haq.Int8Experts`
    takes their place. Embeddings, norms and routers stay float. So does the output head, unless
    ``config.exclude`` names it no longer: then it is the last to become int8, on what the last
    block gives. The final norm takes its scale, so that the last hidden states a model returns
    are scaled as well; the logits are not. Memory: the model, one block in float32, what it
    computes from a sample, the statistics of one expert, and the calibration tokens' hidden states.
    The same call on the same machine gives the same bytes.

    Whatever is raised, a keyboard interrupt included, every block is either int8 or as it was, and
    so is the head. A note on the exception says how many are int8; the same call goes on after
    them.

    Args:
        model: a causal language model of `transformers`, on one device, float32 or 16 bit.
        calibration: batches of token ids, int64 ``[B, T]``, or mappings with "input_ids" and
            optionally "attention_mask" ``[B, T]``. `haq.calibration_batches` makes them from text.
        config: what to do; the defaults are the recommended method.
        progress: show a bar with the blocks done and the time left. It hides when the output is
            not a terminal, and where transformers' progress bars are switched off.

    Returns:
        ``model``, which now runs int8. `haq.quantization_report` tells what was done.

    Raises:
        TypeError: an argument has the wrong type, or token ids the wrong dtype.
        ValueError: an argument cannot be worked with; the message says why and what to do.
        RuntimeError: NaN or infinity appeared in an activation; the message names the layer.

    Examples:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2,
        ...                    num_attention_heads=2, word_embed_proj_dim=16)
        >>> model = OPTForCausalLM(config)
        >>> tokens = [torch.randint(2, 64, (1, 32)) for _ in range(4)]
        >>> model = quantize_model(model, tokens, progress=False)
        >>> model.model.decoder.layers[0].fc1.weight.dtype
        torch.int8
    """
    config = checked_config(config)
    structure = checked_model(model, config)
    blocks = structure.blocks
    report = _report_to_continue(model, config, blocks)
    batches = checked_batches(calibration, model)
    training = model.training
    model.eval()
    try:
        inputs = capture_block_inputs(model, blocks, batches)
        route = find_route(model, structure, inputs, batches)
        if report is None:
            report = QuantizationReport(
                type(model).__name__,
                config,
                len(blocks),
                inputs.num_tokens,
                kept_float=kept_float(model, structure),
                with_head=route is not None,
            )
            attach_report(model, report)
            guard(model)
        # `disable=None` hides the bar when the output is not a terminal.
        with logging.tqdm(
            total=len(blocks) + report.with_head,
            desc="Quantizing",
            unit="block",
            disable=None if progress else True,
        ) as bar:
            _quantize_blocks(structure, inputs, report, bar.update)
            if route is not None:
                _quantize_head(route, structure, list(tail_batches(inputs, batches)), report)
                bar.update()
    except BaseException as error:
        report = find_report(model)
        if report is not None:
            _drop_what_is_not_there(report, blocks)
        error.add_note(_state_of(model, report))
        raise
    finally:
        model.train(training)
    use_fast_parts(model)
    return model


def _quantize_blocks(
    structure: Structure,
    inputs: BlockInputs,
    report: QuantizationReport,
    done: Callable[[], object],
) -> None:
    for i, block in enumerate(structure.blocks):
        batches = inputs.of_block(i)
        prefix = f"{structure.name}.{i}"
        if i >= len(report.blocks):
            converted, block_report = quantize_block(
                block, batches, report.config, prefix, names_inside(structure.excluded, prefix)
            )
            # The report first: what it has too much after an interrupt can be taken off.
            report.blocks.append(block_report)
            structure.blocks[i] = block = converted
        inputs.hidden = [run_block(block, batch) for batch in batches]
        check_finite(inputs.hidden, prefix)
        done()


def find_route(
    model: PreTrainedModel,
    structure: Structure,
    inputs: BlockInputs,
    batches: Sequence[Mapping[str, Tensor]],
) -> Route | None:
    """How the model gets to the head that is to be int8; None if none is.

    Raises:
        ValueError: it does not call its head.
    """
    if structure.head is None:
        return None
    first = next(tail_batches(inputs, batches))
    return Route(model, structure.blocks, structure.head, inputs.wrap, first)


def _quantize_head(
    route: Route,
    structure: Structure,
    batches: Sequence[BlockBatch],
    report: QuantizationReport,
) -> None:
    head = quantize_head(route, batches, report.config, structure.excluded)
    place = place_of_report(route.model, replace(report, head=head.report))
    write_at_once([*head.places(route), place])


def names_inside(names: Iterable[str], prefix: str) -> frozenset[str]:
    """Those of ``names`` that are inside the module ``prefix``, as they are called there."""
    inside = f"{prefix}."
    return frozenset(n.removeprefix(inside) for n in names if n.startswith(inside))


def _report_to_continue(
    model: PreTrainedModel, config: QuantizationConfig, blocks: nn.ModuleList
) -> QuantizationReport | None:
    """The report of an interrupted call with the same configuration; None for a float model."""
    report = find_report(model)
    converted = any(isinstance(module, Int8Linear) for module in blocks.modules())
    if report is None and not converted:
        return None
    if report is not None:
        _drop_what_is_not_there(report, blocks)
    if report is None or report.complete:
        raise ValueError(
            f"`model` is already int8: {type(model).__name__} has `Int8Linear` layers. Load the "
            "float model to quantize it differently."
        )
    if report.config != config:
        raise ValueError(
            f"`model` is partly int8: {len(report.blocks)} of {len(blocks)} blocks were quantized "
            f"with {report.config}. Call with that configuration to go on, or load the float model."
        )
    return report


def _drop_what_is_not_there(report: QuantizationReport, blocks: nn.ModuleList) -> None:
    """Take the line of a block off whose replacement an interrupt prevented."""
    last = len(report.blocks) - 1
    if report.blocks and report.blocks[last].layers:
        if not any(isinstance(module, Int8Linear) for module in blocks[last].modules()):
            del report.blocks[last]


def kept_float(model: nn.Module, structure: Structure) -> list[str]:
    """Linears outside the blocks, what the user excluded, and the routers of experts."""
    prefix, blocks, excluded = f"{structure.name}.", structure.blocks, structure.excluded
    inside = [n for n in (*linears(model), *fused_experts(model)) if n.startswith(prefix)]
    routing = [f"{prefix}{i}.{n}" for i, block in enumerate(blocks) for n in routers(block)]
    # A linear router is listed once, and so is one with a linear inside.
    others = [n for n in linears(model) if not n.startswith(prefix) and n != structure.head]
    # Had they not been excluded, the model would have been refused.
    unknown = [f"{prefix}{i}.{n}" for i, block in enumerate(blocks) for n in unknown_weights(block)]
    kept = [n for n in inside if n in excluded and n not in routing]
    return [*others, *kept, *unknown, *routing]


def check_finite(batches: Iterable[Tensor], block_name: str) -> None:
    """Refuse what a block gave if any of it is NaN or infinite."""
    for i, hidden in enumerate(batches):
        if not bool(torch.isfinite(hidden).all()):
            raise RuntimeError(
                f"`{block_name}` gives NaN or infinity for calibration batch {i}. A float16 model "
                "that overflows can be loaded in bfloat16 or float32."
            )


def _state_of(model: PreTrainedModel, report: QuantizationReport | None) -> str:
    done = 0 if report is None else len(report.blocks)
    if report is None or done == 0:
        detach_report(model)
        unguard(model)
        return "haq: the model is as it was, no block was converted."
    if report.complete:
        head = " and the head" if report.with_head else ""
        return f"haq: all {done} blocks{head} of the model are int8 and work: it is done."
    if done == report.num_blocks:
        return (
            f"haq: all {done} blocks of the model are int8 and work; the head is as it was. The "
            "same call goes on with it; load the model again to start afresh."
        )
    return (
        f"haq: {done} of {report.num_blocks} blocks of the model are int8 and work; the others are "
        "as they were. The same call goes on after them; load the model again to start afresh."
    )
