"""Bad input: what the error says, and that the model is as it was."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

from haq import QuantizationConfig, quantize_model
from haq.nn import Int8Experts, Int8Linear
from haq.quantization.report import detach_report, find_report
from haq.quantization.validation import excluded_modules
from tests.architectures import ARCHITECTURES, MIXTURES, POSITIONS, VOCABULARY, token_ids

IDS = token_ids(2, 8)


@pytest.fixture
def refused() -> Callable[..., None]:
    """Quantizes, expects an error, and checks that nothing of it is left on the model."""

    def expect(
        model: PreTrainedModel,
        calibration: Any,
        error: type[Exception],
        match: str,
        **options: Any,
    ) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = dict(model.named_modules())
        with pytest.raises(error, match=match):
            quantize_model(model, calibration, QuantizationConfig(**options), progress=False)
        assert dict(model.named_modules()) == modules
        assert find_report(model) is None
        torch.testing.assert_close(
            model.state_dict(), state, rtol=0, atol=0, equal_nan=True, check_device=False
        )

    return expect


# --- Calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (IDS, r"must be an iterable of batches, got a single Tensor\. Put batches in a list"),
        ({"input_ids": IDS}, r"must be an iterable of batches, got a single dict\."),
        (BatchEncoding({"input_ids": IDS}), r"must be an iterable .* a single BatchEncoding\."),
        ("some text", r"got a single str\..* `haq\.calibration_batches\(tokenizer, source\)`"),
        (None, r"`calibration` must be an iterable of batches, got NoneType\."),
        (5, r"`calibration` must be an iterable of batches, got int\."),
        (["some text"], r"`calibration\[0\]` must be an int64 tensor of token ids, .* got str\."),
        ([IDS, IDS.tolist()], r"`calibration\[1\]` must be an int64 tensor .*, got list\."),
        ([{"ids": IDS, "mask": IDS}], r"got a mapping with keys \['ids', 'mask'\]\."),
        ([{"input_ids": IDS.tolist()}], r"got a mapping with keys \['input_ids'\]\."),
        ([IDS.float()], r"`calibration\[0\]` must hold int64 token ids, got torch\.float32\."),
        ([IDS, IDS.int()], r"`calibration\[1\]` must hold int64 .* got torch\.int32\. Use `.long"),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(2, 8).tolist()}],
            r"'attention_mask' of `calibration\[0\]` must be a tensor, got list\.",
        ),
    ],
)
def test_calibration_of_a_wrong_type(
    refused: Callable[..., None], calibration: Any, match: str
) -> None:
    refused(ARCHITECTURES["opt"](), calibration, TypeError, match)


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        ([], r"`calibration` is empty: pass at least one batch of token ids of shape \[batch, seq"),
        ((ids for ids in []), r"`calibration` is empty"),
        ([IDS[0]], r"`calibration\[0\]` must have shape \[batch, sequence\] .*, got \[8\]\."),
        ([IDS[None]], r"must have shape \[batch, sequence\] and hold tokens, got \[1, 2, 8\]\."),
        ([IDS, IDS[:0]], r"`calibration\[1\]` must have shape .* hold tokens, got \[0, 8\]\."),
        ([IDS[:, :0]], r"must have shape \[batch, sequence\] and hold tokens, got \[2, 0\]\."),
        (
            [IDS, IDS.index_fill(1, torch.tensor(3), VOCABULARY)],
            r"`calibration\[1\]` must hold ids in \[0, 95\], .*, got 96\. Was it made with another",
        ),
        ([IDS - 50], r"`calibration\[0\]` must hold ids in \[0, 95\], .*, got -\d+\."),
        (
            [torch.ones(1, POSITIONS + 1, dtype=torch.int64)],
            r"no longer than the model's 128 positions, got sequences of 129 tokens\. Pass "
            r"`sequence_length=128` or less",
        ),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(2, 7)}],
            r"'attention_mask' of `calibration\[0\]` must have the shape of 'input_ids', \[2, 8\], "
            r"and keep a token, got shape \[2, 7\] with 14 tokens kept\.",
        ),
        (
            [IDS, {"input_ids": IDS, "attention_mask": torch.zeros(2, 8)}],
            r"`calibration\[1\]` .* got shape \[2, 8\] with 0 tokens kept\.",
        ),
    ],
)
def test_calibration_of_a_wrong_shape_or_value(
    refused: Callable[..., None], calibration: Any, match: str
) -> None:
    refused(ARCHITECTURES["opt"](), calibration, ValueError, match)


def test_the_longest_sequence_the_model_takes_is_fine() -> None:
    model = ARCHITECTURES["opt"]()
    quantize_model(model, [token_ids(1, POSITIONS)], progress=False)
    assert find_report(model).tokens == POSITIONS


def test_a_model_without_a_limit_takes_any_length() -> None:
    model = ARCHITECTURES["bloom"]()
    del model.config.max_position_embeddings
    quantize_model(model, [token_ids(1, POSITIONS + 5)], progress=False)
    assert find_report(model).tokens == POSITIONS + 5


@pytest.mark.parametrize("length", [1, 2])
def test_a_handful_of_tokens_is_enough_to_work(length: int) -> None:
    model = quantize_model(ARCHITECTURES["llama"](), [token_ids(1, length)], progress=False)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_an_error_in_the_users_generator_is_the_users(refused: Callable[..., None]) -> None:
    def batches() -> Any:
        yield IDS
        raise OSError("the disk is gone")

    refused(ARCHITECTURES["opt"](), batches(), OSError, "the disk is gone")


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("model.layers.1.mlp.down_proj.weight", 32 * 48),
        ("model.layers.0.input_layernorm.weight", 32),
        ("model.embed_tokens.weight", VOCABULARY * 32),
        ("lm_head.weight", VOCABULARY * 32),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    refused: Callable[..., None], name: str, elements: int, value: float, dtype: torch.dtype
) -> None:
    model = ARCHITECTURES["llama"]().to(dtype)
    model.get_parameter(name).data.view(-1)[[5, 7]] = value
    match = rf"finite weights, but `{name}` has NaN or infinity in 2 of {elements} elements"
    refused(model, [IDS], ValueError, match)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_in_calibration_names_the_layer_and_the_blocks_that_are_done(
    value: float,
) -> None:
    model = ARCHITECTURES["llama"]()
    norm = model.model.layers[1].post_attention_layernorm
    norm.forward = lambda x: torch.full_like(x, value)
    before = copy.deepcopy(model.model.layers[1].state_dict())
    match = r"The input of `model\.layers\.1\.mlp\.gate_proj` is NaN or infinite"
    with pytest.raises(RuntimeError, match=match) as caught:
        quantize_model(model, [IDS], progress=False)
    (note,) = caught.value.__notes__
    assert note.startswith("haq: 1 of 2 blocks of the model are int8 and work")
    torch.testing.assert_close(model.model.layers[1].state_dict(), before, rtol=0, atol=0)


def test_a_block_whose_output_is_not_finite_is_named() -> None:
    """The last product overflows, after every input was fine."""
    model = ARCHITECTURES["llama"]().to(torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    with pytest.raises(
        RuntimeError,
        match=r"`model\.layers\.0` gives NaN or infinity for calibration batch 0\. .*bfloat16",
    ):
        quantize_model(model, [IDS], progress=False)


def test_a_block_that_is_not_finite_can_be_left_by_loading_the_model_in_float32() -> None:
    """As the message says."""
    model = ARCHITECTURES["llama"]()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    quantize_model(model, [IDS], progress=False)
    assert find_report(model).complete


# --- Models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [(nn.Linear(2, 2), "Linear"), ("facebook/opt-125m", "str"), (None, "NoneType")],
    ids=["a module", "a name", "None"],
)
def test_what_is_no_transformers_model(model: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"must be a `transformers` model, got {name}\. Pass the"):
        quantize_model(model, [IDS])


def test_a_compiled_wrapper_is_no_transformers_model() -> None:
    compiled = torch.compile(ARCHITECTURES["opt"](), backend="eager")
    with pytest.raises(TypeError, match=r"got OptimizedModule.*without a pipeline, an adapter"):
        quantize_model(compiled, [IDS])


@pytest.mark.parametrize("config", [{"damping": 0.1}, "hessian"], ids=["dict", "str"])
def test_a_config_of_a_wrong_type(config: Any) -> None:
    match = f"`config` must be a QuantizationConfig, got {type(config).__name__}"
    with pytest.raises(TypeError, match=match):
        quantize_model(ARCHITECTURES["opt"](), [IDS], config)


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"vocab_size": 96, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1},
        ),
        (
            "BartForConditionalGeneration",
            "BartConfig",
            {"vocab_size": 96, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
            | {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
            | {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
        ),
        ("ViTForImageClassification", "ViTConfig", SMALL | {"intermediate_size": 8}),
    ],
    ids=["t5", "bart", "vit"],
)
def test_a_model_that_is_no_decoder_of_text(
    refused: Callable[..., None], name: str, config: str, options: dict[str, Any]
) -> None:
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    refused(model, [IDS], ValueError, rf"must be a causal language model.*got {name}\.")


def test_a_model_without_blocks(refused: Callable[..., None]) -> None:
    model = ARCHITECTURES["opt"]()
    model._no_split_modules = []
    match = r"must be a causal language model with a list of decoder blocks, got OPTForCausalLM"
    refused(model, [IDS], ValueError, match)


def test_a_model_on_the_meta_device(refused: Callable[..., None]) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES["llama"]()
    with pytest.raises(
        ValueError, match=r"but `model\.embed_tokens\.weight` is on the meta device\. Load it with"
    ):
        quantize_model(model, [IDS])


def test_a_model_partly_on_the_meta_device() -> None:
    model = ARCHITECTURES["llama"]()
    model.model.layers[1].to("meta")
    with pytest.raises(
        ValueError, match=r"`model\.layers\.1\.self_attn\.q_proj\.weight` is on the meta device"
    ):
        quantize_model(model, [IDS])


def test_a_model_spread_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be only one device here, so the second one is only said to be."""
    model = ARCHITECTURES["llama"]()
    parameters = dict(model.named_parameters())
    elsewhere = SimpleNamespace(device="cuda:1", is_meta=False)
    monkeypatch.setattr(model, "parameters", lambda: [*parameters.values(), elsewhere])
    with pytest.raises(
        ValueError, match=r"must be on one device, got cpu, cuda:1\. Load it on one"
    ):
        quantize_model(model, [IDS])


