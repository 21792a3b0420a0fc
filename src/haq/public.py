"""The public names, all at once: `haq` asks for them when the first one is used."""

from haq.checkpoint.load import from_pretrained
from haq.checkpoint.save import save_pretrained
from haq.checkpoint.stream import quantize_checkpoint
from haq.config import OffloadConfig, QuantizationConfig
from haq.evaluation import (
    Comparison,
    channel_magnitudes,
    compare,
    evaluation_tokens,
    perplexity,
)
from haq.int8.matmul import backends, use_backend
from haq.nn import Int8Experts, Int8Linear
from haq.offload.costs import Costs
from haq.offload.offloader import ExpertOffloader, find_offloader
from haq.offload.placement import Placement
from haq.offload.report import OffloadReport
from haq.offload.routing import RoutingStatistics, routing_trace
from haq.offload.simulation import Simulation, simulate
from haq.quantization.calibration import calibration_batches
from haq.quantization.pipeline import quantize_model
from haq.quantization.report import (
    BlockReport,
    LayerReport,
    QuantizationReport,
    RoutingReport,
    quantization_report,
)

__all__ = [
    "BlockReport",
    "Comparison",
    "Costs",
    "ExpertOffloader",
    "Int8Experts",
    "Int8Linear",
    "LayerReport",
    "OffloadConfig",
    "OffloadReport",
    "Placement",
    "QuantizationConfig",
    "QuantizationReport",
    "RoutingReport",
    "RoutingStatistics",
    "Simulation",
    "backends",
    "calibration_batches",
    "channel_magnitudes",
    "compare",
    "evaluation_tokens",
    "find_offloader",
    "from_pretrained",
    "perplexity",
    "quantization_report",
    "quantize_checkpoint",
    "quantize_model",
    "routing_trace",
    "save_pretrained",
    "simulate",
    "use_backend",
]
