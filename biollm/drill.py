"""Proves the failover before it is needed: breaks every rung in every way, in this process, and reports who answered.

The waterfall is the real one, with the user's own configuration; loopback servers take the place of the providers, and
a private ledger that of the user's. Nothing is sent to a provider and no quota is spent. Every rung is played in
OpenAI's dialect, whatever its provider speaks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from biollm._background import background
from biollm._broken import Stage
from biollm._resources import state_dir
from biollm._run import Request
from biollm._shared import watch
from biollm.client import import_waterfall
from biollm.config import Config
from biollm.credentials import Credential, of_secret
from biollm.errors import CompletionError
from biollm.ledger import Ledger
from biollm.routing import Deployment, Wants
from biollm.rungs import Rungs

if TYPE_CHECKING:
    from biollm._waterfall import Waterfall

TIMEOUT = 3.0  # seconds that stand for the configured ones: a busy machine is no fault, and a drill must end
# What is broken -> what rests after it: other rungs with the same one are passed over, too.
FAULTS: Mapping[str, str] = {
    "refused": "endpoint", "hang": "endpoint", "reset": "", "http_400": "", "http_401": "key", "http_403": "deployment",
    "http_404": "deployment", "http_429": "account", "http_500": "endpoint", "http_503": "endpoint", "html": "endpoint",
    "truncated": "endpoint", "empty": "", "no choices": "", "cut stream": "",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One rung broken in one way, all rungs above it being away.

    Attributes:
        expected: Who should have answered; None where no other rung is left.
        answered: Who did.
        ms: Milliseconds until the answer, or the error.
        seen: What the user would have seen.
    """

    rung: str
    fault: str
    expected: str | None
    answered: str | None
    ms: float
    seen: str

    @property
    def ok(self) -> bool:
        """Return whether the rung answered that should have."""
        return self.answered == self.expected


@dataclass(frozen=True)
class Drill:
    """What a drill found.

    Attributes:
        absent: Rung -> why it would not answer even unbroken, one sentence.
        ok: Whether some rung can answer, and in every case the one did that should have.
    """

    rungs: tuple[str, ...]
    absent: Mapping[str, str]
    cells: tuple[Cell, ...]

    @property
    def ok(self) -> bool:
        """Return whether the failover can be relied on."""
        return bool(self.rungs) and all(cell.ok for cell in self.cells)


class _Played(Rungs):
    """The rungs of another, each that could answer moved to a stage."""

    def __init__(self, real: Rungs, stages: Mapping[str, Stage], ledger: Ledger) -> None:
        config = replace(real.config, timeout=TIMEOUT, stream_timeout=TIMEOUT)
        super().__init__(config, ledger, real.state, real.policy)
        for place, rung in enumerate(_ready(real), 1):
            moved = replace(
                rung,
                provider=rung.provider.model_copy(update={"timeout": None}),
                order=place,
                litellm_model="openai/" + rung.litellm_model.split("/", 1)[1],
                base_url=stages[rung.endpoint].url,
                local=True,
                start="",
            )
            self.deployments.append(moved)
            self.admit(moved)

    def refresh(self) -> bool:
        return False

    def _look(self, deployment: Deployment, exchange: bool) -> Credential | str:
        return of_secret(_key(deployment).split()[0])


def drill(config: Config) -> Drill:
    """Break every rung of `config` in every way; send nothing beyond this machine."""
    with TemporaryDirectory(prefix="biollm-drill-") as folder:
        real = Rungs(config, Ledger(Path(folder)), state_dir(), config.data_policy, watch(config.cluster).alive)
        real.refresh()
        standing = real.standing(Wants(policy=config.data_policy))
        absent = {rung.deployment.id: rung.reason for rung in standing if rung.standing != "ready"}
        cells = background().run(_play(real, Path(folder))) if _ready(real) else []
        return Drill(tuple(rung.id for rung in _ready(real)), absent, tuple(cells))


def _ready(real: Rungs) -> list[Deployment]:
    rungs = real.standing(Wants(policy=real.config.data_policy))
    return [rung.deployment for rung in rungs if rung.standing == "ready"]


def _key(deployment: Deployment) -> str:
    """Return how a stage knows the rung: the account's key in the drill, and the model's name."""
    account = f"{deployment.provider.name}/{deployment.account.name}".encode().hex()
    return f"drill-{account} {deployment.litellm_model.split('/', 1)[1]}"


async def _play(real: Rungs, folder: Path) -> list[Cell]:
    faults: dict[str, str] = {}
    stages = {rung.endpoint: Stage(faults) for rung in _ready(real)}
    for stage in stages.values():
        await stage.open()
    first = Ledger(folder / "first")
    try:
        waterfall = import_waterfall()(_Played(real, stages, first))
        request = Request([{"role": "user", "content": "drill"}], {}, Wants(policy=real.config.data_policy))
        await waterfall.complete(replace(request, timeout=60.0))  # LiteLLM's first call takes seconds
        cells: list[Cell] = []
        for at, rung in enumerate(rungs := _ready(real)):
            for fault in FAULTS:
                faults.clear()
                faults |= {_key(above): "http_404" for above in rungs[:at]} | {_key(rung): fault}
                if fault == "refused":
                    stages[rung.endpoint].close()
                ledger = Ledger(folder / f"{at}-{fault}")
                waterfall.ledger = waterfall.rungs.ledger = ledger
                cells.append(await _cell(waterfall, request, rungs, at, fault))
                ledger.close()
                await stages[rung.endpoint].open()
        return cells
    finally:
        first.close()
        for stage in stages.values():
            stage.close()


async def _cell(waterfall: Waterfall, request: Request, rungs: Sequence[Deployment], at: int, fault: str) -> Cell:
    started, answered, seen = time.perf_counter(), None, ""
    try:
        if fault == "cut stream":
            done: Any = None
            async for piece in waterfall.stream(replace(request, on_interrupt="restart")):
                done = getattr(piece, "completion", None) or done
        else:
            done = await waterfall.complete(request)
        answered, seen = done.deployment, "a degraded answer" if done.degraded else "an answer"
    except CompletionError as error:
        seen = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    ms = round((time.perf_counter() - started) * 1000, 1)
    below = (each.id for each in rungs[at + 1 :] if not _rests(rungs[at], each, FAULTS[fault]))
    return Cell(rungs[at].id, fault, next(below, None), answered, ms, seen)


def _rests(broken: Deployment, other: Deployment, what: str) -> bool:
    """Return whether `other` is passed over while `what` of the broken one rests."""
    account = (broken.provider.name, broken.account.name) == (other.provider.name, other.account.name)
    return {
        "endpoint": broken.endpoint == other.endpoint,
        "account": broken.scope == other.scope,
        "key": account,
    }.get(what, False)
