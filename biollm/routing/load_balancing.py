"""Chooses among the replicas of a rung those with the least to do, by what their servers say.

LiteLLM's least-busy counts what its own Router sent, by callbacks that get lost between event loops; what other users
and processes ask of a server it cannot know. vLLM tells that at /metrics. So the choice is narrowed to the least busy
and LiteLLM draws among equals. Only local servers are asked, and only where a rung has several.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from biollm._runtime import background
from biollm.providers.credentials import Credential
from biollm.routing.candidates import Candidate, DeploymentPool, Load
from biollm.routing.deployments import Deployment
from biollm.routing.host_check import trust
from biollm.slurm.endpoints import Figures, figures

LOOK, PATIENCE = 0.3, 2.0  # seconds that requests wait at most for what the servers say; that a server has to say it
FRESH, STALE = 1.0, 5.0  # seconds: older figures are asked for again beside the request; still older ones before it
SILENT = 30.0  # seconds for which a server that said nothing of use is not asked again


@dataclass
class _Server:
    """The last word of a server, what of ours was under way there then, and when it is asked again (monotonic).

    While it is asked, `due` is until when a request waits for it.
    """

    told: Figures | None = None
    own: int = 0
    due: float = 0.0
    stale: float = 0.0


class Balance:
    """What this process knows of the load of replicas. For the background loop only.

    Attributes:
        under_way: One object for each request under way, whose `deployment` answers it; one that is forgotten leaves.
    """

    def __init__(self) -> None:
        self.under_way: WeakSet[Any] = WeakSet()
        self._servers: dict[str, _Server] = {}
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._client: Any = None

    async def least_busy(self, replicas: Sequence[Deployment], known: DeploymentPool) -> list[Deployment]:
        """Return those of `replicas` with the least to do; `known` has their keys."""
        loads = await self.loads(replicas, known)
        least = min(load.rank for load in loads.values())
        return [replica for replica in replicas if loads[replica.id].rank == least]

    async def weighed(self, rungs: Sequence[Candidate], known: DeploymentPool) -> Sequence[Candidate]:
        """Return `rungs` with the load of those that share an order with others that are ready."""
        loads: dict[str, Load] = {}
        ready = [candidate.deployment for candidate in rungs if candidate.status == "ready"]
        for order, count in Counter(deployment.order for deployment in ready).items():
            if count > 1:
                loads |= await self.loads([each for each in ready if each.order == order], known)
        return [replace(candidate, load=loads.get(candidate.deployment.id)) for candidate in rungs]

    async def loads(self, replicas: Sequence[Deployment], known: DeploymentPool) -> dict[str, Load]:
        """Return the load of each of `replicas` by its id, asking their servers where that is due."""
        speaking = {each.endpoint: each for each in replicas if each.local and each.base_url and not each.embedded}
        if len(speaking) > 1:
            now = time.monotonic()
            for name, replica in speaking.items():
                server = self._servers.setdefault(name, _Server())
                if now >= server.due and name not in self._looks:
                    self._looks[name] = asyncio.create_task(self._look(server, replica, known))
                    server.due = now + LOOK
            if late := [name for name in speaking if now >= self._servers[name].stale]:
                patience = max(0.0, *(self._servers[name].due - now for name in late))
                await asyncio.wait([self._looks[name] for name in late], timeout=patience)
        servers = {each.id: self._servers.get(each.endpoint, _Server()) for each in replicas}
        told = {name: server.told for name, server in servers.items() if server.told}
        # What a server told of our own requests gives way to what is under way by now.
        others = {name: max(0, each.running + each.waiting - servers[name].own) for name, each in told.items()}
        most, fullest = max(others.values(), default=0), max((each.cache for each in told.values()), default=0.0)
        own = self._own()
        return {
            name: Load(own[name], others.get(name, most), told[name].cache if name in told else fullest, told.get(name))
            for name in servers
        }

    def _own(self) -> Counter[str]:
        return Counter(each.deployment.id for each in self.under_way)

    async def _look(self, server: _Server, replica: Deployment, known: DeploymentPool) -> None:
        """Ask one server for its figures: at /metrics, which lies beside its /v1."""
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(trust_env=False, timeout=PATIENCE)
            background().closing.append(self._client.aclose)
        url = (replica.base_url or "").removesuffix("/v1")
        key = known.credentials.get(replica.id) or Credential()
        headers = {"Authorization": f"Bearer {key.secret}"} if key.secret else {}
        told: Figures | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                if not await trust().objection(replica, key, known.config.cluster):
                    told = figures((await self._client.get(f"{url}/metrics", headers=headers)).text)
        except (TimeoutError, httpx.HTTPError, ValueError):
            pass
        finally:
            now = time.monotonic()
            server.told, server.own = told, self._own()[replica.id]
            server.due, server.stale = (now + FRESH, now + STALE) if told else (now + SILENT, float("inf"))
            del self._looks[replica.endpoint]


def of_process() -> Balance:
    """Return the process's one view of loads."""
    return background().kept.setdefault("balance", Balance())
