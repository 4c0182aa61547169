"""What counts limits and keeps cooldowns: one interface, and the store of a user's processes, quotas.db.

The store of several hosts is in `redis.py`. tests/ledger/test_stores.py holds both to the same answers.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from biollm.ledger import attempts, quotas
from biollm.ledger.quotas import Cooldown
from biollm.ledger.records import Claim
from biollm.ledger.sqlite import BOUND, Database, is_damage, read

if TYPE_CHECKING:
    import asyncio  # half the time of importing this module, and commands that only read need none of it

    from biollm.config import Limit
    from biollm.ledger.records import Refused

PRUNE = 60.0  # seconds between removals of what no window includes any more
_ORIGINS = 900  # looked up at once: SQLite takes 999 parameters
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (quotas.grant, quotas.finish, quotas.release, quotas.cool, quotas.recover, quotas.learn, quotas.note)
}

Recall = Callable[[float, float, str], Sequence[float]]


@dataclass(eq=False)
class Job:
    """An operation: a function of `quotas`, its time in epoch seconds, its arguments, and what it returned.

    The time of `reserve` is that at which it is carried out, and `future` that of its caller.
    """

    operation: str
    at: float
    arguments: tuple[Any, ...]
    answer: Any = None
    future: asyncio.Future[int | Refused | None] | None = None

    @property
    def abandoned(self) -> bool:
        """Return whether its caller has gone, or decided without it."""
        return self.future is not None and self.future.done()


class QuotaStore(Protocol):
    """What all processes ask; errors are OSError or sqlite3.Error. Only the writing thread calls `write`."""

    name: str  # where it is, for people
    advice: str  # what to do where it cannot be used
    remote: bool  # a server: each question waits for the network

    def write(self, jobs: Sequence[Job]) -> Mapping[str, Cooldown]:
        """Carry out jobs in order, all or none, and return the cooldowns."""
        ...

    def close(self) -> None:
        """Close it; the next use opens it again."""
        ...

    def cooldowns(self) -> Mapping[str, Cooldown]:
        """Return the cooldowns, and for a day those that are over."""
        ...

    def used(self, scope: str, limits: Sequence[Limit]) -> list[tuple[float, float | None]]:
        """Return how much of each limit is used, and when its period ends or its oldest request leaves it."""
        ...

    def ratios(self) -> Mapping[str, float]:
        """Return each model's tokens beside the estimate."""
        ...

    def origins(self, digests: Sequence[str]) -> Mapping[str, str]:
        """Return which model gave what has these digests."""
        ...


class SqliteStore:
    """quotas.db, which the processes of a user or of a group's folder share.

    A rollback journal waits for the disk at every commit. Callers wait for this file, so it does not there, and a power
    failure may cost it; what it held of days and months is then taken from history.db (`recall`).
    """

    advice, remote = "Make the folder writable, or set BIOLLM_STATE_DIR to another.", False

    def __init__(
        self, path: Path, clock: Callable[[], float], network: bool, recall: Recall, served: Callable[[], None]
    ) -> None:
        self.name = str(path.parent)
        self._path, self._clock, self._recalled, self._served = path, clock, recall, served
        synchronous = "OFF" if network else "NORMAL"
        self._open = partial(Database, path, quotas.SCHEMA, network, synchronous, patience=BOUND - 0.05)
        self._database = self._open()  # for one thread
        self._pruned = -math.inf

    def write(self, jobs: Sequence[Job]) -> Mapping[str, Cooldown]:  # noqa: D102
        found: dict[str, Cooldown] = {}
        self._database.write(lambda db: found.update(self._carry_out(db, jobs)))
        return found

    def close(self) -> None:  # noqa: D102
        self._database.close()

    def cooldowns(self) -> Mapping[str, Cooldown]:  # noqa: D102
        return _by_key(self._read(quotas.COOLDOWNS, (self._clock() - quotas.MEMORY,)))

    def used(self, scope: str, limits: Sequence[Limit]) -> list[tuple[float, float | None]]:  # noqa: D102
        now = self._clock()
        return [quotas.used_of(self._read, scope, limit, now) for limit in limits]

    def ratios(self) -> Mapping[str, float]:  # noqa: D102
        return dict(self._read("SELECT model, ratio FROM token_ratio"))

    def origins(self, digests: Sequence[str]) -> Mapping[str, str]:  # noqa: D102
        asked = digests[-_ORIGINS:]
        marks = ", ".join("?" * len(asked))
        return dict(self._read(f"SELECT digest, model FROM origin WHERE digest IN ({marks})", asked))  # noqa: S608

    def _read(self, sql: str, arguments: Sequence[object] = ()) -> list[Any]:
        try:
            return read(self._path, sql, arguments)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
        with closing(self._open()) as database:
            database.write(lambda _: None)  # which sets the file aside
        return []

    def _carry_out(self, db: sqlite3.Connection, jobs: Sequence[Job]) -> Mapping[str, Cooldown]:
        now = self._clock()
        if abs(now - self._pruned) > PRUNE:
            quotas.prune(db, now)
            self._pruned = now
        for job in jobs:
            self._served()
            if job.operation != "reserve":
                job.answer = OPERATIONS[job.operation](db, job.at, *job.arguments)
            elif not job.abandoned:
                self._recall(db, job.arguments[0], now)
                job.answer = quotas.reserve(db, now, *job.arguments)
        return _by_key(db.execute(quotas.COOLDOWNS, (now - quotas.MEMORY,)))

    def _recall(self, db: sqlite3.Connection, claim: Claim, now: float) -> None:
        """Begin a day or month with what history.db has of it: its limit is new, or quotas.db was lost."""
        for period in quotas.periods(claim, now):
            key = (claim.scope, *period)
            if not db.execute("SELECT 1 FROM total WHERE scope = ? AND start = ? AND until = ?", key).fetchone():
                db.execute(quotas.BEGIN, (*key, *self._recalled(*period, claim.scope)))


def history_of(path: Path) -> Recall:
    """Return a function that sums up a period and scope in history.db: requests, tokens, USD."""

    def recall(start: float, end: float, scope: str) -> Sequence[float]:
        kind, _, name = scope.partition("/")
        sums, what = attempts.SUMS, scope
        if kind in ("gateway", "key"):
            sums, what = attempts.SUMS_OF_KEY, json.dumps({"key": name})[1:-1]
        with suppress(sqlite3.Error):  # callers wait: at midnight there is nothing to find anyway
            return (read(path, sums, (start, end, what), patience=0.05) or [(0, 0, 0)])[0]
        return (0, 0, 0)

    return recall


def _by_key(rows: Iterable[Any]) -> dict[str, Cooldown]:
    return {key: Cooldown(*row) for key, *row in rows}
