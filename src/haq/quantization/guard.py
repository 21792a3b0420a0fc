"""What stands between an int8 model and `transformers`' own way to save it.

Without it ``model.save_pretrained`` would write a directory that loads without an error and with
random experts, because it writes int8 modules under names that are nobody's.
"""

from typing import Any, NoReturn

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Int8Guard(HfQuantizer):
    """Tells `transformers` that a model is quantized, and that it cannot save it."""

    def __init__(self) -> None:
        # The name of a method that only error messages read.
        super().__init__(QuantizationConfigMixin(quant_method="haq"))  # type: ignore[arg-type]

    def is_serializable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError that says how it is done."""
        raise ValueError(
            "`model.save_pretrained` cannot save a model that haq made int8. Call "
            "`haq.save_pretrained(model, directory, tokenizer)`, which writes a directory that "
            "`haq.from_pretrained` and vLLM read."
        )

    @property
    def is_trainable(self) -> bool:
        """Int8 modules pass no gradient on."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Int8 modules are one operator each to the compiler."""
        return True


def guard(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` raise."""
    model.hf_quantizer = Int8Guard()  # type: ignore[assignment]


def unguard(model: PreTrainedModel) -> None:
    """Take that back, of a model that is float after all."""
    if isinstance(getattr(model, "hf_quantizer", None), Int8Guard):
        del model.hf_quantizer
