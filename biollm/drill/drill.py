"""Proves the failover before it is needed: breaks every rung in every way, in this process, and reports who answered.

The waterfall is the real one, with the user's own configuration; loopback servers take the place of the providers, and
a private ledger that of the user's. Nothing is sent to a provider and no quota is spent. Every rung is played in
OpenAI's dialect, whatever its provider speaks; `live_drill` asks the real ones.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from biollm._ownership import address
from biollm._runtime import background, watch
from biollm.config import Config
from biollm.config.paths import state_dir
from biollm.drill.fault_server import Stage
from biollm.errors import CompletionError
from biollm.ledger import Ledger
from biollm.providers.credentials import Credential, of_secret
from biollm.routing import import_waterfall
from biollm.routing.candidates import DeploymentPool
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.pricing import prices
from biollm.routing.request import Request
from biollm.types import Usage

if TYPE_CHECKING:
    from biollm.routing.waterfall import Waterfall

_RESTS = 400 * 86400.0  # seconds after which nothing rests any more
TRIES = 2  # requests to one rung for one call
TIMEOUT = 3.0  # seconds that stand for the configured ones: a busy machine is no fault, and a drill must end
# What is broken -> what rests after it: other rungs with the same one are passed over, too.
FAULTS: Mapping[str, str] = {
    "refused": "endpoint", "hang": "deployment", "reset": "", "http_400": "", "http_401": "key", "http_403": "deployment",
    "http_404": "deployment", "http_429": "account", "http_500": "deployment", "http_503": "deployment",
    "html": "deployment", "truncated": "deployment", "empty": "", "no choices": "", "error in 200": "deployment",
    "cut stream": "deployment", "malformed chunk": "deployment", "no end marker": "", "flapping": "",
}  # fmt: skip
STREAMED = ("cut stream", "malformed chunk", "no end marker")
HARMLESS = ("no end marker", "flapping")  # the broken rung itself answers, the flapping one when asked once more
_DEGRADED = "a degraded answer, where allow_degraded permits it"
# what can befall the embedded model, which no network and no key part from us
IN_PROCESS = ("hang", "empty", "cut stream")


@dataclass(frozen=True)
class Cell:
    """One rung broken in one way, all rungs above it being away.

    Attributes:
        expected: Who should have answered; None where no other rung is left.
        answered: Who did.
        ms: Milliseconds until the answer, or the error.
        seen: What the user would have seen.
        asked: How often the broken rung was asked.
        next: Who answered the call right after, the rung being well again; None where it rests and no other is left.
        recovered: Whether the rung answers again once its rest is over.
    """

    candidate: str
    fault: str
    expected: str | None
    answered: str | None
    ms: float
    seen: str
    asked: int = 1
    next: str | None = None
    recovered: bool = True

    @property
    def ok(self) -> bool:
        """Return whether the rung answered that should have, then and later, and it was not asked too often."""
        later = self.recovered and (self.next is not None or self.expected is None)
        return self.answered == self.expected and later and self.asked <= TRIES


@dataclass(frozen=True)
class Drill:
    """What a drill found.

    Attributes:
        absent: Rung -> why it would not answer even unbroken, one sentence.
        odd: What is strange about the order of the rungs, one sentence each.
        ok: Whether some rung can answer, and in every case the one did that should have.
    """

    rungs: tuple[str, ...]
    absent: Mapping[str, str]
    cells: tuple[Cell, ...]
    odd: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether the failover can be relied on."""
        return bool(self.rungs) and all(cell.ok for cell in self.cells)


class Played(DeploymentPool):
    """The rungs `played` of another, each moved to its stage, and below them `live`, which stays what it is."""

    def __init__(
        self,
        real: DeploymentPool,
        stages: Mapping[str, Stage],
        ledger: Ledger,
        played: Sequence[Deployment],
        live: Deployment | None = None,
    ) -> None:
        quick = replace(real.config, timeout=TIMEOUT, stream_timeout=TIMEOUT)
        super().__init__(real.config if live else quick, ledger, real.state, real.policy)
        self._real = real
        self.deployments = [
            _moved(candidate, stages[candidate.endpoint].url, at) for at, candidate in enumerate(played, 1)
        ]
        self.deployments += [replace(live, order=len(played) + 1)] if live else []
        self._live = live.id if live else ""
        for candidate in self.deployments:
            self.note(candidate, self.look(candidate, exchange=False))

    def due(self) -> bool:
        """Return that nothing has changed: the real rungs were read when the drill began."""
        return False

    def look(self, deployment: Deployment, *, exchange: bool = True) -> Credential | str:  # noqa: D102
        if deployment.id == self._live:
            return self._real.look(deployment, exchange=exchange)
        return of_secret(_key(deployment).split()[0])


