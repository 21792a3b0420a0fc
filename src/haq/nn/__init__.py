"""Modules that run int8."""

from haq.nn.experts import Int8Experts
from haq.nn.linear import Int8Linear

__all__ = ["Int8Experts", "Int8Linear"]
