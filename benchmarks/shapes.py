"""Whole models to time: their shapes, random weights, int8 copies, and the two kinds of work.

Speed does not depend on the weights, so they are pieces of one random pattern: to draw a billion
numbers takes a minute. Decoding is one token after a prompt of 128 and those before it; the cache
is cut back after 16 of them, or after each where the model is compiled for one length. Prefill is a
whole prompt, with logits for its last token only. They are asked for by index: for the slice that
``generate`` takes torch copies the whole head first, which takes a model as long again as
everything else.
"""

import copy
import inspect
from collections.abc import Callable, Iterable

import harness
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from haq.model.experts import (
    Activation,
    dense_layers,
    fused_experts,
    fused_matrices,
    is_experts,
)
from haq.model.fast import use_fast_parts
from haq.nn import Int8Experts, Int8Linear

PROMPT, LONG_PROMPT = 128, 512
TEXT, LONG_TEXT = 16, 1500  # tokens that are decoded before the cache is cut back; before them
VOCABULARY = 32000

LLAMA_2048 = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LLAMA_4096 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
MIXTRAL_1024 = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "llama-2048": (LlamaConfig, LLAMA_2048),
    "llama-4096": (LlamaConfig, LLAMA_4096),
    "mixtral-1024": (MixtralConfig, MIXTRAL_1024),
}

# A prime: no row of any matrix begins where another one does.
_PATTERN = 1_000_003

# Standard deviations by the ends of names: each layer adds a little to what is there, as in trained
# models, so that a small error stays one and two implementations can be compared.
_SPREADS = {
    "embed_tokens.weight": 1.0,
    "o_proj.weight": 0.002,
    "down_proj.weight": 0.002,
    "experts.down_proj": 0.002,
}
_OTHER_SPREAD = 0.02


def config_of(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of one of the `SHAPES`, with fewer layers if so many are given."""
    config_class, shape = SHAPES[name]
    if layers is not None:
        shape = {**shape, "num_hidden_layers": layers}
    return config_class(**shape, vocab_size=VOCABULARY, max_position_embeddings=2048)


def build(name: str, layers: int | None = None) -> PreTrainedModel:
    """A model of that shape in bfloat16 with random weights."""
    return build_from(config_of(name, layers))


def build_from(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any configuration whose only buffers are the tables of rotary embeddings."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # Its tables are not parameters.
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(_PATTERN, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            shift = int(torch.randint(_PATTERN, (), generator=generator))
            _fill(parameter.data, (pattern.roll(shift) * _spread(name)).bfloat16())
        else:
            parameter.data.fill_(1)
    return model.eval().requires_grad_(False)


def _spread(name: str) -> float:
    return next((s for end, s in _SPREADS.items() if name.endswith(end)), _OTHER_SPREAD)


def _fill(values: Tensor, pattern: Tensor) -> None:
    for part in values.view(-1).split(len(pattern)):
        part.copy_(pattern[: len(part)])


def prompt(length: int) -> Tensor:
    """Random token ids, int64 ``[1, length]``."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def int8_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with int8 blocks, as `haq.quantize_model` leaves it; it shares everything else.

    What `down_proj` reads has a zero point for each token, which that call gives where it pays: the
    slower of the two ways.
    """
    copied = with_own_modules(model)
    for block in copied.model.layers:
        replaced: dict[str, nn.Module] = {
            name: int8_experts(module) for name, module in fused_experts(block).items()
        }
        for name, linear in dense_layers(block).items():
            down = name.endswith("down_proj")
            replaced[name] = Int8Linear.from_float(linear.weight, asymmetric=down)
        for name, module in replaced.items():
            block.set_submodule(name, module)
    use_fast_parts(copied)
    return copied


def int8_experts(experts: nn.Module) -> Int8Experts:
    """All experts of a layer in int8."""
    up, _, down, _ = fused_matrices(experts)
    return Int8Experts(
        [Int8Linear.from_float(weight) for weight in up],
        [Int8Linear.from_float(weight, asymmetric=True) for weight in down],
        Activation(experts),
    )


def with_int8_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with an int8 head; it shares everything else."""
    copied = with_own_modules(model, outermost_int8(model).values())
    copied.lm_head = Int8Linear.from_float(model.lm_head.weight)
    return copied


def outermost_int8(model: PreTrainedModel) -> dict[str, Int8Linear | Int8Experts]:
    """The int8 modules by name, experts as a whole."""
    found: dict[str, Int8Linear | Int8Experts] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Int8Linear | Int8Experts) and not inside:
            found[name] = module
    return found


def with_own_modules(model: PreTrainedModel, shared: Iterable[nn.Module] = ()) -> PreTrainedModel:
    """A copy with the same tensors in modules of its own, but for those that are to be shared."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(part): part for part in (*tensors, *shared)})


def decoder(model: PreTrainedModel) -> harness.Run:
    """One token after the prompt, and then after one token more."""
    tokens = prompt(PROMPT + 1)
    cache = DynamicCache(config=model.config)
    # A step, too, and not compiled: all that is to be compiled is the step that is repeated.
    eager = getattr(model, "_orig_mod", model)
    eager(tokens, **{cache_argument(eager): cache}, logits_to_keep=1)
    cache.crop(-1)
    return _steps(model, cache, tokens[:, -1:], 1 if eager is not model else TEXT)


def decoder_of_long_text(model: PreTrainedModel) -> harness.Run:
    """The same after `LONG_TEXT` tokens, whose keys and values are random: a prompt takes long."""
    config = model.config
    cache = DynamicCache(config=config)
    size = config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        shape = 1, config.num_key_value_heads, LONG_TEXT, size
        cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), index)
    return _steps(model, cache, prompt(1), TEXT)


def _steps(model: PreTrainedModel, cache: DynamicCache, token: Tensor, most: int) -> harness.Run:
    """Decodes a token again and again; the cache is cut back after so many."""
    length = cache.get_seq_length()
    filled = {cache_argument(getattr(model, "_orig_mod", model)): cache}

    def step() -> Tensor:
        logits: Tensor = model(token, **filled).logits
        if cache.get_seq_length() == length + most:
            cache.crop(-most)
        return logits

    return step


def cache_argument(model: PreTrainedModel) -> str:
    """What a model calls its cache: transformers 5.24 renamed it."""
    named = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in named else "past_key_values"


def prefill(model: PreTrainedModel, length: int = LONG_PROMPT) -> harness.Run:
    """A whole prompt."""
    tokens, last = prompt(length), torch.tensor([length - 1])
    return lambda: model(tokens, logits_to_keep=last).logits


def bytes_per_token(model: PreTrainedModel) -> int:
    """What decoding a token has to read: all weights but embeddings and experts not chosen.

    Scales, and the keys and values of a short text, are nothing beside them.
    """
    embeddings = model.get_input_embeddings()
    total = sum(_weight_bytes(module) for module in model.modules() if module is not embeddings)
    for experts in (m for m in model.modules() if is_experts(m) or isinstance(m, Int8Experts)):
        held = sum(_weight_bytes(module) for module in experts.modules())
        config = model.config
        total -= held - held * config.num_experts_per_tok // config.num_local_experts
    return total


def _weight_bytes(module: nn.Module) -> int:
    if isinstance(module, Int8Linear):
        return module.out_features * module.in_features
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))


def works(prompt_length: int) -> dict[str, Callable[[PreTrainedModel], harness.Run]]:
    """What `peers` has all of them do."""
    return {"decode": decoder, "prefill": lambda model: prefill(model, prompt_length)}
