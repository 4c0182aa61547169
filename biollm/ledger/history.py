"""Rolls the attempts of history.db up into one row per hour, account, model, tags, outcome and reason.

Plain SQL has no percentiles, and a million attempts take seconds to sort; a row holds its latencies as a histogram
with buckets 2% wide instead: the bucket of each answer, two bytes, so that histograms add up by standing in a line
and are counted at C's speed. Rows are added to, by the attempts written since (`rolled.last`), so one that comes late
to an hour long past is counted like any other. Made on demand: nothing is rolled up before somebody asks.
"""

from __future__ import annotations

import math
import re
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from biollm.errors import UsageError
from biollm.ledger.records import Record
from biollm.ledger.sqlite import read
from biollm.ledger.store import Ledger, fill_in

EXACT = 200_000  # attempts up to which percentiles are taken from the attempts themselves
_CHUNK = 50_000  # attempts rolled up in one transaction: writers wait some 0.3 s at most, callers never
_TAIL = 5_000  # attempts not rolled up that are rather read than written
_LOOK_BACK = 1_000  # attempts before a chunk in which a request may have begun
_SMALLEST, _WIDTH = 0.01, math.log(1.02)  # ms; of a bucket, so that its middle is within 1% of everything in it

SCHEMA = """
CREATE TABLE IF NOT EXISTS rollup (
    hour INTEGER, provider TEXT, account TEXT, model TEXT, tags TEXT, outcome TEXT, why TEXT, attempts INTEGER,
    requests INTEGER, prompt INTEGER, completion INTEGER, cost REAL, ms BLOB, ttft BLOB, unpriced INTEGER DEFAULT 0,
    unpriced_prompt INTEGER DEFAULT 0, unpriced_completion INTEGER DEFAULT 0, estimated INTEGER DEFAULT 0,
    PRIMARY KEY (hour, provider, account, model, tags, outcome, why)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rolled (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER, pruned REAL);
INSERT OR IGNORE INTO rolled (one, last, pruned) VALUES (1, 0, 0);
"""
_CELL = (
    "hour, provider, account, model, tags, outcome, why, attempts, requests, prompt, completion, cost, ms, ttft,"
    " unpriced, unpriced_prompt, unpriced_completion, estimated"
)
_READ = (
    'SELECT at, request, provider, account, model, outcome, "order", reason, status, ms, ttft_ms, prompt_tokens,'
    " completion_tokens, cost_usd, tags, estimated FROM attempt WHERE "
)


_ADD = (
    "UPDATE rollup SET attempts = attempts + ?, requests = requests + ?, prompt = prompt + ?,"
    " completion = completion + ?, cost = cost + ?, ms = CAST(ms || ? AS BLOB), ttft = CAST(ttft || ? AS BLOB),"
    " unpriced = unpriced + ?, unpriced_prompt = unpriced_prompt + ?, unpriced_completion = unpriced_completion + ?,"
    " estimated = estimated + ?"
    " WHERE hour = ? AND provider = ? AND account = ? AND model = ? AND tags = ? AND outcome = ? AND why = ?"
)


_SUM = (  # blobs joined by SQLite: ten times faster than rows fetched and joined here
    "SELECT hour / ? * ?, provider, account, model, tags, outcome, why, sum(attempts), sum(requests), sum(prompt),"
    " sum(completion), sum(cost), CAST(group_concat(ms, '') AS BLOB), CAST(group_concat(ttft, '') AS BLOB),"
    " sum(unpriced), sum(unpriced_prompt), sum(unpriced_completion), sum(estimated)"
    " FROM rollup WHERE hour >= ? AND hour < ? GROUP BY 1, 2, 3, 4, 5, 6, 7"
)


class Key(NamedTuple):
    """What a cell counts. `why`: of a failure its kind; of an answer by a later rung, why the first gave none."""

    hour: int  # since the epoch
    provider: str
    account: str
    model: str
    tags: str  # JSON
    outcome: str
    why: str


@dataclass(slots=True)
class Cell:
    """Sums of attempts. `requests` began here; `ms` and `ttft` are of answers, in milliseconds or as buckets.

    Those in `unpriced` have tokens whose price is unknown; of those in `estimated` the provider stated no tokens.
    """

    attempts: int = 0
    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cost: float = 0.0
    ms: Sequence[float] = ()
    ttft: Sequence[float] = ()
    unpriced: int = 0
    unpriced_prompt: int = 0
    unpriced_completion: int = 0
    estimated: int = 0


def bucket(ms: float) -> int:
    """Return the number of the bucket that `ms` falls in."""
    return math.ceil(math.log(max(ms, _SMALLEST) / _SMALLEST) / _WIDTH)


def middle(number: float) -> float:
    """Return the milliseconds that a bucket stands for."""
    return _SMALLEST * math.exp((number - 0.5) * _WIDTH)


