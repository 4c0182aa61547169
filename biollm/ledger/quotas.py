"""The tables of quotas.db, and how limits are counted: windows request by request, days and months as sums."""

# ruff: noqa: S608 # what is put into SQL are names of columns; values are parameters
from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from biollm.config import Limit
    from biollm.ledger.records import Claim

Query = Callable[[str, Sequence[object]], list[Any]]
# SQLite 3.26 (RHEL 8) must do: no RETURNING, no STRICT. `tokens` is NULL until the attempt is finished; long
# after `at`, that marks a process that died. `reserved` holds what requests under way are expected to use.
SCHEMA = """
CREATE TABLE IF NOT EXISTS sent (id INTEGER PRIMARY KEY, scope TEXT NOT NULL, at REAL NOT NULL, tokens, usd);
CREATE INDEX IF NOT EXISTS sent_scope_at ON sent (scope, at);
CREATE TABLE IF NOT EXISTS reserved (id INTEGER PRIMARY KEY, scope TEXT NOT NULL, at REAL NOT NULL, tokens, usd);
CREATE INDEX IF NOT EXISTS reserved_scope_at ON reserved (scope, at);
CREATE TABLE IF NOT EXISTS total (
    scope TEXT NOT NULL, start REAL NOT NULL, until REAL NOT NULL,
    requests DEFAULT 0, tokens DEFAULT 0, usd DEFAULT 0, PRIMARY KEY (scope, start, until)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cooldown (
    key TEXT PRIMARY KEY, until REAL NOT NULL, reason TEXT NOT NULL, kind TEXT NOT NULL, stated INTEGER NOT NULL,
    times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS token_ratio (model TEXT PRIMARY KEY, ratio REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS origin (digest TEXT PRIMARY KEY, model TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
"""
BEGIN = "INSERT INTO total (scope, start, until, requests, tokens, usd) VALUES (?, ?, ?, ?, ?, ?)"
_LEAST = {"requests": 1.0, "tokens": 1.0, "usd": 1e-6}  # that must still fit
_SOON = 1.0  # seconds until a request is tried again that only those in flight keep out
_DAY = 86400.0
COOLDOWNS = "SELECT key, until, reason, kind, stated, times FROM cooldown WHERE until > ?"
_RECOVER = "DELETE FROM cooldown WHERE key = ? AND until <= ? AND (until <= ? OR NOT stated)"
MEMORY = 86400.0  # seconds for which a cooldown that ended is still a step of the ladder
_TOGETHER = 1.0  # seconds: failures so near each other are one step, if the first step is no cooldown
FARTHEST = 32 * 86400.0  # seconds; no cooldown is longer


class Cooldown(NamedTuple):
    """Why and until when a key may not be used."""

    until: float  # epoch seconds; once it has passed, the cooldown only counts as a step of the ladder
    reason: str
    kind: str = ""
    stated: bool = False  # the provider named the time; else it is an estimate, which a success ends
    times: int = 1  # consecutive cooldowns of this kind without a success

    def step(self, ladder: Sequence[float]) -> float:
        """Return this cooldown's seconds where the provider named none."""
        return ladder[min(self.times, len(ladder)) - 1]


class Block(NamedTuple):
    """What keeps a request back, and until when, in epoch seconds."""

    until: float
    reason: str
    key: str  # on cooldown; "scope:" and the scope for a limit
    shut: bool = False  # a limit without room for any request


def next_cooldown(
    before: Cooldown | None, now: float, reason: str, kind: str, seconds: float | None, ladder: Sequence[float]
) -> Cooldown:
    """Return the cooldown after one more failure; requests that fail together are one step of `ladder`."""
    row = before.times if before and before.kind == kind else 0
    near = _TOGETHER if before and row and before.step(ladder) == 0 else 0.0
    times = row if before and row and before.until + near > now else row + 1
    made = Cooldown(now, reason, kind, seconds is not None, times)
    made = made._replace(until=now + (made.step(ladder) if seconds is None else seconds))
    longer = before is not None and before.until > made.until and (before.stated or not made.stated)
    return before if before and longer else made


def cool(
    db: sqlite3.Connection, now: float, key: str, reason: str, kind: str, seconds: float | None, ladder: Sequence[float]
) -> Cooldown:
    """Put `key` on cooldown, for at least as long as it already is."""
    found = db.execute(f"{COOLDOWNS} AND key = ?", (now - MEMORY, key)).fetchone()
    made = next_cooldown(Cooldown(*found[1:]) if found else None, now, reason, kind, seconds, ladder)
    db.execute(
        "INSERT OR REPLACE INTO cooldown (key, until, reason, kind, stated, times) VALUES (?, ?, ?, ?, ?, ?)",
        (key, *made),
    )
    return made


