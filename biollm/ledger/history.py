"""Sums the attempts of history.db, and rolls them up into one row per hour, account, model, tags, outcome and reason.

SQL has no percentiles, and a million attempts take seconds to sort. A roll-up row therefore holds its latencies as a
histogram with buckets 2% wide: the bucket of each answer, two bytes, so that histograms are added by concatenation
and counted in C. (Measured over a million attempts: one row per bucket, grouped by SQLite, takes four times as long.)
Rows grow by the attempts written since (`rolled.last`), so late ones count like any other. Rolled up on demand.
"""

# ruff: noqa: S608 # what is put into SQL are names of columns; values are parameters
from __future__ import annotations

import math
import re
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from biollm.errors import UsageError
from biollm.ledger import attempts
from biollm.ledger.sqlite import read
from biollm.ledger.store import Ledger

EXACT = 200_000  # attempts up to which percentiles are taken from the attempts themselves
_CHUNK = 50_000  # attempts rolled up in one transaction: writers wait some 0.3 s at most, callers never
_TAIL = 5_000  # attempts not rolled up yet that are read rather than rolled up
_LOOK_BACK = 1_000  # attempts before a chunk in which a request may have begun
_SMALLEST, _WIDTH = 0.01, math.log(1.02)  # ms; of a bucket, so that its middle is within 1% of everything in it


class Key(NamedTuple):
    """What a cell counts. `why`: a failure's kind; or, of an answer by a later candidate, why the first gave none."""

    hour: int  # since the epoch
    provider: str
    account: str
    model: str
    tags: str  # JSON
    outcome: str
    why: str


@dataclass(slots=True)
class Cell:
    """Sums of attempts."""

    attempts: int = 0
    requests: int = 0  # those that began here
    prompt: int = 0
    completion: int = 0
    cost: float = 0.0  # in USD
    unpriced: int = 0  # attempts whose tokens have no known price
    unpriced_prompt: int = 0
    unpriced_completion: int = 0
    estimated: int = 0  # attempts whose provider reported no tokens
    # ms, ttft: latencies of the answers, in milliseconds or as buckets
    ms: Sequence[float] = field(default_factory=lambda: array("H"))
    ttft: Sequence[float] = field(default_factory=lambda: array("H"))


class _Attempt(NamedTuple):
    at: float
    request: str
    provider: str
    account: str
    model: str
    outcome: str
    order: int
    reason: str
    status: int | None
    ms: float
    ttft_ms: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    tags: str
    estimated: int


SCHEMA = """
CREATE TABLE IF NOT EXISTS rollup (
    hour INTEGER, provider TEXT, account TEXT, model TEXT, tags TEXT, outcome TEXT, why TEXT, attempts INTEGER,
    requests INTEGER, prompt INTEGER, completion INTEGER, cost REAL, ms BLOB, ttft BLOB, unpriced INTEGER DEFAULT 0,
    unpriced_prompt INTEGER DEFAULT 0, unpriced_completion INTEGER DEFAULT 0, estimated INTEGER DEFAULT 0,
    PRIMARY KEY (hour, provider, account, model, tags, outcome, why)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rolled (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER, pruned REAL);
INSERT OR IGNORE INTO rolled (one, last, pruned) VALUES (1, 0, 0);
"""
_HISTOGRAMS = ["ms", "ttft"]
_COUNTS = [each.name for each in fields(Cell) if each.name not in _HISTOGRAMS]
_NAMES = [*Key._fields, *_COUNTS, *_HISTOGRAMS]
_ADDED = [f"{name} = {name} + excluded.{name}" for name in _COUNTS]
_JOINED = [f"{name} = CAST({name} || excluded.{name} AS BLOB)" for name in _HISTOGRAMS]
_READ = "SELECT {} FROM attempt WHERE outcome != 'skipped' AND ".format(
    ", ".join(f'"{name}"' for name in _Attempt._fields)
)
_ADD = "INSERT INTO rollup ({}) VALUES ({}) ON CONFLICT ({}) DO UPDATE SET {}".format(
    ", ".join(_NAMES), ", ".join("?" * len(_NAMES)), ", ".join(Key._fields), ", ".join(_ADDED + _JOINED)
)
_SUM = "SELECT hour / ? * ?, {}, {}, {} FROM rollup WHERE hour >= ? AND hour < ? GROUP BY 1, 2, 3, 4, 5, 6, 7".format(
    ", ".join(Key._fields[1:]),  # histograms joined by SQLite: ten times faster than rows fetched and joined here
    ", ".join(f"sum({name})" for name in _COUNTS),
    ", ".join(f"CAST(group_concat({name}, '') AS BLOB)" for name in _HISTOGRAMS),
)


