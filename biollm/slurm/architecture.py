"""Reads a model's architecture numbers from its published `config.json`.

LiteLLM knows prices, not layers; vLLM computes this on a GPU node only, and needs torch to do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from biollm.config import Architecture
from biollm.errors import UsageError

# One of these keys means that some layers keep a state instead of a KV cache: the formulas below would be wrong.
_HYBRID = ("mamba_d_state", "ssm_cfg", "linear_num_value_heads", "state_size", "hybrid_override_pattern")
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a decoder-only transformer from its Hugging Face `config.json`.

    Covers the llama shape (Llama, Qwen2/3, Mistral, Phi-3), mixtures of experts (Mixtral, Qwen-MoE, MiniMax-M2,
    gpt-oss) and multi-head latent attention (DeepSeek-V2/V3); others raise UsageError.
    """
    text = cast("Mapping[str, Any]", config.get("text_config") or config)
    kind, hint = str(text.get("model_type")), "Write the `architecture:` block in models.yaml by hand."
    if any(text.get(key) for key in _HYBRID) or "linear_attention" in (text.get("layer_types") or ()):
        raise UsageError(f"model_type {kind} has state-space layers: its size is not known.", hint=hint)
    try:
        return _read(config, text, kind)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"config.json (model_type {kind}) is not of a known kind: {error!r}.", hint=hint) from None


def _read(config: Mapping[str, Any], text: Mapping[str, Any], kind: str) -> Architecture:
    heads = int(text["num_attention_heads"])
    experts = _first(text, "n_routed_experts", "num_local_experts", "num_experts")
    parameters, unquantized = _count(text, kind, experts)
    quantization = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    published = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    dtype, bits = _dtype(quantization, published)
    latent = _first(text, "kv_lora_rank")
    return Architecture(
        parameters=parameters,
        weight_bytes=round(((parameters - unquantized) * bits + unquantized * _BITS.get(dtype, 16)) / 8),
        dtype=dtype,
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        kv_heads=0 if latent else _first(text, "num_key_value_heads", "num_attention_heads"),
        head_dim=0 if latent else _head_dim(text),
        kv_lora_rank=latent,
        rope_dim=int(text["qk_rope_head_dim"]) if latent else 0,
        hidden=int(text["hidden_size"]),
        intermediate=_expert_size(text) if experts else int(text["intermediate_size"]),
        vocab=int(text["vocab_size"]),
        experts=experts,
        quant_block=int((quantization.get("weight_block_size") or [0])[0]),
        context=_first(text, "max_position_embeddings"),
    )


def _count(text: Mapping[str, Any], kind: str, experts: int) -> tuple[int, int]:
    """Return (all parameters, those that quantization leaves alone: embeddings, head, routers)."""
    hidden, layers, vocab = int(text["hidden_size"]), int(text["num_hidden_layers"]), int(text["vocab_size"])
    embeddings = vocab * hidden * (1 if text.get("tie_word_embeddings") else 2)
    dense = 3 * hidden * int(text["intermediate_size"])
    first, step = _first(text, "first_k_dense_replace"), _first(text, "decoder_sparse_step") or 1
    moe_layers = len(range(first, layers, step)) if experts else 0
    router, expert = experts * hidden, 3 * hidden * _expert_size(text) if experts else 0
    shared = _first(text, "n_shared_experts") * expert + 3 * hidden * _first(text, "shared_expert_intermediate_size")
    feed_forward = (layers - moe_layers) * dense + moe_layers * (router + shared + experts * expert)
    parameters = embeddings + hidden + layers * (2 * hidden + _attention(text, kind)) + feed_forward
    # gpt-oss keeps everything but its experts in bfloat16
    kept = parameters - moe_layers * experts * expert if kind == "gpt_oss" else embeddings + moe_layers * router
    return parameters, kept


def _attention(text: Mapping[str, Any], kind: str) -> int:
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    if text.get("kv_lora_rank"):
        return _latent_attention(text, hidden, heads)
    head_dim = _head_dim(text)
    query_width = heads * head_dim
    kv_width = _first(text, "num_key_value_heads", "num_attention_heads") * head_dim
    parameters = 2 * hidden * (query_width + kv_width)  # queries and output, keys and values
    if kind.startswith("qwen2") or text.get("attention_bias"):
        parameters += query_width + 2 * kv_width
    if text.get("attention_bias"):
        parameters += hidden
    if kind.startswith("qwen3"):
        parameters += 2 * head_dim
    if text.get("use_qk_norm"):
        parameters += query_width + kv_width
    return parameters


def _latent_attention(text: Mapping[str, Any], hidden: int, heads: int) -> int:
    latent, rope_dim, value_dim = (int(text[key]) for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"))
    nope_dim, query_rank = int(text["qk_nope_head_dim"]), _first(text, "q_lora_rank")
    query_width = heads * (nope_dim + rope_dim)
    queries = (hidden + 1 + query_width) * query_rank if query_rank else hidden * query_width
    compression = hidden * (latent + rope_dim) + latent  # with its norm
    expansion = latent * heads * (nope_dim + value_dim)
    return queries + compression + expansion + heads * value_dim * hidden


def _dtype(quantization: Mapping[str, Any], published: str) -> tuple[str, float]:
    """Return the name of the weights' type, and the bits per weight with its scales."""
    if not quantization:
        return published, _BITS.get(published, 16)
    method = str(quantization.get("quant_method", "?"))
    groups = cast("Mapping[str, Any]", quantization.get("config_groups") or {})
    weights: list[dict[str, Any]] = [group.get("weights") or {} for group in groups.values()]
    bits = int(quantization.get("bits") or (weights[0].get("num_bits") if weights else 0) or 0)
    bits = bits or (4 if method == "mxfp4" or quantization.get("load_in_4bit") else 8)
    scales = 32 / 128**2  # FP8: 32 bits per block of 128 x 128
    if method == "mxfp4":
        scales = 8 / 32  # 8 bits per 32 weights
    elif bits == 4:
        scales = 20 / 128  # AWQ, GPTQ: 16 bits and a 4-bit zero point per 128 weights
    return method, bits + scales


def _head_dim(text: Mapping[str, Any]) -> int:
    size = _first(text, "head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"])
    if not size:
        raise ValueError("hidden_size is less than num_attention_heads")
    return size


def _expert_size(text: Mapping[str, Any]) -> int:
    return _first(text, "moe_intermediate_size", "intermediate_size")


def _first(text: Mapping[str, Any], *keys: str) -> int:
    return next((int(text[key]) for key in keys if text.get(key)), 0)
