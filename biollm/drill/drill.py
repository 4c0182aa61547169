"""Breaks every deployment of the user's own configuration in every way and reports which one answers instead.

The waterfall is the real one. Servers on loopback replace the providers, generated keys replace the user's, and a
temporary ledger the user's own, so no provider gets a request and no quota is used. Every deployment is replaced by one
that speaks OpenAI's dialect; `live.py` sends requests to the real ones.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from biollm._files import write_private
from biollm._ownership import address
from biollm._runtime import background, watch
from biollm.config import Config
from biollm.config.paths import state_dir
from biollm.drill.fault_server import FaultServer
from biollm.errors import CompletionError
from biollm.ledger import Ledger
from biollm.providers.credentials import Credential
from biollm.routing.candidates import DeploymentPool, Survey
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.pricing import prices
from biollm.routing.request import Request
from biollm.routing.waterfall import Waterfall
from biollm.slurm.endpoints import Endpoint
from biollm.types import Usage

TRIES = 2  # requests to one deployment for one call
TIMEOUT = 3.0  # seconds instead of the configured ones: enough on a busy machine, and the drill ends
_LONG = 40 * 86400.0  # seconds after which every cooldown is over
# Fault -> what goes on cooldown: other deployments that share it are passed over too.
FAULTS: Mapping[str, str] = {
    "refused": "endpoint", "hang": "deployment", "reset": "", "http_400": "", "http_401": "key", "http_403": "deployment",
    "http_404": "deployment", "http_429": "account", "http_500": "deployment", "http_503": "deployment",
    "html": "deployment", "truncated": "deployment", "empty": "", "no choices": "", "error in 200": "deployment",
    "cut stream": "deployment", "malformed chunk": "deployment", "no end marker": "", "flapping": "",
}  # fmt: skip
STREAMED = ("cut stream", "malformed chunk", "no end marker")
HARMLESS = ("no end marker", "flapping")  # the deployment itself still answers, the flapping one at its second attempt
IN_PROCESS = ("hang", "empty", "cut stream")  # faults of the embedded model, which has no network and no key
_DEGRADED = "a degraded answer, where allow_degraded permits it"


@dataclass(frozen=True)
class Cell:
    """One deployment broken in one way while all before it are unavailable."""

    deployment: str
    fault: str
    expected: str | None  # the deployment that should answer; None where none is left
    answered: str | None  # the one that did
    ms: float  # milliseconds until the answer, or the error
    seen: str  # what the user sees
    asked: int = 1  # requests to the broken deployment
    # what answers the next call, the deployment being repaired; None where it cools down and none is left
    next: str | None = None
    recovered: bool = True  # whether the deployment answers again after its cooldown

    @property
    def ok(self) -> bool:
        """Return whether the right deployment answered, now and later, after no more than two attempts."""
        later = self.recovered and (self.next is not None or self.expected is None)
        return self.answered == self.expected and later and self.asked <= TRIES


@dataclass(frozen=True)
class Drill:
    """The result of a drill."""

    deployments: tuple[str, ...]
    absent: Mapping[str, str]  # deployment -> why it could not answer anyway, one sentence
    cells: tuple[Cell, ...]
    odd: tuple[str, ...] = ()  # what looks wrong in the order of the deployments, one sentence each

    @property
    def ok(self) -> bool:
        """Return whether a deployment can answer and every failover worked."""
        return bool(self.deployments) and all(cell.ok for cell in self.cells)


def drill(config: Config) -> Drill:
    """Break every deployment of `config` in every way; send nothing to a provider.

    Fixed servers of this site or machine get a TCP connection, to see whether one listens.
    """
    with TemporaryDirectory(prefix="biollm-drill-") as folder:
        ledger, servers = Ledger(Path(folder, "empty")), watch(config.cluster).alive()
        real = DeploymentPool(config, ledger, state_dir(), config.data_policy, lambda: servers)
        real.refresh()
        found = real.candidates(Requirements(policy=config.data_policy))
        absent = {each.deployment.id: each.reason for each in found if each.status != "ready"}
        absent |= _not_listening([each.deployment for each in found if each.status == "ready"])
        ready = [each.deployment for each in found if each.deployment.id not in absent]
        cells = background().run(_Harness(config, ready, Path(folder)).run(servers)) if ready else []
    return Drill(tuple(each.id for each in ready), absent, tuple(cells), tuple(_odd(ready, config)))


def _not_listening(found: Sequence[Deployment]) -> dict[str, str]:
    """Return the deployments at a local address without a listener. Discovered servers have been probed already."""
    absent: dict[str, str] = {}
    for each in found:
        if each.local and each.base_url and not each.start:
            try:
                socket.create_connection(address(each.base_url), 1.0).close()
            except OSError:
                absent[each.id] = f"no server listens at {each.base_url}"
    return absent


def _odd(found: Sequence[Deployment], config: Config) -> Iterator[str]:
    """Yield what a priority that was set by mistake looks like."""
    known = prices(found, config)
    costs = {ident: price and price.usd(Usage(1, 1)) for ident, price in known.items()}
    for at, each in enumerate(found):
        later, own = found[at + 1 :], each.provider
        if each.embedded and (better := next((other for other in later if not other.embedded), None)):
            yield f"{each.id} gives degraded answers, and comes before {better.id}"
        free = next((other for other in later if other.provider.free_tier and costs[other.id] == 0), None)
        if free and costs[each.id] != 0:
            what = "may cost money (its price is unknown)" if costs[each.id] is None else "costs money"
            yield f"{each.id} {what}, and comes before {free.id}, which is free"
        same = next((other.provider for other in later if other.provider.priority == own.priority), own)
        if same.name != own.name and each == next(other for other in found if other.provider == own):
            yield f"{own.name} and {same.name} have the same priority, {own.priority}: the order in the file decides"


class _Harness:
    """The deployments, each moved to a fault server, and the calls that test them."""

    def __init__(self, config: Config, deployments: Sequence[Deployment], folder: Path) -> None:
        self._config, self._deployments, self._folder = config, deployments, folder
        self._faults: dict[tuple[str, str], str] = {}
        self._requests = Counter[tuple[str, str]]()
        self._servers = {
            each.endpoint: FaultServer(self._faults, self._requests, each.start, _address(each)[0])
            for each in deployments
        }
        self._ahead = 0.0  # seconds by which the ledger's clock is ahead
        self._request = Request([{"role": "user", "content": "drill"}], {}, Requirements(policy=config.data_policy))

    async def run(self, endpoints: Sequence[Endpoint]) -> list[Cell]:
        """Return a cell for each deployment and fault."""
        for server in self._servers.values():
            await server.open()
        ledger = Ledger(self._folder, clock=lambda: time.time() + self._ahead)
        self._waterfall = Waterfall(self._pool(ledger, endpoints))
        try:
            await self._waterfall.complete(replace(self._request, timeout=60.0))  # LiteLLM's first call takes seconds
            return [
                await self._cell(at, fault)
                for at, each in enumerate(self._deployments)
                for fault in (IN_PROCESS if each.embedded else FAULTS)
            ]
        finally:
            ledger.close()
            for server in self._servers.values():
                server.close()

    def _pool(self, ledger: Ledger, endpoints: Sequence[Endpoint]) -> DeploymentPool:
        """Return the deployments at their fault servers, each with an order of its own; a limit is no fault."""
        moved: list[Deployment] = []
        replaced: list[Endpoint] = []
        for order, each in enumerate(self._deployments, 1):
            (key, model), url = _address(each), self._servers[each.endpoint].url
            write_private(file := self._folder / key, key)  # a refused key is read again: never the user's
            kind = "api" if each.embedded else each.provider.type  # else the real model would start
            provider = each.provider.model_copy(update={"timeout": None, "type": kind})
            account = each.account.model_copy(update={"env_key": None, "key_file": file})
            place: dict[str, Any] = {"litellm_model": f"openai/{model}", "base_url": url, "local": True, "limits": ()}
            moved.append(replace(each, provider=provider, account=account, order=order, **place))
            found = (endpoint for endpoint in endpoints if endpoint.start == each.start)
            replaced += [replace(endpoint, base_url=url, key_file=file, owner=os.getuid()) for endpoint in found]
        changes = {"timeout": TIMEOUT, "stream_timeout": TIMEOUT, "policy": "order"}
        config = replace(self._config, routing=self._config.routing.model_copy(update=changes))
        pool = DeploymentPool(config, ledger, self._folder, config.data_policy, lambda: replaced)
        pool.apply(Survey(tuple(replaced), moved, [(each, Credential(_address(each)[0])) for each in moved]))
        return pool

    async def _cell(self, at: int, fault: str) -> Cell:
        """Break one deployment while those before it are unavailable, call, repair it, call again; later call it alone."""
        broken, before = self._deployments[at], dict.fromkeys(map(_address, self._deployments[:at]), "http_404")
        server = self._servers[broken.endpoint]
        self._ahead += _LONG
        self._break(before | {_address(broken): fault})
        if fault == "refused":
            server.close()
        started = time.perf_counter()
        answered, seen = await self._answer(self._request, stream=fault in STREAMED)
        ms, asked = round((time.perf_counter() - started) * 1000, 1), self._requests[_address(broken)]
        self._break(before)
        await server.open()
        following, _ = await self._answer(self._request)
        self._ahead += _LONG
        alone = replace(self._request.requirements, deployment=broken.id)
        again, _ = await self._answer(replace(self._request, requirements=alone))
        left = self._deployments[at if fault in HARMLESS else at + 1 :]
        expected = next((each.id for each in left if not _cools(broken, each, FAULTS[fault])), None)
        return Cell(broken.id, fault, expected, answered, ms, seen, asked, following, again == broken.id)

    def _break(self, faults: Mapping[tuple[str, str], str]) -> None:
        self._requests.clear()
        self._faults.clear()
        self._faults |= faults

    async def _answer(self, request: Request, *, stream: bool = False) -> tuple[str | None, str]:
        """Return which deployment answers, and what the user sees."""
        done: Any = None
        try:
            if stream:
                async for piece in self._waterfall.stream(replace(request, on_interrupt="restart")):
                    done = getattr(piece, "completion", None) or done
            else:
                done = await self._waterfall.complete(request)
        except CompletionError as error:
            return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        embedded = any(each.embedded for each in self._deployments if each.id == done.deployment)
        return done.deployment, _DEGRADED if embedded else "an answer"


def _address(each: Deployment) -> tuple[str, str]:
    """Return how a fault server knows the deployment: the generated key of its account or server, and its model."""
    key = Credential(f"{each.provider.name}/{each.account.name}{each.start}").fingerprint
    return f"drill-{key}", each.litellm_model.split("/", 1)[1]


def _cools(broken: Deployment, other: Deployment, what: str) -> bool:
    """Return whether `other` is passed over while `what` of the broken one is on cooldown."""
    own = (broken.start, broken.provider.name, broken.account.name)
    return {
        "endpoint": broken.endpoint == other.endpoint,
        # Each server has its own queue; without limits of the account's own, one model's is not taken for it.
        "account": bool(broken.account.limits) and (broken.start, broken.scope) == (other.start, other.scope),
        "key": own == (other.start, other.provider.name, other.account.name),
    }.get(what, False)
