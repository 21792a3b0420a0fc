"""Keys and values that grow in place, beside the cache of transformers that copies them."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from haq.model import growing
from haq.model.growing import Store
from haq.nn.store import Attended, Spot

GROUPS, SIZE, WIDTH = 2, 4, 3
X = torch.zeros(1, dtype=torch.bfloat16)


def random(tokens: int, seed: int, width: int = SIZE, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, GROUPS, tokens, width, generator=generator).bfloat16()


def filled(tokens: int = 5) -> DynamicCache:
    cache = DynamicCache()
    cache.update(random(tokens, 0), random(tokens, 1, WIDTH), 0)
    return cache


def held(cache: DynamicCache) -> tuple[Tensor, Tensor]:
    layer: Any = cache.layers[0]
    return layer.keys, layer.values


def memory(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Bfloat16 as it lies there."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    import ctypes

    raw = (ctypes.c_int16 * size).from_address(address)
    return torch.frombuffer(raw, dtype=torch.bfloat16).as_strided(shape, strides)


def give(cache: Any, seed: int, index: int = 0) -> tuple[Tensor, Tensor]:
    """One token by way of a store; what it says that is attended to."""
    store = Store(cache, index)
    spot = store.place((GROUPS, SIZE), (GROUPS, WIDTH), X)
    assert isinstance(spot, Spot)
    key, value = random(1, seed)[0, :, 0], random(1, seed + 100, WIDTH)[0, :, 0]
    memory(spot.turned_key, (GROUPS, SIZE), (spot.key_group, 1)).copy_(key)
    memory(spot.placed_value, (GROUPS, WIDTH), (spot.value_group, 1)).copy_(value)
    told = store.keep(X)
    assert isinstance(told, Attended)
    keys = memory(told.key, (GROUPS, told.tokens_before, SIZE), (told.key_group, told.key_token, 1))
    values = memory(
        told.value, (GROUPS, told.tokens_before, WIDTH), (told.value_group, told.value_token, 1)
    )
    return keys.clone()[None], values.clone()[None]


def update(cache: Any, seed: int, index: int = 0) -> tuple[Tensor, Tensor]:
    given = random(1, seed), random(1, seed + 100, WIDTH)
    result: tuple[Tensor, Tensor] = cache.update(*given, index)
    return result


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("tokens", [1, 5, 600])
def test_grows_as_a_cache_that_copies(tokens: int) -> None:
    """Also beyond the room that there is at first."""
    ours, theirs = filled(tokens), filled(tokens)
    for seed in range(2, 2 + growing._LEAST + 20):
        assert_same(give(ours, seed), update(theirs, seed))
        assert_same(held(ours), held(theirs))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_nothing_is_copied_while_there_is_room() -> None:
    cache = filled()
    give(cache, 2)
    places = [tensor.data_ptr() for tensor in held(cache)]
    for seed in range(3, 20):
        give(cache, seed)
        assert [tensor.data_ptr() for tensor in held(cache)] == places


def test_what_was_in_view_is_not_written_to() -> None:
    """Someone keeps a text, cuts the cache back, and goes on with another one."""
    cache = filled()
    give(cache, 2)
    give(cache, 3)
    kept, copied = held(cache), [tensor.clone() for tensor in held(cache)]
    twin = copy.deepcopy(cache)
    cache.crop(-1)
    theirs = filled()
    update(theirs, 2)
    assert_same(give(cache, 4), update(theirs, 4))
    assert_same(give(cache, 5), update(theirs, 5))
    assert_same(held(cache), held(theirs))
    for tensors in (kept, held(twin)):
        assert_same(tensors, (copied[0], copied[1]))
    assert_same(give(twin, 6), give_to_copies(copied, 6))


def give_to_copies(tensors: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    cache = DynamicCache()
    cache.update(tensors[0], tensors[1], 0)
    return update(cache, seed)


def test_an_empty_cache_is_given_tensors() -> None:
    ours, theirs = DynamicCache(), DynamicCache()
    for seed in range(3):
        assert_same(give(ours, seed), update(theirs, seed))
    assert_same(held(ours), held(theirs))


def test_every_layer_has_its_own_room() -> None:
    ours, theirs = filled(), filled()
    for cache in (ours, theirs):
        cache.update(random(5, 7), random(5, 8, WIDTH), 1)
    for seed in range(2, 6):
        for index in (0, 1):
            assert_same(give(ours, seed + index, index), update(theirs, seed + index, index))


def test_other_caches_update_themselves() -> None:
    config = LlamaConfig(hidden_size=GROUPS * SIZE, num_attention_heads=GROUPS, num_hidden_layers=1)
    static = [StaticCache(config=config, max_cache_len=8) for _ in range(2)]
    for seed in range(2):
        keys = [store.update(random(1, seed), random(1, seed + 100), 0)[0] for store in static[:1]]
        store = Store(static[1], 0)
        spot = store.place((GROUPS, SIZE), (GROUPS, SIZE), X)
        memory(spot.turned_key, (GROUPS, SIZE), (spot.key_group, 1)).copy_(random(1, seed)[0, :, 0])
        memory(spot.placed_value, (GROUPS, SIZE), (spot.value_group, 1)).zero_()
        told = store.keep(X)
        found = memory(
            told.key, (GROUPS, told.tokens_before, SIZE), (told.key_group, told.key_token, 1)
        )
        assert torch.equal(found[None], keys[0])


def test_a_sliding_window_updates_itself() -> None:
    ours, theirs = DynamicCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.layer_class_to_replicate = None
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=3))
    for seed in range(6):
        assert_same(give(ours, seed), update(theirs, seed))
    assert_same(held(ours), held(theirs))


def test_several_texts_or_another_dtype_update_themselves() -> None:
    cache = DynamicCache()
    cache.update(random(4, 0).float(), random(4, 1, WIDTH).float(), 0)
    keys, values = give(cache, 2)  # The cache makes float32 of both.
    assert torch.equal(keys[:, :, -1:], random(1, 2))
    assert torch.equal(values[:, :, :4], random(4, 1, WIDTH))
    assert held(cache)[0].dtype == torch.float32


def test_the_room_goes_with_its_cache() -> None:
    cache = filled()
    give(cache, 2)
    room = weakref.ref(growing._rooms[cache.layers[0]])  # type: ignore[index]
    del cache
    gc.collect()
    assert room() is None
