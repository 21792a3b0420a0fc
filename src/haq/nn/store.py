"""What kernels and a cache tell each other of a token's key and value."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Spot(NamedTuple):
    """Where a token's key and value are written.

    Attributes:
        turned_key: the address of ``[G, D]``.
        placed_value: that of ``[G, V]``.
        key_group: elements from where a group begins to where the next one does.
        value_group: likewise.
    """

    turned_key: int
    placed_value: int
    key_group: int
    value_group: int


class Attended(NamedTuple):
    """What a token attends to.

    Attributes:
        key: the address of ``[G, T, D]``.
        value: that of ``[G, T, V]``.
        tokens_before: T.
        key_group: elements from where a group begins to where the next one does.
        key_token: likewise, of tokens.
        value_group: likewise.
        value_token: likewise.
    """

    key: int
    value: int
    tokens_before: int
    key_group: int
    key_token: int
    value_group: int
    value_token: int


class Store(Protocol):
    """A cache that is about to be given a token's key and value."""

    def place(self, key: tuple[int, int], value: tuple[int, int], x: Tensor) -> Spot:
        """Where they are to be written, given G and D, and G and V, and a tensor of their dtype."""

    def keep(self, x: Tensor) -> Attended:
        """When they are: what the token attends to, in the dtype of a tensor."""

    def ahead(self) -> Attended | None:
        """What it will attend to, before they are; None if that is not known."""
