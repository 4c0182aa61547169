"""A snapshot of now: which deployments would answer, what runs, how the last half hour went.

Slurm, vLLM and LiteLLM each show a part of it. Only attempts that are new since the last snapshot are read.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from biollm._runtime import ledger, watch
from biollm.config import Config, Limit
from biollm.config.paths import state_dir
from biollm.errors import BiollmError
from biollm.ledger import Ledger
from biollm.ledger.sqlite import databases, read
from biollm.routing.candidates import Candidate, DeploymentPool, Status, explain
from biollm.routing.deployments import Requirements
from biollm.slurm import scaling
from biollm.slurm.endpoints import Endpoint
from biollm.slurm.submissions import Job

MINUTES = 30  # of the series
_JOBS_S = 5.0  # seconds between two calls of Slurm
_NEW = (
    """SELECT id, at, request, deployment, outcome, ms, "order", reason FROM attempt WHERE outcome != 'skipped' AND """
)
_LAST = (  # SQLite takes the other columns from the row of the maximum
    "SELECT max(id), max(at + ms / 1000), '', deployment, outcome, 0, 0, reason FROM attempt WHERE at >= ? GROUP BY 4, 5"
)


State = Status | Literal["failing"]


@dataclass(frozen=True)
class LimitUse:
    """A limit, and how much of it is used; both in requests, tokens or USD."""

    limit: str
    used: float
    amount: float


@dataclass(frozen=True)
class CandidateView:
    """A deployment and its state."""

    place: int  # from 1; accounts and replicas share one
    deployment: str
    state: State  # its status, but "failing" if it may be used though its last attempt, in the last half hour, failed
    why: str  # one sentence; empty when ready
    quotas: tuple[LimitUse, ...]
    frees_s: float | None  # seconds until it may be used again, or None
    last_s: float | None  # seconds since its last answer, None if that is more than a day ago


@dataclass(frozen=True)
class JobView:
    """A job of this user, or another user's server in use here. `left_s`: seconds of walltime left."""

    job: str
    models: str
    phase: str
    reason: str
    node: str
    left_s: float | None


