"""What a model in two places does not let happen by half, and models that changed meanwhile."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import haq
from haq import ExpertOffloader, OffloadConfig
from haq.nn import Int8Linear
from haq.offload.budget import dense_bytes, parse_memory
from haq.offload.collect import experts_modules
from haq.offload.rehearsal import rehearse
from tests.architectures import MIXTURES, VOCABULARY
from tests.offload.offloading import build, generated, logits_of, offloader, plain_tokens

CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "half of the decoder": lambda model: model.model.half(),
    "to of a block": lambda model: model.model.layers[0].to(torch.float64),
    "half of a mixture": lambda model: model.model.layers[0].mlp.half(),
    "numbers of others": lambda model: model.load_state_dict(build("mixtral").state_dict()),
    "numbers of the decoder": lambda model: model.model.load_state_dict({}, strict=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_has_changed_when_a_change_is_refused(
    change: Callable[[PreTrainedModel], object],
) -> None:
    model = build("mixtral")
    before = {name: (p, p.dtype, p.clone()) for name, p in model.named_parameters()}
    with offloader(model, 2):
        torch.manual_seed(1)
        with pytest.raises(RuntimeError, match="detach"):
            change(model)
        assert torch.equal(generated(model), plain_tokens("mixtral"))
    for name, parameter in model.named_parameters():
        kept, dtype, values = before[name]
        assert parameter is kept
        assert parameter.dtype == dtype
        assert torch.equal(parameter, values)
    change(model)  # It can be done when the model is in one place.


def test_weights_that_were_replaced_after_planning_are_used() -> None:
    model, other = build("mixtral"), MIXTURES["mixtral"]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    planned = offloader(model, 3)
    model.load_state_dict(other.state_dict(), assign=True)
    expected = logits_of(other)
    with planned:
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_cast_after_planning_is_refused() -> None:
    model = build("mixtral")
    planned = offloader(model, 3)
    model.bfloat16()
    with pytest.raises(RuntimeError, match="Make a new `ExpertOffloader`"):
        planned.attach()
    assert not planned.attached
    logits_of(model)


def test_experts_that_were_quantized_after_planning_are_refused() -> None:
    model = build("mixtral")
    planned = offloader(model, 3)
    ids = torch.randint(VOCABULARY, (2, 16))
    haq.quantize_model(model, [ids], haq.QuantizationConfig(search_tokens=32), progress=False)
    with pytest.raises(RuntimeError, match="other shapes or dtypes"):
        planned.attach()


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("16gb", 16 * 10**9),
        ("16GB", 16 * 10**9),
        ("16gib", 16 * 2**30),
        ("1.5MiB", 3 * 2**19),
        (" 4096 ", 4096),
        (4096, 4096),
    ],
)
def test_sizes_are_read_as_people_mean_them(written: str | int, size: int) -> None:
    assert parse_memory(written) == size


def test_options_are_read_before_anything_is_planned() -> None:
    config = OffloadConfig(pinned_memory="16 elephants")
    with pytest.raises(ValueError, match="`pinned_memory` must be a size"):
        ExpertOffloader(build("mixtral"), device="cpu", config=config)
    with pytest.raises(ValueError, match="`device` must be one that torch can use"):
        ExpertOffloader(build("mixtral"), device=None)  # type: ignore[arg-type]


def test_the_cache_of_windows_holds_what_they_are_views_of() -> None:
    """gpt-oss keeps the last tokens of a prompt as a view of all of them."""
    model = MIXTURES["gpt-oss"]()
    ids = torch.randint(VOCABULARY, (1, 100))
    cache = model.model(input_ids=ids, use_cache=True).past_key_values
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    found = rehearse(model, 1, 100, experts_modules(model))
    # And a number or two about where the window is.
    assert 0 <= found.cache_bytes - sum(held.values()) <= 64


def test_zero_points_of_dense_layers_are_counted() -> None:
    model = build("qwen3-moe", "int8")
    experts = experts_modules(model).values()
    before = dense_bytes(model, experts)
    inside = {id(module) for each in experts for module in each.modules()}
    dense = [m for m in model.modules() if isinstance(m, Int8Linear) and id(m) not in inside]
    layer = next(each for each in dense if not each.asymmetric)
    layer.asymmetric = True
    assert dense_bytes(model, experts) == before + 4 * layer.out_features
