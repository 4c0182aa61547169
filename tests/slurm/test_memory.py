"""The numbers that `fit` must compute, for H100 80GB unless stated otherwise."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from biollm.config import Architecture, Cluster, Config, Model, load_config
from biollm.errors import DoesNotFitError, UsageError
from biollm.slurm.architecture import architecture_from_config
from biollm.slurm.memory import FitReport, fit, gpu_gib, token_count

K = 1024
# The keys of each model's published config.json that count.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen-coder-32b": {
        "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 27648,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "torch_dtype": "bfloat16",
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "deepseek-coder-v2": {
        "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 102400,
        "torch_dtype": "bfloat16", "max_position_embeddings": 163840, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 160,
        "n_shared_experts": 2, "first_k_dense_replace": 1,
    },
    "llama-3.3-70b": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
    },
    "minimax-m2": {
        "model_type": "minimax_m2", "hidden_size": 3072, "num_hidden_layers": 62, "intermediate_size": 1536,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 200064,
        "dtype": "bfloat16", "max_position_embeddings": 196608, "num_local_experts": 256, "use_routing_bias": True,
        "use_qk_norm": True, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "codellama-34b": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 48, "intermediate_size": 22016,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "torch_dtype": "bfloat16",
        "max_position_embeddings": 16384,
    },
}  # fmt: skip
MOE = {"num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280, "first_k_dense_replace": 3}
OTHERS: list[tuple[str, int, float, dict[str, Any]]] = [  # name, parameters, GB, config
    ("SmolLM2-135M", 134_515_008, 0.269, {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}),
    ("Mixtral-8x7B", 46_702_792_704, 93.4, {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8}),
    ("Qwen3-8B", 8_190_735_360, 16.4, {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}),
    ("Qwen3-30B-A3B", 30_532_122_624, 61.1, {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "num_experts": 128, "decoder_sparse_step": 1}),
    ("DeepSeek-V3", 671_026_404_352, 673.1, {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, **MOE,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
    ("gpt-oss-20b", 20_914_757_184, 13.8, {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "attention_bias": True, "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}}),
    ("Qwen2.5-32B-AWQ", 32_763_876_352, 19.3, {
        **PUBLISHED["qwen-coder-32b"],
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}),
    ("Llama-70B-w8a8", 70_553_706_496, 72.7, {
        **PUBLISHED["llama-3.3-70b"], "quantization_config": {
            "quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config()


def report(name: str, gpus: int, cluster: Cluster | None = None, **args: object) -> FitReport:
    """Fit a model as published, with nothing but these vllm_args, on `gpus` H100 of 79.1 GiB at 0.90."""
    architecture = architecture_from_config(PUBLISHED[name])
    model = Model(
        key=name,
        hf_id="org/name",
        gpus_required=gpus,
        architecture=architecture,
        vllm_args={"tensor_parallel_size": gpus, **args},
    )
    return fit(model, cluster or Cluster(gpu_memory_gib=79.1))


@pytest.mark.parametrize(
    ("name", "parameters", "gb", "gib", "kv_bytes", "context"),
    [
        ("qwen-coder-32b", 32_763_876_352, 65.5, 61.0, 262_144, 32768),
        ("deepseek-coder-v2", 235_741_434_880, 471.5, 439.1, 69_120, 163840),
        ("llama-3.3-70b", 70_553_706_496, 141.1, 131.4, 327_680, 131072),
        ("minimax-m2", 228_689_748_992, 230.1, 214.3, 253_952, 196608),
        ("codellama-34b", 33_743_970_304, 67.5, 62.9, 196_608, 16384),
    ],
)
def test_sizes_are_those_of_the_published_models(
    name: str, parameters: int, gb: float, gib: float, kv_bytes: int, context: int
) -> None:
    architecture, usual, small = (
        architecture_from_config(PUBLISHED[name]),
        report(name, 4),
        report(name, 4, kv_cache_dtype="fp8"),
    )
    assert architecture.parameters == parameters
    assert architecture.weight_bytes / 1e9 == pytest.approx(gb, rel=0.002)
    assert architecture.context == usual.max_model_len == context
    assert usual.weights_gib == pytest.approx(gib, rel=0.002)
    assert (usual.kv_bytes_per_token, small.kv_bytes_per_token) == (kv_bytes, kv_bytes / 2)


@pytest.mark.parametrize(
    ("name", "gpus", "args", "expected"),
    [
        ("qwen-coder-32b", 1, {}, {"kv_gib": 7.2, "budget_gib": 71.2, "overhead_gib": 3.0}),
        ("llama-3.3-70b", 2, {}, {"tokens": 16_400}),
        ("llama-3.3-70b", 2, {"kv_cache_dtype": "fp8"}, {"tokens": 33_000}),
        ("minimax-m2", 4, {}, {"kv_gib": 58.0, "sequences": 58 / 46.5}),
        ("deepseek-coder-v2", 4, {"quantization": "fp8"}, {"weights_gib": 238e9 / K**3}),
    ],
)
def test_room_for_the_kv_cache(name: str, gpus: int, args: dict[str, object], expected: dict[str, float]) -> None:
    got = asdict(report(name, gpus, **args))
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("length", [None, "auto", -1])
def test_where_the_context_is_unknown_a_sequence_may_fill_the_cache(length: object) -> None:
    architecture = replace(architecture_from_config(PUBLISHED["qwen-coder-32b"]), context=0)
    got = fit(Model(key="m", hf_id="o/m", architecture=architecture, vllm_args={"max_model_len": length}), Cluster())
    assert got.fits
    assert got.max_model_len == got.tokens > 0
    assert got.sequences == 1


def test_a_full_sequence_of_qwen_takes_8_gib() -> None:
    qwen, minimax = report("qwen-coder-32b", 1), report("minimax-m2", 4)
    assert qwen.max_model_len * qwen.kv_bytes_per_token / K**3 == pytest.approx(8.0)
    assert minimax.max_model_len * minimax.kv_bytes_per_token / K**3 == pytest.approx(46.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gpus", "args", "fits"),
    [
        ("qwen-coder-32b", 1, {}, False),  # marginal: 7.2 GiB of KV cache against 8.0
        ("qwen-coder-32b", 1, {"max_model_len": 28672}, True),
        ("qwen-coder-32b", 1, {"kv_cache_dtype": "fp8"}, True),
        ("qwen-coder-32b", 1, {"gpu_memory_utilization": 0.95}, True),
        ("qwen-coder-32b", 2, {}, True),
        ("deepseek-coder-v2", 2, {"max_model_len": 65536}, False),
        ("deepseek-coder-v2", 4, {}, False),
        ("deepseek-coder-v2", 8, {}, True),
        ("deepseek-coder-v2", 4, {"quantization": "fp8"}, True),
        ("deepseek-coder-v2", 2, {"quantization": "fp8", "max_model_len": 4096}, False),
        ("deepseek-coder-v2", 2, {"quantization": "awq", "max_model_len": 65536}, True),
        ("llama-3.3-70b", 1, {}, False),
        ("llama-3.3-70b", 2, {"max_model_len": 32768}, False),
        ("llama-3.3-70b", 2, {"max_model_len": 16000}, True),
        ("llama-3.3-70b", 2, {"max_model_len": "auto"}, True),
        ("llama-3.3-70b", 4, {}, True),
        ("minimax-m2", 4, {}, True),
        ("minimax-m2", 2, {}, False),
        ("minimax-m2", 8, {}, False),  # 1536 / 8 is no multiple of 128
        ("minimax-m2", 8, {"enable_expert_parallel": True}, True),
        ("codellama-34b", 1, {}, True),
        ("codellama-34b", 1, {"max_model_len": 32768}, False),  # more than its context
        ("codellama-34b", 1, {"max_model_len": 20480, "hf_overrides": {"rope_scaling": {}}}, True),
        ("llama-3.3-70b", 1, {"cpu_offload_gb": 80, "max_model_len": 4096}, True),
    ],
)
def test_what_starts(name: str, gpus: int, args: dict[str, object], fits: bool) -> None:
    got = report(name, gpus, **args)
    assert got.fits is fits, got.reasons
    assert bool(got.reasons) is not fits


@pytest.mark.parametrize(
    ("name", "gpus", "args", "reason", "suggestions"),
    [
        ("qwen-coder-32b", 1, {}, "holds 293.. tokens; one sequence of max_model_len has 32768", [
            "a shorter context (max_model_len: 28672)", "more GPUs (tensor_parallel_size: 2)",
            "a KV cache of half the size (kv_cache_dtype: fp8)", "more of each GPU (gpu_memory_utilization: 0.95)",
            "FP8 weights (quantization: fp8), or an INT8 checkpoint"]),
        ("deepseek-coder-v2", 2, {"max_model_len": 65536}, r"219\.\d GiB of weights and 3 GiB", [
            "more GPUs (tensor_parallel_size: 8)", "a 4-bit AWQ checkpoint (another hf_id)"]),
        ("llama-3.3-70b", 2, {}, "holds 162.. tokens", [
            "a shorter context (max_model_len: 15360)", "more GPUs (tensor_parallel_size: 4)",
            "FP8 weights (quantization: fp8), or an INT8 checkpoint"]),
        ("minimax-m2", 8, {}, "1536 / 8 = 192 is not a multiple", [
            "whole experts on each GPU (enable_expert_parallel: true)"]),
        ("qwen-coder-32b", 3, {}, "3 does not divide its 40 attention heads", ["more GPUs (tensor_parallel_size: 4)"]),
        ("qwen-coder-32b", 5, {}, "5 and its 8 KV heads do not divide", ["more GPUs (tensor_parallel_size: 8)"]),
        ("codellama-34b", 1, {"max_model_len": 32768}, "more than the 16384 tokens of its own context", [
            "a shorter context (max_model_len: 16384)"]),
        ("qwen-coder-32b", 1, {"pipeline_parallel_size": 65}, "pipeline_parallel_size 65 is more than its 64", []),
    ],
)  # fmt: skip
def test_a_refusal_says_why_and_what_would_do(
    name: str, gpus: int, args: dict[str, object], reason: str, suggestions: list[str]
) -> None:
    got = report(name, gpus, **args)
    assert re.search(reason, " ".join(got.reasons))
    assert list(got.suggestions) == suggestions


def test_kv_heads_are_sharded_and_latent_attention_is_replicated() -> None:
    llama, deepseek = [report("llama-3.3-70b", n) for n in (4, 8)], [report("deepseek-coder-v2", n) for n in (8, 16)]
    assert llama[1].tokens > 2 * llama[0].tokens
    rank = 79.1 * 0.9 - 3 - deepseek[1].weights_per_gpu_gib
    assert deepseek[1].tokens == int(rank * K**3 / 69_120)
    # more ranks than KV heads: each holds one head, so tokens grow only with the room beside the weights
    sixteen, eight = report("llama-3.3-70b", 16), llama[1]
    assert sixteen.tokens < 1.2 * eight.tokens


def test_pipeline_stages_share_weights_and_layers() -> None:
    both, tensor = report("llama-3.3-70b", 2, pipeline_parallel_size=2), report("llama-3.3-70b", 4)
    assert (both.gpus, both.weights_per_gpu_gib) == (4, tensor.weights_per_gpu_gib)
    assert both.tokens == pytest.approx(tensor.tokens, rel=0.01)


@pytest.mark.parametrize(("name", "parameters", "gb", "published"), OTHERS, ids=[other[0] for other in OTHERS])
def test_other_kinds_of_models(name: str, parameters: int, gb: float, published: dict[str, Any]) -> None:
    architecture = architecture_from_config(published)
    assert architecture.parameters == pytest.approx(parameters, rel=1e-9 if "gpt" not in name else 1e-3)
    assert architecture.weight_bytes / 1e9 == pytest.approx(gb, rel=0.01)


def test_a_multimodal_config_is_read_from_its_text_part() -> None:
    inner = architecture_from_config(PUBLISHED["llama-3.3-70b"])
    assert architecture_from_config({"model_type": "mllama", "text_config": PUBLISHED["llama-3.3-70b"]}) == inner


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"model_type": "gpt2", "n_embd": 768}, "model_type gpt2"),
        ({}, "num_attention_heads"),
        ({**PUBLISHED["llama-3.3-70b"], "vocab_size": "many"}, "many"),
        ({**PUBLISHED["llama-3.3-70b"], "layer_types": ["linear_attention"]}, "state-space"),
        ({**PUBLISHED["llama-3.3-70b"], "mamba_d_state": 128}, "state-space"),
    ],
)
def test_an_unknown_kind_of_model_is_refused(broken: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        architecture_from_config(broken)
    assert "by hand" in str(raised.value.hint)


def test_the_shipped_models_fit_the_shipped_cluster(config: Config) -> None:
    local = [model for model in config.models.values() if model.type == "local"]
    assert len(local) == 5
    for model in local:
        assert fit(model, config.cluster).reasons == (), model.key


def test_the_shipped_numbers_are_the_published_ones(config: Config) -> None:
    for name, published in PUBLISHED.items():
        shipped, computed = config.models[name].architecture, architecture_from_config(published)
        assert isinstance(shipped, Architecture)
        assert shipped.weight_bytes == pytest.approx(computed.weight_bytes, rel=0.001)
        assert asdict(shipped) | {"weight_bytes": 0} == asdict(computed) | {"weight_bytes": 0}, name


def test_the_command_line_overrides_gpu_utilisation_and_weights(config: Config) -> None:
    model, cluster = config.models["llama-3.3-70b"], config.cluster
    assert fit(model, cluster, gpus=4).gpus == 4
    assert fit(model, cluster, gpu="h200").budget_gib == pytest.approx(139.8 * 0.95)
    assert fit(model, cluster, gpu="40").gpu_gib == 40
    assert not fit(model, cluster, gpu="a100-40gb").fits
    assert fit(model, cluster, gpu_memory_utilization=0.5).budget_gib == pytest.approx(79.1 / 2)
    assert fit(model, cluster, gpus=1, quantization="awq").fits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpu": "h1000"}, "h1000"),
        ({"gpu_memory_utilization": 1.7}, "at most 1"),
        ({"gpus": -1}, "at least 1"),
        ({"quantization": "fp9"}, "fp9"),
    ],
)
def test_nonsense_is_refused(config: Config, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fit(config.models["qwen-coder-32b"], config.cluster, **arguments)


def test_a_model_of_unknown_size_is_refused_with_a_fix() -> None:
    with pytest.raises(DoesNotFitError) as raised:
        fit(Model(key="mine", hf_id="me/mine"), Cluster())
    assert "biollm models add me/mine" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("text", "tokens"), [(16384, 16384), ("16384", 16384), ("16k", 16000), ("16K", 16384), ("25.6k", 25600),
                         ("1M", 2**20), ("auto", 0), (-1, 0), (None, None)],
)  # fmt: skip
def test_tokens_are_written_as_vllm_reads_them(text: object, tokens: int | None) -> None:
    assert token_count(text) == tokens


@pytest.mark.parametrize("text", ["-5", -5, 0, "0", "1.5", "1.5K", "many", "16kk", True])
def test_wrong_numbers_of_tokens(text: object) -> None:
    with pytest.raises(UsageError, match="is not a number of tokens"):
        token_count(text)


def test_gpus_are_named_as_people_name_them() -> None:
    assert gpu_gib("NVIDIA H100") == gpu_gib("h100") == 79.1
    assert gpu_gib("24GB") == gpu_gib("24") == 24
    with pytest.raises(UsageError) as raised:
        gpu_gib("h10")
    assert "Did you mean" in str(raised.value.hint)