def test_a_model_that_another_tool_quantized(refused: Callable[..., None]) -> None:
    model = ARCHITECTURES["llama"]()
    model.quantization_method = "bitsandbytes"
    match = r"must have float weights, got one quantized with bitsandbytes\. Load the original"
    refused(model, [IDS], ValueError, match)


def test_a_model_that_is_int8_already() -> None:
    model = quantize_model(ARCHITECTURES["opt"](), [IDS], progress=False)
    report, state = copy.deepcopy(find_report(model)), copy.deepcopy(model.state_dict())
    match = r"`model` is already int8: OPTForCausalLM has `Int8Linear` layers\. Load the float"
    with pytest.raises(ValueError, match=match):
        quantize_model(model, [IDS], progress=False)
    assert find_report(model) == report
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    # Int8 layers that came without a report are no reason to start over.
    detach_report(model)
    with pytest.raises(ValueError, match=match):
        quantize_model(model, [IDS], progress=False)


def test_nothing_to_quantize(refused: Callable[..., None]) -> None:
    match = (
        r"Nothing to quantize: OPTForCausalLM has 12 layers in its blocks, all of them "
        r"excluded by `exclude=\('lm_head', '\*layers\*'\)`\."
    )
    refused(ARCHITECTURES["opt"](), [IDS], ValueError, match, exclude=("lm_head", "*layers*"))


