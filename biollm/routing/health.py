"""Asks every provider at once whether it is there, without a billable token: by its list of models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from biollm._runtime import apart, background, ledger, watch
from biollm.config import Config, load_config
from biollm.config.paths import state_dir
from biollm.providers.credentials import Credential, hide
from biollm.routing import host_check
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment, Requirements

if TYPE_CHECKING:
    import httpx

_GEMINI = "https://generativelanguage.googleapis.com/v1beta"


@dataclass(frozen=True)
class Health:
    """What one account of a provider, or one running server, answered.

    Attributes:
        who: The deployment's id without its model.
        available: Whether it lists its models; None where that could not be asked.
        latency_ms: Milliseconds of that answer.
        error: Why it is not available, or was not asked, one sentence.
        missing: Models that the configuration names and the provider does not list.
        resting: Why a model of it is on cooldown or at a limit all the same, and whether the time is an estimate.
    """

    provider: str
    who: str
    available: bool | None
    latency_ms: float | None = None
    error: str = ""
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
    """Return how each account and each running server is, in waterfall order. `timeout` is in seconds, for all."""
    pool = DeploymentPool(config, ledger(), state_dir(), config.data_policy, watch(config.cluster).alive)
    pool.refresh()
    groups: dict[str, list[Deployment]] = {}
    for candidate in pool.candidates(Requirements(policy=config.data_policy)):
        deployment = candidate.deployment
        groups.setdefault(f"{deployment.scope.split(':')[0]}{deployment.start}", []).append(deployment)
    found = background().run(_check_all(pool, list(groups.values()), timeout))
    resting = {
        candidate.deployment.id: candidate.reason for candidate in pool.candidates(Requirements()) if candidate.until
    }
    return [
        replace(each, resting=next((resting[one.id] for one in group if one.id in resting), ""))
        for each, group in zip(found, groups.values(), strict=True)
    ]


async def _check_all(pool: DeploymentPool, groups: Sequence[list[Deployment]], timeout: float) -> list[Health]:
    import httpx

    async with (
        httpx.AsyncClient(timeout=timeout) as cloud,
        httpx.AsyncClient(timeout=timeout, trust_env=False) as local,
    ):
        return list(
            await asyncio.gather(
                *(_check(pool, group, local if group[0].local else cloud, timeout) for group in groups)
            )
        )


async def _check(pool: DeploymentPool, group: list[Deployment], client: httpx.AsyncClient, timeout: float) -> Health:
    import httpx

    first = group[0]
    who = first.id if first.start else first.id.removesuffix(f"/{first.model}")
    known = pool.credentials.get(first.id)
    if known is None:
        return Health(first.provider.name, who, False, error=pool.missing(first))
    if first.embedded:
        return Health(first.provider.name, who, True, 0.0)
    if not (_address(first) or known.base_url):
        return Health(first.provider.name, who, None, error="its address is known to LiteLLM alone; not asked")
    try:
        async with asyncio.timeout(timeout):
            if known.ends_within(0):  # `refresh` renews none
                renewed = pool.note(first, await apart(pool.look, first))
                if renewed is None:
                    return Health(first.provider.name, who, False, error=pool.missing(first))
                known = renewed
            if why := await host_check.trust().objection(first, known, pool.config.cluster):
                return Health(first.provider.name, who, False, error=why)
            started = time.perf_counter()
            listed = await _models(client, first, known)
    except TimeoutError:
        return Health(first.provider.name, who, False, error=f"no answer within {timeout:g} s")
    except httpx.HTTPStatusError as error:
        return Health(first.provider.name, who, False, error=f"HTTP {error.response.status_code}")
    except (ValueError, TypeError, AttributeError):
        return Health(first.provider.name, who, False, error="answered with something that is no JSON list of models")
    except httpx.HTTPError as error:
        text = hide(str(error), [known.secret])
        return Health(first.provider.name, who, False, error=f"{type(error).__name__}: {text}".strip(": "))
    ms = (time.perf_counter() - started) * 1000
    pool.ledger.recover(key for key in pool.claims[first.id].cooling if key.startswith(("endpoint:", "key:")))
    names = {deployment.litellm_model.split("/", 1)[1] for deployment in group}
    return Health(first.provider.name, who, True, ms, missing=tuple(sorted(names - listed)) if listed else ())


def _address(deployment: Deployment) -> str:
    """Return where the provider answers; "" where LiteLLM alone knows it."""
    return deployment.base_url or (_GEMINI if deployment.litellm_model.startswith("gemini/") else "")


async def _models(client: httpx.AsyncClient, deployment: Deployment, known: Credential) -> set[str]:
    """Return the ids that the provider lists; none where it lists nothing of use."""
    if deployment.litellm_model.startswith("gemini/"):
        headers = {"x-goog-api-key": known.secret}
    else:
        headers = {"Authorization": f"Bearer {known.secret}", **known.headers} if known.secret else {}
    answer = await client.get(f"{known.base_url or _address(deployment)}/models", headers=headers)
    answer.raise_for_status()
    body: Any = answer.json()
    entries: list[Any] = body.get("data") or body.get("models") or []
    return {str(entry.get("id") or entry.get("name", "")).removeprefix("models/") for entry in entries}
