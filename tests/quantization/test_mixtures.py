"""`quantize_model` on mixtures of experts: what becomes int8, what stays, and who chose whom."""

import copy
import functools
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from haq import QuantizationConfig, quantization_report, quantize_model
from haq.model.blocks import BlockBatch, capture_block_inputs, find_blocks, run_block
from haq.model.experts import ExpertList, unfuse
from haq.nn import Int8Experts, Int8Linear
from haq.quantization import block as block_module
from haq.quantization import experts as experts_module
from haq.quantization import work as work_module
from haq.quantization.block import quantize_block
from haq.quantization.hessian import SecondMoment
from haq.quantization.report import find_report
from haq.quantization.work import BlockWork
from tests.architectures import EXCLUDE, EXPERTS, HIDDEN, INNER, LAYERS, MIXTURES, SLOTS, token_ids

CALIBRATION = [token_ids(2, 64, seed=seed) for seed in range(4)]
UNSEEN = token_ids(4, 32, seed=99)


def config_of(name: str, *exclude: str, **options: object) -> QuantizationConfig:
    return QuantizationConfig(exclude=("lm_head", *EXCLUDE.get(name, ()), *exclude), **options)


def quantize(
    name: str,
    *exclude: str,
    model: PreTrainedModel | None = None,
    calibration: Any = CALIBRATION,
    **options: object,
) -> PreTrainedModel:
    model = MIXTURES[name]() if model is None else model
    config = config_of(name, *exclude, **options)
    return quantize_model(model, calibration, config, progress=False)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """With the defaults; to be looked at and called only."""
    return quantize(name)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def divergence(reference: PreTrainedModel, model: PreTrainedModel) -> Tensor:
    """KL of every token of `UNSEEN`."""
    expected, got = (logits_of(m, UNSEEN).float().log_softmax(-1) for m in (reference, model))
    return (expected.exp() * (expected - got)).sum(-1).flatten()


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    torch.testing.assert_close(other_state, state, rtol=0, atol=0)


# --- What becomes int8 ----------------------------------------------------------------------------

# Weights of the blocks with two dimensions or more that stay float: routers, gates of shared
# experts, and in one family what was excluded.
STAYS_FLOAT = {
    "mixtral": {"0.mlp.gate.weight", "1.mlp.gate.weight"},
    "qwen2-moe": {"1.mlp.gate.weight", "1.mlp.shared_expert_gate.weight"},
    "qwen3-moe": {"0.mlp.gate.weight", "1.mlp.gate.weight"},
    "olmoe": {"0.mlp.gate.weight", "1.mlp.gate.weight"},
    "phimoe": {"0.mlp.router.weight", "1.mlp.router.weight"},
    "deepseek-v2": {"1.mlp.gate.weight"},
    "deepseek-v3": {"1.mlp.gate.weight"},
    "gpt-oss": {"0.mlp.router.weight", "1.mlp.router.weight"},
    "granite-moe": {"0.block_sparse_moe.router.weight", "1.block_sparse_moe.router.weight"},
    "granite-moe-shared": {
        "0.block_sparse_moe.router.weight",
        "1.block_sparse_moe.router.weight",
    },
    "jamba": {
        "0.mamba.A_log",
        "0.mamba.conv1d.weight",
        "0.mamba.dt_proj.weight",
        "1.feed_forward.router.weight",
    },
    "ernie4_5-moe": {
        "1.mlp.gate.weight",
        "1.mlp.gate.moe_statics.e_score_correction_bias",
    },
    "hunyuan-moe": {"0.mlp.gate.wg.weight", "1.mlp.gate.wg.weight"},
    "glm4-moe": {"1.mlp.gate.weight"},
    "nemotron-h": {"0.mixer.gate.weight"},
}

