"""Keys and values that grow where they are, a token at a time.

For each token a `DynamicCache` of `transformers` copies all keys and values that a layer has, which
behind a long text adds much to a step. Here they are moved to memory with room
behind them, where the next tokens are written. The cache has views of it, tensors as before; what
was in view once is never written to again.
"""

import weakref
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from haq.nn.store import Attended, Spot

# There is room for an eighth more tokens than there are, and for so many at least.
_SHARE, _LEAST = 8, 64


class _Room:
    """Memory that one layer's keys and values grow in.

    Args:
        keys: ``[1, G, T, D]``, which are moved there.
        values: ``[1, G, T, V]``.

    Attributes:
        views: what of the memory the cache was given last.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        tokens = keys.shape[2]
        self.size = tokens + max(_LEAST, tokens // _SHARE)
        self.views = keys, values
        self._keys, self._values = sides = [_moved(tensor, self.size) for tensor in self.views]
        # Asked for once: for each token it would take longer than to write it.
        self._places = [side.data_ptr() for side in sides]
        self._groups, self._tokens = ([side.stride(of) for side in sides] for of in (1, 2))
        self._bytes = keys.itemsize

    def spot(self, tokens: int) -> Spot:
        """Where the next token goes behind so many."""
        key, value = (
            place + tokens * stride * self._bytes
            for place, stride in zip(self._places, self._tokens, strict=True)
        )
        return Spot(key, value, *self._groups)

    def view(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What the cache is given: so many."""
        self.views = self._keys.narrow(2, 0, tokens), self._values.narrow(2, 0, tokens)
        return self.views

    def attended(self, tokens: int) -> Attended:
        """The same, as a kernel reads it."""
        (key, value), (key_group, value_group) = self._places, self._groups
        key_token, value_token = self._tokens
        return Attended(key, value, tokens, key_group, key_token, value_group, value_token)


_rooms: "weakref.WeakKeyDictionary[DynamicLayer, _Room]" = weakref.WeakKeyDictionary()


class Store:
    """A layer of a cache that is about to be given a token.

    Args:
        cache: any; a `DynamicCache` of one text on the CPU grows in place.
        index: of the layer.
    """

    def __init__(self, cache: Cache, index: int) -> None:
        # What is kept beside a cache must not keep it.
        self._cache, self._index = weakref.ref(cache), index
        self._room: _Room | None = None

    def place(self, key: tuple[int, int], value: tuple[int, int], x: Tensor) -> Spot:
        """Where a token's key and value are to be written.

        Args:
            key: G and D.
            value: G and V.
            x: a tensor of their dtype.
        """
        self._layer = layer = self._growing()
        if layer is not None:
            room = _rooms.get(layer)
            held, tokens = (layer.keys, layer.values), layer.keys.shape[2]
            ours = room is not None and held[0] is room.views[0] and held[1] is room.views[1]
            if room is None or not ours or room.size == tokens:
                alike = _are_like(held[0], key, x) and _are_like(held[1], value, x)
                room = _Room(*held) if alike else None
            if room is not None:
                self._room = _rooms[layer] = room
                return room.spot(tokens)
        self._given = x.new_empty(1, key[0], 1, key[1]), x.new_empty(1, value[0], 1, value[1])
        return Spot(self._given[0].data_ptr(), self._given[1].data_ptr(), key[1], value[1])

    def keep(self, x: Tensor) -> Attended:
        """Give the cache what was written, and tell what the token attends to.

        Args:
            x: a tensor of the dtype that is attended to.
        """
        if self._room is not None:
            tokens = self._layer.keys.shape[2] + 1
            self._layer.keys, self._layer.values = self._room.view(tokens)
            return self._room.attended(tokens)
        cache = self._cache()
        assert cache is not None  # Whoever calls this holds it.
        updated = cache.update(*self._given, self._index)
        self._attended = keys, values = tuple(_plain(tensor, x) for tensor in updated)
        strides = keys.stride(1), keys.stride(2), values.stride(1), values.stride(2)
        return Attended(keys.data_ptr(), values.data_ptr(), keys.shape[2], *strides)

    def grows(self) -> bool:
        """Whether it may grow in place."""
        return self._growing() is not None

    def ahead(self) -> Attended | None:
        """What the token will attend to; None if nobody but the cache knows."""
        if self._room is None:
            return None
        return self._room.attended(self._layer.keys.shape[2] + 1)

    def is_as_placed(self) -> bool:
        """Whether the cache still is what it was when `place` was called."""
        layer, room = self._growing(), self._room
        if room is None or layer is not self._layer:
            return False
        return layer.keys is room.views[0] and layer.values is room.views[1]

    def _growing(self) -> Any:
        """The layer of the cache, if it is one that does nothing but grow; else None."""
        cache = self._cache()
        if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) <= self._index:
            return None
        layer = cache.layers[self._index]
        return layer if type(layer) is DynamicLayer and layer.is_initialized else None


def _are_like(held: Tensor, shape: tuple[int, int], x: Tensor) -> bool:
    alike = held.dtype == x.dtype and held.is_cpu and held.dim() == 4
    return alike and held.shape[2] > 0 and (*held.shape[:2], held.shape[3]) == (1, *shape)


def _moved(tensor: Tensor, size: int) -> Tensor:
    one, groups, tokens, width = tensor.shape
    # Zeros, as whoever saves a view saves all of its memory.
    room = tensor.new_zeros(one, groups, size, width)
    room[:, :, :tokens] = tensor
    return room


def _plain(tensor: Tensor, like: Tensor) -> Tensor:
    """What a cache gave, as the kernel reads it: caches may keep what they were given elsewhere."""
    if tensor.dtype != like.dtype or not tensor.is_cpu:
        tensor = tensor.to(like)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
