"""Configuration and running servers become deployments, and deployments become LiteLLM's arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biollm import _ownership
from biollm.config import Config, Limit, Model, load_config
from biollm.routing import deployments, router_config
from biollm.routing.deployments import Requirements

GOLDEN = Path(__file__).parents[1] / "golden" / "shipped_waterfall.json"

PROVIDERS = """
providers:
  two: {type: api, priority: 2, base_url: "https://two.example/v1", models: [big, small], rate_limit: [15/min, 1000/day],
        accounts: [{name: lab, env_key: LAB}, {name: core, env_key: CORE, rate_limit: 2/s}]}
  one: {type: api, priority: 1, env_key: ONE, base_url: "https://one.example/v1", models: [big], trains_on_prompts: true,
        limits_per: model, rate_limit: 5/min, model_ids: {big: vendor/big-v2}}
  gpu: {type: local, priority: 5, models: [mine]}
  near: {type: api, priority: 6, base_url: "http://127.0.0.1:9/v1", models: [tiny]}
"""
MODELS = """models:
  mine: {hf_id: lab/mine, type: local, context_length: 4096, capabilities: [code, reasoning], vllm_args: {max_model_len: 2048}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return _config(tmp_path)


def _config(folder: Path, *, shipped: bool = False) -> Config:
    (folder / "providers.yaml").write_text(("" if shipped else "inherit: false") + PROVIDERS)
    (folder / "models.yaml").write_text(("" if shipped else "inherit: false\n") + MODELS)
    return load_config(folder)


def server(start: str, model: str = "mine") -> Any:
    """Stand for the record of a running server."""
    return SimpleNamespace(start=start, model=model, base_url=f"http://n1:80{start}/v1", key_file="/k", adapters=())


def test_the_shipped_waterfall_is_the_recorded_one() -> None:
    found = deployments.build_deployments(load_config())
    shown = router_config.model_list(found, {d.id: {"api_key": f"os.environ/{d.account.env_key}"} for d in found})
    assert shown == json.loads(GOLDEN.read_text()), "if this is meant, write the new list into tests/golden"


def test_priority_then_place_in_the_list_becomes_order_and_accounts_share_it(config: Config) -> None:
    found = [(d.order, d.id) for d in deployments.build_deployments(config)]
    assert found == [
        (1, "one/big"),
        (2, "two.lab/big"),
        (2, "two.core/big"),
        (3, "two.lab/small"),
        (3, "two.core/small"),
        (4, "gpu/mine"),
        (5, "near/tiny"),
    ]


def test_a_model_of_its_own_priority_goes_before_its_place(config: Config) -> None:
    small = replace_model(config, "small", priority=1)
    assert next(d.model for d in deployments.build_deployments(small) if d.provider.name == "two") == "small"


def replace_model(config: Config, key: str, **changes: Any) -> Config:
    model = config.models["mine"].model_copy(update={"key": key, "type": "api", **changes})
    return replace(config, models={**config.models, key: model})


def test_a_local_model_that_no_provider_lists_follows_the_listed_ones(config: Config) -> None:
    model = config.models["mine"].model_copy(update={"key": "added"})
    more = replace(config, models={**config.models, "added": model})
    assert [d.model for d in deployments.build_deployments(more) if d.provider.name == "gpu"] == ["mine", "added"]


def test_running_servers_are_replicas_of_one_order(config: Config) -> None:
    found = [
        d
        for d in deployments.build_deployments(config, [server("1"), server("2"), server("3", "other")])
        if d.model == "mine"
    ]
    assert [(d.order, d.id, d.base_url) for d in found] == [
        (4, "gpu/mine#1", "http://n1:801/v1"),
        (4, "gpu/mine#2", "http://n1:802/v1"),
    ]
    assert all(d.local and d.litellm_model == "hosted_vllm/mine" for d in found)


def test_a_local_model_without_a_server_stays_visible_without_an_address(config: Config) -> None:
    (mine,) = [d for d in deployments.build_deployments(config) if d.model == "mine"]
    assert (mine.base_url, mine.local) == (None, True)


def test_local_only_keeps_what_never_leaves_whatever_its_type(config: Config) -> None:
    assert [d.id for d in deployments.build_deployments(config, [server("1")], "local_only")] == [
        "gpu/mine#1",
        "near/tiny",
    ]


@pytest.mark.parametrize(
    ("url", "hosts", "local"),
    [
        ("http://127.0.0.1:8000/v1", (), True),
        ("http://127.9.9.9/v1", (), True),
        ("http://[::1]:8000/v1", (), True),
        ("http://localhost/v1", (), True),
        ("https://api.openai.com/v1", (), False),
        ("https://localhost.evil.example/v1", (), False),
        ("http://10.0.0.7:8000/v1", (), False),
        ("http://llm.lab.example/v1", ("llm.lab.example",), True),
        ("http://GPU01:8000/v1", ("gpu01",), True),
        ("http://gpu01:8000/v1", ("GPU01",), True),
        (None, (), False),
    ],
)
def test_local_means_loopback_or_a_host_the_site_calls_its_own(
    url: str | None, hosts: tuple[str, ...], local: bool
) -> None:
    assert _ownership.is_local(url, hosts) is local


def test_limits_belong_to_the_account_or_to_its_model(config: Config) -> None:
    scopes = {d.id: d.scope for d in deployments.build_deployments(config)}
    assert scopes["two.lab/big"] == scopes["two.lab/small"] == "two/lab"
    assert scopes["one/big"] == "one/default:big"


@pytest.mark.parametrize(
    ("limits", "rpm"),
    [
        ([Limit("requests", 15, "min")], 15),
        ([Limit("requests", 2, "s"), Limit("requests", 60, "min")], 60),
        ([Limit("requests", 1000, "day")], None),
        ([Limit("tokens", 15, "min")], None),
        ([], None),
    ],
)
def test_the_tightest_rate_becomes_rpm(limits: list[Limit], rpm: int | None) -> None:
    assert router_config.requests_per_minute(limits) == rpm


def test_both_groups_and_only_deployments_with_a_key(config: Config) -> None:
    found = deployments.build_deployments(config, [server("1")])
    made = router_config.model_list(found, {"one/big": {"api_key": "k"}, "gpu/mine#1": {"api_key": "s"}})
    assert [(e["model_name"], e["model_info"]["id"]) for e in made] == [
        ("biollm", "one/big"),
        ("biollm", "gpu/mine#1"),
        ("biollm-local", "gpu/mine#1@local"),
    ]
    assert made[0]["litellm_params"] == {
        "model": "openai/vendor/big-v2",
        "order": 1,
        "drop_params": True,
        "api_base": "https://one.example/v1",
        "rpm": 5,
        "api_key": "k",
    }


@pytest.mark.parametrize(
    ("ident", "requirements", "reason"),
    [
        ("one/big", Requirements(), None),
        ("one/big", Requirements(policy="local_only"), "local_only"),
        ("one/big", Requirements(policy="no_training"), "train on prompts"),
        ("two.lab/big", Requirements(policy="no_training"), None),
        ("gpu/mine#1", Requirements(tools=True), "does not support tools"),
        ("two.lab/big", Requirements(tools=True), None),
        ("gpu/mine#1", Requirements(capability="reasoning"), None),
        ("two.lab/big", Requirements(capability="reasoning"), "lacks the capability"),
        ("gpu/mine#1", Requirements(prompt=2048), None),
        ("gpu/mine#1", Requirements(prompt=2049), "its context is 2048"),
    ],
)
def test_what_a_request_needs_rules_deployments_out(
    config: Config, ident: str, requirements: Requirements, reason: str | None
) -> None:
    (deployment,) = [d for d in deployments.build_deployments(config, [server("1")]) if d.id == ident]
    said = deployments.ineligible_reason(deployment, requirements)
    assert said is None if reason is None else said and reason in said


SMALL = "embedded/smollm2-135m"


@pytest.mark.parametrize(
    ("ident", "vision", "media", "reason"),
    [
        ("one/big", False, (), None),
        ("one/big", False, ("images",), "does not support images"),
        ("one/big", None, ("images",), None),  # unknown: tried
        ("one/big", True, ("images",), None),
        ("one/big", False, ("audio",), None),
        (SMALL, None, (), None),
        (SMALL, None, ("images",), "supports text only"),
        (SMALL, None, ("files",), "supports text only"),
    ],
)
def test_images_go_to_who_may_take_them(
    tmp_path: Path, ident: str, vision: bool | None, media: tuple[str, ...], reason: str | None
) -> None:
    [found] = [d for d in deployments.build_deployments(_config(tmp_path, shipped=True)) if d.id == ident]
    assert deployments.ineligible_reason(replace(found, vision=vision), Requirements(media=frozenset(media))) == reason


@pytest.mark.parametrize(
    ("said", "facts", "vision"),
    [
        (None, {}, None),
        (None, {"supports_vision": None}, None),
        (None, {"supports_vision": True}, True),
        (None, {"supports_vision": False}, False),
        (True, {"supports_vision": False}, True),
        (False, {"supports_vision": True}, False),
    ],
)
def test_models_yaml_comes_before_litellms_map(
    config: Config, said: bool | None, facts: dict[str, Any], vision: bool | None
) -> None:
    assert deployments.informed(replace(deployments.build_deployments(config)[0], vision=said), facts).vision is vision


@pytest.mark.parametrize(
    ("context", "most", "prompt", "wanted", "asked", "reason"),
    [
        (None, None, 100, None, None, None),
        (None, None, 100, 32000, 32000, None),
        (8192, None, 100, None, None, None),
        (8192, None, 100, 4000, 4000, None),
        (8192, None, 100, 32000, 7992, None),  # beside a prompt that may have 200 tokens
        (8192, None, 3500, 32000, 2048, None),
        (8192, None, 6144, 32000, 2048, None),
        (8192, None, 6145, 32000, 2048, "needs about 8193 tokens, its context is 8192"),
        (8192, None, 8000, 192, 192, None),
        (8192, None, 8000, 193, 193, "needs about 8193 tokens, its context is 8192"),
        (1024, None, 100, 32000, 2048, "needs about 2148 tokens, its context is 1024"),
        (8192, 4096, 100, 32000, 4096, None),
        (8192, 4096, 100, 4000, 4000, None),
        (8192, 4096, 100, None, None, None),
        (None, 1000, 100, 1000, 1000, None),
        (None, 1000, 100, 1001, 1000, "answers with at most 1000 tokens"),
    ],
)
def test_a_long_answer_is_shortened_to_what_fits(
    config: Config, context: int | None, most: int | None, prompt: int, wanted: int | None, asked: int | None,
    reason: str | None,
) -> None:  # fmt: skip
    deployment = replace(deployments.build_deployments(config)[0], context_length=context, max_output=most)
    requirements = Requirements(prompt=prompt, prompt_most=2 * prompt, answer=wanted)
    assert deployments.ineligible_reason(deployment, requirements) == reason
    assert deployments.allowance(deployment, requirements) == asked


@pytest.mark.parametrize(
    ("flags", "context", "tools"),
    [
        ({}, 32768, False),
        ({"max_model_len": 2048, "tool_call_parser": "hermes"}, 2048, True),
        ({"max-model-len": 2048, "tool-call-parser": "hermes"}, 2048, True),
        ({"--max-model-len": "2k"}, 2000, False),
        ({"max_model_len": "2K"}, 2048, False),
        ({"max_model_len": "64k"}, 32768, False),
        ({"max_model_len": "auto"}, 32768, False),
        ({"max_model_len": -1}, 32768, False),
        ({"max_model_len": "many"}, 32768, False),  # which no server starts with
        ({"max_model_len": True}, 32768, False),
    ],
)
def test_a_server_takes_what_the_flags_of_vllm_say(
    config: Config, flags: dict[str, Any], context: int, tools: bool
) -> None:
    model = Model(key="mine", hf_id="lab/mine", context_length=32768, vllm_args=flags)
    (mine,) = [d for d in deployments.build_deployments(replace(config, models={"mine": model})) if d.model == "mine"]
    assert (mine.context_length, mine.tools) == (context, tools)


def test_an_openai_deployment_has_its_own_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    config = _config(tmp_path, shipped=True)
    assert {d.base_url for d in deployments.build_deployments(config) if d.provider.name == "openai"} == {
        "https://api.openai.com/v1"
    }


def test_copilot_accounts_go_to_the_openai_dialect(tmp_path: Path) -> None:
    config = _config(tmp_path, shipped=True)
    models = {
        d.litellm_model.split("/")[0]
        for d in deployments.build_deployments(config)
        if d.provider.name == "github_copilot"
    }
    assert models == {"openai"}


def test_the_proxy_file_holds_no_key_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    made, left_out = router_config.proxy_config(_config(tmp_path, shipped=True))
    keys = {entry["litellm_params"]["api_key"] for entry in made["model_list"]}
    assert all(key == "none" or key.startswith("os.environ/") for key in keys)
    assert "sk-planted" not in json.dumps(made)
    assert {sentence.split("/")[0] for sentence in left_out} >= {
        "embedded",
        "github_copilot.lab",
        "github_copilot.core",
        "vllm",  # no server, no address: LiteLLM would look for one elsewhere
    }
    assert made["router_settings"]["optional_pre_call_checks"] == ["enforce_model_rate_limits"]
    assert made["litellm_settings"] == {"openai_key": "none"}, "no OPENAI_API_KEY goes to other hosts"


@pytest.mark.parametrize(
    ("provider", "routing_block", "whole", "streamed"),
    [
        ("type: api", "{}", 60, 12),
        ("type: api, models: [thinker]", "{}", 60, 60),
        ("type: api", "{stream_timeout: 5, timeout: 9}", 9, 5),
        ("type: api, models: [thinker]", "{stream_timeout: 5}", 60, 5),
        ("type: api, timeout: 30", "{stream_timeout: 5}", 30, 30),
        ("type: local, timeout: 300", "{}", 300, 300),
        ("type: local", "{local_timeout: 200}", 200, 200),
        ("type: embedded", "{local_timeout: 200}", 200, 86400),
    ],
)
def test_an_attempt_has_the_time_that_its_kind_of_server_needs(
    tmp_path: Path, provider: str, routing_block: str, whole: float, streamed: float
) -> None:
    models = "" if "models" in provider else "models: [plain], "
    at = "" if "embedded" in provider else 'base_url: "https://one.example/v1", '
    (tmp_path / "providers.yaml").write_text(
        f"inherit: false\nrouting: {routing_block}\nproviders:\n  one: {{{models}{at}{provider}}}\n"
    )
    kind = provider.partition(",")[0]
    weights = {"type: local": "hf_id: lab/plain", "type: embedded": "gguf: x"}.get(kind, "name: Plain")
    (tmp_path / "models.yaml").write_text(
        f"inherit: false\nmodels:\n  thinker: {{type: api, capabilities: [reasoning]}}\n  plain: {{{kind}, {weights}}}\n"
    )
    config = load_config(tmp_path)
    (one,) = deployments.build_deployments(config)
    found = [deployments.attempt_timeout(one, config, stream=stream) for stream in (False, True)]
    assert found == [whole, streamed]
