"""What is around the int8 layers of a model, by haq's kernels where they are faster."""

from transformers import PreTrainedModel

from haq.model import steps
from haq.model.attention import use_fast_attention
from haq.nn import norms
from haq.nn.kept import use_fast_linears


def use_fast_parts(model: PreTrainedModel) -> None:
    """Let attention, norms and the layers that stay in bfloat16 run by kernels, in place.

    Each of them computes what it computed before wherever there is no kernel for it.
    """
    use_fast_attention(model)
    if norms.may_run(model.dtype):  # Elsewhere a fused norm is the same as any.
        norms.fuse_norms(model)
    use_fast_linears(model)
    if steps.may_run(model.dtype):
        steps.use_fast_steps(model)