# --- Mixtures of experts --------------------------------------------------------------------------


def test_experts_are_no_reason_to_refuse(tiny_mixtral: Callable[..., PreTrainedModel]) -> None:
    model = quantize_model(tiny_mixtral(vocab_size=VOCABULARY), [IDS], progress=False)
    experts = [name for name, m in model.named_modules() if isinstance(m, Int8Experts)]
    assert experts == [f"model.layers.{i}.mlp.experts" for i in range(2)]


def test_a_model_of_experts_alone_has_something_to_quantize(
    tiny_mixtral: Callable[..., PreTrainedModel],
) -> None:
    config = QuantizationConfig(exclude=("lm_head", "*.self_attn"))
    model = quantize_model(tiny_mixtral(vocab_size=VOCABULARY), [IDS], config, progress=False)
    # Two matrices of four experts in two layers.
    assert len(find_report(model).layers) == 2 * 4 * 2


def test_nothing_to_quantize_in_a_mixture(
    refused: Callable[..., None], tiny_mixtral: Callable[..., PreTrainedModel]
) -> None:
    """Four linears and one set of experts in each of two blocks; routers stay float anyway."""
    exclude = ("lm_head", "*.self_attn", "*.experts")
    match = r"Nothing to quantize: MixtralForCausalLM has 10 layers in its blocks, all of them"
    refused(tiny_mixtral(vocab_size=VOCABULARY), [IDS], ValueError, match, exclude=exclude)