def _moved(candidate: Deployment, url: str, order: int) -> Deployment:
    """Return the rung at a stage. A limit is no fault, and what is played is charged to no account."""
    return replace(
        candidate,
        provider=candidate.provider.model_copy(update={"timeout": None}),
        order=order,
        litellm_model="openai/" + candidate.litellm_model.split("/", 1)[1],
        base_url=url,
        scope=f"drill:{candidate.scope}",
        limits=(),
        local=True,
    )


def drill(config: Config) -> Drill:
    """Break every rung of `config` in every way; send nothing to a provider.

    Of fixed servers of this site or machine it looks whether anybody listens.
    """
    with TemporaryDirectory(prefix="biollm-drill-") as folder:
        real = DeploymentPool(
            config, Ledger(Path(folder)), state_dir(), config.data_policy, watch(config.cluster).alive
        )
        real.refresh()
        status = real.candidates(Requirements(policy=config.data_policy))
        absent = {candidate.deployment.id: candidate.reason for candidate in status if candidate.status != "ready"}
        ready = [candidate.deployment for candidate in status if candidate.status == "ready"]
        absent |= _unheard(ready)
        ready = [candidate for candidate in ready if candidate.id not in absent]
        cells = background().run(_play(real, ready, Path(folder))) if ready else []
        return Drill(tuple(candidate.id for candidate in ready), absent, tuple(cells), tuple(_odd(ready, config)))


def _unheard(rungs: Sequence[Deployment]) -> dict[str, str]:
    """Return the rungs with an address here at which nobody listens. Found servers were asked when they were found."""
    urls = {candidate.base_url for candidate in rungs if candidate.local and candidate.base_url and not candidate.start}
    silent: set[str] = set()
    for url in urls:
        try:
            socket.create_connection(address(url), 1.0).close()
        except OSError:
            silent.add(url)
    return {
        candidate.id: f"nobody listens at {candidate.base_url}" for candidate in rungs if candidate.base_url in silent
    }


def _odd(rungs: Sequence[Deployment], config: Config) -> Iterator[str]:
    """Yield what a priority that was set by mistake looks like."""
    known = prices(rungs, config)
    costs = {ident: price and price.usd(Usage(1, 1)) for ident, price in known.items()}
    for at, candidate in enumerate(rungs):
        below, own = rungs[at + 1 :], candidate.provider
        if candidate.embedded and (better := next((each for each in below if not each.embedded), None)):
            yield f"{candidate.id} answers in degraded quality, and is asked before {better.id}"
        free = next((each for each in below if each.provider.free_tier and costs[each.id] == 0), None)
        if free and costs[candidate.id] != 0:
            what = "may cost money (its price is unknown)" if costs[candidate.id] is None else "costs money"
            yield f"{candidate.id} {what}, and is asked before {free.id}, which is free"
        same = next((each.provider for each in below if each.provider.priority == own.priority), own)
        if same.name != own.name and candidate == next(each for each in rungs if each.provider == own):
            yield f"{own.name} and {same.name} have one priority, {own.priority}: the order in the file decides"


def _key(deployment: Deployment) -> str:
    """Return how a stage knows the rung: the account's (or found server's) key in the drill, and the model's name."""
    account = f"{deployment.provider.name}/{deployment.account.name}{deployment.start}".encode().hex()
    return f"drill-{account} {deployment.litellm_model.split('/', 1)[1]}"