# Experts modules, and the linears beside them that every token goes through, in the whole model.
EXPERTS_AND_LINEARS = {
    "mixtral": (2, 8),
    "qwen2-moe": (1, 14),
    "qwen3-moe": (2, 8),
    "olmoe": (2, 8),
    "phimoe": (2, 8),
    "deepseek-v2": (1, 16),
    "deepseek-v3": (1, 16),
    "gpt-oss": (2, 8),
    "granite-moe": (2, 8),
    "granite-moe-shared": (2, 12),
    "jamba": (1, 10),
    "ernie4_5-moe": (1, 14),
    "hunyuan-moe": (2, 14),
    "glm4-moe": (1, 14),
    "nemotron-h": (1, 6),
}


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters of the blocks with two dimensions or more, by name in the list of blocks."""
    _, blocks = find_blocks(model)
    named = blocks.named_parameters()
    # The biases of all experts are one parameter [E, N].
    return {n: p for n, p in named if p.dim() >= 2 and not n.endswith("_proj_bias")}


@pytest.mark.parametrize("name", MIXTURES)
def test_every_weight_becomes_int8_but_routers_and_exclusions(name: str) -> None:
    before, after = MIXTURES[name](), quantized(name)
    assert set(matrices(after)) == STAYS_FLOAT[name]
    expected = sum(p.numel() for n, p in matrices(before).items() if n not in STAYS_FLOAT[name])
    _, blocks = find_blocks(after)
    int8 = {n: m for n, m in blocks.named_modules() if isinstance(m, Int8Linear)}
    assert {layer.weight.dtype for layer in int8.values()} == {torch.int8}
    assert sum(layer.weight.numel() for layer in int8.values()) == expected

    experts = {n for n, m in blocks.named_modules() if isinstance(m, Int8Experts)}
    dense = [n for n in int8 if not any(n.startswith(f"{e}.") for e in experts)]
    assert (len(experts), len(dense)) == EXPERTS_AND_LINEARS[name]
    # Outside of the blocks every bit is the same.
    prefix, _ = find_blocks(before)
    kept = {key: value for key, value in before.state_dict().items() if prefix not in key}
    state = after.state_dict()
    torch.testing.assert_close({key: state[key] for key in kept}, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_report_lists_every_layer(name: str) -> None:
    model = quantized(name)
    report = quantization_report(model)
    prefix, blocks = find_blocks(model)
    expected = {}
    for path, module in blocks.named_modules():
        if isinstance(module, Int8Experts):
            up_name = "gate_up_proj" if name != "nemotron-h" else "up_proj"
            for layers, matrix in ((module.up, up_name), (module.down, "down_proj")):
                for i, layer in enumerate(layers):
                    expected[f"{prefix}.{path}.{i}.{matrix}"] = (tuple(layer.weight.shape), i)
        elif isinstance(module, Int8Linear) and ".experts." not in path:
            expected[f"{prefix}.{path}"] = (tuple(module.weight.shape), None)
    assert {
        layer.name: ((layer.out_features, layer.in_features), layer.expert)
        for layer in report.layers
    } == expected
    assert len(report.layers) == len(expected)
    assert report.complete
    assert report.tokens == 4 * 2 * 64
    for layer in report.layers:
        few = layer.expert is not None and layer.tokens < experts_module.MIN_TOKENS
        assert layer.rounding == ("nearest" if few else "hessian")
        assert bool(layer.note) == few
        assert 0 < layer.error_after < 1e-2
    routers = {f"{prefix}.{path}" for path in STAYS_FLOAT[name]}
    for kept in report.kept_float:
        assert kept == "lm_head" or any(path.startswith(kept) for path in routers)


# The norm before the experts and the routers that read it, in one block.
ROUTERS = {
    "mixtral": ("post_attention_layernorm", ["mlp.gate"]),
    "qwen2-moe": ("post_attention_layernorm", ["mlp.gate", "mlp.shared_expert_gate"]),
    "qwen3-moe": ("post_attention_layernorm", ["mlp.gate"]),
    "olmoe": ("post_attention_layernorm", ["mlp.gate"]),
    "phimoe": ("post_attention_layernorm", ["mlp.router"]),
    "deepseek-v2": ("post_attention_layernorm", ["mlp.gate"]),
    "deepseek-v3": ("post_attention_layernorm", ["mlp.gate"]),
    "gpt-oss": ("post_attention_layernorm", ["mlp.router"]),
    "granite-moe": ("post_attention_layernorm", ["block_sparse_moe.router"]),
    "granite-moe-shared": ("post_attention_layernorm", ["block_sparse_moe.router"]),
    "jamba": ("pre_ff_layernorm", ["feed_forward.router"]),
    "ernie4_5-moe": ("post_attention_layernorm", ["mlp.gate"]),
    "hunyuan-moe": ("post_attention_layernorm", ["mlp.gate.wg"]),
    "glm4-moe": ("post_attention_layernorm", ["mlp.gate"]),
    "nemotron-h": ("norm", ["mixer.gate"]),
}


def sparse_blocks(name: str, model: PreTrainedModel) -> dict[int, nn.Module]:
    """The blocks with a router, by their number."""
    _, blocks = find_blocks(model)
    router = ROUTERS[name][1][0]
    return {i: b for i, b in enumerate(blocks) if router in dict(b.named_modules())}


def routed_experts(name: str, block: nn.Module) -> nn.Module:
    """What holds the experts of a sparse block: transformers' own or int8."""
    return block.get_submodule(experts_path(name))