def test_experts_can_be_excluded(tiny_mixtral: Callable[..., PreTrainedModel]) -> None:
    before = tiny_mixtral(vocab_size=VOCABULARY)
    config = QuantizationConfig(exclude=("lm_head", "*.mlp.experts", "*.mlp.gate"))
    model = quantize_model(copy.deepcopy(before), [IDS], config, progress=False)
    layers = [name for name, m in model.named_modules() if isinstance(m, Int8Linear)]
    assert layers == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "k", "v", "o")
    ]
    for block, original in zip(model.model.layers, before.model.layers, strict=True):
        torch.testing.assert_close(
            block.mlp.state_dict(), original.mlp.state_dict(), rtol=0, atol=0
        )


def with_a_norm_after_each_expert(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
        layer.mlp.experts.post_expert_norm = nn.LayerNorm(32)
    return model


def test_experts_with_a_norm_after_each_are_refused(
    refused: Callable[..., None], tiny_mixtral: Callable[..., PreTrainedModel]
) -> None:
    model = with_a_norm_after_each_expert(tiny_mixtral(vocab_size=VOCABULARY))
    # Beside experts that are unknown a router may be anything, too, and it comes first.
    router = r"`model\.layers\.0\.mlp\.gate\.weight` has shape \[4, 32\] and belongs to no linear"
    refused(model, [IDS], ValueError, router)
    match = (
        r"`model\.layers\.0\.mlp\.experts\.gate_up_proj` has shape \[4, 96, 32\] and belongs to no "
        r"linear layer and to no experts that haq knows: it cannot quantize it and does not leave "
        r'weights in float silently\. Add "model\.layers\.0\.mlp\.experts\.gate_up_proj", or the '
        r"module it is in, to `exclude` to keep it float\."
    )
    refused(model, [IDS], ValueError, match, exclude=("lm_head", "*.mlp.gate"))


def test_unknown_experts_can_be_excluded(tiny_mixtral: Callable[..., PreTrainedModel]) -> None:
    before = with_a_norm_after_each_expert(tiny_mixtral(vocab_size=VOCABULARY))
    config = QuantizationConfig(exclude=("lm_head", "*.experts", "*.gate"))
    model = quantize_model(copy.deepcopy(before), [IDS], config, progress=False)
    assert len(find_report(model).layers) == 2 * 4
    for block, original in zip(model.model.layers, before.model.layers, strict=True):
        torch.testing.assert_close(
            block.mlp.state_dict(), original.mlp.state_dict(), rtol=0, atol=0
        )


def llama4() -> PreTrainedModel:
    """Experts that have their gate in the forward, where it cannot be called."""
    config = transformers.Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )
    return transformers.Llama4ForCausalLM(config).eval()


def test_experts_that_haq_does_not_know_are_refused(refused: Callable[..., None]) -> None:
    match = (
        r"`model\.layers\.0\.feed_forward\.(experts\.gate_up_proj` has shape \[2, 32, 96\]|"
        r"router\.weight` has shape \[2, 32\]) and belongs to no linear layer and to no experts"
    )
    refused(llama4(), [IDS], ValueError, match)


# --- Weights that haq does not know ---------------------------------------------------------------