class Theatre:
    """Stages for rungs, open while it is entered, and what LiteLLM needs warmed up.

    Attributes:
        stages: A rung's endpoint -> where it is played.
        request: What is asked.
    """

    def __init__(self, real: DeploymentPool, rungs: Sequence[Deployment]) -> None:
        self._real, self.rungs = real, rungs
        self._faults: dict[str, str] = {}
        self._asked = Counter[str]()
        self.stages = {
            candidate.endpoint: Stage(self._faults, self._asked, candidate.start, _key(candidate).split()[0])
            for candidate in rungs
        }
        self.request = Request([{"role": "user", "content": "drill"}], {}, Requirements(policy=real.config.data_policy))

    @asynccontextmanager
    async def opened(self, ledger: Ledger) -> AsyncGenerator[Waterfall]:
        """Open the stages; yield a waterfall of all rungs, played well."""
        for stage in self.stages.values():
            await stage.open()
        try:
            waterfall = import_waterfall()(Played(self._real, self.stages, ledger, self.rungs))
            await waterfall.complete(replace(self.request, timeout=60.0))  # LiteLLM's first call takes seconds
            yield waterfall
        finally:
            ledger.close()
            for stage in self.stages.values():
                stage.close()

    def breaks(self, faults: Iterable[tuple[Deployment, str]]) -> None:
        """Break these rungs, each in its way, and no others; count anew who is asked."""
        self._faults.clear()
        self._asked.clear()
        self._faults |= {_key(candidate): fault for candidate, fault in faults}

    def asked(self, candidate: Deployment) -> int:
        """Return how often a rung was asked since."""
        return self._asked[_key(candidate)]


async def _play(real: DeploymentPool, rungs: Sequence[Deployment], folder: Path) -> list[Cell]:
    theatre, cells = Theatre(real, rungs), list[Cell]()
    async with theatre.opened(Ledger(folder / "first")) as waterfall:
        for at, candidate in enumerate(rungs):
            for fault in IN_PROCESS if candidate.embedded else FAULTS:
                later = [0.0]  # seconds that the ledger's clock is ahead
                ledger = Ledger(folder / f"{at}-{fault}", clock=lambda later=later: time.time() + later[0])
                waterfall.ledger = waterfall.pool.ledger = ledger
                cell = await _cell(theatre, waterfall, at, fault)
                following, _ = await _answer(waterfall, theatre.request, stream=False)
                later[0] = _RESTS
                theatre.breaks((other, "http_404") for other in rungs if other != candidate)
                requirements = replace(
                    theatre.request.requirements, provider=candidate.provider.name, model=candidate.model
                )
                again, _ = await _answer(waterfall, replace(theatre.request, requirements=requirements), stream=False)
                cells.append(replace(cell, next=following, recovered=again == candidate.id))
                ledger.close()
    return cells


async def _cell(theatre: Theatre, waterfall: Waterfall, at: int, fault: str) -> Cell:
    """Break one rung, those above it being away, ask, and let it be well again."""
    rungs = theatre.rungs
    above = [(each, "http_404") for each in rungs[:at]]
    theatre.breaks([*above, (rungs[at], fault)])
    if fault == "refused":
        theatre.stages[rungs[at].endpoint].close()
    started = time.perf_counter()
    answered, seen = await _answer(waterfall, theatre.request, stream=fault in STREAMED)
    ms = round((time.perf_counter() - started) * 1000, 1)
    asked = theatre.asked(rungs[at])
    theatre.breaks(above)
    await theatre.stages[rungs[at].endpoint].open()
    left = rungs[at:] if fault in HARMLESS else rungs[at + 1 :]
    below = (each.id for each in left if not _rests(rungs[at], each, FAULTS[fault]))
    return Cell(rungs[at].id, fault, next(below, None), answered, ms, seen, asked)


async def _answer(waterfall: Waterfall, request: Request, *, stream: bool) -> tuple[str | None, str]:
    """Return who answers, and what the user sees."""
    try:
        if stream:
            done: Any = None
            async for piece in waterfall.stream(replace(request, on_interrupt="restart")):
                done = getattr(piece, "completion", None) or done
        else:
            done = await waterfall.complete(request)
    except CompletionError as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return done.deployment, _DEGRADED if done.degraded else "an answer"


def _rests(broken: Deployment, other: Deployment, what: str) -> bool:
    """Return whether `other` is passed over while `what` of the broken one rests."""
    account = (broken.provider.name, broken.account.name) == (other.provider.name, other.account.name)
    return {
        "endpoint": broken.endpoint == other.endpoint,
        # Each server has its own queue; without limits of the account's own, one model's is not taken for it.
        "account": bool(broken.account.limits) and broken.scope == other.scope and broken.start == other.start,
        "key": account and broken.start == other.start,
    }.get(what, False)