@dataclass(frozen=True)
class Minute:
    """The requests sent in a minute."""

    requests: int = 0
    ms: float | None = None  # median milliseconds of those answered, over all their attempts; None without an answer
    # share answered by a later candidate because an earlier one failed or was limited; None without one
    fallback: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything at the time `at` (epoch seconds). `minutes`: the last 30, oldest first, the present one last."""

    at: float
    candidates: tuple[CandidateView, ...]
    jobs: tuple[JobView, ...]
    minutes: tuple[Minute, ...]
    alerts: tuple[str, ...] = ()
    scaling: tuple[str, ...] = ()  # the last decision about each scaled model


@dataclass
class _Request:
    ms: float = 0.0
    attempts: int = 0
    answered: bool = False
    fell: bool = False


class Collector:
    """Takes snapshots; from any thread, one at a time. `jobs` is called in its own thread: Slurm may hang."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        state: Path,
        *,
        discover: Callable[[], Iterable[Endpoint]] = tuple,
        jobs: Callable[[], Sequence[Job]] = tuple,
        alerts: Callable[[], Iterable[object]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._ledger, self._state = config, ledger, state
        self._discover, self._read_jobs, self._alerts, self._clock = discover, jobs, alerts, clock
        self._lock = threading.Lock()
        self._jobs: Sequence[Job] = ()
        self._jobs_thread: threading.Thread | None = None
        self._jobs_at = -_JOBS_S  # monotonic
        self._reset()

    @classmethod
    def of_process(cls, config: Config, alerts: Callable[[], Iterable[object]] = tuple) -> Collector:
        """Return one with this process's ledger, servers and jobs."""
        from biollm import slurm

        jobs = partial(slurm.status, config.cluster)
        return cls(config, ledger(config), state_dir(), discover=watch(config.cluster).alive, jobs=jobs, alerts=alerts)

    def snapshot(self) -> Snapshot:
        """Take one; nothing is sent to a provider."""
        with self._lock:
            now = self._clock()
            self._follow(now)
            servers, policy = tuple(self._discover()), self._config.data_policy
            pool = DeploymentPool(self._config, self._ledger, self._state, policy, lambda: servers)
            found = explain(pool, Requirements(policy=policy))
            scopes = {each.deployment.scope: each.deployment.limits for each in found}
            used = {scope: self._ledger.used(scope, limits) for scope, limits in scopes.items()}
            views = [self._view(each, used[each.deployment.scope], now) for each in found]
            self._update_jobs()
            jobs, alerts = _job_views(self._jobs, servers), tuple(map(str, self._alerts()))
            decided = tuple(f"{key}: {state.line}" for key, state in scaling.scaled(self._config).items())
            return Snapshot(now, tuple(views), jobs, self._series(now), alerts, decided)

    def _view(self, candidate: Candidate, used: Sequence[tuple[Limit, float, object]], now: float) -> CandidateView:
        name, why = candidate.deployment.id, candidate.reason
        state: State = candidate.status
        answered = self._answered.get(name)
        failed, reason = self._failed.get(name, (0.0, ""))
        if state == "ready" and failed > max(answered or 0.0, now - 60 * MINUTES):
            state, why = "failing", reason
        return CandidateView(
            place=candidate.deployment.order,
            deployment=name,
            state=state,
            why=why,
            quotas=tuple(LimitUse(str(limit), count, limit.amount) for limit, count, _ in used),
            frees_s=max(0.0, candidate.until - now) if candidate.until else None,
            last_s=max(0.0, now - answered) if answered else None,
        )

    def _reset(self) -> None:
        self._seen = -1  # the last row's id; a row's time is that of sending, so rows come out of order by it
        self._answered: dict[str, float] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._requests: dict[int, dict[str, _Request]] = defaultdict(dict)  # by minute and id
        self._minutes: dict[int, Minute] = {}

    def _follow(self, now: float) -> None:
        newest: int = (self._query("SELECT max(id) FROM attempt") or [(None,)])[0][0] or -1
        if newest < self._seen:  # the file was replaced
            self._reset()
        if self._seen < 0:
            rows = self._query(_LAST, now - 86400) + self._query(f"{_NEW}at >= ?", now - 60 * MINUTES)
        else:
            rows = self._query(f"{_NEW}id > ?", self._seen) if newest > self._seen else []
        for number, at, request, deployment, outcome, ms, order, reason in rows:
            self._seen = max(self._seen, number)
            ended, answered = at + ms / 1000, outcome == "ok"
            if answered:
                self._answered[deployment] = max(ended, self._answered.get(deployment, 0.0))
            elif outcome == "failed":
                self._failed[deployment] = max((ended, reason), self._failed.get(deployment, (0.0, "")))
            if request:
                seen = self._requests[int(at // 60)].setdefault(request, _Request())
                seen.fell = seen.fell or (answered and order > 1 and bool(reason or seen.attempts))
                seen.ms, seen.attempts, seen.answered = seen.ms + ms, seen.attempts + 1, seen.answered or answered
                self._minutes.pop(int(at // 60), None)

    def _query(self, sql: str, *arguments: object) -> list[Any]:
        with suppress(sqlite3.Error, OSError):
            return read(databases(self._state) / "history.db", sql, arguments)
        return []

    def _series(self, now: float) -> tuple[Minute, ...]:
        last = int(now // 60)
        span = range(last - MINUTES + 1, last + 1)
        for old in [minute for minute in self._requests if minute < span[0]]:
            del self._requests[old]
            self._minutes.pop(old, None)
        for minute in span:
            if minute not in self._minutes and (seen := self._requests.get(minute)):
                took = [each.ms for each in seen.values() if each.answered]
                fell = sum(each.fell for each in seen.values()) / len(seen)
                self._minutes[minute] = Minute(len(seen), median(took) if took else None, fell)
        return tuple(self._minutes.get(minute, Minute()) for minute in span)

    def _update_jobs(self) -> None:
        """Read the jobs in a thread every 5 s; only the first call waits for it, up to 2 s."""

        def work() -> None:
            with suppress(BiollmError, OSError):  # what was known stays
                self._jobs = self._read_jobs()

        first = self._jobs_thread is None
        busy = self._jobs_thread is not None and self._jobs_thread.is_alive()
        if not busy and time.monotonic() - self._jobs_at >= _JOBS_S:
            self._jobs_at = time.monotonic()
            self._jobs_thread = threading.Thread(target=work, name="biollm-jobs", daemon=True)
            self._jobs_thread.start()
            self._jobs_thread.join(2.0 if first else 0.0)


def _job_views(jobs: Sequence[Job], servers: Sequence[Endpoint]) -> tuple[JobView, ...]:
    own = {job.submission.id for job in jobs}
    views = [
        JobView(j.submission.job, ", ".join(j.submission.models), j.phase, j.reason, j.node, j.left_s) for j in jobs
    ]
    others = [JobView(e.job, e.model, "ready", "", e.host, e.left_s) for e in servers if e.submission not in own]
    return (*views, *others)
