"""Checks the availability of all providers at once by their lists of models, which cost no tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from biollm._runtime import apart, background, ledger, watch
from biollm.config import Config, load_config
from biollm.config.paths import state_dir
from biollm.providers.credentials import Credential, hide, origin
from biollm.routing import host_check
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment, Requirements

if TYPE_CHECKING:
    import httpx

_GEMINI = "https://generativelanguage.googleapis.com/v1beta"


@dataclass(frozen=True)
class Health:
    """The state of one account of a provider, or of one running server.

    Attributes:
        who: The deployment's id without its model.
        available: Whether it lists its models; None where that could not be checked.
        latency_ms: Milliseconds of that answer.
        error: Why it is not available, or was not checked, one sentence.
        keyless: Whether it has no key, or no login, to be checked with.
        missing: Models in the configuration that the provider does not list.
        resting: Why one of its models is on cooldown or at a limit all the same, and whether the time is an estimate.
    """

    provider: str
    who: str
    available: bool | None
    latency_ms: float | None = None
    error: str = ""
    keyless: bool = False
    missing: tuple[str, ...] = ()
    resting: str = ""


def check_all_providers(config: Config | None = None, *, timeout: float = 10.0) -> dict[str, dict[str, Any]]:
    """Return for each provider {"available": True, "latency_ms": 120} or {"available": False, "error": "..."}.

    A provider is available when one of its accounts, or one of its servers, is; {"available": None, "error": "..."}
    where none is known to be and one could not be asked.

    Args:
        config: The configuration; the usual layers when None.
        timeout: Seconds for all of it, whatever hangs.

    Raises:
        ConfigError: A YAML file is wrong.
    """
    found: dict[str, dict[str, Any]] = {}
    rank = (False, None, True).index
    for health in check(config or load_config(), timeout=timeout):
        good = {"available": True, "latency_ms": round(health.latency_ms or 0)}
        bad = {"available": health.available, "error": health.error}
        if health.provider not in found or rank(health.available) > rank(found[health.provider]["available"]):
            found[health.provider] = good if health.available else bad
    return found


def check(config: Config, *, timeout: float = 10.0) -> list[Health]:
    """Return the health of each account and each running server, in waterfall order. `timeout` is in seconds, for all."""
    pool = DeploymentPool(config, ledger(config), state_dir(), config.data_policy, watch(config.cluster).alive)
    pool.refresh()
    pool.ledger.refresh()
    groups: dict[str, list[Deployment]] = {}
    for candidate in pool.candidates(Requirements(policy=config.data_policy)):
        deployment = candidate.deployment
        groups.setdefault(f"{deployment.scope.split(':')[0]}{deployment.start}", []).append(deployment)
    found = background().run(_check_all(pool, list(groups.values()), timeout))
    resting = {each.deployment.id: each.reason for each in pool.candidates(Requirements()) if each.until}
    return [
        replace(health, resting=next((resting[each.id] for each in group if each.id in resting), ""))
        for health, group in zip(found, groups.values(), strict=True)
    ]


async def _check_all(pool: DeploymentPool, groups: Sequence[list[Deployment]], timeout: float) -> list[Health]:
    import httpx

    async with (
        httpx.AsyncClient(timeout=timeout) as cloud,
        httpx.AsyncClient(timeout=timeout, trust_env=False) as local,
    ):
        checks = (_check(pool, group, local if group[0].local else cloud, timeout) for group in groups)
        return list(await asyncio.gather(*checks))


async def _check(pool: DeploymentPool, group: list[Deployment], client: httpx.AsyncClient, timeout: float) -> Health:
    import httpx

    first = group[0]
    known = pool.credentials.get(first.id)
    unavailable = Health(
        first.provider.name, first.id if first.start else first.id.removesuffix(f"/{first.model}"), False
    )
    if known is None:
        return replace(unavailable, error=pool.missing(first), keyless=first.provider.type == "api")
    if first.embedded:
        return replace(unavailable, available=True, latency_ms=0.0)
    if not (_address(first) or known.base_url):
        return replace(unavailable, available=None, error="only LiteLLM knows its address; not checked")
    try:
        async with asyncio.timeout(timeout):
            if known.ends_within(0):  # `refresh` renews none
                known = pool.note(first, await apart(pool.look, first))
            if known is None:
                return replace(unavailable, error=pool.missing(first), keyless=first.provider.type == "api")
            if why := await host_check.trust().objection(first, known, pool.config.cluster):
                return replace(unavailable, error=why)
            started = time.perf_counter()
            listed = await _models(client, first, known)
    except TimeoutError:
        return replace(unavailable, error=f"no answer within {timeout:g} s")
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        key = f" (key: {origin(first.account)})" if status in (401, 403) and origin(first.account) else ""
        return replace(unavailable, error=f"HTTP {status}{key}")
    except (ValueError, TypeError, AttributeError):
        return replace(unavailable, error="the answer is not a JSON list of models")
    except httpx.HTTPError as error:
        text = hide(str(error), [known.secret] if known else [])
        return replace(unavailable, error=f"{type(error).__name__} ({first.host}): {text}".strip(": "))
    ms = (time.perf_counter() - started) * 1000
    pool.ledger.recover(key for key in pool.claims[first.id].cooling if key.startswith(("endpoint:", "key:")))
    missing = {deployment.litellm_model.split("/", 1)[1] for deployment in group} - listed if listed else ()
    return replace(unavailable, available=True, latency_ms=ms, missing=tuple(sorted(missing)))


def _address(deployment: Deployment) -> str:
    """Return the provider's base URL; "" where only LiteLLM knows it."""
    return deployment.base_url or (_GEMINI if deployment.litellm_model.startswith("gemini/") else "")


async def _models(client: httpx.AsyncClient, deployment: Deployment, known: Credential) -> set[str]:
    """Return the ids that the provider lists."""
    if deployment.litellm_model.startswith("gemini/"):
        headers = {"x-goog-api-key": known.secret}
    else:
        headers = {"Authorization": f"Bearer {known.secret}", **known.headers} if known.secret else {}
    answer = await client.get(f"{known.base_url or _address(deployment)}/models", headers=headers)
    answer.raise_for_status()
    body: Any = answer.json()
    entries: list[Any] = body.get("data") or body.get("models") or []
    return {str(entry.get("id") or entry.get("name", "")).removeprefix("models/") for entry in entries}
