"""What layers of an int8 model take on a GPU, beside the same in bfloat16. For `gpu.py`."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu_timing import CACHE_BYTES, Run, measure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from haq.int8 import matmul
from haq.model.experts import Activation, fused_matrices
from haq.nn import Int8Experts, Int8Linear, fuse_norms

LINEAR_SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096)]  # [N, K]
LINEAR_TOKENS = [1, 4, 16, 256, 4096]

# Mixtral's.
EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, INNER = 8, 2, 4096, 14336
EXPERT_TOKENS = [1, 4, 16, 128, 1024]

NORM_TOKENS = [1, 16, 1024]


def measure_linear(shape: tuple[int, int], backends: Sequence[str]) -> list[dict[str, Any]]:
    """One layer, its weight rotated past the cache."""
    rows, columns = shape
    copies = -(-CACHE_BYTES // (rows * columns))
    layers: dict[str, list[nn.Module]] = {
        "bf16": [
            nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cuda")
            for _ in range(copies)
        ]
    }
    for name in backends:
        with matmul.use_backend(name):
            layers[name] = [Int8Linear.from_float(layer.weight) for layer in layers["bf16"]]
    results = []
    for tokens in LINEAR_TOKENS:
        inputs = [torch.randn(tokens, columns, device="cuda").bfloat16() for _ in range(copies)]
        calls = {
            name: [partial(layer, x) for layer, x in zip(some, inputs, strict=True)]
            for name, some in layers.items()
        }
        labels = {"what": f"linear {rows} x {columns}", "tokens": tokens}
        results.append(measure(labels, calls, _bytes(layers, rows * columns)))
    return results


def _bytes(names: Any, elements: int) -> dict[str, int]:
    """Two for each element of bfloat16, one for those of int8."""
    return {name: elements * (2 if name.startswith("bf16") else 1) for name in names}


class OneByOne(nn.Module):
    """What transformers' experts did before they were fused: a loop over those that are chosen.

    The choice is known beforehand, which is more than a model knows.
    """

    def __init__(self, experts: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.up, _, self.down, _ = fused_matrices(experts)
        self.activation = Activation(experts)
        self.places = [
            (e, *torch.where(index == e)) for e in range(EXPERTS) if bool((index == e).any())
        ]

    def forward(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert, tokens, slots in self.places:
            middle = self.activation(F.linear(hidden[tokens], self.up[expert]))
            rows = F.linear(middle, self.down[expert]) * gates[tokens, slots, None]
            total.index_add_(0, tokens, rows)
        return total


class GroupedFloats(nn.Module):
    """All experts by two grouped products of torch, as transformers' own implementation has it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.up, _, self.down, _ = fused_matrices(experts)
        self.activation = Activation(experts)

    def forward(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        flat, slots = index.flatten(), index.shape[1]
        order = flat.argsort()
        experts = torch.arange(EXPERTS, device=flat.device)
        ends = (flat[:, None] <= experts).sum(0, dtype=torch.int32)
        up = F.grouped_mm(hidden[order // slots], self.up.transpose(1, 2), offs=ends)
        rows = F.grouped_mm(self.activation(up), self.down.transpose(1, 2), offs=ends)
        rows = rows * gates.flatten()[order, None]
        placed = torch.empty_like(rows).index_copy_(0, order, rows)
        return placed.view(*index.shape, -1).sum(1)


def float_experts(device: torch.device, hidden: int = HIDDEN, inner: int = INNER) -> nn.Module:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=EXPERTS)
    experts = MixtralExperts(config).to(device, torch.bfloat16)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.02)
    return experts.requires_grad_(False)


def int8_experts(experts: nn.Module) -> Int8Experts:
    """What `down_proj` reads has a zero point for each token: the slower of the two ways."""
    up, _, down, _ = fused_matrices(experts)
    return Int8Experts(
        [Int8Linear.from_float(weight) for weight in up],
        [Int8Linear.from_float(weight, asymmetric=True) for weight in down],
        Activation(experts),
    )


def routed(tokens: int, hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and two different experts for each token."""
    index = torch.rand(tokens, EXPERTS, device=device).argsort(-1)[:, :EXPERTS_PER_TOKEN]
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    return x, index, torch.rand(tokens, EXPERTS_PER_TOKEN, device=device).bfloat16()


def check_int8_experts(device: torch.device) -> None:
    """A layer's experts have the bits of the CPU's, and are about those in bfloat16."""
    floats = float_experts(device, hidden=192, inner=320)
    on_device = int8_experts(floats)
    on_cpu = copy.deepcopy(on_device).to("cpu")
    # Exponentials differ between devices, a ReLU does not.
    for experts in (on_device, on_cpu):
        experts.activation = relu_gate
    for tokens in (1, 3, 50, 700):
        given = routed(tokens, 192, device)
        result, expected = on_device(*given).cpu(), on_cpu(*(part.cpu() for part in given))
        # torch may add what a zero point stands for without rounding in between.
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7)
        exact = OneByOne(floats, given[1])
        exact.activation = relu_gate
        signal = exact(*given).float().cpu()
        error = float((result.float() - signal).norm() / signal.norm())
        assert error < 0.05, f"{error:.1%} off"
    print(f"experts of a layer: those of the CPU, {error:.1%} off from bfloat16")


def relu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate.relu() * up


def measure_int8_experts() -> list[dict[str, Any]]:
    """All that is done in a layer between the router and the residual sum."""
    device = torch.device("cuda")
    floats = float_experts(device)
    int8 = int8_experts(floats)
    grouped = GroupedFloats(floats)
    results = []
    for tokens in EXPERT_TOKENS:
        given = routed(tokens, HIDDEN, device)
        one_by_one = OneByOne(floats, given[1])
        modules: dict[str, Callable[..., Tensor]] = {"bf16": one_by_one, int8.up[0].backend: int8}
        expected = one_by_one(*given).float()
        try:
            error = (grouped(*given).float() - expected).norm() / expected.norm()
            assert error < 0.02, f"grouped_mm is {error:.1%} off"
            modules["bf16 grouped"] = grouped
        except (AttributeError, RuntimeError) as reason:
            print("torch multiplies no groups here:", str(reason).partition("\n")[0])
        if int8.up[0].backend != "triton":
            del modules[int8.up[0].backend]  # It waits for the routing: no graph can hold it.
        chosen = len(given[1].unique())
        calls: dict[str, list[Run]] = {n: [partial(m, *given)] for n, m in modules.items()}
        labels = {"what": "experts of a layer of Mixtral", "tokens": tokens}
        results.append(measure(labels, calls, _bytes(calls, chosen * 3 * HIDDEN * INNER)))
    return results


class Normed(nn.Module):
    """A norm, and the three int8 layers that read it, small enough not to hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(HIDDEN).to("cuda", torch.bfloat16)
        self.readers = nn.ModuleList(
            Int8Linear.from_float(torch.randn(64, HIDDEN, device="cuda")) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        outputs = [reader(y) for reader in self.readers]
        return outputs[-1]


def check_norm(device: torch.device) -> None:
    """Fused and unfused, in bfloat16, within a unit of its last place; nearly all are equal."""
    plain, fused = (LlamaRMSNorm(1030).to(device, torch.bfloat16) for _ in range(2))
    for norm in (plain, fused):
        norm.weight.data.copy_(torch.linspace(-2, 2, 1030))
    fuse_norms(nn.Sequential(fused))
    x = torch.randn(50, 1030, device=device).bfloat16()
    result, expected = fused(x), plain(x)
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-9)
    equal = float((result == expected).float().mean())
    assert equal > 0.99, f"only {equal:.1%} are equal"
    print(f"fused norms: {equal:.2%} of the numbers are those of the norm")


def measure_norm() -> list[dict[str, Any]]:
    results = []
    for tokens in NORM_TOKENS:
        unfused, fused = Normed(), Normed()
        fuse_norms(fused)
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        calls = {"unfused": [partial(unfused, x)], "fused": [partial(fused, x)]}
        labels = {"what": "norm and three small layers", "tokens": tokens}
        results.append(measure(labels, calls))
    return results
