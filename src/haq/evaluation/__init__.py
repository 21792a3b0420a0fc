"""How good a language model is on a text: perplexity, and one model compared with another.

The protocol is the one of the GPTQ paper (arXiv 2210.17323) and of most papers since: the text is
tokenized as one string and cut into windows without overlap, each window starts without context,
and the mean is taken over all predicted tokens. Perplexities by other protocols do not compare.
"""

from haq.evaluation.channels import channel_magnitudes
from haq.evaluation.corpora import evaluation_tokens
from haq.evaluation.quality import Comparison, compare, perplexity

__all__ = ["Comparison", "channel_magnitudes", "compare", "evaluation_tokens", "perplexity"]
