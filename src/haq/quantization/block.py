"""One decoder block from float to int8: the method itself, step by step."""

from collections.abc import Sequence

from torch import nn

from haq.config import QuantizationConfig
from haq.memory import give_back
from haq.model.blocks import BlockBatch, evenly_spread
from haq.model.groups import find_groups
from haq.model.probe import shortened
from haq.nn import Int8Experts, Int8Linear
from haq.processes import ALONE, Processes
from haq.quantization.experts import nearest_errors
from haq.quantization.products import fast_products
from haq.quantization.report import BlockReport
from haq.quantization.work import BlockWork

# With relative squared errors below this, channels are as large in int8 as in float, but for the
# smallest ones, and a search need not know better. Outliers that nothing was done about yet leave
# larger errors.
_CLOSE_TO_FLOAT = 1e-3


@fast_products()
def quantize_block(
    block: nn.Module,
    batches: Sequence[BlockBatch],
    config: QuantizationConfig,
    name: str,
    excluded: frozenset[str] = frozenset(),
    *,
    use_up: bool = False,
    processes: Processes = ALONE,
) -> tuple[nn.Module, BlockReport]:
    """An int8 copy of a decoder block, and what was done to each of its layers.

    Args:
        block: the float block; unchanged, whatever happens, unless it is used up.
        batches: what the block is given, for every calibration batch.
        config: what to do.
        name: the block's name in the model, for the report and for errors.
        excluded: names, in the block, of modules that must stay float.
        processes: which share the batches out, and all make the same block.
        use_up: give the memory of the float block back as soon as there is a float32 copy.

    Returns:
        A block with the same modules, dtypes and device, but for int8 linears and experts.

    Raises:
        RuntimeError: an activation is NaN or infinite; the message names the layer.
        ValueError: the block reads the weight of a linear without calling it.
    """
    work = BlockWork(block, name, excluded, config, processes, use_up=use_up)
    give_back()
    some = evenly_spread(batches, config.search_tokens)
    probe = shortened(work.block, some[0].float())
    groups = find_groups(work.block, probe)
    work.check_weights_are_only_multiplied(groups, probe)
    statistics, sample = work.observe_sample(groups, batches, some)
    modules = work.round_to_nearest()
    plain = work.output_errors(modules, sample)
    plain_experts = {
        n: nearest_errors(e, sample.routed[n], config) for n, e in work.experts.items()
    }

    close = config.smoothing != "fixed" and max(plain.values(), default=0.0) < _CLOSE_TO_FLOAT
    work.observe_rest(modules if close else {}, statistics, batches, sample)
    del modules
    for group in groups:
        give_back()
        work.smooth(group, statistics[group.consumers], sample, probe)

    work.choose_zero_points(groups, sample)
    give_back()
    modules = work.round_to_nearest()
    moments, inputs = work.observe_int8(groups, modules, batches)
    modules |= work.round_with_hessian(groups, moments)
    errors = work.output_errors(modules, sample)
    experts, layers = work.finish_experts(inputs, plain_experts)

    for layer, module in (modules | experts).items():
        work.block.set_submodule(layer, module)
    _restore_dtypes(work.block, block)
    report = BlockReport(
        work.reports(modules, plain, errors) + layers,
        work.routing_reports(experts, inputs, sample.routed, some),
    )
    return work.block, report


def _restore_dtypes(work: nn.Module, original: nn.Module) -> None:
    """Give every parameter and buffer that is still there the dtype it has in ``original``."""
    # Scales and biases of int8 layers are float32 in every model.
    int8 = {id(m) for part in work.modules() if _is_int8(part) for m in part.modules()}
    for name, module in work.named_modules():
        if id(module) not in int8:
            twin = original.get_submodule(name)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                tensor.data = tensor.data.to(getattr(twin, key).dtype)


def _is_int8(module: nn.Module) -> bool:
    return isinstance(module, Int8Linear | Int8Experts)
