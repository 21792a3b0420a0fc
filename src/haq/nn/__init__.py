"""Modules that run int8."""

from haq.nn.experts import Int8Experts
from haq.nn.linear import Int8Linear
from haq.nn.norms import fuse_norms, unfuse_norms

__all__ = ["Int8Experts", "Int8Linear", "fuse_norms", "unfuse_norms"]
