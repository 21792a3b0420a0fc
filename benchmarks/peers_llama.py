"""llama.cpp on a model of transformers: writes it as GGUF in Q8_0, and runs it. For `peers.py`.

Q8_0 is int8 weights with a scale for every 32 of them; the inputs are rounded the same way. The
file has no vocabulary: tokens go in and logits come out as numbers.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import llama_cpp
import numpy as np

if TYPE_CHECKING:  # Where only llama.cpp's memory is measured nobody else is to be there.
    from torch import Tensor
    from transformers import PreTrainedModel

_CONTEXT, _BATCH = 1024, 512
_MATRIX = gguf.GGMLQuantizationType.Q8_0

Run = Callable[[], "np.ndarray[Any, Any]"]


def write(model: "PreTrainedModel", path: Path) -> None:
    """Write a Llama or a Mixtral."""
    writer = gguf.GGUFWriter(path, "llama")
    _write_config(writer, model.config)
    for name, tensor in _tensors(model):
        values = tensor.float().numpy()
        if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, _MATRIX), raw_dtype=_MATRIX)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _tensors(model: "PreTrainedModel") -> Iterator[tuple[str, "Tensor"]]:
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for index, block in enumerate(model.model.layers):
        for name, tensor in _tensors_of(block, model.config):
            yield f"blk.{index}.{name}.weight", tensor


def _tensors_of(block: Any, config: Any) -> Iterator[tuple[str, "Tensor"]]:
    attention, mlp = block.self_attn, block.mlp
    yield "attn_norm", block.input_layernorm.weight
    yield "attn_q", _pairs_together(attention.q_proj.weight, config.num_attention_heads)
    yield "attn_k", _pairs_together(attention.k_proj.weight, config.num_key_value_heads)
    yield "attn_v", attention.v_proj.weight
    yield "attn_output", attention.o_proj.weight
    yield "ffn_norm", block.post_attention_layernorm.weight
    if hasattr(mlp, "experts"):
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
        yield "ffn_gate_inp", mlp.gate.weight
        yield "ffn_gate_exps", gate
        yield "ffn_up_exps", up
        yield "ffn_down_exps", mlp.experts.down_proj
    else:
        yield "ffn_gate", mlp.gate_proj.weight
        yield "ffn_up", mlp.up_proj.weight
        yield "ffn_down", mlp.down_proj.weight


def _pairs_together(weight: "Tensor", heads: int) -> "Tensor":
    """Rows of a head in llama.cpp's order: what rotary embeddings turn together is side by side."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def _has_amx() -> bool:
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


class LlamaCpp:
    """A GGUF file, loaded.

    Args:
        path: the file.
        threads: CPU threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        # Its code for AMX, compiled by GCC 12, ends the process by an illegal instruction.
        of_model.use_extra_bufts = not _has_amx()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), of_model)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load the file that was written for it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT, _BATCH, _BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def decoder(self, tokens: list[int]) -> Run:
        """The last of the tokens, again and again: the cache is cut back after each."""
        self._forget()
        end = len(tokens) - 1
        self._decode(tokens[:end], 0)

        def step() -> np.ndarray[Any, Any]:
            logits = self._decode(tokens[-1:], end)
            llama_cpp.llama_memory_seq_rm(self._memory, 0, end, -1)
            return logits

        return step

    def prefill(self, tokens: list[int]) -> Run:
        """A whole prompt."""

        def run() -> np.ndarray[Any, Any]:
            self._forget()
            return self._decode(tokens, 0)

        return run

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def _decode(self, tokens: list[int], start: int) -> "np.ndarray[Any, Any]":
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, False
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[len(tokens) - 1] = True
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returns {code}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocabulary,)).copy()