def bucket(ms: float) -> int:
    """Return the number of the bucket that `ms` falls in."""
    return math.ceil(math.log(max(ms, _SMALLEST) / _SMALLEST) / _WIDTH)


def middle(number: float) -> float:
    """Return the milliseconds that a bucket stands for."""
    return _SMALLEST * math.exp((number - 0.5) * _WIDTH)


def latencies(groups: Iterable[Iterable[float]], exact: bool = False) -> Counter[float]:
    """Return how often each latency occurs, in ms, of the `ms` or `ttft` of cells."""
    counts = Counter[float](chain.from_iterable(groups))
    return counts if exact else Counter({middle(number): count for number, count in counts.items()})


def total(cells: Iterable[Cell]) -> Cell:
    """Return the sum of cells, without their latencies."""
    whole = Cell()
    for cell in cells:
        for name in _COUNTS:
            setattr(whole, name, getattr(whole, name) + getattr(cell, name))
    return whole


_KINDS = {
    "limited": (("quota", "used by|is used up"), ("cooling", "")),
    "skipped": (("no key", "^no key"), ("no server", "^no server"), ("unfit", "")),
    "failed": (
        ("timeout", r"no answer (with)?in|no content within|in time"),
        ("connection", "connection|resolve|certificate|TLS|reached|hung up|proxy"),
        ("bad answer", ""),
    ),
}


def _kind(outcome: str, status: int | None, reason: str) -> str:
    """Return in a word or two why an attempt gave no answer: few enough to count by."""
    if status:
        return f"HTTP {status}"
    return next((kind for kind, pattern in _KINDS.get(outcome, ()) if re.search(pattern, reason)), outcome)


@lru_cache(maxsize=4096)
def _why(outcome: str, later: bool, status: int | None, reason: str) -> str:
    """Return a failure's kind; for an answer by a later candidate, the kind that its record gives for the first."""
    if outcome != "ok":
        return _kind(outcome, status, reason)
    if not later or not reason:
        return ""
    first, _, text = reason.partition(": ")  # "failed: HTTP 429: ..."
    code = re.match(r"HTTP (\d{3})", text)
    return _kind(first, int(code[1]) if code and first == "failed" else None, text)


