"""`OffloadConfig`: what it takes, what it refuses, and that it survives JSON."""

import json
from typing import Any

import pytest

from haq import OffloadConfig


def test_defaults_are_checked_and_survive_json() -> None:
    config = OffloadConfig()
    assert (config.placement, config.prefetch, config.cold) == ("latency", True, "auto")
    other = OffloadConfig("path", False, 7, "gpu", 3, 100, 4096)
    for each in (config, other):
        assert OffloadConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert other.to_dict() == {
        "placement": "path",
        "prefetch": False,
        "spare_slots": 7,
        "cold": "gpu",
        "batch_size": 3,
        "max_length": 100,
        "pinned_memory": 4096,
    }
    with pytest.raises(AttributeError):
        config.batch_size = 2  # type: ignore[misc]


@pytest.mark.parametrize("placement", ["latency", "path", "popularity", "uniform"])
@pytest.mark.parametrize("cold", ["auto", "cpu", "gpu"])
def test_every_choice(placement: Any, cold: Any) -> None:
    config = OffloadConfig(placement=placement, cold=cold)
    assert (config.placement, config.cold) == (placement, cold)


VALUES: dict[str, tuple[Any, str]] = {
    "placement": ("fastest", '"latency", "path", "popularity", "uniform"'),
    "cold": ("disk", '"auto", "cpu", "gpu"'),
    "spare_slots": (0, "at least 1"),
    "batch_size": (0, "at least 1"),
    "max_length": (-5, "at least 1"),
}


@pytest.mark.parametrize("name", VALUES)
def test_bad_values(name: str) -> None:
    value, expected = VALUES[name]
    with pytest.raises(ValueError, match=f"^`{name}` must be") as caught:
        OffloadConfig(**{name: value})
    assert expected in str(caught.value)
    assert f"got {value!r}" in str(caught.value)


TYPES: list[tuple[str, Any]] = [
    ("prefetch", 1),
    ("prefetch", "yes"),
    ("spare_slots", 2.0),
    ("spare_slots", True),
    ("batch_size", "4"),
    ("batch_size", None),
    ("max_length", 1e3),
    ("max_length", False),
    ("pinned_memory", 1.5),
    ("pinned_memory", None),
    ("pinned_memory", True),
]


@pytest.mark.parametrize(("name", "value"), TYPES)
def test_bad_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^`{name}` must be") as caught:
        OffloadConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["placement", "cold"])
@pytest.mark.parametrize("value", [None, 3, ""])
def test_choices_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` must be one of"):
        OffloadConfig(**{name: value})


def test_no_spare_slot_where_nothing_comes() -> None:
    assert OffloadConfig(spare_slots=0, cold="cpu").spare_slots == 0
    with pytest.raises(ValueError, match="`spare_slots` must be at least 0, got -1"):
        OffloadConfig(spare_slots=-1, cold="cpu")
    for cold in ("auto", "gpu"):
        with pytest.raises(ValueError, match="`spare_slots` must be at least 1, got 0"):
            OffloadConfig(spare_slots=0, cold=cold)


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="'slots'") as caught:
        OffloadConfig.from_dict({"slots": 3})
    assert "spare_slots" in str(caught.value)
