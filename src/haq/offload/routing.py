"""Which experts are chosen how often, and which ones after which: what placement and prefetch know.

Layers are numbered by their experts: layer 0 is the first layer that has any.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel

from haq.offload.collect import experts_modules, number_of_experts, routings
from haq.offload.stored import is_archive, json_counts, read_arrays, table_of, write_arrays

Batches = Iterable[Tensor | Mapping[str, Tensor]]

# Layers that one layer's choice is known to predict. On a trace of DeepSeek-V2-Lite three ahead is
# nearly as good as one, and far enough to hide a copy behind.
_AHEAD = 3

# Choices that `scores` adds for each expert of the layer ahead: with few tokens the popularity
# decides, and a pair that was never seen is not impossible.
_SMOOTHING = 0.5

# What is written to disk, for `read_arrays`.
_STORED = {
    "layers": "str L",
    "experts_per_token": "int64",
    "tokens": "int64",
    "counts": "int64 L E",
    "gate_mass": "float64 L E",
    "transitions": f"int64 {_AHEAD} L E E",
}


class RoutingStatistics:
    """How often each expert was chosen, and together with which ones of the next three layers.

    Args:
        layers: names of the layers of experts in the model, in their order, or their number.
        num_experts: E.
        experts_per_token: A.

    Attributes:
        layers: the names: L of them.
        num_experts: E.
        experts_per_token: A.
        tokens: that were seen at the first layer.
        counts: tokens that chose the expert, int64 ``[L, E]``.
        gate_mass: sum of the router's weights of those tokens, float64 ``[L, E]``.
        transitions: tokens for which layer l chose i and layer l + d chose j, at ``[d - 1, l, i,
            j]``: int64 ``[3, L, E, E]``; zero where there is no layer l + d.

    Raises:
        TypeError: a name is no string.
        ValueError: there are no layers, two have one name, or A is not in [1, E].

    Examples:
        >>> statistics = RoutingStatistics(2, num_experts=4, experts_per_token=1)
        >>> first, second = np.array([[0], [0], [1]]), np.array([[2], [2], [3]])
        >>> statistics.add(0, first, None)
        >>> statistics.add(1, second, None, before=[first])
        >>> statistics.counts
        array([[2, 1, 0, 0],
               [0, 0, 2, 1]])
        >>> int(statistics.predict(0, [1])[0])
        3
    """

    def __init__(
        self, layers: Sequence[str] | int, num_experts: int, experts_per_token: int
    ) -> None:
        self.layers = _names(layers)
        if not _is_count(num_experts):
            raise ValueError(f"`num_experts` must be a positive integer, got {num_experts!r}.")
        if not _is_count(experts_per_token) or experts_per_token > num_experts:
            raise ValueError(
                f"`experts_per_token` must be an integer in [1, {num_experts}], the number of "
                f"experts, got {experts_per_token!r}. It is `num_experts_per_tok` of most configs."
            )
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.tokens = 0
        size = (len(self.layers), num_experts)
        self.counts: NDArray[np.int64] = np.zeros(size, np.int64)
        self.gate_mass: NDArray[np.float64] = np.zeros(size)
        self.transitions: NDArray[np.int64] = np.zeros((_AHEAD, *size, num_experts), np.int64)

    @classmethod
    def collect(cls, model: PreTrainedModel, batches: Batches, *, progress: bool = True) -> Self:
        """What the model chooses in one pass over batches; the model is unchanged.

        Args:
            model: a mixture of experts of `transformers`, float or int8.
            batches: int64 token ids ``[B, T]``, or mappings with ``input_ids`` and, if there is
                padding, ``attention_mask``. Padding is left out.
            progress: show a bar with the batches done and the time left. It hides when the output
                is not a terminal, and where transformers' progress bars are switched off.

        Raises:
            TypeError: a batch or the model is of the wrong kind.
            ValueError: a batch does not fit the model, there is none, the model has no experts, or
                its layers have different numbers of them.
        """
        statistics: Self | None = None
        for layers in routings(model, batches, progress=progress):
            indices = [layer.index for layer in layers]
            if statistics is None:
                found = experts_modules(model)
                statistics = cls(tuple(found), number_of_experts(found), indices[0].shape[1])
            for number, layer in enumerate(layers):
                before = indices[max(number - _AHEAD, 0) : number][::-1]
                statistics.add(number, layer.index, layer.weights, before)
        assert statistics is not None  # `routings` refuses to have no batch
        return statistics

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        *,
        experts_per_token: int,
        layers: Sequence[str] | None = None,
    ) -> Self:
        """Plain popularity: nothing is known of router weights and of what follows what.

        Args:
            counts: tokens that chose each expert, whole numbers ``[L, E]``.
            experts_per_token: A.
            layers: their names.

        Raises:
            ValueError: the counts are no such table, one is negative, or the rest does not fit.
        """
        table = table_of(counts)
        statistics = cls(
            len(table) if layers is None else layers, table.shape[1], experts_per_token
        )
        if len(statistics.layers) != len(table):
            raise ValueError(
                f"`layers` must name the {len(table)} layers of `counts`, got "
                f"{len(statistics.layers)} names."
            )
        statistics.counts[:] = table
        statistics.tokens = round(int(table[0].sum()) / experts_per_token)
        return statistics

    def add(
        self,
        layer: int,
        index: NDArray[np.int64],
        weights: NDArray[np.floating[Any]] | None,
        before: Sequence[NDArray[np.int64]] = (),
    ) -> None:
        """Count what one layer chose for some tokens. Fast, for it is called for every token.

        Args:
            layer: in [0, L).
            index: the experts of each token, int64 ``[T, A]``, each once; E stands for none.
            weights: of the router, float ``[T, A]``; None leaves `gate_mass` as it is.
            before: ``index`` of the same tokens in the layers before, the nearest first: three at
                most.

        Raises:
            TypeError: an index is not int64.
            ValueError: a shape does not fit, an index is not in [0, E], a weight is not finite, or
                there are not so many layers before.
        """
        number = self.num_experts
        # [1 + len(before), T, A]
        chosen = np.array(self._checked(layer, index, weights, before))
        if chosen.dtype != np.int64:
            raise TypeError(f"`index` and `before` must be int64, got {chosen.dtype}.")
        has_none = False
        if chosen.size:
            lowest, highest = chosen.min(), chosen.max()
            has_none = bool(highest == number)
            if lowest < 0 or highest > number:
                raise ValueError(
                    f"`index` and `before` must be in [0, {number}], the number of experts "
                    f"standing for none, got {lowest if lowest < 0 else highest}."
                )
        flat = chosen[0].reshape(-1)
        if weights is not None:
            mass = np.bincount(flat, weights.reshape(-1), minlength=number + 1)
            if not math.isfinite(mass.sum()):
                raise ValueError("`weights` must be finite, got NaN or infinity.")
            self.gate_mass[layer] += mass[:number]
        self.counts[layer] += np.bincount(flat, minlength=number + 1)[:number]
        if layer == 0:
            self.tokens += len(index)
        for back, earlier in enumerate(chosen[1:]):
            pairs = earlier[:, :, None] * number + chosen[0][:, None, :]  # [T, A, A]
            if has_none:
                pairs = pairs[(earlier < number)[:, :, None] & (chosen[0] < number)[:, None, :]]
            # Faster than `bincount`, which would make a new [E, E] of every token.
            np.add.at(self.transitions[back, layer - 1 - back].reshape(-1), pairs.reshape(-1), 1)

    def _checked(
        self,
        layer: int,
        index: NDArray[np.int64],
        weights: NDArray[np.floating[Any]] | None,
        before: Sequence[NDArray[np.int64]],
    ) -> list[NDArray[np.int64]]:
        """``index`` and ``before``, all of one shape."""
        self._check_layer(layer)
        if index.ndim != 2 or index.shape[1] != self.experts_per_token:
            raise ValueError(
                f"`index` must have shape [T, {self.experts_per_token}], the experts of each "
                f"token, got {list(index.shape)}."
            )
        if len(before) > min(layer, _AHEAD):
            raise ValueError(
                f"`before` must have at most {min(layer, _AHEAD)} entries at layer {layer}, got "
                f"{len(before)}."
            )
        given = [index, *before]
        for one in (*given, *([] if weights is None else [weights])):
            if one.shape != index.shape:
                raise ValueError(
                    f"`weights` and `before` must have the shape of `index`, {list(index.shape)}, "
                    f"got {list(one.shape)}. They are of the same tokens."
                )
        return given

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"`layer` must be in [0, {len(self.layers) - 1}], got {layer!r}.")

    def merge(self, other: "RoutingStatistics") -> Self:
        """What both have seen together; neither is changed.

        Raises:
            ValueError: they are of different models.
        """
        other.check(len(self.layers), self.num_experts)
        if other.experts_per_token != self.experts_per_token:
            raise ValueError(
                f"`other` must be of a model with {self.experts_per_token} experts per token, got "
                f"{other.experts_per_token}."
            )
        unknown = _names(len(self.layers))
        if self.layers != other.layers and unknown not in (self.layers, other.layers):
            one, two = next(p for p in zip(self.layers, other.layers, strict=True) if p[0] != p[1])
            raise ValueError(
                f"`other` must be of the same model, but has `{two}` where this has `{one}`."
            )
        layers = other.layers if self.layers == unknown else self.layers
        merged = type(self)(layers, self.num_experts, self.experts_per_token)
        merged.tokens = self.tokens + other.tokens
        for name in ("counts", "gate_mass", "transitions"):
            np.add(getattr(self, name), getattr(other, name), out=getattr(merged, name))
        return merged

    @property
    def popularity(self) -> NDArray[np.float64]:
        """The share of a layer's tokens that chose each expert, float64 ``[L, E]``.

        Rows sum to A. Where nothing was seen every expert has A / E.
        """
        return np.stack([self._popularity(layer) for layer in range(len(self.layers))])

    def _popularity(self, layer: int) -> NDArray[np.float64]:
        counts = self.counts[layer]
        total = int(counts.sum())
        shares = counts / total if total else np.full(len(counts), 1 / len(counts))
        return self.experts_per_token * shares

    def scores(self, layer: int, chosen: ArrayLike, ahead: int = 1) -> NDArray[np.float64]:
        """How likely each expert of the layer ahead is, after what this one chose.

        The sum over the chosen experts i of P(j | i), the share of j among all that followed i.
        Choices in proportion to the popularity of the layer ahead are added to those seen, so that
        without transitions the scores of one token are the popularity.

        Args:
            layer: that chose.
            chosen: int64, of any shape: the experts of a token, or of several. E is passed over;
                without an expert the scores are the popularity.
            ahead: 1, 2 or 3 layers.

        Returns:
            float64 ``[E]``; the sum is the number of experts in ``chosen``.

        Raises:
            ValueError: there is no such layer, or no such expert.
        """
        self._check_layer(layer)
        if not 1 <= ahead <= _AHEAD or layer + ahead >= len(self.layers):
            raise ValueError(
                f"`ahead` must be in [1, {_AHEAD}] and lead to one of the {len(self.layers)} "
                f"layers, got {ahead!r} at layer {layer}."
            )
        experts = np.asarray(chosen).reshape(-1)
        if len(experts):
            if experts.dtype.kind != "i" or experts.min() < 0 or experts.max() > self.num_experts:
                raise ValueError(
                    f"`chosen` must be integers in [0, {self.num_experts}], got {chosen!r:.80}."
                )
            experts = experts[experts < self.num_experts]
        popularity = self._popularity(layer + ahead)
        if not len(experts):
            return popularity
        added = _SMOOTHING * self.num_experts
        followed = self.transitions[ahead - 1, layer, experts]  # [experts, E]
        shares = (followed + popularity * (added / self.experts_per_token)) / (
            followed.sum(1, keepdims=True) + added
        )
        scores: NDArray[np.float64] = shares.sum(0)
        return scores

    def predict(self, layer: int, chosen: ArrayLike, ahead: int = 1) -> NDArray[np.int64]:
        """The experts of layer ``layer + ahead``, int64 ``[E]``, the most likely first.

        As `scores`; of equals the lower number comes first.
        """
        return np.argsort(-self.scores(layer, chosen, ahead), kind="stable")

    def check(self, layers: int, num_experts: int) -> None:
        """Refuse statistics of another model.

        Raises:
            ValueError: the number of layers with experts, or of experts in each, is another.
        """
        if (len(self.layers), self.num_experts) != (layers, num_experts):
            raise ValueError(
                f"Routing statistics must be of a model with {layers} layers of {num_experts} "
                f"experts, got those of one with {len(self.layers)} layers of {self.num_experts}. "
                "Collect them from the model with `RoutingStatistics.collect(model, batches)`."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, under exactly this name; one that is there is replaced.

        Raises:
            OSError: it cannot be written; what was there is left.
        """
        values = {name: np.asarray(getattr(self, name)) for name in _STORED}
        write_arrays(Path(path), values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, experts_per_token: int | None = None) -> Self:
        """Read what `save` wrote, or counts in JSON. Nothing is unpickled.

        JSON is a list of layers, each a list of counts of its experts, or an object with such a
        list as "expert_popularity".

        Args:
            path: of the file.
            experts_per_token: A, which JSON counts do not tell; else it must be what is stored.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of a newer haq, or something else, or A is missing or wrong.
        """
        path = Path(path)
        data = path.read_bytes()
        if not is_archive(data):
            return cls._from_json(path, data, experts_per_token)
        values = read_arrays(path, data, _STORED)
        read = cls._empty(path, values)
        if experts_per_token not in (None, read.experts_per_token):
            raise ValueError(
                f"`experts_per_token` must be {read.experts_per_token}, as in `{path}`, got "
                f"{experts_per_token!r}. Leave it out."
            )
        read.tokens = int(values["tokens"])
        # Into arrays of this process: `add` needs them in C order, which a file need not have.
        read.counts[:] = values["counts"]
        read.gate_mass[:] = values["gate_mass"]
        read.transitions[:] = values["transitions"]
        return read

    @classmethod
    def _empty(cls, path: Path, values: Mapping[str, NDArray[Any]]) -> Self:
        layers, experts = values["layers"].tolist(), values["counts"].shape[1]
        try:
            return cls(layers, experts, int(values["experts_per_token"]))
        except ValueError as error:
            raise ValueError(f"`{path}` is damaged: {error}") from error

    @classmethod
    def _from_json(cls, path: Path, data: bytes, experts_per_token: int | None) -> Self:
        counts = json_counts(path, data)
        if experts_per_token is None:
            # "total_input_tokens" of published counts is the number of words, and no help.
            raise ValueError(
                f"`experts_per_token` must be given for `{path}`: counts alone do not tell how "
                "many experts a token chose. Pass 2 for Mixtral."
            )
        try:
            return cls.from_counts(counts, experts_per_token=experts_per_token)
        except ValueError as error:
            raise ValueError(f"`{path}`: {error}") from error


def routing_trace(model: PreTrainedModel, batches: Batches) -> NDArray[np.int64]:
    """The experts of every token that is not padding: int64 ``[T, L, A]``.

    Args:
        model: as in `RoutingStatistics.collect`, which says what is raised, too.
        batches: as there. Tokens come in the order of batches, rows and positions.
    """
    parts = [np.stack([layer.index for layer in layers], 1) for layers in routings(model, batches)]
    return np.concatenate(parts)


def _names(layers: Sequence[str] | int) -> tuple[str, ...]:
    if isinstance(layers, int):
        layers = [f"layer {number}" for number in range(layers)]
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"`layers` must be a list of names or their number, got {layers!r:.80}.")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"`layers` must be one or more names, each another one, got {list(layers)!r:.80}."
        )
    return tuple(layers)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