def _fold(rows: Iterable[Any], seen: dict[str, str], *, exact: bool, grain: int = 1) -> dict[Key, Cell]:
    """Sum up attempts, those of a request in the order in which they were made; `exact` keeps every latency.

    `seen` holds why the first attempt of a request failed, and is added to: a request that is not in it begins here.
    """
    cells: dict[Key, Cell] = {}
    for each in map(_Attempt._make, rows):
        before, why = seen.get(each.request), _why(each.outcome, each.order > 1, each.status, each.reason)
        if before is None:
            seen[each.request] = "" if each.outcome == "ok" else why
        elif each.outcome == "ok" and each.order > 1:
            why = why or before
        hour = int(each.at // (3600 * grain)) * grain
        key = Key(hour, each.provider, each.account, each.model, each.tags, each.outcome, why)
        if (cell := cells.get(key)) is None:
            cell = cells[key] = Cell(ms=array("d"), ttft=array("d")) if exact else Cell()
        cell.requests += before is None
        _add(cell, each, exact)
    return cells


def _add(cell: Cell, each: _Attempt, exact: bool) -> None:
    cell.attempts += 1
    cell.prompt += each.prompt_tokens
    cell.completion += each.completion_tokens
    cell.estimated += each.estimated
    if each.cost_usd is not None:
        cell.cost += each.cost_usd
    elif each.prompt_tokens or each.completion_tokens:
        cell.unpriced += 1
        cell.unpriced_prompt += each.prompt_tokens
        cell.unpriced_completion += each.completion_tokens
    if each.outcome == "ok":
        cell.ms.append(each.ms if exact else bucket(each.ms))  # type: ignore[attr-defined] # an array here
        if each.ttft_ms is not None:
            cell.ttft.append(each.ttft_ms if exact else bucket(each.ttft_ms))  # type: ignore[attr-defined]


def cells(
    ledger: Ledger, since: float, until: float, exact: int = EXACT, grain: int = 1
) -> tuple[list[tuple[Key, Cell]], bool]:
    """Return the sums of `since` <= at < `until` by `grain` hours, and whether their latencies are exact.

    They are if there are at most `exact` attempts and none was pruned; of pruned time, whole hours are counted.
    """
    with ledger.reading() as db:
        if db is None:
            return [], True
        last, pruned = _rolled(db)
        counted = "SELECT count(*) FROM (SELECT 1 FROM attempt WHERE at >= ? AND at < ? LIMIT ?)"
        few = db.execute(counted, (since, until, exact + 1)).fetchone()[0] <= exact
        if few and since >= pruned:
            rows = db.execute(f"{_READ} at >= ? AND at < ? ORDER BY at, id", (since, until))
            return list(_fold(rows, {}, exact=True, grain=grain).items()), True
        behind = db.execute("SELECT coalesce(max(id), 0) FROM attempt").fetchone()[0] - last > _TAIL
    if behind:
        with suppress(sqlite3.Error, OSError):  # a folder that only its owner may write: then all is read
            roll(ledger)
    with ledger.reading() as db:
        assert db is not None  # noqa: S101 # it was there
        return list(_summed(db, since, until, grain)), False


def marked(ledger: Ledger, since: float, until: float, marks: Mapping[str, str]) -> list[tuple[Key, Cell]]:
    """Return the sums of the attempts, with the mark of each request, or "(none)", in place of its tags; latencies are exact."""
    with ledger.reading() as db:
        if db is None:
            return []
        rows = map(_Attempt._make, db.execute(f"{_READ} at >= ? AND at < ? ORDER BY at, id", (since, until)))
        marked = (row._replace(tags=marks.get(row.request, "(none)")) for row in rows)
        return list(_fold(marked, {}, exact=True, grain=1 << 30).items())


def _summed(db: sqlite3.Connection, since: float, until: float, grain: int) -> Iterator[tuple[Key, Cell]]:
    """Yield whole hours from the roll-up; from the attempts what is not rolled up, and the parts of hours at both ends."""
    last, pruned = _rolled(db)
    first, end = math.ceil(since / 3600), math.floor(min(until, 1e11) / 3600)
    if since < pruned:
        first = math.floor(since / 3600)
    if pruned > end * 3600:  # in the last hour
        end = math.ceil(until / 3600)
    if first < end and (last or pruned):
        for row in db.execute(_SUM, (grain, grain, first, end)):
            yield Key(*row[:7]), Cell(*row[7:-2], *(memoryview(blob).cast("H") for blob in row[-2:]))
    if first >= end:
        first = end = math.ceil(until / 3600)
    tail = db.execute(f"{_READ} id > ? AND at >= ? AND at < ? ORDER BY id", (last, first * 3600, end * 3600))
    yield from _fold(tail, _before(db, last), exact=False, grain=grain).items()
    sides = ((since, min(first * 3600, until)), (end * 3600, until))
    rows = chain.from_iterable(db.execute(f"{_READ} at >= ? AND at < ? ORDER BY at, id", side) for side in sides)
    yield from _fold(rows, {}, exact=False, grain=grain).items()


def _before(db: sqlite3.Connection, last: int) -> dict[str, str]:
    """Return the requests that may continue after attempt `last`, and why their first attempt failed."""
    seen: dict[str, str] = {}
    _fold(db.execute(f"{_READ} id > ? AND id <= ? ORDER BY id", (last - _LOOK_BACK, last)), seen, exact=False)
    return seen


def roll(ledger: Ledger) -> None:
    """Roll up every attempt that is not yet, in chunks between which others can write."""
    more = [True]
    while more[-1]:
        ledger.change(lambda db: more.append(_roll_chunk(db)), SCHEMA)


def _roll_chunk(db: sqlite3.Connection) -> bool:
    last, _ = _rolled(db)
    chunk = "SELECT max(id), count(*) FROM (SELECT id FROM attempt WHERE id > ? ORDER BY id LIMIT ?)"
    until, count = db.execute(chunk, (last, _CHUNK)).fetchone()
    if not count:
        return False
    rows = db.execute(f"{_READ} id > ? AND id <= ? ORDER BY id", (last, until))
    for key, cell in _fold(rows, _before(db, last), exact=False).items():
        db.execute(_ADD, (*key, *(getattr(cell, name) for name in (*_COUNTS, *_HISTOGRAMS))))  # arrays as their bytes
    db.execute("UPDATE rolled SET last = ?", (until,))
    return count == _CHUNK


def _rolled(db: sqlite3.Connection) -> tuple[int, float]:
    """Return the last attempt rolled up, and the time before which attempts have been removed."""
    made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rolled'").fetchone()
    return db.execute("SELECT last, pruned FROM rolled").fetchone() if made else (0, 0.0)


def prune(ledger: Ledger, before: float) -> int:
    """Remove the attempts before that time and return their number; the sums of their hours stay."""
    roll(ledger)
    removed = 0

    def work(db: sqlite3.Connection) -> None:
        nonlocal removed
        while _roll_chunk(db):  # what was written since
            pass
        removed = db.execute("DELETE FROM attempt WHERE at < ?", (before,)).rowcount
        db.execute("UPDATE rolled SET pruned = max(pruned, ?)", (before,))
        db.execute("UPDATE rolled SET last = (SELECT coalesce(max(id), 0) FROM attempt)")  # ids are used again

    ledger.change(work, SCHEMA)
    return removed


def merge(ledger: Ledger, file: Path) -> int:
    """Add the attempts of another host's history.db that are not here yet, and return their number.

    Those of a time that has been pruned here are left out: they may have been counted.
    """
    hint = "Name the history.db of another host."
    if not file.is_file():
        raise UsageError(f"{file}: no such file.", hint=hint)
    everything = f"SELECT {attempts.COLUMNS} FROM attempt ORDER BY at, id"
    try:
        rows = read(file, everything, patience=2, prepare=attempts.fill_in)
    except sqlite3.Error as error:
        raise UsageError(f"{file}: {error}.", hint=hint) from error
    at, request, deployment = map(attempts.NAMES.index, ("at", "request", "deployment"))
    new: list[Any] = []

    def work(db: sqlite3.Connection) -> None:
        _, pruned = _rolled(db)
        known = "SELECT 1 FROM attempt WHERE at = ? AND request = ? AND deployment = ?"
        later = [row for row in rows if row[at] >= pruned]
        new[:] = [row for row in later if not db.execute(known, (row[at], row[request], row[deployment])).fetchone()]
        db.executemany(attempts.ADD, new)

    ledger.change(work, SCHEMA)
    return len(new)
