"""One view of the experts of a layer, however `transformers` lays them out, and their router.

In transformers 5 the experts of a layer are one module with two 3-D parameters, and no linear: who
looks for ``nn.Linear`` leaves nine tenths of a mixture of experts as it was. The layouts differ in
four ways: matrices are stored ``[E, N, K]`` or transposed, gate and up rows are concatenated or
interleaved, there are biases or not, a gate or not. `ExpertList` is the same function with two
linears for each expert, ``[N, K]`` as everywhere else in haq, in the family's own order of rows;
what lies between the two is the family's own gate function, which is called, not copied.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from haq.model.linears import is_linear, linears, weight_view
from haq.nn import Int8Experts

_UP_NAMES = ("gate_up_proj", "up_proj")
_DOWN_NAME = "down_proj"


class Activation:
    """What an expert computes between its two matrices: its gate function, or its activation.

    Args:
        experts: a fused experts module of `transformers`.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=4, intermediate_size=2, num_local_experts=2)
        >>> gate_and_up = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
        >>> Activation(MixtralExperts(config))(gate_and_up).round(decimals=3)
        tensor([[0.0000, 5.2850]])
    """

    def __init__(self, experts: nn.Module) -> None:
        # The family's method reads attributes of its module (`act_fn`, `alpha`, `limit`), so it is
        # called on one that has everything but the weights.
        self._module = copy.copy(experts)
        self._module._parameters = {}

    def __call__(self, x: Tensor) -> Tensor:
        """From ``[T, 2 I]``, or ``[T, I]`` without a gate, to ``[T, I]``."""
        name = "_apply_gate" if getattr(self._module, "has_gate", True) else "act_fn"
        function: Callable[[Tensor], Tensor] = getattr(self._module, name)
        return function(x)


class Expert(nn.Module):
    """The two linears of one expert, under the names that the fused parameters have.

    Attributes:
        up_name: "gate_up_proj", or "up_proj" without a gate.
    """

    def __init__(self, up_name: str, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up_name = up_name
        self.add_module(up_name, up)
        self.down_proj = down

    @property
    def up(self) -> nn.Module:
        """The first linear, ``[2 I, D]`` or ``[I, D]``."""
        return self.get_submodule(self.up_name)

    @property
    def down(self) -> nn.Module:
        """The second linear, ``[D, I]``."""
        return self.down_proj


class ExpertList(nn.ModuleList):
    """Experts one by one, with the forward signature of the fused module they come from.

    Attributes:
        activation: what every expert computes between its linears.
    """

    def __init__(self, experts: list[Expert], activation: Activation) -> None:
        super().__init__(experts)
        self.activation = activation

    def expert(self, index: int) -> Expert:
        """One of the experts."""
        expert = self[index]
        assert isinstance(expert, Expert)
        return expert

    @property
    def experts(self) -> list[Expert]:
        """All of them."""
        return [self.expert(index) for index in range(len(self))]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float ``[T, D]``.
            top_k_index: int64 ``[T, A]``; the number of experts stands for none.
            top_k_weights: float ``[T, A]``.

        Returns:
            ``[T, D]``, dtype of ``hidden_states``.
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(top_k_index == index)
            if len(tokens):
                output = expert.down(self.activation(expert.up(hidden_states[tokens])))
                weighted = output * top_k_weights[tokens, slots, None]
                total.index_add_(0, tokens, weighted.to(total.dtype))
        return total


def is_fused_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the experts of a layer as 3-D parameters that `unfuse` knows."""
    parameters = dict(module.named_parameters(recurse=False))
    up = [name for name in _UP_NAMES if name in parameters]
    if len(up) != 1 or _DOWN_NAME not in parameters:
        return False
    known = {up[0], _DOWN_NAME, f"{up[0]}_bias", f"{_DOWN_NAME}_bias"}
    shapes = [parameters[up[0]].shape, parameters[_DOWN_NAME].shape]
    return (
        set(parameters) <= known
        and all(len(shape) == 3 for shape in shapes)
        and shapes[0][0] == shapes[1][0]
        # A norm after each expert is between `down` and the sum, where nothing is called here.
        and not getattr(module, "has_post_expert_norm", False)
        and (hasattr(module, "_apply_gate") or not getattr(module, "has_gate", True))
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether ``module`` stands for experts that are in two places, as `haq.offload` has them."""
    return getattr(type(module), "is_offloaded_experts", False) is True


def check_in_one_place(model: nn.Module) -> None:
    """Refuse a model whose experts are in two places.

    Raises:
        RuntimeError: an offloader is attached.
    """
    for name, module in model.named_modules():
        if is_offloaded(module):
            raise RuntimeError(
                f"`{name}` is in two places: an `ExpertOffloader` is attached. Call its `detach()` "
                "first: `haq.find_offloader(model).detach()`."
            )


def fused_experts(block: nn.Module) -> dict[str, nn.Module]:
    """The fused experts modules of a block by name."""
    return {name: module for name, module in block.named_modules() if is_fused_experts(module)}


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds all experts of a layer, in either form."""
    return isinstance(module, ExpertList) or is_fused_experts(module)


def unfuse(
    experts: nn.Module, dtype: torch.dtype | None = None, *, use_up: bool = False
) -> ExpertList:
    """The same function with two linears for each expert.

    Args:
        experts: a fused experts module; unchanged, unless it is used up.
        dtype: of the new weights; that of the old ones if None.
        use_up: leave shapes of its parameters, each as soon as its copies are made.

    Returns:
        Experts with memory of their own, each its own, so that one after the other can be freed.
    """
    up_name, transposed = _up_name(experts), _is_transposed(experts)

    def linears_of(name: str) -> list[nn.Linear]:
        weights = experts.get_parameter(name).data
        bias = experts._parameters.get(f"{name}_bias")
        biases = [None] * len(weights) if bias is None else list(bias.data)
        copies = zip(weights.mT if transposed else weights, biases, strict=True)
        made = [_linear(weight, own, dtype) for weight, own in copies]
        if use_up:
            experts._parameters[name] = nn.Parameter(weights.to("meta"), requires_grad=False)
        return made

    pairs = zip(linears_of(up_name), linears_of(_DOWN_NAME), strict=True)
    return ExpertList([Expert(up_name, up, down) for up, down in pairs], Activation(experts))


def fused_matrices(
    experts: nn.Module,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Both matrices of all experts ``[E, N, K]`` and their biases ``[E, N]``, views of the module.

    Args:
        experts: a fused experts module.
    """
    transposed = _is_transposed(experts)

    def of(name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = experts.get_parameter(name).data, experts._parameters.get(f"{name}_bias")
        return weight.mT if transposed else weight, None if bias is None else bias.data

    return (*of(_up_name(experts)), *of(_DOWN_NAME))


def unfused_shapes(experts: nn.Module) -> tuple[int, tuple[int, int], tuple[int, int], bool]:
    """What `unfuse` would make: E, both matrices ``[N, K]`` of each, and whether there are biases.

    Args:
        experts: a fused experts module, on any device.
    """
    first, second = (experts.get_parameter(n).shape for n in (_up_name(experts), _DOWN_NAME))
    step = -1 if _is_transposed(experts) else 1
    (up_rows, up_columns), (down_rows, down_columns) = first[1:][::step], second[1:][::step]
    has_bias = f"{_DOWN_NAME}_bias" in experts._parameters
    return first[0], (up_rows, up_columns), (down_rows, down_columns), has_bias


def _up_name(experts: nn.Module) -> str:
    return next(name for name in _UP_NAMES if name in experts._parameters)


def _is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> nn.Linear:
    """A linear ``[N, K]`` that owns copies of both."""
    dtype = weight.dtype if dtype is None else dtype
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    copied = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    made.weight = nn.Parameter(copied, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
    return made


def routers(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that decide over experts, by name: they stay float.

    They stand beside the experts, and none of their matrices gives more numbers per token than
    there are experts: the router with one for each, and the gate of a shared expert with one.
    """
    return dict(_routers(block))


def _routers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, experts in block.named_modules():
        # Of a block that is int8 already, too: an interrupted model is gone on with.
        if not is_experts(experts) and not isinstance(experts, Int8Experts):
            continue
        number = _number_of_experts(experts)
        parent = name.rpartition(".")[0]
        for child_name, child in block.get_submodule(parent).named_children():
            rows = {len(p) for p in child.parameters() if p.dim() >= 2}
            if child is not experts and rows and rows <= {1, number}:
                yield f"{parent}.{child_name}".lstrip("."), child


def _number_of_experts(experts: nn.Module) -> int:
    if isinstance(experts, ExpertList):
        return len(experts)
    if isinstance(experts, Int8Experts):
        return experts.num_experts
    return len(experts.get_parameter(_DOWN_NAME))


def routing_matrices(block: nn.Module) -> list[nn.Parameter]:
    """Every matrix of the routers of a block."""
    return [p for module in routers(block).values() for p in module.parameters() if p.dim() >= 2]


def dense_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block that every token goes through: none of routers, none of experts."""
    apart = {id(parameter) for parameter in routing_matrices(block)}
    for module in block.modules():
        if isinstance(module, ExpertList):
            apart |= {id(parameter) for parameter in module.parameters()}
    return {n: m for n, m in linears(block).items() if id(m.weight) not in apart}


def unknown_weights(block: nn.Module) -> dict[str, torch.Size]:
    """Parameters with two or more dimensions that nothing here knows: what would stay float."""
    known = {id(m.weight) for m in linears(block).values()}
    known |= {id(parameter) for parameter in routing_matrices(block)}
    known |= {id(p) for m in fused_experts(block).values() for p in m.parameters(recurse=False)}
    return {
        name: parameter.shape
        for name, parameter in block.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in known
    }


def input_matrices(module: nn.Module) -> list[Tensor]:
    """The matrices ``[N, K]`` that multiply what ``module`` reads, sharing memory with it.

    Of a linear its weight; of experts the first weight of each; of a router all that it has.
    """
    if is_linear(module):
        return [weight_view(module)]
    if isinstance(module, ExpertList):
        return [weight_view(expert.up) for expert in module.experts]
    if is_fused_experts(module):
        first = module.get_parameter(_up_name(module)).data
        return list(first.mT if _is_transposed(module) else first)
    return [parameter.data for parameter in module.parameters() if parameter.dim() >= 2]
