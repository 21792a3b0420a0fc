"""Triton's kernels for an NVIDIA GPU: tokens to int8, and products with a plain int8 weight.

Nothing imports this package until a weight is packed for a GPU: Triton comes with torch there, and
is not needed elsewhere. Around a product nothing is left to launch: the tokens are rounded by one
kernel, and what follows the sums of int32 happens before they are stored, in the order of
:mod:`haq.int8.matmul`. Divisions are IEEE's and no multiplication is fused with an addition, so
that the bits are those of the formula; they do not depend on how a kernel is cut into blocks.
"""

from haq.int8.kernels.combine import add_experts
from haq.int8.kernels.grouped import grouped_linear
from haq.int8.kernels.linear import int8_linear, int8_product
from haq.int8.kernels.norms import norm_tokens
from haq.int8.kernels.plans import Plan
from haq.int8.kernels.tiles import Tiles, expert_tiles, row_tiles
from haq.int8.kernels.tokens import Int8Tokens, quantize_tokens

__all__ = [
    "Int8Tokens",
    "Plan",
    "Tiles",
    "add_experts",
    "expert_tiles",
    "grouped_linear",
    "int8_linear",
    "int8_product",
    "norm_tokens",
    "quantize_tokens",
    "row_tiles",
]
