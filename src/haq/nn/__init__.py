"""Modules that run int8."""

from haq.nn.linear import Int8Linear

__all__ = ["Int8Linear"]
