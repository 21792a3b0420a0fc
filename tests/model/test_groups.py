"""The groups of every architecture, against what its source in `transformers` says."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from haq.model.blocks import BlockBatch, capture_block_inputs, find_blocks, run_block
from haq.model.experts import fused_experts, unfuse
from haq.model.folding import fold
from haq.model.groups import Group, find_groups
from tests.architectures import ARCHITECTURES, HIDDEN, INNER, token_ids
from tests.model.toys import HIDDEN as TOY_HIDDEN
from tests.model.toys import Residual, batch_of


@dataclass(frozen=True)
class Expected:
    """A group as one reads it off the source; ``rows`` of the producer feed the input channels."""

    consumers: tuple[str, ...]
    producer: str | None
    rows: list[int] = field(default_factory=list)
    offset: float = 0.0
    scope: str = ""


def heads(
    *, count: int, width: int, first: int = 0, stride: int = 0, repeats: int = 1
) -> list[int]:
    """Rows of the values, channel by channel of the attention's output: ``count`` heads of
    ``width`` channels, where ``repeats`` heads in a row share the values that start at ``first``
    and lie ``stride`` rows apart."""
    stride = stride or width
    return [first + head // repeats * stride + c for head in range(count) for c in range(width)]


EVERY = list(range(HIDDEN))
# Four heads of eight channels. Two heads in a row share a key and value head: repeat_kv copies
# head 0 to 0 and 1, head 1 to 2 and 3.
ONE_BY_ONE = heads(count=4, width=8)
IN_PAIRS = heads(count=4, width=8, repeats=2)

SEPARATE_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_AND_UP = ("mlp.gate_proj", "mlp.up_proj")


def opt(*, post_norm: bool) -> list[Expected]:
    # A norm after the residual sum is itself the next residual: nothing can be folded into it.
    attention, mlp = (None, None) if post_norm else ("self_attn_layer_norm", "final_layer_norm")
    rows = [] if post_norm else EVERY
    out = "self_attn.out_proj"
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [
        Expected(qkv, attention, rows, scope="self_attn"),
        Expected((out,), "self_attn.v_proj", ONE_BY_ONE, scope=out),
        # fc1 and fc2 have no module of their own around them.
        Expected(("fc1",), mlp, rows),
        Expected(("fc2",), "fc1", list(range(INNER)), scope="fc2"),
    ]


def gated(
    *,
    values: list[int] = IN_PAIRS,
    offset: float = 0.0,
    mlp_norm: str = "post_attention_layernorm",
) -> list[Expected]:
    """Llama and its descendants: ``down(act(gate(x)) * up(x))``."""
    o_proj, down = "self_attn.o_proj", "mlp.down_proj"
    return [
        Expected(SEPARATE_QKV, "input_layernorm", EVERY, offset, "self_attn"),
        Expected((o_proj,), "self_attn.v_proj", values, scope=o_proj),
        Expected(GATE_AND_UP, mlp_norm, EVERY, offset, "mlp"),
        Expected((down,), "mlp.up_proj", list(range(INNER)), scope=down),
    ]


EXPECTED: dict[str, list[Expected]] = {
    "opt": opt(post_norm=False),
    "opt-post-norm": opt(post_norm=True),
    "llama": gated(),
    "mistral": gated(),
    "qwen2": gated(),
    # The norms of queries and keys change nothing about the values.
    "qwen3": gated(values=heads(count=4, width=16, repeats=2)),
    # Norms multiply by 1 + w. A third and a fourth norm stand after attention and MLP.
    "gemma2": gated(offset=1.0, mlp_norm="pre_feedforward_layernorm"),
    "gemma3": gated(
        offset=1.0,
        mlp_norm="pre_feedforward_layernorm",
        values=heads(count=4, width=8, repeats=4),
    ),
    # One matrix for queries (32 rows), keys (16) and values (16), one for gate and up.
    "phi3": [
        Expected(("self_attn.qkv_proj",), "input_layernorm", EVERY, scope="self_attn"),
        Expected(
            ("self_attn.o_proj",),
            "self_attn.qkv_proj",
            heads(count=4, width=8, first=48, repeats=2),
            scope="self_attn.o_proj",
        ),
        Expected(("mlp.gate_up_proj",), "post_attention_layernorm", EVERY, scope="mlp"),
        Expected(
            ("mlp.down_proj",),
            "mlp.gate_up_proj",
            list(range(INNER, 2 * INNER)),
            scope="mlp.down_proj",
        ),
    ],
    # Query, key and value of head 0, then of head 1, ... A GELU rescales nothing exactly.
    "gpt-neox": [
        Expected(("attention.query_key_value",), "input_layernorm", EVERY, scope="attention"),
        Expected(
            ("attention.dense",),
            "attention.query_key_value",
            heads(count=4, width=8, first=16, stride=24),
            scope="attention.dense",
        ),
        Expected(("mlp.dense_h_to_4h",), "post_attention_layernorm", EVERY, scope="mlp"),
        Expected(("mlp.dense_4h_to_h",), None, scope="mlp.dense_4h_to_h"),
    ],
    "bloom": [
        Expected(
            ("self_attention.query_key_value",), "input_layernorm", EVERY, scope="self_attention"
        ),
        Expected(
            ("self_attention.dense",),
            "self_attention.query_key_value",
            heads(count=4, width=8, first=16, stride=24),
            scope="self_attention.dense",
        ),
        Expected(("mlp.dense_h_to_4h",), "post_attention_layernorm", EVERY, scope="mlp"),
        Expected(("mlp.dense_4h_to_h",), None, scope="mlp.dense_4h_to_h"),
    ],
    # All queries, then all keys, then all values.
    "gpt2": [
        Expected(("attn.c_attn",), "ln_1", EVERY, scope="attn"),
        Expected(
            ("attn.c_proj",), "attn.c_attn", heads(count=4, width=8, first=64), 0.0, "attn.c_proj"
        ),
        Expected(("mlp.c_fc",), "ln_2", EVERY, scope="mlp"),
        Expected(("mlp.c_proj",), None, scope="mlp.c_proj"),
    ],
    # Attention and MLP side by side on one norm: the block itself is what they have in common.
    "phi": [
        Expected((*SEPARATE_QKV, "mlp.fc1"), "input_layernorm", EVERY),
        Expected(("self_attn.dense",), "self_attn.v_proj", ONE_BY_ONE, scope="self_attn.dense"),
        Expected(("mlp.fc2",), None, scope="mlp.fc2"),
    ],
    "gptj": [
        Expected(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), "ln_1", EVERY),
        Expected(("attn.out_proj",), "attn.v_proj", ONE_BY_ONE, scope="attn.out_proj"),
        Expected(("mlp.fc_out",), None, scope="mlp.fc_out"),
    ],
}


@pytest.mark.parametrize("index", [0, 1], ids=["first block", "second block"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_and_producers(name: str, index: int) -> None:
    model = ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": token_ids(2, 20)}])
    state = {key: value.clone() for key, value in model.state_dict().items()}

    groups = find_groups(blocks[index], inputs.of_block(index)[0])

    got = [
        Expected(
            group.consumers,
            group.producer and group.producer.name,
            group.producer.rows.tolist() if group.producer else [],
            group.producer.offset if group.producer else 0.0,
            group.scope,
        )
        for group in groups
    ]
    assert got == EXPECTED[name]
    # The probes are undone to the bit.
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def random_scale(rows: Tensor) -> Tensor:
    """Factors between 1/4 and 4, equal where channels come from one row: float32 ``[K]``."""
    return (4 ** (2 * torch.rand(int(rows.max()) + 1) - 1))[rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_random_scales_everywhere_leaves_the_logits(name: str) -> None:
    model = ARCHITECTURES[name]()
    ids = token_ids(2, 20)
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": ids}])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits

    folded = 0
    for i, block in enumerate(blocks):
        for group in find_groups(block, inputs.of_block(i)[0]):
            if group.producer:
                scale = random_scale(group.producer.rows)
                applied = fold(block, group.producer, group.consumers, scale, torch.float32).applied
                torch.testing.assert_close(applied, scale)
                folded += 1

    changed = sum(not torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert changed > folded > 0
    with torch.no_grad():
        # Another order of float32 roundings through two blocks; logits are of size 1.
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 2], ids=["one token", "two tokens"])
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "phi3", "gpt-neox"])
def test_short_sequences_show_the_same_groups(name: str, length: int) -> None:
    model = ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": token_ids(1, length)}])
    groups = find_groups(blocks[0], inputs.of_block(0)[0])
    assert [(group.consumers, group.producer and group.producer.name) for group in groups] == [
        (expected.consumers, expected.producer) for expected in EXPECTED[name]
    ]


@pytest.mark.parametrize("name", ["opt", "mistral", "gemma3", "bloom"])
def test_padding_does_not_hide_groups(name: str) -> None:
    model = ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :9] = 0
    batch = {"input_ids": token_ids(2, 20), "attention_mask": mask}
    inputs = capture_block_inputs(model, blocks, [batch])
    groups = find_groups(blocks[0], inputs.of_block(0)[0])
    assert [group.producer and group.producer.rows.tolist() for group in groups] == [
        expected.rows or None for expected in EXPECTED[name]
    ]


def test_a_linear_that_never_ran_is_in_no_group() -> None:
    block = Residual()
    block.unused = nn.Linear(TOY_HIDDEN, TOY_HIDDEN)
    groups = find_groups(block, batch_of(torch.randn(1, 9, TOY_HIDDEN)))
    assert [group.consumers for group in groups] == [("fc1",), ("fc2",)]


# --- Mixtures of experts --------------------------------------------------------------------------


def qwen2_moe() -> nn.Module:
    """Experts beside a shared one, which has a gate of its own."""
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return Qwen2MoeForCausalLM(config).eval()


def groups_of(model: nn.Module, *, unfused: bool) -> tuple[nn.Module, list[Group], BlockBatch]:
    """The first block, its groups, and the one batch that it was given."""
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": token_ids(2, 20) % 64}])
    block, batch = blocks[0], inputs.of_block(0)[0]
    if unfused:
        for name, module in fused_experts(block).items():
            block.set_submodule(name, unfuse(module))
    return block, find_groups(block, batch), batch


def described(group: Group) -> tuple[tuple[str, ...], tuple[str, ...], str | None, str]:
    return group.consumers, group.routers, group.producer and group.producer.name, group.scope


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_experts_share_their_input_with_their_router(
    unfused: bool, tiny_mixtral: Callable[..., nn.Module]
) -> None:
    model = tiny_mixtral()
    _, groups, _ = groups_of(model, unfused=unfused)
    o_proj, experts = "self_attn.o_proj", "mlp.experts"
    assert [described(group) for group in groups] == [
        (SEPARATE_QKV, (), "input_layernorm", "self_attn"),
        ((o_proj,), (), "self_attn.v_proj", o_proj),
        # The experts run last in the MLP, and their output is the MLP's.
        ((experts,), ("mlp.gate",), "post_attention_layernorm", experts),
    ]
    assert groups[2].readers == (experts, "mlp.gate")
    assert groups[2].producer.rows.tolist() == EVERY


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_a_shared_expert_reads_what_the_others_do(unfused: bool) -> None:
    _, groups, _ = groups_of(qwen2_moe(), unfused=unfused)
    down = "mlp.shared_expert.down_proj"
    up = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    floats = ("mlp.gate", "mlp.shared_expert_gate")
    assert [described(group) for group in groups[2:]] == [
        ((*up, "mlp.experts"), floats, "post_attention_layernorm", "mlp"),
        ((down,), (), "mlp.shared_expert.up_proj", down),
    ]
    assert groups[2].readers == (*up, "mlp.experts", *floats)


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_folding_into_all_readers_leaves_a_mixture_and_without_the_router_it_does_not(
    unfused: bool,
) -> None:
    block, groups, batch = groups_of(qwen2_moe(), unfused=unfused)
    group = groups[2]
    expected = run_block(block, batch)
    scale = 2.0 ** (torch.arange(HIDDEN) % 5 - 2)  # Powers of two turn no choice of experts.
    fold(block, group.producer, group.readers, scale, torch.float32)
    torch.testing.assert_close(run_block(block, batch), expected, rtol=1e-4, atol=1e-4)
    fold(block, group.producer, group.consumers, scale, torch.float32)
    assert (run_block(block, batch) - expected).abs().max() > 0.1


def test_a_dense_group_has_no_routers() -> None:
    groups = find_groups(Residual(), batch_of(torch.randn(1, 9, TOY_HIDDEN)))
    assert [(group.routers, group.readers) for group in groups] == [((), ("fc1",)), ((), ("fc2",))]
