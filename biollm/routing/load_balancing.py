"""Narrows the choice among the replicas of one model to the least busy, by the metrics of their servers.

LiteLLM's least-busy counts what its own Router sent, by callbacks that get lost between event loops, and knows nothing
of the requests of other users and processes; vLLM reports those at /metrics. LiteLLM then picks among equals. Only local
servers are polled, and only where a model has several.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from biollm._runtime import background
from biollm.providers.credentials import Credential
from biollm.routing.candidates import Candidate, DeploymentPool, Load
from biollm.routing.deployments import Deployment
from biollm.routing.host_check import trust
from biollm.slurm.endpoints import Figures, figures

LOOK, PATIENCE = 0.3, 2.0  # seconds: the longest that requests wait for metrics; that a server has to send them
FRESH, STALE = 1.0, 5.0  # seconds: older metrics are renewed beside the request; still older ones before it
SILENT = 30.0  # seconds for which a server without usable metrics is not polled again


@dataclass
class _Server:
    """The last metrics of a server, this process's requests there at the time, and when to poll again (monotonic).

    While it is polled, requests wait for it until `due`.
    """

    told: Figures | None = None
    own: int = 0
    due: float = 0.0
    stale: float = 0.0


class Balance:
    """The load of replicas, as this process knows it. For the background loop only.

    Attributes:
        under_way: An object for each request in flight, whose `deployment` serves it; a forgotten one leaves by itself.
    """

    def __init__(self) -> None:
        self.under_way: WeakSet[Any] = WeakSet()
        self._servers: dict[str, _Server] = {}
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._client: Any = None

    async def least_busy(self, replicas: Sequence[Deployment], pool: DeploymentPool) -> list[Deployment]:
        """Return the least busy of `replicas`; `pool` has their keys."""
        loads = await self.loads(replicas, pool)
        least = min(load.rank for load in loads.values())
        return [replica for replica in replicas if loads[replica.id].rank == least]

    async def weighed(self, candidates: Sequence[Candidate], pool: DeploymentPool) -> Sequence[Candidate]:
        """Return `candidates` with the load of the ready ones that share an order with others."""
        loads: dict[str, Load] = {}
        ready = [candidate.deployment for candidate in candidates if candidate.status == "ready"]
        for order, count in Counter(deployment.order for deployment in ready).items():
            if count > 1:
                loads |= await self.loads([each for each in ready if each.order == order], pool)
        return [replace(candidate, load=loads.get(candidate.deployment.id)) for candidate in candidates]

    async def loads(self, replicas: Sequence[Deployment], pool: DeploymentPool) -> dict[str, Load]:
        """Return the load of each of `replicas` by its id, after polling the servers that are due."""
        pollable = {each.endpoint: each for each in replicas if each.local and each.base_url and not each.embedded}
        if len(pollable) > 1:
            await self._poll(pollable, pool)
        return _loads({each.id: self._servers.get(each.endpoint, _Server()) for each in replicas}, self._own())

    async def _poll(self, replicas: Mapping[str, Deployment], pool: DeploymentPool) -> None:
        """Start to poll the servers that are due, and wait a moment for those whose metrics are stale."""
        now = time.monotonic()
        for name, replica in replicas.items():
            server = self._servers.setdefault(name, _Server())
            if now >= server.due and name not in self._looks:
                self._looks[name] = asyncio.create_task(self._look(server, replica, pool))
                server.due = now + LOOK
        if late := [name for name in replicas if now >= self._servers[name].stale]:
            patience = max(0.0, *(self._servers[name].due - now for name in late))
            await asyncio.wait([self._looks[name] for name in late], timeout=patience)

    def _own(self) -> Counter[str]:
        return Counter(each.deployment.id for each in self.under_way)

    async def _look(self, server: _Server, replica: Deployment, pool: DeploymentPool) -> None:
        """Poll one server at /metrics, which lies beside its /v1."""
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(trust_env=False, timeout=PATIENCE)
            background().closing.append(self._client.aclose)
        url = (replica.base_url or "").removesuffix("/v1")
        key = pool.credentials.get(replica.id) or Credential()
        headers = {"Authorization": f"Bearer {key.secret}"} if key.secret else {}
        told: Figures | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                if not await trust().objection(replica, key, pool.config.cluster):
                    told = figures((await self._client.get(f"{url}/metrics", headers=headers)).text)
        except (TimeoutError, httpx.HTTPError, ValueError):
            pass
        finally:
            now = time.monotonic()
            server.told, server.own = told, self._own()[replica.id]
            server.due, server.stale = (now + FRESH, now + STALE) if told else (now + SILENT, float("inf"))
            del self._looks[replica.endpoint]


def _loads(servers: Mapping[str, _Server], own: Counter[str]) -> dict[str, Load]:
    """Return the loads by deployment id; `own` counts this process's requests in flight now."""
    told = {name: server.told for name, server in servers.items() if server.told}
    # Of what a server reported, this process's own requests are replaced by those in flight now.
    others = {name: max(0, figures.running + figures.waiting - servers[name].own) for name, figures in told.items()}
    most, fullest = max(others.values(), default=0), max((figures.cache for figures in told.values()), default=0.0)
    return {
        name: Load(own[name], others.get(name, most), told[name].cache if name in told else fullest, told.get(name))
        for name in servers
    }


def of_process() -> Balance:
    """Return the process's one Balance."""
    return background().once("balance", Balance)