def recover(db: sqlite3.Connection, now: float, key: str, known: float) -> None:
    """End the cooldown of `key` unless the provider stated it, or it ends later than in `known` seconds: a new one."""
    db.execute(_RECOVER, (key, now + known, now))


def learn(db: sqlite3.Connection, _: float, model: str, ratio: float) -> None:
    """Keep how many tokens a model counts where one was estimated."""
    db.execute("INSERT OR REPLACE INTO token_ratio VALUES (?, ?)", (model, ratio))


def note(db: sqlite3.Connection, now: float, digests: Sequence[str], model: str) -> None:
    """Keep which model gave what has these digests."""
    db.executemany("INSERT OR REPLACE INTO origin VALUES (?, ?, ?)", [(digest, model, now) for digest in digests])


def reserve(db: sqlite3.Connection, now: float, claim: Claim, reservation: int) -> list[Block]:
    """Count the request of `claim`, or return what blocks it."""
    marks = ", ".join("?" * len(claim.cooling))
    rows = db.execute(f"{COOLDOWNS} AND key IN ({marks})", (now, *claim.cooling)).fetchall()
    blocks = [Block(until, reason, key) for key, until, reason, *_ in rows]
    blocks += [limited(claim, limit, *found) for limit in claim.limits if (found := full(db, claim, limit, now))]
    if not blocks:
        grant(db, now, claim, reservation)
    return blocks


def limited(claim: Claim, limit: Limit, until: float, shut: bool) -> Block:
    """Return the block of a limit without room: `shut` for any request, else for this one or with those in flight."""
    return Block(until, f"{limit} {'used' if shut else 'used or reserved'} by {claim.scope}", claim.limited_by, shut)


def release(db: sqlite3.Connection, at: float, scope: str, reservation: int) -> None:
    """Take back a request that was counted and then not sent."""
    for table in ("sent", "reserved"):
        db.execute(f"DELETE FROM {table} WHERE id = ?", (reservation,))
    db.execute(
        "UPDATE total SET requests = requests - 1 WHERE scope = ? AND ? BETWEEN start AND until - 1e-6", (scope, at)
    )


def grant(db: sqlite3.Connection, at: float, claim: Claim, reservation: int) -> None:
    """Count a request that may be sent; only once, also where `reserve` counted it after its caller had decided alone."""
    if claim.limits:
        sql = "INSERT OR IGNORE INTO sent (id, scope, at) VALUES (?, ?, ?)"
        if not db.execute(sql, (reservation, claim.scope, at)).rowcount:
            return
    if claim.tokens or claim.usd:
        values = (reservation, claim.scope, at, claim.tokens, claim.usd)
        db.execute("INSERT INTO reserved (id, scope, at, tokens, usd) VALUES (?, ?, ?, ?, ?)", values)
    for start, until in periods(claim, at):
        db.execute(
            "INSERT INTO total (scope, start, until, requests) VALUES (?, ?, ?, 1)"
            " ON CONFLICT (scope, start, until) DO UPDATE SET requests = requests + 1",
            (claim.scope, start, until),
        )


def finish(db: sqlite3.Connection, at: float, scope: str, reservation: int, used: tuple[float, float]) -> None:
    """Add the (tokens, USD) that a request has used, in place of what was reserved for it."""
    db.execute("DELETE FROM reserved WHERE id = ?", (reservation,))
    db.execute("UPDATE sent SET tokens = ?, usd = ? WHERE id = ?", (*used, reservation))
    db.execute(  # in the periods in which it was sent
        "UPDATE total SET tokens = tokens + ?, usd = usd + ? WHERE scope = ?"
        " AND coalesce((SELECT at FROM sent WHERE id = ?), ?) BETWEEN start AND until - 1e-6",
        (*used, scope, reservation, at),
    )


def prune(db: sqlite3.Connection, now: float) -> None:
    """Remove what no limit includes any more (windows are an hour at most), and rows of a clock that ran ahead.

    The reservation of a process that died counts as used: the request was probably sent.
    """
    lost = "SELECT id, scope, at, tokens, usd FROM reserved WHERE abs(at - ?) > ?"
    for reservation, scope, at, *used in db.execute(lost, (now, _DAY)).fetchall():
        finish(db, at, scope, reservation, (used[0], used[1]))
    db.execute("DELETE FROM sent WHERE abs(at - ?) > 3660", (now,))
    db.execute("DELETE FROM total WHERE until < ?", (now - _DAY,))  # for attempts still under way
    db.execute("DELETE FROM origin WHERE abs(at - ?) > ?", (now, _DAY))
    db.execute("DELETE FROM cooldown WHERE until <= ? OR until > ?", (now - MEMORY, now + FARTHEST))


