"""vLLM's flags are checked before a GPU waits for them: names, choices, ranges, parsers that exist."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from biollm.config import Config, load_config
from biollm.slurm.vllm_flags import flags, problems, requirement, snapshot


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config()


def test_the_snapshot_is_of_a_known_vllm() -> None:
    assert snapshot()["vllm"] == "0.32.0"
    assert len(snapshot()["flags"]) > 300


def test_the_extra_installs_the_version_of_the_snapshot() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (wanted,) = project["project"]["optional-dependencies"]["vllm"]
    assert Requirement(wanted).specifier.contains(snapshot()["vllm"])
    assert not Requirement(wanted).specifier.contains("0.33.0") and requirement() == "vllm==0.32.*"


def test_the_shipped_models_have_good_flags(config: Config) -> None:
    for model in config.models.values():
        assert list(problems(model.vllm_args)) == [], model.key


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"max_model_leng": 1}, "is not a flag of vLLM 0.32.0. Did you mean 'max_model_len'?"),
        ({"swap_space": 4}, "is not a flag"),
        ({"disable_log_requests": True}, "is not a flag"),
        ({"task": "generate"}, "is not a flag"),
        ({"rope_scaling": "{}"}, "is not a flag"),
        ({"dtype": "fp16"}, "is 'fp16'. Known: auto, bfloat16, float, float16"),
        ({"dtype": "float8"}, "is 'float8'. Did you mean 'float"),
        ({"kv_cache_dtype": "fp9"}, "Did you mean 'fp8'?"),
        ({"quantization": "fp9"}, "Did you mean 'fp8'?"),
        ({"tool_call_parser": "llama3json"}, "Did you mean 'llama3_json'?"),
        ({"reasoning_parser": "minimax-m2"}, "Did you mean 'minimax_m2'?"),
        ({"gpu_memory_utilization": 1.7}, "share of the GPU's memory"),
        ({"gpu_memory_utilization": 0}, "share of the GPU's memory"),
        ({"gpu_memory_utilization": "most"}, "not a number"),
        ({"max_model_len": -5}, "is not a number of tokens: -5. Write 16384"),
        ({"max_num_batched_tokens": "lots"}, "is not a number of tokens"),
        ({"tensor_parallel_size": 0}, "is 0; the minimum is 1"),
        ({"tensor_parallel_size": 1.5}, "not a whole number"),
        ({"tensor_parallel_size": True}, "is True"),
        ({"enforce_eager": "sometimes"}, "not true or false"),
        ({"max_num_seqs": [1, 2]}, "takes one value"),
        ({"speculative_config": "eagle"}, "not JSON"),
        ({"seed": None}, "has no value"),
        ({"chat_template": ""}, "has no value"),
        ({"chat_template": "a\0b"}, "has no value"),
        ({"allowed_media_domains": ["--port"]}, "begin with a dash"),
        ({"port": 8000}, "set by biollm itself"),
        ({"api_key": "sk-1"}, "is a secret"),
        ({"hf_token": "hf_1"}, "is a secret"),
        ({"enable_auto_tool_choice": True}, "needs tool_call_parser"),
    ],
)
def test_what_vllm_would_refuse_or_fail_on(args: dict[str, Any], says: str) -> None:
    [(key, message)] = problems(args)
    assert key in args
    assert says in message
    assert not any(secret in message for secret in ("sk-1", "hf_1"))


@pytest.mark.parametrize(
    "args",
    [
        {"max_model_len": "16k"},
        {"max_model_len": "auto"},
        {"kv_cache_dtype": "fp8_e4m3", "gpu_memory_utilization": 1},
        {"tool_call_parser": "ours", "tool_parser_plugin": "/opt/ours.py"},
        {"reasoning_parser": "ours", "reasoning_parser_plugin": "/opt/ours.py"},
        {"hf_overrides": {"rope_scaling": {"factor": 4.0}}},
        {"compilation_config": '{"level": 3}'},
        {"enable_prefix_caching": False, "enforce_eager": True},
    ],
)
def test_what_is_right(args: dict[str, Any]) -> None:
    assert list(problems(args)) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_len": 4096}, ["--max-model-len", "4096"]),
        ({"gpu_memory_utilization": 0.95}, ["--gpu-memory-utilization", "0.95"]),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),  # on by default: leaving it out is no "off"
        ({"disable_log_stats": False}, []),  # has no negation
        ({"hf_overrides": {"a": {"b": [1, True]}}}, ["--hf-overrides", '{"a":{"b":[1,true]}}']),
        ({"allowed_origins": ["*"]}, ["--allowed-origins", '["*"]']),
        ({"allowed_media_domains": ["a.org", "b, c"]}, ["--allowed-media-domains", "a.org", "b, c"]),
        ({"chat_template": "{{ x }}\n$(id) 'q'"}, ["--chat-template", "{{ x }}\n$(id) 'q'"]),
        ({"chat_template": "-dashed"}, ["--chat-template=-dashed"]),
    ],
)
def test_flags_become_arguments(args: dict[str, Any], words: list[str]) -> None:
    assert list(problems(args)) == []
    assert [word for flag in flags(args) for word in flag] == words
