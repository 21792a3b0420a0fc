"""How much memory does it take to quantize one decoder block of Mixtral-8x7B?

The block is of the real shape with random weights in bfloat16 (D 4096, I 14336, 8 experts: 2.9 GB)
and is quantized by the whole method. What is measured is the peak of the process's resident memory
above what it held before, in a process of its own. The bound is what the method has to hold: the
block in float32, the statistics of one expert while its Hessian is factored, and the activations of
the calibration tokens.

    python benchmarks/memory.py            about ten minutes on 2 cores
    python benchmarks/memory.py --quick    a block of a hundredth of the size
"""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import harness
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import haq
from haq.model.blocks import capture_block_inputs
from haq.quantization.block import quantize_block

REAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
QUICK = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8}
WINDOWS, LENGTH = 16, 256

# While the Hessian [I, I] of a second linear is factored it exists twice, and its linear, [D, I] in
# float32, is rounded in a copy.
COPIES_OF_A_HESSIAN = 2


class PeakMemory:
    """The most resident memory of this process while the ``with`` block runs, in bytes."""

    def __enter__(self) -> Self:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def block_of(shape: dict[str, int]) -> MixtralForCausalLM:
    config = MixtralConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"] // 4,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        vocab_size=1024,
        max_position_embeddings=LENGTH,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.model.rotary_emb.__init__(config)  # Its tables are not parameters.
    return model.eval()


def bound(shape: dict[str, int], block: torch.nn.Module, tokens: int) -> dict[str, int]:
    """What the method has to hold, in bytes."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    return {
        "block_in_float32": sum(p.numel() for p in block.parameters()) * 4,
        "statistics_of_one_expert": COPIES_OF_A_HESSIAN * inner**2 * 4 + 2 * hidden * inner * 4,
        # What enters the block and the experts, in 16 bit, and one expert's share in float32.
        "activations": tokens * hidden * (2 + 2) + tokens // 4 * (hidden + 3 * inner) * 4,
    }


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    shape = QUICK if options.quick else REAL
    torch.manual_seed(0)
    model = block_of(shape)
    blocks = model.model.layers
    batches = [{"input_ids": torch.randint(1024, (1, LENGTH))} for _ in range(WINDOWS)]
    inputs = capture_block_inputs(model, blocks, batches)
    parts = bound(shape, blocks[0], WINDOWS * LENGTH)
    start = time.perf_counter()
    with PeakMemory() as memory:
        _, report = quantize_block(
            blocks[0], inputs.of_block(0), haq.QuantizationConfig(), "model.layers.0"
        )
    seconds = time.perf_counter() - start
    assert all(layer.rounding == "hessian" for layer in report.layers)
    peak = memory.peak - memory.before
    rows: list[list[str]] = [[name.replace("_", " "), _gb(size)] for name, size in parts.items()]
    harness.print_table(
        ["GB", ""], [*rows, ["bound", _gb(sum(parts.values()))], ["peak", _gb(peak)]]
    )
    print(f"{seconds:.0f} s for {WINDOWS * LENGTH} tokens")
    found: dict[str, Any] = {
        "name": "peak over bound",
        "value": peak / sum(parts.values()),
        "target": 1.0,
        "met": peak <= sum(parts.values()),
    }
    print(f"peak over bound: {found['value']:.2f}, {'met' if found['met'] else 'MISSED'}")
    if not options.quick:
        harness.write(
            "memory",
            facts,
            shape=shape,
            tokens=WINDOWS * LENGTH,
            seconds=seconds,
            block_bytes=sum(p.nbytes for p in blocks[0].parameters()),
            bound_bytes=parts,
            peak_bytes=peak,
            targets=[found],
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


if __name__ == "__main__":
    main()
