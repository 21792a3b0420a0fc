"""What a configuration accepts, what it refuses and how it says so, and that it survives JSON."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq import QuantizationConfig


def test_the_defaults() -> None:
    assert QuantizationConfig().to_dict() == {
        "smoothing": "search",
        "smoothing_strength": 0.5,
        "rounding": "hessian",
        "damping": 0.01,
        "asymmetric_inputs": True,
        "exclude": ("lm_head",),
        "search_tokens": 1024,
    }


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig().damping = 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"smoothing": "smoothquant"},
            r'`smoothing` must be one of "search", "fixed", "none", got \'smoothquant\'\.',
        ),
        ({"smoothing": None}, r"`smoothing` must be one of .*, got None\."),
        ({"smoothing": ["search"]}, r"`smoothing` must be one of .*, got \['search'\]\."),
        (
            {"rounding": "gptq"},
            r'`rounding` must be one of "hessian", "nearest", got \'gptq\'\.',
        ),
        ({"smoothing_strength": 1.1}, r"`smoothing_strength` must be in \[0, 1\], got 1\.1\."),
        ({"smoothing_strength": -0.1}, r"`smoothing_strength` must be in \[0, 1\], got -0\.1\."),
        ({"smoothing_strength": float("nan")}, r"`smoothing_strength` must be in .*, got nan\."),
        ({"damping": 0.0}, r"`damping` must be in \(0, 1\], got 0\.0\."),
        ({"damping": -1}, r"`damping` must be in \(0, 1\], got -1\."),
        ({"damping": 1.5}, r"`damping` must be in \(0, 1\], got 1\.5\."),
        ({"damping": float("nan")}, r"`damping` must be in \(0, 1\], got nan\."),
        ({"damping": float("inf")}, r"`damping` must be in \(0, 1\], got inf\."),
        ({"search_tokens": 0}, r"`search_tokens` must be at least 1, got 0\."),
        ({"search_tokens": -5}, r"`search_tokens` must be at least 1, got -5\."),
    ],
)
def test_a_value_that_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing_strength": "0.5"}, r"`smoothing_strength` must be a number, got '0\.5'\."),
        ({"smoothing_strength": True}, r"`smoothing_strength` must be a number, got True\."),
        ({"damping": None}, r"`damping` must be a number, got None\."),
        (
            {"exclude": "lm_head"},
            r"`exclude` must be a sequence of patterns, got 'lm_head'\. Write",
        ),
        ({"exclude": None}, r"`exclude` must be a sequence of patterns, got None\. Write"),
        ({"exclude": 3}, r"`exclude` must be a sequence of patterns, got 3\."),
        ({"exclude": ("lm_head", 3)}, r"`exclude` must be a sequence .*, got \('lm_head', 3\)\."),
        # Read once it would be empty.
        ({"exclude": iter(["lm_head"])}, r"`exclude` must be a sequence of patterns, got <list_it"),
        # In another order it would be another configuration.
        ({"exclude": {"lm_head"}}, r"`exclude` must be a sequence of patterns, got \{'lm_head'\}"),
        ({"search_tokens": 10.0}, r"`search_tokens` must be an integer, got 10\.0\."),
        ({"search_tokens": True}, r"`search_tokens` must be an integer, got True\."),
        ({"search_tokens": "many"}, r"`search_tokens` must be an integer, got 'many'\."),
    ],
)
def test_a_type_that_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        QuantizationConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing_strength": 0},
        {"smoothing_strength": 1},
        {"damping": 1},
        {"damping": 1e-12},
        {"search_tokens": 1},
        {"exclude": ()},
        {"exclude": ["lm_head", "*.fc1"]},
    ],
    ids=str,
)
def test_the_ends_of_what_is_allowed(options: dict[str, Any]) -> None:
    config = QuantizationConfig(**options)
    (key,) = options
    expected = tuple(options[key]) if key == "exclude" else options[key]
    assert getattr(config, key) == expected


def test_a_list_of_patterns_is_the_same_as_a_tuple() -> None:
    as_list, as_tuple = (QuantizationConfig(exclude=kind(["a", "b"])) for kind in (list, tuple))
    assert as_list == as_tuple
    assert hash(as_list) == hash(as_tuple)


@given(
    st.builds(
        QuantizationConfig,
        smoothing=st.sampled_from(["search", "fixed", "none"]),
        smoothing_strength=st.floats(0, 1),
        rounding=st.sampled_from(["hessian", "nearest"]),
        damping=st.floats(0, 1, exclude_min=True),
        exclude=st.lists(st.text()),
        search_tokens=st.integers(1, 10**9),
    )
)
def test_json_gives_back_the_same(config: QuantizationConfig) -> None:
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_missing_takes_its_default() -> None:
    assert QuantizationConfig.from_dict({"damping": 0.1}) == QuantizationConfig(damping=0.1)


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"Unknown option 'alpha'\. The options are smoothing, .*"):
        QuantizationConfig.from_dict({"damping": 0.1, "alpha": 0.5})
    with pytest.raises(TypeError, match="alpha"):
        QuantizationConfig(alpha=0.5)


def test_a_value_that_is_wrong_in_json() -> None:
    with pytest.raises(ValueError, match="`damping` must be in"):
        QuantizationConfig.from_dict({"damping": 7})
