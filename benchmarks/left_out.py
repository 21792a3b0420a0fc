"""Which choices were close, and what would the other have bought?

The same measurement as `quality.py`: KL(float || int8) and the change of NLL on text that
calibration never saw, three calibration seeds. Differences under 7 % are ties: about what a few
choices looked at on the same windows can win by chance.

    python benchmarks/left_out.py            about 15 minutes on 2 cores
    python benchmarks/left_out.py --quick    one seed, few windows: does it run?
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import harness
import torch
from quality import KL_TARGETS, Protocol, Variant, mean, measure, prepare, with_maximum
from torch import Tensor, nn

from haq import QuantizationConfig
from haq.model.blocks import BlockBatch
from haq.model.groups import find_groups
from haq.model.linears import bias_view, weight_view
from haq.model.trace import observe_inputs
from haq.quantization import block as block_room

quantize_block = block_room.quantize_block


def quantize_shifted(
    block: nn.Module, batches: Sequence[BlockBatch], *rest: Any, **options: Any
) -> Any:
    """Center each channel of a LayerNorm: z leaves its bias, W z enters its readers' biases."""
    work = copy.deepcopy(block).float()
    for group in find_groups(work, batches[0].float()):
        producer = work.get_submodule(group.producer.name) if group.producer else None
        if isinstance(producer, nn.LayerNorm):
            shift = _middle(work, group.consumers[0], batches)
            producer.bias.data -= shift
            for name in group.consumers:
                reader = work.get_submodule(name)
                bias_view(reader).add_(weight_view(reader) @ shift)
    return quantize_block(work, batches, *rest, **options)


def _middle(block: nn.Module, name: str, batches: Sequence[BlockBatch]) -> Tensor:
    highest, lowest = [], []

    def watch(rows: Tensor) -> None:
        highest.append(rows.amax(0))
        lowest.append(rows.amin(0))

    observe_inputs(block, {name: watch}, batches)
    return (torch.stack(highest).amax(0) + torch.stack(lowest).amin(0)) / 2


def add_float(moment: Any, inputs: Tensor) -> None:
    moment.update(inputs)


HAQ = QuantizationConfig()
VARIANTS = [
    Variant("haq", HAQ),
    Variant("maximum instead of the 4-norm", HAQ, {"block.search_candidates": with_maximum}),
    Variant("channels of LayerNorms centered", HAQ, {"pipeline.quantize_block": quantize_shifted}),
    Variant(
        "Hessian of the float block's inputs",
        HAQ,
        {
            "block.update_quantized": add_float,
            "block.installed": lambda block, modules: ExitStack(),
        },
    ),
]


def main() -> None:
    quick = harness.arguments(__doc__).quick
    prepare()
    facts = harness.card()
    harness.print_card(__doc__, facts)
    protocol = Protocol(128, 16, 8, (0,)) if quick else Protocol(128, 128, 192, (0, 1, 2))
    rows = [
        row
        for model in KL_TARGETS
        for row in measure(model, VARIANTS, ["wikitext2", "c4"], protocol)
    ]
    for model in KL_TARGETS:
        kl = partial(mean, rows, "kl", model=model)
        for variant in VARIANTS[1:]:
            change = kl(variant=variant.name) / kl(variant="haq") - 1
            print(f"{model:18} {variant.name:42} {change:+.1%}")
    if not quick:
        harness.write("left_out", facts, rows=rows)


if __name__ == "__main__":
    main()