def experts_path(name: str) -> str:
    return f"{ROUTERS[name][1][0].split('.')[0]}.experts"


def pairs_of_blocks(
    name: str, before: PreTrainedModel, after: PreTrainedModel
) -> list[tuple[nn.Module, nn.Module]]:
    """The sparse blocks of both."""
    old, new = sparse_blocks(name, before), sparse_blocks(name, after)
    return list(zip(old.values(), new.values(), strict=True))


# --- Outliers -------------------------------------------------------------------------------------

# Last parts of the names of everything that reads the norm before the experts.
_READERS = {
    *("gate.weight", "router.weight", "wg.weight", "shared_expert_gate.weight"),
    *("gate_up_proj", "gate_proj.weight", "up_proj.weight", "up_proj", "input_linear.weight"),
}
OUTLIERS, FACTOR = (5, 17), 256.0  # A power of two: planting it rounds nothing.


def planted(name: str) -> PreTrainedModel:
    """The same function, with two channels of what the experts read 256 times larger."""
    model = MIXTURES[name]()
    norm_name, _ = ROUTERS[name]
    for block in sparse_blocks(name, model).values():
        for parameter in block.get_submodule(norm_name).parameters():
            parameter.data[list(OUTLIERS)] *= FACTOR
        for path, parameter in block.named_parameters():
            ends = {path.rpartition(".")[2], ".".join(path.split(".")[-2:])}
            if ends & _READERS and "attn" not in path:
                transposed = name == "gpt-oss" and path.endswith("gate_up_proj")
                matrix = parameter.data.mT if transposed else parameter.data
                assert matrix.shape[-1] == HIDDEN
                matrix[..., list(OUTLIERS)] /= FACTOR
    return model


IN_16_BITS = [
    *product(MIXTURES, [torch.bfloat16]),
    *product(["mixtral", "phimoe", "deepseek-v3", "gpt-oss"], [torch.float16]),
]


# --- Folding --------------------------------------------------------------------------------------


