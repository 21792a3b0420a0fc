"""What the user decides: frozen dataclasses, checked when they are made, that survive JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Smoothing = Literal["search", "fixed", "none"]
Rounding = Literal["hessian", "nearest"]
Placement = Literal["latency", "path", "popularity", "uniform"]
Cold = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class QuantizationConfig:
    """How `quantize_model` works. The defaults are what the measurements in the docs recommend.

    Attributes:
        smoothing: where the range of activations is moved into weights. "search" tries scales for
            every group of linears that share an input and keeps the one with the smallest error of
            what the block computes from it; "fixed" is SmoothQuant (arXiv 2211.10438, equation 4)
            with ``smoothing_strength`` on the same groups; "none" leaves the model's ranges alone.
        smoothing_strength: SmoothQuant's alpha in [0, 1], for "fixed" only.
        rounding: "hessian" rounds column by column with error compensation, "nearest" rounds every
            weight to its nearest integer.
        damping: fraction of the Hessian's mean diagonal that is added to its diagonal. It grows by
            itself where a factorization fails.
        asymmetric_inputs: give tokens a zero point where that removes a fifth of a layer's error or
            more: after an activation, as a rule. It changes how inputs are rounded when the model
            runs here, not the weights; other runtimes can round symmetrically.
        exclude: names of modules that stay float, as shell-style patterns over the model's module
            names: ``lm_head``, ``*.down_proj``, ``model.layers.0``. What is inside a module that
            matches stays float with it. A pattern that matches nothing is an error, except in
            the default. ``lm_head`` is the output head, whatever the model calls it; if no
            pattern names it, as in ``exclude=()``, the head becomes int8 after the blocks.
        search_tokens: about how many calibration tokens the search for scales is judged on. The
            channel statistics always see all of them.

    Raises:
        ValueError: an option is unknown or a number is out of range.
        TypeError: an attribute has the wrong type.

    Examples:
        >>> QuantizationConfig(smoothing="fixed", smoothing_strength=0.8).rounding
        'hessian'
    """

    smoothing: Smoothing = "search"
    smoothing_strength: float = 0.5
    rounding: Rounding = "hessian"
    damping: float = 0.01
    asymmetric_inputs: bool = True
    exclude: tuple[str, ...] = ("lm_head",)
    search_tokens: int = 1024

    def __post_init__(self) -> None:
        _check_choice("smoothing", self.smoothing, get_args(Smoothing))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        _check_number("smoothing_strength", self.smoothing_strength, 0, 1)
        _check_number("damping", self.damping, 0, 1, above=True)
        if not isinstance(self.asymmetric_inputs, bool):
            raise TypeError(
                f"`asymmetric_inputs` must be True or False, got {self.asymmetric_inputs!r}."
            )
        is_sequence = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, str)
        if not is_sequence or not all(isinstance(p, str) for p in self.exclude):
            raise TypeError(
                f"`exclude` must be a sequence of patterns, got {self.exclude!r}. "
                'Write `exclude=("lm_head", "*.down_proj")`.'
            )
        # JSON has no tuples; a list that was read back must equal what was written.
        object.__setattr__(self, "exclude", tuple(self.exclude))
        _check_count("search_tokens", self.search_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`.

        Examples:
            >>> QuantizationConfig(damping=0.1).to_dict()["damping"]
            0.1
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is not an option; the message lists the options there are.
        """
        _check_known(values, [field.name for field in fields(cls)])
        return cls(**values)


@dataclass(frozen=True)
class OffloadConfig:
    """How `ExpertOffloader` works.

    Attributes:
        placement: which experts stay on the GPU. "latency" minimises the expected time of a token
            under the measured costs; "path" covers the most travelled paths from layer to layer,
            then the layers that are covered least (arXiv 2508.07329); "popularity" takes the
            experts that are chosen most, "uniform" as many in every layer.
        prefetch: bring experts that are likely to be chosen in the next layers to the GPU before
            they are, where the costs say that it pays.
        spare_slots: room on the GPU for experts that come and go: those prefetched, and in a prompt
            those with so many tokens that bringing them pays. At least 1, unless ``cold`` is "cpu".
        cold: where experts run that are not on the GPU: "cpu", or "gpu", which brings every one of
            them and gives the very bits of a model that is on the GPU as a whole, or, by the
            costs, whichever is faster.
        batch_size: sequences that are generated at a time; memory is reserved for their keys and
            values. Beams count.
        max_length: tokens of a sequence, prompt and answer, likewise.
        pinned_memory: bytes of the CPU's memory that copies to the GPU may be made from without
            waiting, "2GiB" or a number; 0 for none. Int8 weights have a second copy there.

    Raises:
        ValueError: an option is unknown or a number is out of range.
        TypeError: an attribute has the wrong type.

    Examples:
        >>> OffloadConfig(placement="path").spare_slots
        2
    """

    placement: Placement = "latency"
    prefetch: bool = True
    spare_slots: int = 2
    cold: Cold = "auto"
    batch_size: int = 1
    max_length: int = 4096
    pinned_memory: str | int = "2GiB"

    def __post_init__(self) -> None:
        _check_choice("placement", self.placement, get_args(Placement))
        _check_choice("cold", self.cold, get_args(Cold))
        if not isinstance(self.prefetch, bool):
            raise TypeError(f"`prefetch` must be True or False, got {self.prefetch!r}.")
        _check_count("spare_slots", self.spare_slots, 0 if self.cold == "cpu" else 1)
        _check_count("batch_size", self.batch_size, 1)
        _check_count("max_length", self.max_length, 1)
        if isinstance(self.pinned_memory, bool) or not isinstance(self.pinned_memory, str | int):
            raise TypeError(
                f'`pinned_memory` must be a string such as "2GiB" or a number of bytes, got '
                f"{self.pinned_memory!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`.

        Examples:
            >>> OffloadConfig().to_dict()["placement"]
            'latency'
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OffloadConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is not an option; the message lists the options there are.
        """
        _check_known(values, [field.name for field in fields(cls)])
        return cls(**values)


def _check_known(values: dict[str, Any], known: list[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r}. The options are {', '.join(known)}.")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def _check_number(
    name: str, value: object, low: float, high: float, *, above: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    # Written so that NaN fails too.
    if not ((low < value if above else low <= value) and value <= high):
        interval = f"{'(' if above else '['}{low}, {high}]"
        raise ValueError(f"`{name}` must be in {interval}, got {value}.")