def kind(outcome: str, status: int | None, reason: str) -> str:
    """Return in a word or two why an attempt gave no answer: few enough to count by."""
    if status:
        return f"HTTP {status}"
    for word, sign in _KINDS.get(outcome, ()):
        if re.search(sign, reason):
            return word
    return outcome


_KINDS = {
    "limited": (("quota", "used by|is used up"), ("cooling", "")),
    "skipped": (("no key", "^no key"), ("no server", "^no server"), ("unfit", "")),
    "failed": (
        ("timeout", r"no answer (with)?in|no content within|in time"),
        ("connection", "connection|resolve|certificate|TLS|reached|hung up|proxy"),
        ("bad answer", ""),
    ),
}


def fold(rows: Iterable[Any], seen: dict[str, str], *, exact: bool, grain: int = 1) -> dict[Key, Cell]:
    """Sum up attempts, each request's in the order in which they were made.

    Args:
        rows: As `_READ` gives them.
        seen: Request -> why its first attempt failed; added to. What is not in it begins here.
        exact: Keep every latency instead of its bucket.
        grain: Hours that are summed up together.
    """
    cells: dict[Any, Cell] = {}
    code, span = "d" if exact else "H", 3600 * grain
    for row in rows:
        at, request, provider, account, model, outcome, order, reason, status, ms, ttft, sent, got, cost = row[:14]
        tags, estimated = row[14:]
        before, why = seen.get(request), _why(outcome, order > 1, status, reason)
        if before is None:
            seen[request] = "" if outcome == "ok" else why
        elif outcome == "ok" and order > 1:
            why = why or before
        key = (int(at // span) * grain, provider, account, model, tags, outcome, why)
        if (cell := cells.get(key)) is None:
            cell = cells[key] = Cell(ms=array(code), ttft=array(code))
        cell.attempts += 1
        cell.requests += before is None
        cell.prompt += sent
        cell.completion += got
        if cost is not None:
            cell.cost += cost
        elif sent or got:
            cell.unpriced += 1
            cell.unpriced_prompt += sent
            cell.unpriced_completion += got
        cell.estimated += estimated
        if outcome == "ok":
            cell.ms.append(ms if exact else bucket(ms))  # type: ignore[attr-defined] # the array made above
            if ttft is not None:
                cell.ttft.append(ttft if exact else bucket(ttft))  # type: ignore[attr-defined]
    return {Key(*key): cell for key, cell in cells.items()}


@lru_cache(maxsize=4096)
def _why(outcome: str, later: bool, status: int | None, reason: str) -> str:
    """Return the kind of a failure; of an answer by a later rung, what its record says of the first rung."""
    if outcome != "ok":
        return kind(outcome, status, reason)
    if not later or not reason:
        return ""
    said, _, text = reason.partition(": ")  # "failed: HTTP 429: ..."
    code = re.match(r"HTTP (\d{3})", text)
    return kind(said, int(code[1]) if code and said == "failed" else None, text)


def cells(
    ledger: Ledger, since: float, until: float, exact: int = EXACT, grain: int = 1
) -> tuple[list[tuple[Key, Cell]], bool]:
    """Return the sums of `since` <= at < `until`, and whether their latencies are exact.

    They are, when the attempts are at most `exact` and none of the time has been pruned; of pruned time, whole
    hours are counted. `grain` hours are summed up together.
    """
    with ledger.look() as db:
        if db is None:
            return [], True
        last, pruned = _rolled(db)
        window = (since, until)
        counted = "SELECT count(*) FROM (SELECT 1 FROM attempt WHERE at >= ? AND at < ? LIMIT ?)"
        few = db.execute(counted, (*window, exact + 1)).fetchone()[0] <= exact
        if few and since >= pruned:
            rows = db.execute(f"{_READ} at >= ? AND at < ? ORDER BY at, id", window)
            return list(fold(rows, {}, exact=True, grain=grain).items()), True
        behind = db.execute("SELECT coalesce(max(id), 0) FROM attempt").fetchone()[0] - last > _TAIL
    if behind:
        with suppress(sqlite3.Error, OSError):  # a folder that only its owner may write: read it all, then
            roll(ledger)
    with ledger.look() as db:
        assert db is not None  # noqa: S101 # it was there
        return list(_summed(db, since, until, grain)), False


def _summed(db: sqlite3.Connection, since: float, until: float, grain: int) -> Iterator[tuple[Key, Cell]]:
    """Yield whole hours from the roll-up, and what it does not have, or has only with more, from the attempts."""
    last, pruned = _rolled(db)
    first, end = math.ceil(since / 3600), math.floor(min(until, 1e11) / 3600)
    if since < pruned:
        first = math.floor(since / 3600)
    if first < end and (last or pruned):
        for row in db.execute(_SUM, (grain, grain, first, end)):
            blobs = (memoryview(blob).cast("H") for blob in row[12:14])
            yield Key(*row[:7]), Cell(*row[7:12], *blobs, *row[14:])
    if first >= end:
        first = end = math.ceil(until / 3600)
    tail = db.execute(f"{_READ} id > ? AND at >= ? AND at < ? ORDER BY id", (last, first * 3600, end * 3600))
    yield from fold(tail, _before(db, last), exact=False, grain=grain).items()
    sides = ((since, min(first * 3600, until)), (end * 3600, until))
    rows = chain.from_iterable(db.execute(f"{_READ} at >= ? AND at < ? ORDER BY at, id", side) for side in sides)
    yield from fold(rows, {}, exact=False, grain=grain).items()


def _before(db: sqlite3.Connection, last: int) -> dict[str, str]:
    """Return the requests that may go on after attempt `last`, and why their first attempt failed."""
    seen: dict[str, str] = {}
    fold(db.execute(f"{_READ} id > ? AND id <= ? ORDER BY id", (last - _LOOK_BACK, last)), seen, exact=False)
    return seen


def roll(ledger: Ledger) -> None:
    """Roll up every attempt that is not yet; in pieces, between which others can write."""
    more = [True]
    while more[-1]:
        ledger.change(lambda db: more.append(_roll_some(db)), SCHEMA)


def _roll_some(db: sqlite3.Connection) -> bool:
    last, _ = _rolled(db)
    until = db.execute(
        "SELECT max(id), count(*) FROM (SELECT id FROM attempt WHERE id > ? ORDER BY id LIMIT ?)", (last, _CHUNK)
    ).fetchone()
    if not until[1]:
        return False
    rows = db.execute(f"{_READ} id > ? AND id <= ? ORDER BY id", (last, until[0]))
    for key, cell in fold(rows, _before(db, last), exact=False).items():
        sums = (cell.attempts, cell.requests, cell.prompt, cell.completion, cell.cost)
        blobs = (bytes(cell.ms), bytes(cell.ttft))  # type: ignore[arg-type]
        more = (cell.unpriced, cell.unpriced_prompt, cell.unpriced_completion, cell.estimated)
        if not db.execute(_ADD, (*sums, *blobs, *more, *key)).rowcount:
            values = (*key, *sums, *blobs, *more)
            db.execute(f"INSERT INTO rollup ({_CELL}) VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
    db.execute("UPDATE rolled SET last = ?", (until[0],))
    return until[1] == _CHUNK


def _rolled(db: sqlite3.Connection) -> tuple[int, float]:
    """Return the last attempt rolled up, and the time before which attempts have been removed."""
    made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rolled'").fetchone()
    return db.execute("SELECT last, pruned FROM rolled").fetchone() if made else (0, 0.0)


def prune(ledger: Ledger, before: float) -> int:
    """Remove the attempts before that time; the sums of their hours stay. Return how many they were."""
    roll(ledger)
    removed = [0]

    def work(db: sqlite3.Connection) -> None:
        while _roll_some(db):  # what came since
            pass
        removed[0] = db.execute("DELETE FROM attempt WHERE at < ?", (before,)).rowcount
        db.execute("UPDATE rolled SET pruned = max(pruned, ?)", (before,))
        db.execute("UPDATE rolled SET last = (SELECT coalesce(max(id), 0) FROM attempt)")  # ids may come again

    ledger.change(work, SCHEMA)
    return removed[0]


def merge(ledger: Ledger, file: Path) -> int:
    """Add the attempts of another host's history.db that are not here yet; return how many they were.

    Those of a time that has been pruned here are left out: nobody could tell whether they were counted.

    Raises:
        UsageError: The file is not one.
    """
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file.", hint="Name the history.db of another host.")
    names = [column.name for column in fields(Record)]
    columns = ", ".join(f'"{name}"' for name in names)
    try:
        rows = read(file, f"SELECT {columns} FROM attempt ORDER BY at, id", patience=2, prepare=fill_in)  # noqa: S608
    except sqlite3.Error as error:
        raise UsageError(f"{file}: {error}.", hint="Name the history.db of another host.") from error
    at, request, deployment = (names.index(name) for name in ("at", "request", "deployment"))
    added = [0]

    def work(db: sqlite3.Connection) -> None:
        _, pruned = _rolled(db)
        known = "SELECT 1 FROM attempt WHERE at = ? AND request = ? AND deployment = ?"
        new = [
            row
            for row in rows
            if row[at] >= pruned and not db.execute(known, (row[at], row[request], row[deployment])).fetchone()
        ]
        marks = ", ".join("?" * len(names))
        db.executemany(f"INSERT INTO attempt ({columns}) VALUES ({marks})", new)  # noqa: S608
        added[0] = len(new)

    ledger.change(work, SCHEMA)
    return added[0]