def test_a_linear_that_adds_something_of_its_own_is_refused(refused: Callable[..., None]) -> None:
    class Adapter(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = ARCHITECTURES["opt"]()
    model.model.decoder.layers[1].fc2.__class__ = Adapter
    refused(
        model,
        [IDS],
        ValueError,
        r"`model\.decoder\.layers\.1\.fc2\.weight` has shape \[32, 48\] and belongs to no linear",
    )


LEFT = ("lm_head", "*.A_log", "*.conv1d")


@pytest.mark.parametrize(
    ("exclude", "weight", "shape"),
    [
        (LEFT[:1], r"mamba\.A_log", r"64, 4"),
        (LEFT[:2], r"mamba\.conv1d\.weight", r"64, 1, 4"),
        ((LEFT[0], LEFT[2]), r"mamba\.A_log", r"64, 4"),
    ],
)
def test_what_is_neither_a_linear_nor_experts_is_refused(
    refused: Callable[..., None], exclude: tuple[str, ...], weight: str, shape: str
) -> None:
    match = (
        rf"`model\.layers\.0\.{weight}` has shape \[{shape}\] and belongs to no linear layer and "
        rf'to no experts that haq knows: .* Add "model\.layers\.0\.{weight}", or the module it is '
        r"in, to `exclude` to keep it float\."
    )
    refused(MIXTURES["jamba"](), [IDS], ValueError, match, exclude=exclude)


def test_a_linear_that_is_read_without_a_call_is_refused(refused: Callable[..., None]) -> None:
    """A Mamba multiplies by the weight of `dt_proj` itself, to add its bias later."""
    match = (
        r"`model\.layers\.0\.mamba\.dt_proj` must be called as a module to become int8, but its "
        r'block reads its weight by itself\. Add "\*\.dt_proj" to `exclude` to keep it float\.'
    )
    refused(MIXTURES["jamba"](), [IDS], ValueError, match, exclude=LEFT)


@pytest.mark.parametrize(
    "patterns",
    [
        ("*.A_log", "*.conv1d", "*.dt_proj"),
        ("model.layers.0.mamba.A_log", "model.layers.0.mamba.conv1d.weight", "*.dt_proj"),
    ],
    ids=["modules", "weights by their own name"],
)
def test_a_mamba_layer_is_quantized_but_for_what_is_excluded(patterns: tuple[str, ...]) -> None:
    before = MIXTURES["jamba"]()
    config = QuantizationConfig(exclude=("lm_head", *patterns))
    model = quantize_model(copy.deepcopy(before), [IDS], config, progress=False)
    mamba, original = model.model.layers[0].mamba, before.model.layers[0].mamba
    layers = {name for name, m in mamba.named_modules() if isinstance(m, Int8Linear)}
    assert layers == {"in_proj", "x_proj", "out_proj"}
    for weight in ("A_log", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"):
        assert torch.equal(mamba.get_parameter(weight), original.get_parameter(weight)), weight
    with torch.no_grad():
        got, expected = model(IDS).logits, before(IDS).logits
    # 8 bits in two blocks of random weights.
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1


def test_all_of_a_mamba_can_be_excluded_at_once() -> None:
    config = QuantizationConfig(exclude=("lm_head", "*.mamba"))
    model = quantize_model(MIXTURES["jamba"](), [IDS], config, progress=False)
    assert not any("mamba" in layer.name for layer in find_report(model).layers)


# --- Exclusions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.v_prj", "fc1", "layers.0", "MODEL.*", ""])
def test_a_pattern_that_matches_nothing(refused: Callable[..., None], pattern: str) -> None:
    match = (
        rf"`exclude` pattern '{pattern.replace('*', '[*]')}' matches no module of OPTForCausalLM\. "
        r"Module names look like '[\w.]+'; `\*` matches any part, dots included\."
    )
    refused(
        ARCHITECTURES["opt"](), [IDS], ValueError, match, exclude=("*.q_proj", pattern, "lm_head")
    )


def test_the_default_pattern_may_match_nothing() -> None:
    model = ARCHITECTURES["llama"]().model  # Without a head.
    quantize_model(model, [IDS], progress=False)
    assert find_report(model).kept_float == []


TREE = nn.ModuleDict(
    {
        "layers": nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(1, 1)}), "fc": nn.Linear(1, 1)})
            for _ in range(11)
        ),
        "head": nn.Linear(1, 1),
    }
)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], set()),
        (["head"], {"head"}),
        (["layers.1"], {f"layers.1{rest}" for rest in ("", ".attn", ".attn.q", ".fc")}),
        (["*.attn"], {f"layers.{i}.attn{rest}" for i in range(11) for rest in ("", ".q")}),
        (["layers.1?.fc", "head"], {"layers.10.fc", "head"}),
        (["layers.[!1]*.fc"], {f"layers.{i}.fc" for i in range(11) if i not in (1, 10)}),
    ],
    ids=["none", "leaf", "block 1 and not 10", "parents", "one character", "not in a class"],
)
def test_a_pattern_takes_what_is_inside(patterns: list[str], expected: set[str]) -> None:
    assert excluded_modules(TREE, patterns) == expected


def test_a_weight_that_belongs_to_no_layer_is_matched_by_its_own_name() -> None:
    tree = nn.ModuleDict({"mamba": nn.ModuleDict({"proj": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    tree["mamba"].register_parameter("A_log", nn.Parameter(torch.ones(2, 2)))
    tree["mamba"].register_parameter("D", nn.Parameter(torch.ones(2)))
    assert excluded_modules(tree, ["*.A_log"]) == {"mamba.A_log"}
    assert excluded_modules(tree, ["mamba"]) == {"mamba", "mamba.proj", "mamba.A_log"}
    # What a layer has is matched by the layer's name; vectors stay as they are anyway.
    assert excluded_modules(tree, ["fc.weight", "*.D"]) == set()
