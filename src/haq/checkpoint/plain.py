"""What `AutoModelForCausalLM.from_pretrained` makes of a directory that haq wrote.

A dense one loads with the package compressed-tensors: weights in float, inputs rounded. With
experts `transformers` gives up deep inside the merging of their weights, so it is told earlier what
to do instead. Its registry takes no second quantizer of one name, and after ``import haq`` every
checkpoint of compressed-tensors has to load as before: so this is the quantizer that was
registered, which looks for haq's own file first.

This module is imported while the modelling code of `transformers` is: what needs that, is imported
in the function that does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedTensorsOrHaq(CompressedTensorsHfQuantizer):
    """The quantizer of compressed-tensors, but for mixtures of experts that haq saved."""

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> Any:
        from haq.checkpoint.format import HAQ_FILE
        from haq.model.experts import fused_experts

        folder = Path(model.config.name_or_path or ".")
        if (folder / HAQ_FILE).is_file() and fused_experts(model):
            raise ValueError(
                f"`{folder}` holds int8 experts, which `transformers` cannot load. Call "
                f'`haq.from_pretrained("{folder}")`: the model runs in int8.'
            )
        before = super()._process_model_before_weight_loading
        return before(model, **kwargs)  # type: ignore[no-untyped-call]


def register() -> None:
    """Take the place of the quantizer of compressed-tensors, if nobody else has."""
    if AUTO_QUANTIZER_MAPPING.get("compressed-tensors") is CompressedTensorsHfQuantizer:
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CompressedTensorsOrHaq