def used_of(query: Query, scope: str, limit: Limit, now: float) -> tuple[float, float | None]:
    """Return how much of `limit` is used or reserved, and when its period ends or its oldest request leaves."""
    used, until = _settled(query, scope, limit, now)
    return used + _reserved(query, scope, limit, now), until


def _settled(query: Query, scope: str, limit: Limit, now: float) -> tuple[float, float | None]:
    if not limit.rolling:
        start, until = period(limit, now)
        sql = f"SELECT {limit.kind} FROM total WHERE scope = ? AND start = ? AND until = ?"
        rows = query(sql, (scope, start, until))
        return (rows[0][0] if rows else 0.0), until
    value = "1" if limit.kind == "requests" else limit.kind
    sql = f"SELECT total({value}), min(at) FROM sent WHERE scope = ? AND at > ?"
    ((used, oldest),) = query(sql, (scope, now - window(limit))) or [(0.0, None)]
    return used, None if oldest is None else oldest + window(limit)


def _reserved(query: Query, scope: str, limit: Limit, now: float) -> float:
    if limit.kind == "requests":
        return 0.0
    since = now - window(limit) if limit.rolling else period(limit, now)[0]
    sql = f"SELECT total({limit.kind}) FROM reserved WHERE scope = ? AND at > ?"
    rows = query(sql, (scope, since))  # none where no process of this version has written yet
    return rows[0][0] if rows else 0.0


def excess(limit: Limit, used: float, claim: Claim | None = None) -> float:
    """Return by how much a request would exceed `limit`; it has room unless that is above 0.

    A request counts what `claim` is expected to use, else the least possible; at most the whole limit.
    """
    expected = {"requests": 0.0, "tokens": claim.tokens, "usd": claim.usd}[limit.kind] if claim else 0.0
    return used + min(max(expected, _LEAST[limit.kind]), limit.amount) - limit.amount


def full(db: sqlite3.Connection, claim: Claim, limit: Limit, now: float) -> tuple[float, bool] | None:
    """Return when `limit` has room for `claim` again, and whether it has none for any request; None if it has now."""

    def query(sql: str, values: Sequence[object]) -> list[Any]:
        return db.execute(sql, values).fetchall()

    used, until = _settled(query, claim.scope, limit, now)
    over = excess(limit, used, claim)
    if over + _reserved(query, claim.scope, limit, now) <= 0:
        return None
    if over <= 0:
        return now + _SOON, False
    shut = excess(limit, used) > 0
    over = excess(limit, used) if shut else over
    if limit.rolling:
        value = "1" if limit.kind == "requests" else f"coalesce({limit.kind}, 0)"
        sql = f"SELECT at, {value} FROM sent WHERE scope = ? AND at > ? ORDER BY at"
        for at, count in query(sql, (claim.scope, now - window(limit))):
            over -= count
            if over <= 0:
                return at + window(limit), shut
    return (now + _SOON if until is None else until), shut


def window(limit: Limit) -> float:
    """Return the seconds that a request counts in a rolling window: up to a second more than the limit says.

    The server counts arrivals. A slow one (name look-up, TLS) and a quick later one are closer together there.
    """
    return limit.seconds + min(1.0, limit.seconds / 10)


def periods(claim: Claim, now: float) -> set[tuple[float, float]]:
    """Return start and end of each day or month in the limits of `claim`."""
    return {period(limit, now) for limit in claim.limits if not limit.rolling}


def period(limit: Limit, now: float) -> tuple[float, float]:
    """Return start and end of the calendar day or month around `now`, as `limit.resets` has it."""
    return _period(limit.unit, limit.resets or "00:00", now // 60 * 60)  # `resets` is in whole minutes


@lru_cache
def _period(unit: str, resets: str, now: float) -> tuple[float, float]:
    clock, _, zone = resets.partition(" ")
    hour, minute = (int(part) for part in clock.split(":"))
    tz = ZoneInfo(zone) if zone else UTC

    def begin(day: date) -> float:
        return datetime.combine(day, time_of_day(hour, minute), tz).timestamp()

    def step(day: date, days: int) -> date:
        if unit == "day":
            return day + timedelta(days)
        return (day + timedelta(31 if days > 0 else -1)).replace(day=1)

    today = datetime.fromtimestamp(now, tz).date()
    first = today if unit == "day" else today.replace(day=1)
    if begin(first) > now:
        first = step(first, -1)
    return begin(first), begin(step(first, 1))
