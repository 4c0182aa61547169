"""The heart of biollm: deployments become LiteLLM's `model_list`. Priority becomes `order`, rate limits become `rpm`.

    lightning:                                       model_name: biollm
      priority: 1                                    litellm_params:
      rate_limit: 15/min                     ->        model: openai/gpt-oss-20b
      base_url: https://lightning.ai/api/v1            order: 1
      models: [gpt-oss-20b]                            rpm: 15
                                                       api_base: https://lightning.ai/api/v1

Pure: nothing is read, sent or imported from LiteLLM. The same entries make a config.yaml for the LiteLLM proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from biollm._ownership import in_the_clear
from biollm.routing.deployments import Deployment, build_deployments

if TYPE_CHECKING:
    from biollm.config import Config, Limit

GROUP, LOCAL_GROUP = "biollm", "biollm-local"  # LiteLLM's model groups: every deployment, and those that are local


def model_list(found: Iterable[Deployment], keys: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return LiteLLM's `model_list`: local deployments stand in both groups.

    Args:
        found: The deployments; those without an entry in `keys` are left out.
        keys: Deployment id -> further `litellm_params`: `api_key`, `extra_headers`, `api_base`.
    """
    entries: list[dict[str, Any]] = []
    for deployment in found:
        if deployment.id in keys:
            entries.append(_entry(deployment, keys[deployment.id], GROUP, deployment.id))
            if deployment.local:
                entries.append(_entry(deployment, keys[deployment.id], LOCAL_GROUP, f"{deployment.id}@local"))
    return entries


def _entry(deployment: Deployment, key: Mapping[str, Any], group: str, ident: str) -> dict[str, Any]:
    params = {
        "model": deployment.litellm_model,
        "order": deployment.order,
        "rpm": requests_per_minute(deployment.limits),
        "api_base": deployment.base_url,
        "timeout": deployment.provider.timeout,
        "drop_params": True,
    }
    info = {"id": ident, "provider": deployment.provider.name, "account": deployment.account.name}
    params = {name: value for name, value in params.items() if value}
    return {"model_name": group, "litellm_params": params | dict(key), "model_info": info}


def requests_per_minute(limits: Iterable[Limit]) -> int | None:
    """Return the tightest limit per second or minute as LiteLLM's `rpm`, or None."""
    rates = [limit.amount * 60 / limit.seconds for limit in limits if limit.kind == "requests" and limit.seconds <= 60]
    return max(1, int(min(rates))) if rates else None


def router_settings(config: Config) -> dict[str, Any]:
    """Return the Router's settings: no retries, no cooldowns of its own (the ledger has them), finite timeouts."""
    return {
        "num_retries": 0,
        "allowed_fails": 0,
        "disable_cooldowns": True,
        "timeout": config.routing.timeout,
        "stream_timeout": config.routing.stream_timeout or config.routing.timeout,
    }


def proxy_config(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return a config.yaml for the LiteLLM proxy, and a sentence for each deployment it cannot express.

    Keys appear as `os.environ/NAME` only. The proxy counts requests per deployment and clock minute; it has no budgets of
    tokens or USD, no shared accounts and no data policies.
    """
    keys: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    found = build_deployments(config)
    for deployment in found:
        if deployment.embedded or deployment.provider.litellm_provider == "github_copilot":
            left_out.append(f"{deployment.id}: its answers or its tokens come from biollm's own process")
        elif deployment.account.key_file:
            left_out.append(f"{deployment.id}: its key lies in a file, which the proxy does not read")
        elif deployment.provider.type == "local" and not deployment.base_url:
            left_out.append(f"{deployment.id}: its servers come and go with their jobs and keys of their own")
        elif why := in_the_clear(deployment.base_url or "", config.cluster.local_hosts):
            left_out.append(f"{deployment.id}: {why}")
        elif deployment.account.env_key:
            keys[deployment.id] = {"api_key": f"os.environ/{deployment.account.env_key}"}
        else:
            keys[deployment.id] = {"api_key": "none"}
    settings = {**router_settings(config), "optional_pre_call_checks": ["enforce_model_rate_limits"]}
    made = {"model_list": model_list(found, keys), "router_settings": settings}
    # Where a variable is not set, LiteLLM would send OPENAI_API_KEY to whatever host speaks OpenAI's dialect.
    return {**made, "litellm_settings": {"openai_key": "none"}}, left_out
