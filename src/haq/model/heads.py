"""The output head of a language model: where it is, and what ties it to the embeddings."""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from haq.model.linears import is_linear

# A dictionary, a key in it, and the value to be.
Place = tuple[dict[str, Any], str, Any]


def find_head(model: PreTrainedModel) -> str | None:
    """The name of the linear that gives the logits; None if there is none, or it is no linear.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> find_head(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
        'lm_head'
    """
    head = model.get_output_embeddings()
    if head is None or not is_linear(head):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def untied(model: PreTrainedModel, head: str) -> list[Place]:
    """What to write for the head to have a weight of its own from now on.

    As long as a configuration says ``tie_word_embeddings``, `transformers` puts the embeddings'
    weight into the head whenever it is asked to tie weights. The configuration may belong to other
    models as well, so that every module of this one gets a copy in its place.

    Args:
        model: a model with a head.
        head: its name.
    """
    places: list[Place] = []
    for owner in _owners(model, head):
        config = owner.config
        if getattr(config, "tie_word_embeddings", False):
            own = copy.deepcopy(config)
            own.tie_word_embeddings = False
            dictionaries = [vars(module) for module in model.modules()]
            places += [(d, "config", own) for d in dictionaries if d.get("config") is config]
    tied = vars(model).get("all_tied_weights_keys") or {}
    left = {name: other for name, other in tied.items() if not name.startswith(f"{head}.")}
    if left != tied:
        places.append((vars(model), "all_tied_weights_keys", left))
    return places


def _owners(model: PreTrainedModel, head: str) -> Iterator[PreTrainedModel]:
    """The model, and every model in it that has the head inside."""
    path = head.split(".")
    for length in range(len(path)):
        module: nn.Module = model.get_submodule(".".join(path[:length]))
        if isinstance(module, PreTrainedModel):
            yield module


def write_at_once(places: Sequence[Place]) -> None:
    """Write all of the values, or none: no interrupt of Python's comes between two of them.

    They are written by one call that runs no line of Python.
    """
    dictionaries, keys, values = zip(*places, strict=True) if places else ((), (), ())
    deque(map(dict.__setitem__, dictionaries, keys, values), maxlen=0)
