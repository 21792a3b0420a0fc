"""What the user decides: frozen dataclasses, checked when they are made, that survive JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Smoothing = Literal["search", "fixed", "none"]
Rounding = Literal["hessian", "nearest"]


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
            the default.
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
        if isinstance(self.search_tokens, bool) or not isinstance(self.search_tokens, int):
            raise TypeError(f"`search_tokens` must be an integer, got {self.search_tokens!r}.")
        if self.search_tokens < 1:
            raise ValueError(f"`search_tokens` must be at least 1, got {self.search_tokens}.")

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
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown option {unknown[0]!r}. The options are {', '.join(known)}.")
        return cls(**values)


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