def folded_block(
    block: nn.Module,
    batches: list[BlockBatch],
    config: QuantizationConfig,
    excluded: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
) -> nn.Module:
    """What `quantize_block` would give if nothing were rounded to int8: float32."""
    works: list[BlockWork] = []
    finished: list[tuple[nn.Module, nn.Module]] = []

    class Work(BlockWork):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            works.append(self)

    def finish(work: Any, *arguments: Any) -> object:
        finished.append((work.experts_of, copy.deepcopy(work.expert)))  # It is used up.
        return original(work, *arguments)

    original = experts_module._Work.finish
    original_init = experts_module._Work.__init__

    def init(work: Any, experts: ExpertList, *rest: Any) -> None:
        work.experts_of = experts
        original_init(work, experts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(block_module, "BlockWork", Work)
        patch.setattr(experts_module._Work, "__init__", init)
        patch.setattr(experts_module._Work, "finish", finish)
        result, _ = quantize_block(block, batches, config, "block", excluded)
    (work,) = works
    for name, experts in work.experts.items():
        smoothed = [expert for owner, expert in finished if owner is experts]
        assert len(smoothed) == len(experts)
        for index, expert in enumerate(smoothed):
            experts[index] = expert
        result.set_submodule(name, experts)
    for name, linear in work.linears.items():
        result.set_submodule(name, linear)
    assert not any(isinstance(module, Int8Linear) for module in result.modules())
    return result.float()


def blocks_and_batches(
    name: str, model: PreTrainedModel, ids: list[Tensor]
) -> Iterator[tuple[nn.Module, list[BlockBatch], frozenset[str]]]:
    """Each block of a float model with what it is given, and what in it is excluded."""
    _, blocks = find_blocks(model)
    batches = [{"input_ids": batch} for batch in ids]
    inputs = capture_block_inputs(model, blocks, batches)
    for i, block in enumerate(blocks):
        given = inputs.of_block(i)
        ends = tuple(pattern.lstrip("*.") for pattern in EXCLUDE.get(name, ()))
        names = {*dict(block.named_modules()), *dict(block.named_parameters())}
        yield block, given, frozenset(n for n in names if ends and n.endswith(ends))
        inputs.hidden = [run_block(block, batch) for batch in given]


def error_of_each_token(reference: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
    """Relative to what the block adds to its input: ``[tokens]``."""
    error = (output - reference).norm(dim=-1) / (reference - hidden).norm(dim=-1)
    return error.flatten()


@pytest.mark.parametrize(("name", "dtype"), [*product(MIXTURES, [torch.float32]), *IN_16_BITS])
def test_smoothing_does_not_change_what_a_block_computes(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planted(name).to(dtype)
    config = config_of(name, rounding="nearest")
    sparse = sparse_blocks(name, model)
    # Rounding of float32. The bias of a LayerNorm is rounded to 16 bits again.
    bias = name == "phimoe" and dtype != torch.float32
    tolerance = 2 * torch.finfo(dtype).eps if bias else 2e-5
    given = blocks_and_batches(name, model, [*CALIBRATION, UNSEEN])
    for index, (block, batches, excluded) in enumerate(given):
        *calibration, unseen = batches
        folded = folded_block(block, calibration, config, excluded, monkeypatch)
        unseen = unseen.float()
        # Not what `folded_block` started from: transformers' own block.
        reference = run_block(copy.deepcopy(block).float(), unseen)
        output = run_block(folded, unseen)
        errors = error_of_each_token(reference, output, unseen.hidden)
        # Tokens that two experts suit equally well could go to the other one.
        assert (errors > tolerance).float().mean() <= (0.03 if bias else 0.0), errors.sort()[0]
        if index in sparse:
            norm = f"{ROUTERS[name][0]}.weight"
            moved = block.get_parameter(norm).float() / folded.get_parameter(norm)
            # The outliers are gone: they differ from the other channels by more than all others.
            assert moved[list(OUTLIERS)].min() > 8 * moved.median()


@pytest.mark.parametrize("token", [0, 2, 9])  # Whose choice turned when scales were folded.
def test_a_token_that_two_experts_suit_equally_well_prevents_no_scale(token: int) -> None:
    model = MIXTURES["mixtral"]()
    gate = model.model.layers[0].mlp.gate
    seen: list[Tensor] = []
    handle = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(model, CALIBRATION[0])
    handle.remove()
    hidden = seen[0].reshape(-1, HIDDEN)[token].double()
    weight = gate.weight.data.double()
    logits = weight @ hidden
    second, third = logits.argsort(descending=True)[1:3]
    weight[third] += (logits[second] - logits[third]) * hidden / hidden.square().sum()
    gate.weight.data.copy_(weight)
    tied = gate.weight.data.double() @ hidden
    assert (tied[second] - tied[third]).abs() < 1e-5
    quantize("mixtral", model=model)
    layers = quantization_report(model).layers
    assert {layer.note for layer in layers} == {""}
    assert "p4" in {layer.smoothing.split()[0] for layer in layers if layer.name.endswith("q_proj")}


# --- The logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_logits_stay_close(name: str) -> None:
    kl = divergence(MIXTURES[name](), quantized(name))
    assert kl.median() > 1e-6
    # Random weights are int8 at its worst, and a token that goes to another expert costs most. Few
    # do, but they are most of the mean, and a last bit decides which.
    of_most = kl.sort().values[: -len(kl) // 10]
    assert of_most.mean() < 2e-3
    assert kl.mean() < 3e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_each_step_pays_where_there_are_outliers(name: str) -> None:
    reference = planted(name)
    torch.testing.assert_close(logits_of(reference, UNSEEN), logits_of(MIXTURES[name](), UNSEEN))

    def cost(**options: object) -> float:
        model = quantize(name, model=planted(name), **options)
        return float(divergence(reference, model).mean())

    nearest = cost(smoothing="none", rounding="nearest")
    assert nearest > 0.02
    assert cost() < 0.2 * nearest


@pytest.mark.parametrize(("name", "dtype"), IN_16_BITS)
def test_a_router_of_16_bits_takes_its_scale_without_rounding(
    name: str, dtype: torch.dtype
) -> None:
    before = planted(name).to(dtype)
    model = quantize(name, model=copy.deepcopy(before))
    dtypes = {path: parameter.dtype for path, parameter in before.named_parameters()}
    after = dict(model.named_parameters())
    assert {path: p.dtype for path, p in after.items()} == {path: dtypes[path] for path in after}
    assert {after[path].dtype for path in after} == {dtype}

    norm_name, routers = ROUTERS[name]
    for old, new in pairs_of_blocks(name, before, model):
        scale = (
            old.get_submodule(norm_name).weight.double()
            / new.get_submodule(norm_name).weight.double()
        )
        exponents = scale.log2()
        assert torch.equal(exponents, exponents.round())
        assert exponents.unique().numel() > 1
        for router in routers:
            weight, expected = (
                b.get_submodule(router).weight.detach().double() for b in (new, old)
            )
            assert weight.shape[1] == HIDDEN
            assert torch.equal(weight / scale, expected)

    ids = UNSEEN
    got, expected = logits_of(model, ids), logits_of(before, ids)
    assert got.dtype == expected.dtype
    # As in float32, but for what 16 bits add, up to 1.4 times; routers without their scale make 1.9
    # to 20 times as much. Some tokens go to other experts than before; medians do not see them.
    exact = copy.deepcopy(before).float()
    in_float32 = quantize(name, model=copy.deepcopy(exact))
    noise = _median_noise(got, expected)
    assert noise < 1.6 * _median_noise(logits_of(in_float32, ids), logits_of(exact, ids))


def _median_noise(got: Tensor, expected: Tensor) -> float:
    """Of tokens, relative."""
    difference = (got.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).median())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    model = quantized(name)
    together = logits_of(model, UNSEEN)
    alone = torch.cat([logits_of(model, row[None]) for row in UNSEEN])
    # Attention sums in another order, and once in a while an input between two integers goes the
    # other way. The logits are of size 1.
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-2)
    assert (together - alone).abs().median() < 1e-5
    assert together.std() > 0.1


# --- Copies, threads, the compiler and the same bytes ---------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_copies_and_pickles_give_the_same_logits(name: str) -> None:
    model = quantized(name)
    expected = logits_of(model, UNSEEN)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(logits_of(other, UNSEEN), expected)
        assert quantization_report(other) == quantization_report(model)
        assert_same_bits(other, model)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_call_gives_the_same_bytes_and_the_same_report(name: str) -> None:
    torch.manual_seed(1234)
    again = quantize(name)
    assert_same_bits(again, quantized(name))
    assert quantization_report(again) == quantization_report(quantized(name))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_compiled_model_gives_the_same_logits(name: str) -> None:
    torch.compiler.reset()
    model = quantized(name)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits_of(compiled, UNSEEN), logits_of(model, UNSEEN))


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_threads_get_what_one_gets(name: str) -> None:
    model = quantized(name)
    prompts = [token_ids(2, 20 + i, seed=i) for i in range(2)]
    expected = [logits_of(model, ids) for ids in prompts]
    results: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        results[index] += [logits_of(model, prompts[index]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 20
        assert all(torch.equal(logits, expected[index]) for logits in results[index])


# --- Padding in the calibration set ---------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_tokens_at_padding_have_no_influence(name: str) -> None:
    ids = token_ids(3, 48)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    mask[2, -4:] = 0
    first, second = (
        quantize(
            name,
            calibration=[{"input_ids": torch.where(mask == 1, ids, other), "attention_mask": mask}],
        )
        for other in (torch.zeros_like(ids), token_ids(3, 48, seed=50))
    )
    assert_same_bits(first, second)
    report = quantization_report(first)
    assert report == quantization_report(second)
    assert report.tokens == 3 * 48 - 19 - 4
    assert [sum(routing.tokens) for routing in report.routing] == [SLOTS * report.tokens] * len(
        sparse_blocks(name, first)
    )
    assert {layer.tokens for layer in report.layers if layer.expert is None} == {report.tokens}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss", "jamba", "granite-moe"])
def test_a_padded_batch_counts_like_the_same_tokens_without_padding(name: str, side: str) -> None:
    ids = token_ids(2, 64)
    left = 6 if side == "left" else 0
    padded = nn.functional.pad(ids, (left, 6 - left))
    mask = nn.functional.pad(torch.ones_like(ids), (left, 6 - left))
    model = quantize(name, calibration=[{"input_ids": padded, "attention_mask": mask}])
    plain = quantize(name, calibration=[ids])
    report, expected = quantization_report(model), quantization_report(plain)
    assert report.tokens == expected.tokens == 128
    assert [r.tokens for r in report.routing] == [r.tokens for r in expected.routing]
    # Sums of another length are rounded otherwise, and a weight between two integers may go the
    # other way; hardly any is.
    differing = [
        (model.get_submodule(path).weight != module.weight).float().mean().item()
        for path, module in plain.named_modules()
        if isinstance(module, Int8Linear)
    ]
    assert sum(differing) / len(differing) < 0.01


# --- Who chose whom -------------------------------------------------------------------------------

STARVED = 2


def without_tokens(name: str) -> PreTrainedModel:
    """With one expert that no token ever chooses, in every layer that has experts."""
    model = MIXTURES[name]()
    for block in sparse_blocks(name, model).values():
        router = block.get_submodule(ROUTERS[name][1][0])
        if name == "mixtral":
            # Of two opposite numbers one is positive, and zero is behind it.
            router.top_k = 1
            router.weight.data[0] = -router.weight.data[1]
            router.weight.data[STARVED] = 0
        else:
            bias = {"gpt-oss": "bias", "deepseek-v3": "e_score_correction_bias"}[name]
            getattr(router, bias).data[STARVED] = -100.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_an_expert_without_tokens_works_and_is_reported(name: str, dtype: torch.dtype) -> None:
    before = without_tokens(name).to(dtype)
    model = quantize(name, model=copy.deepcopy(before))
    report = quantization_report(model)
    assert len(report.routing) == len(sparse_blocks(name, before))
    for routing in report.routing:
        assert routing.tokens[STARVED] == 0
        assert STARVED in routing.starved
        few = {e for e, count in enumerate(routing.tokens) if count < experts_module.MIN_TOKENS}
        assert set(routing.starved) == few
        assert f"Starved: {', '.join(map(str, routing.starved))}." in str(report)
    layers = [layer for layer in report.layers if layer.expert == STARVED]
    assert len(layers) == 2 * len(report.routing)
    for layer in layers:
        assert layer.rounding == "nearest"
        assert layer.tokens == 0
        assert layer.note == "0 calibration tokens chose this expert: rounded to nearest"
        # Judged by what the other experts read.
        assert 1e-7 < layer.error_before < 1e-2
        assert 1e-7 < layer.error_after < 1e-2
        twin = layer.name.replace(f".{STARVED}.", ".0.")
        if not layer.name.endswith("down_proj"):  # Its input is smoothed with that of all others.
            assert layer.smoothing == {r.name: r.smoothing for r in report.layers}[twin]

    # Should a token choose it one day, it computes what it did.
    given = copy.deepcopy(before).float()
    batches = [{"input_ids": UNSEEN}]
    for old, new in pairs_of_blocks(name, given, model):
        scale = (
            old.get_parameter(f"{ROUTERS[name][0]}.weight")
            / new.get_parameter(f"{ROUTERS[name][0]}.weight").float()
        ).detach()
        seen: list[Tensor] = []
        handle = old.mlp.experts.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            given(**batches[0])
            handle.remove()
            tokens = seen[0].reshape(-1, HIDDEN)
            index = torch.full((len(tokens), 1), STARVED)
            weights = torch.ones(len(tokens), 1)
            expected = old.mlp.experts(tokens, index, weights)
            got = new.mlp.experts(tokens / scale, index, weights)
        for layer in (new.mlp.experts.up[STARVED], new.mlp.experts.down[STARVED]):
            assert layer.weight_scale.isfinite().all()
            assert (layer.weight_scale > 0).all()
        # About 1 % of int8, twice.
        assert (got - expected).norm() / expected.norm() < 0.03


def chosen_by(model: PreTrainedModel, module: nn.Module, batches: list[Tensor]) -> list[set[int]]:
    """The experts of every token, caught where the experts are called: one set per token."""
    chosen: list[set[int]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        chosen.extend(set(row) for row in index.tolist())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    for ids in batches:
        logits_of(model, ids)
    handle.remove()
    return chosen


@pytest.mark.parametrize("name", MIXTURES)
def test_the_report_counts_the_tokens_of_each_expert(name: str) -> None:
    before = MIXTURES[name]()
    first, block = next(iter(sparse_blocks(name, before).items()))
    # So that nothing before the experts is int8 and every choice is that of the float model.
    prefix, _ = find_blocks(before)
    earlier = [f"{prefix}.{i}" for i in range(first)]
    attention = f"{prefix}.{first}.self_attn"
    exclude = [*earlier, *([attention] if name != "nemotron-h" else [])]
    model = quantize(name, *exclude)
    chosen = chosen_by(before, routed_experts(name, block), CALIBRATION)
    routing = quantization_report(model).routing[0]
    assert routing.name.startswith(f"{prefix}.{first}.")
    assert routing.name.endswith(".experts")
    expected = [sum(e in row for row in chosen) for e in range(len(routing.tokens))]
    assert list(routing.tokens) == expected
    few = [e for e, count in enumerate(expected) if count < experts_module.MIN_TOKENS]
    assert list(routing.starved) == few
    layers = [layer for layer in quantization_report(model).blocks[first].layers]
    assert {layer.expert: layer.tokens for layer in layers if layer.expert is not None} == dict(
        enumerate(expected)
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_the_share_of_tokens_that_change_experts(name: str) -> None:
    model = quantized(name)
    hybrid = MIXTURES[name]()
    prefix, blocks = find_blocks(hybrid)
    _, new_blocks = find_blocks(model)
    reported = quantization_report(model).routing
    for i, routing in zip(sparse_blocks(name, hybrid), reported, strict=True):
        # Both blocks are given what the int8 blocks before produce.
        for j in range(i):
            blocks[j] = new_blocks[j]
        before = chosen_by(hybrid, routed_experts(name, blocks[i]), CALIBRATION)
        after = chosen_by(model, routed_experts(name, new_blocks[i]), CALIBRATION)
        assert len(before) == len(after) == 4 * 2 * 64
        changed = [old != new for old, new in zip(before, after, strict=True)]
        assert routing.name.startswith(f"{prefix}.{i}.")
        assert routing.changed == pytest.approx(sum(changed) / len(changed), abs=1e-9)


def test_some_tokens_do_change_experts() -> None:
    """So that the test before is not about zeros."""
    shares = [r.changed for n in MIXTURES for r in quantization_report(quantized(n)).routing]
    assert sum(share > 0 for share in shares) > 10
    assert max(shares) < 0.05


# --- Exclusions -----------------------------------------------------------------------------------

# Linears that read what the experts read.
BESIDE = {
    "qwen2-moe": ["1.mlp.shared_expert.gate_proj", "1.mlp.shared_expert.up_proj"],
    "deepseek-v2": ["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"],
    "deepseek-v3": ["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"],
    "granite-moe-shared": ["0.shared_mlp.input_linear", "1.shared_mlp.input_linear"],
    "ernie4_5-moe": ["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"],
    "hunyuan-moe": [f"{i}.mlp.shared_mlp.{x}_proj" for i in range(2) for x in ("gate", "up")],
    "glm4-moe": ["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"],
    "nemotron-h": ["0.mixer.shared_experts.up_proj"],
}


@pytest.mark.parametrize("name", MIXTURES)
def test_excluded_experts_keep_their_bits_and_so_does_all_that_a_scale_would_change(
    name: str,
) -> None:
    before = planted(name)
    model = quantize(name, "*.experts", model=copy.deepcopy(before))
    assert not any(isinstance(module, Int8Experts | ExpertList) for module in model.modules())
    prefix, _ = find_blocks(model)
    norm, routers = ROUTERS[name]
    for old, new in pairs_of_blocks(name, before, model):
        experts = routed_experts(name, new)
        assert type(experts) is type(routed_experts(name, old))
        assert_same_bits(experts, routed_experts(name, old))
        for kept in (norm, *routers):
            assert_same_bits(new.get_submodule(kept), old.get_submodule(kept))
    report = quantization_report(model)
    assert report.routing == []
    assert {n.removeprefix(f"{prefix}.") for n in report.kept_float if n.endswith(".experts")} == {
        f"{i}.{experts_path(name)}" for i in sparse_blocks(name, model)
    }
    notes = {r.name.removeprefix(f"{prefix}."): (r.smoothing, r.note) for r in report.layers}
    beside = BESIDE.get(name, [])
    assert {n: note for n, note in notes.items() if note[1]} == {
        n: ("-", f"not smoothed: `{experts_path(name)}` is excluded") for n in beside
    }
    if not beside:  # Those have to do with the outliers.
        assert divergence(before, model).median() < 2e-3


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "granite-moe-shared"])
def test_the_experts_of_one_layer_can_be_excluded(name: str, layer: int) -> None:
    before = MIXTURES[name]()
    path, other_path = (f"model.layers.{i}.{experts_path(name)}" for i in (layer, 1 - layer))
    model = quantize(name, path)
    assert_same_bits(model.get_submodule(path), before.get_submodule(path))
    assert type(model.get_submodule(other_path)) is Int8Experts
    report = quantization_report(model)
    assert [r.name for r in report.routing] == [other_path]
    assert path in report.kept_float
    if layer == 1:  # The first block does not know of the second.
        assert_same_bits(model.model.layers[0], quantized(name).model.layers[0])


@functools.cache
def partly_quantized(name: str) -> PreTrainedModel:
    return quantize(name, "model.layers.1.mlp.experts")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_any_implementation_of_the_experts_that_stay(
    name: str, implementation: str, when: str
) -> None:
    model = MIXTURES[name]()
    if when == "before":
        model.set_experts_implementation(implementation)
    quantize(name, "model.layers.1.mlp.experts", model=model)
    before = logits_of(model, UNSEEN)
    model.set_experts_implementation(implementation)
    after = logits_of(model, UNSEEN)
    # Sums in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert divergence(partly_quantized(name), model).median() < 1e-4
    assert type(model.model.layers[0].mlp.experts) is Int8Experts


# --- Memory ---------------------------------------------------------------------------------------


def counting(
    record: list[weakref.ref], alive: list[int], kind: type = SecondMoment
) -> type[SecondMoment]:
    class Counted(kind):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            alive.append(sum(reference() is not None for reference in record))
            super().__init__(*arguments, **options)
            record.append(weakref.ref(self))

    return Counted


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss", "nemotron-h"])
def test_one_expert_has_a_hessian_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record: list[weakref.ref] = []
    alive: list[int] = []
    monkeypatch.setattr(experts_module, "SecondMoment", counting(record, alive))
    others: list[weakref.ref] = []
    monkeypatch.setattr(work_module, "SecondMoment", counting(others, []))
    others_alive: list[int] = []
    original = experts_module.quantize_experts

    def quantize_experts(*arguments: Any) -> object:
        others_alive.append(sum(reference() is not None for reference in others))
        return original(*arguments)

    monkeypatch.setattr(work_module, "quantize_experts", quantize_experts)
    gc.disable()
    try:
        model = quantize(name)
    finally:
        gc.enable()
    fed = [
        layer
        for layer in quantization_report(model).layers
        if layer.expert is not None and layer.rounding == "hessian"
    ]
    assert alive == [0] * len(fed)
    assert len(fed) >= 6
    # Those of the layers around the experts are gone before the first of them begins.
    assert others_alive == [0] * len(sparse_blocks(name, model))
    assert len(others) > 0


def live_matrices(*shapes: tuple[int, int]) -> int:
    """How many different memories hold a float32 matrix of one of these shapes, views aside."""
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    found = {t.data_ptr() for t in tensors if t.shape in shapes and t.dtype == torch.float32}
    return len(found - {0})


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_float_weights_of_finished_experts_are_freed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, no copies remain, and nothing waits for the garbage collector."""
    model = MIXTURES[name]()
    fused = [
        [StorageWeakRef(p.untyped_storage()) for p in block.mlp.experts.parameters()]
        for block in model.model.layers
    ]
    copies: list[StorageWeakRef] = []
    alive: list[tuple[list[bool], int]] = []
    shapes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))

    def watched_unfuse(*arguments: Any, **options: Any) -> ExpertList:
        experts = unfuse(*arguments, **options)
        copies.extend(
            StorageWeakRef(layer.weight.untyped_storage())
            for expert in experts.experts
            for layer in (expert.up, expert.down)
        )
        return experts

    original = experts_module._Work.finish
    original_errors = experts_module._Work.input_errors
    before_rounding: list[int] = []

    def input_errors(work: Any) -> object:
        errors = original_errors(work)
        before_rounding.append(live_matrices(*shapes) - others)
        return errors

    def finish(*arguments: Any) -> object:
        there = [not reference.expired() for reference in copies]
        alive.append((there, live_matrices(*shapes) - others))
        return original(*arguments)

    monkeypatch.setattr(work_module, "unfuse", watched_unfuse)
    monkeypatch.setattr(experts_module._Work, "input_errors", input_errors)
    monkeypatch.setattr(experts_module._Work, "finish", finish)
    gc.collect()
    others = live_matrices(*shapes)
    gc.disable()
    try:
        quantize(name, model=model)
        assert all(reference.expired() for reference in [*copies, *fused[0], *fused[1]])
        assert live_matrices(*shapes) == others
    finally:
        gc.enable()
    # While scales are chosen every expert is there once.
    assert before_rounding == [2 * EXPERTS] * LAYERS * EXPERTS
    assert len(alive) == LAYERS * EXPERTS
    for call, (there, matrices_there) in enumerate(alive):
        left = EXPERTS - call % EXPERTS
        assert there == [False] * 2 * call + [True] * 2 * left
        assert matrices_there == 2 * left


# --- Interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss", "nemotron-h"])
def test_an_interrupt_among_the_experts_of_a_block_leaves_it_float(
    name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = MIXTURES[name](), MIXTURES[name]()
    first = min(sparse_blocks(name, model))
    calls: list[str] = []

    def interrupt(*arguments: Any) -> object:
        calls.append("called")
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    original = experts_module.round_together
    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "round_together", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(name, model=model)
    (note,) = caught.value.__notes__
    _, blocks = find_blocks(model)
    if first == 0:
        assert note == "haq: the model is as it was, no block was converted."
        assert find_report(model) is None
    else:
        assert note.startswith("haq: 1 of 2 blocks of the model are int8 and work;")
        assert_same_bits(blocks[0], find_blocks(quantized(name))[1][0])
    for block, old in zip(blocks[first:], find_blocks(before)[1][first:], strict=True):
        assert_same_bits(block, old)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = token_ids(1, 12)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    if first == 0:
        assert torch.equal(logits_of(model, UNSEEN), logits_of(before, UNSEEN))

    quantize(name, model=model)
    assert_same_bits(model, quantized(name))
    assert quantization_report(model) == quantization_report(quantized(name))
